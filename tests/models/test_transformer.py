"""Our BERT layers against LAVIS's, with padding and without: states, gradients, shared keys and values, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.utils import get_abs_path
from lavis.models.med import BertForMaskedLM, XBertLMHeadDecoder
from transformers import BertConfig

from lavis_mafa.models.transformer import Bert, BertWithHead, Grid, Layout, Reading, Tokens

WORDS, WIDTH, HEADS, LAYERS, FUSION, IMAGE_WIDTH, CPU = 60, 16, 2, 3, 1, 12, torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


def lavis(config_file: str, kind: Any, **more: Any) -> Any:
    config = BertConfig.from_json_file(get_abs_path(f"configs/models/{config_file}.json"))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.update({**sizes, **no_dropout, "vocab_size": WORDS, "encoder_width": IMAGE_WIDTH, **more})
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1) * parameter)
    return model.double()


def both(albef: bool = True) -> tuple[Any, BertWithHead]:
    """LAVIS's ALBEF text encoder, or BLIP's decoder, and ours with its weights."""
    theirs = lavis("med_config_albef", BertForMaskedLM, fusion_layer=FUSION) if albef else lavis("med_config", XBertLMHeadDecoder)
    ours = BertWithHead(Bert(WORDS, WIDTH, LAYERS, HEADS, IMAGE_WIDTH, FUSION if albef else 0)).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def texts_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(1, WORDS, mask.shape) * mask, mask


def close(found: torch.Tensor, wanted: torch.Tensor, **more: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8, **more)


def same_gradients(ours: Any, theirs: Any) -> None:
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
        if parameter.grad is not None:
            close(parameter.grad, wanted[name], msg=name)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, PAIRS, st.booleans())
def test_pairs_are_read_as_lavis_reads_them(lengths, pairs, causal):
    """Packed and padded; the first tokens alone; with gradients, those of the images too."""
    theirs, ours = both(albef=not causal)
    ids, mask = texts_of(lengths)
    image_index = torch.tensor([image % 3 for image, _ in pairs])
    text_index = torch.tensor([text % len(lengths) for _, text in pairs])
    images, copy = (torch.randn(3, 5, IMAGE_WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    images.requires_grad_(), copy.requires_grad_()
    wanted = theirs.bert(
        ids[text_index],
        attention_mask=mask[text_index].long(),
        encoder_hidden_states=copy[image_index],
        encoder_attention_mask=torch.ones(len(pairs), 5),
        return_dict=True,
        is_decoder=causal,
    ).last_hidden_state
    reading = Reading.of(mask, CPU, text_index, image_index, images=3)
    found = ours.bert.read(ids, reading, images=ours.bert.keys_values(images), causal=causal)
    close(found, wanted[mask[text_index]])

    weight = torch.randn_like(found)
    (ours.cls(found) * ours.cls(weight).detach()).sum().backward()
    (theirs.cls(wanted[mask[text_index]]) * theirs.cls(weight).detach()).sum().backward()
    same_gradients(ours, theirs)
    close(images.grad, copy.grad)
    if causal:
        return
    first = ours.bert.read(ids, reading, images=ours.bert.keys_values(images), chosen=reading.first)
    close(first, wanted[:, 0])
    padded = Reading.padded(mask[text_index], text_index, image_index)
    states = ours.bert(ours.bert.embeddings(padded.take(ids), padded.positions), padded.tokens, ours.bert.keys_values(images))
    close(states.view_as(wanted), wanted)
    close(ours.bert.read(ids, padded, images=ours.bert.keys_values(images), chosen=padded.first), wanted[:, 0])


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.data())
def test_chosen_tokens_are_those_of_all(lengths, data):
    _, ours = both()
    ids, mask = texts_of(lengths)
    reading = Reading.of(mask, CPU, torch.arange(len(lengths)), torch.zeros(len(lengths), dtype=torch.long), images=1)
    some = sorted(data.draw(st.sets(st.integers(0, len(reading.rows) - 1))))
    images = ours.bert.keys_values(torch.randn(1, 4, IMAGE_WIDTH, dtype=torch.float64))
    every = ours.bert.read(ids, reading, images=images)
    chosen = reading.tokens_at(torch.tensor(some, dtype=torch.long))
    found = ours.bert.read(ids, reading, images=images, chosen=chosen)
    close(found, every[some])
    found.sum().backward()  # nothing chosen has a graph too
    assert all(p.grad is not None for p in ours.bert.encoder.parameters())


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.data())
def test_texts_of_an_image_lie_side_by_side(lengths, data):
    """Each token has a place of its own, in a row of its image, and no row is wider than the room."""
    images = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    layout = Layout.of(lengths, images)
    assert [layout.image_of_row[row] for row in layout.row_of_text] == images
    tokens = layout.tokens(CPU, images=4)
    count, grid = sum(lengths), tokens.images
    places = grid.spread(torch.arange(1.0, count + 1)[:, None])
    assert sorted(places[places > 0].tolist()) == list(range(1, count + 1))
    close(grid.collect(places), torch.arange(1.0, count + 1)[:, None])
    room = max(*lengths, round(1.25 * count / len(set(images)))) if len(lengths) > 1 else lengths[0] * 1.25
    assert grid.width <= max(room, *lengths, 1)
    assert grid.rows <= len(lengths)


def test_an_images_keys_and_values_are_copied_for_no_row_that_is_the_images_own():
    layout = Layout.of([3, 3, 3, 3], [0, 1, 0, 1])
    assert layout.image_of_row == [0, 1] and layout.tokens(CPU, images=2).image_of_row is None
    assert layout.tokens(CPU, images=3).image_of_row.tolist() == [0, 1]


@pytest.mark.parametrize("causal", [False, True])
def test_the_attention_that_is_kept_is_the_one_that_was_used(causal):
    """As Grad-CAM needs it: with its graph, a row a text, the same states as without."""
    _, ours = both()
    ids, mask = texts_of([4, 4])
    every = torch.arange(2)
    images = ours.bert.keys_values(torch.randn(2, 5, IMAGE_WIDTH, dtype=torch.float64))
    reading = Reading.padded(mask, every, every)
    plain = ours.bert.read(ids, reading, images=images, causal=causal)
    layer = ours.bert.encoder.layer[FUSION]
    for attention in (layer.attention.self, layer.crossattention.self):
        attention.save_attention = True
    kept = ours.bert.read(ids, reading, images=images, causal=causal)
    close(kept, plain)
    cross, own = layer.crossattention.self.attention_map, layer.attention.self.attention_map
    assert cross.shape == (2, HEADS, 4, 5) and own.shape == (2, HEADS, 4, 4)
    close(cross.sum(dim=-1), torch.ones(2, HEADS, 4, dtype=torch.float64))
    assert (own.triu(1) == 0).all() == causal
    gradient = torch.autograd.grad(kept[0].sum(), cross)[0]
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0


def test_dropout_of_attention_has_the_right_share():
    """What is left of a mean of equal values: 0 to twice of it, on average the same."""
    bert = Bert(WORDS, 8, 1, 1, IMAGE_WIDTH, dropout=0.25).train()
    attention, query, value = bert.encoder.layer[0].attention.self, torch.zeros(4000, 1, 8), torch.ones(4000, 1, 8)
    torch.manual_seed(0)
    for kept in (False, True):  # torch's attention, and the one that Grad-CAM looks at
        attention.save_attention = kept
        out = attention.attend(query, query, value)
        assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_grid_that_is_full_needs_no_places():
    assert Grid.of([0, 0, 1, 1], 2, CPU).slots is None and Grid.of([0, 1, 1], 2, CPU).slots.tolist() == [0, 2, 3]
    assert isinstance(Layout.of([2, 2]).tokens(CPU), Tokens) and Layout.of([2, 2]).tokens(CPU).seen is None
