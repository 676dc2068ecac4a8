"""Our Q-Former against LAVIS's: each text by itself, padded, without anything shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_mafa.models.qformer import QueryBert, together
from lavis_mafa.models.transformer import BertWithHead, Grid, Reading
from reduced_blip2 import lavis_qformer, spread

WORDS, WIDTH, LAYERS, HEADS, IMAGE, EVERY, QUERIES, IMAGES, TEXTS, LENGTH = 30, 16, 4, 2, 12, 2, 3, 4, 5, 6
CPU = torch.device("cpu")
indices = st.lists(st.tuples(st.integers(0, IMAGES - 1), st.integers(0, TEXTS - 1)), min_size=1, max_size=9)
texts = st.lists(st.integers(2, LENGTH), min_size=TEXTS, max_size=TEXTS)
examples = settings(max_examples=25, deadline=None)


def pair(every: int = EVERY, dropout: float = 0.0) -> tuple[Any, Any]:
    """Ours and LAVIS's, of the same weights."""
    torch.manual_seed(0)
    theirs = lavis_qformer(WORDS, WIDTH, LAYERS, HEADS, IMAGE, every, QUERIES)
    spread(theirs)
    mine = BertWithHead(QueryBert(WORDS, WIDTH, LAYERS, HEADS, IMAGE, every, dropout))
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def given_tensors(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, images, ids and mask."""
    generator = torch.Generator().manual_seed(1)
    queries, images = torch.randn(1, QUERIES, WIDTH, generator=generator), torch.randn(IMAGES, 5, IMAGE, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, WORDS, mask.shape, generator=generator).masked_fill(~mask, 0)
    return queries.requires_grad_(), images.requires_grad_(), ids, mask


def columns(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    image_index, text_index = torch.tensor(pairs).T
    return image_index, text_index


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(2))


def check(mine: Any, theirs: Any, found: Tensor, wanted: Tensor, *inputs: Tensor) -> None:
    """States, and every gradient of a random sum of them."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    gradients = []
    for model, states in ((mine, found), (theirs, wanted)):
        model.zero_grad()
        names = [name for name, _ in model.named_parameters()]
        of = torch.autograd.grad((states * noise(states)).sum(), [*model.parameters(), *inputs], allow_unused=True, retain_graph=True)
        gradients.append(dict(zip([*names, *range(len(inputs))], of, strict=True)))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        own = gradients[0][name]
        assert (own is None or not own.any()) == (gradient is None or not gradient.any()), name
        if gradient is not None and gradient.any():
            torch.testing.assert_close(own, gradient, atol=1e-5 * float(gradient.abs().max().clamp_min(1)), rtol=1e-3)


def lavis_queries(theirs: Any, queries: Tensor, images: Tensor) -> Any:
    return theirs.bert(query_embeds=queries.expand(len(images), -1, -1), encoder_hidden_states=images, use_cache=True, return_dict=True)


# --- the same names, the same numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
def test_state_dicts_go_both_ways(every):
    mine, theirs = pair(every)
    theirs.load_state_dict(mine.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert mine.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("alike", [True, False])
def test_queries_alone(every, alike):
    mine, theirs = pair(every)
    queries, images, _, _ = given_tensors([2])
    if not alike:
        queries = torch.cat([queries, queries.flip(1), queries + 1, queries * 2]).detach().requires_grad_()
    wanted = lavis_queries(theirs, queries, images)
    states, before = mine.bert.look(queries, mine.bert.keys_values(images))
    check(mine, theirs, states, wanted.last_hidden_state, queries, images)
    for ours, others in zip(before, wanted.past_key_values, strict=True):
        found, of_lavis = (torch.stack(layer) for layer in (ours, [part.transpose(1, 2).flatten(2) for part in others]))
        check(mine, theirs, found, of_lavis, queries)


@pytest.mark.parametrize("knows", ["the host", "the device"])
@examples
@given(pairs=indices, lengths=texts)
def test_queries_and_text_together(knows, pairs, lengths):
    mine, theirs = pair()
    queries, images, ids, mask = given_tensors(lengths)
    image_index, text_index = columns(pairs)
    if knows == "the host":
        reading = together(mask, QUERIES, CPU, text_index, image_index, IMAGES)
        assert len(reading.positions) == sum(lengths[text] for _, text in pairs), "no padding"
    else:
        reading = on_a_device(mask, text_index, image_index)
    found = mine.bert.match(queries, ids, reading, mine.bert.keys_values(images))
    wanted = theirs.bert(
        ids[text_index],
        query_embeds=queries.expand(len(pairs), -1, -1),
        attention_mask=torch.cat([torch.ones(len(pairs), QUERIES), mask[text_index]], dim=1),
        encoder_hidden_states=images[image_index],
        return_dict=True,
    ).last_hidden_state[:, :QUERIES]
    check(mine, theirs, found, wanted, queries, images)


def on_a_device(mask: Tensor, text_index: Tensor, image_index: Tensor) -> Reading:
    """As :func:`together` reads indices that the host does not know."""
    with pytest.MonkeyPatch.context() as patch:
        padded = Reading.padded(mask[text_index], text_index)
        patch.setattr(Reading, "of", lambda *_, **__: padded)
        return together(mask, QUERIES, CPU, text_index, image_index)


@examples
@given(lengths=texts)
def test_texts_alone(lengths):
    mine, theirs = pair()
    _, _, ids, mask = given_tensors(lengths)
    wanted = theirs.bert(ids, attention_mask=mask.long(), return_dict=True).last_hidden_state
    reading = Reading.of(mask, CPU)
    check(mine, theirs, mine.bert.read(ids, reading), wanted[mask])
    check(mine, theirs, mine.bert.read(ids, reading, reading.first), wanted[:, 0])


@examples
@given(pairs=indices, lengths=texts)
def test_texts_that_follow_queries(pairs, lengths):
    """The LM's words see all queries, and the words before them; every gradient arrives, that of the images through the queries."""
    mine, theirs = pair()
    queries, images, ids, mask = given_tensors(lengths)
    image_index, text_index = columns(pairs)
    reading = Reading.of(mask, CPU, text_index)
    _, before = mine.bert.look(queries, mine.bert.keys_values(images))
    before = [(keys[image_index], values[image_index]) for keys, values in before]
    words = mine.bert.embeddings(reading.take(ids), reading.positions)
    found = mine.cls(mine.bert.follow(words, reading.tokens.texts, before)[0])
    past = lavis_queries(theirs, queries, images).past_key_values
    wanted = theirs(
        ids[text_index],
        attention_mask=torch.cat([torch.ones(len(pairs), QUERIES), mask[text_index]], dim=1),
        past_key_values=tuple((keys[image_index], values[image_index]) for keys, values in past),
        return_dict=True,
    ).logits[mask[text_index]]
    check(mine, theirs, found, wanted, queries, images)


@pytest.mark.parametrize("cut", [1, 3])
def test_words_that_follow_words_are_read_once(cut):
    mine, _ = pair()
    queries, images, ids, _ = given_tensors([LENGTH] * TEXTS)
    _, before = mine.bert.look(queries, mine.bert.keys_values(images[:1].expand(TEXTS, -1, -1)))

    def follow(start: int, stop: int, before: Any) -> Any:
        positions = torch.arange(start, stop).repeat(TEXTS)
        return mine.bert.follow(mine.bert.embeddings(ids[:, start:stop].flatten(), positions), Grid(TEXTS, stop - start), before)

    whole, _ = follow(0, LENGTH, before)
    first, after = follow(0, cut, before)
    last, _ = follow(cut, LENGTH, after)
    found = torch.cat([states.view(TEXTS, -1, WIDTH) for states in (first, last)], dim=1)
    torch.testing.assert_close(found.flatten(0, 1), whole, atol=1e-5, rtol=1e-4)


# --- what is not computed --------------------------------------------------------------------------------------------------


def test_an_image_is_read_once_and_the_last_layer_for_queries_alone():
    mine, _ = pair()
    queries, images, ids, mask = given_tensors([3, 5, 2, 6, 4])
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _, given, __: rows.update({name: rows.get(name, 0) + given[0].shape[:-1].numel()})

    for name, module in mine.bert.named_modules():
        if name.endswith(("crossattention.self.key", "intermediate", "intermediate_query")):
            module.register_forward_hook(count(name.removeprefix("encoder.layer.")))
    pairs = [(0, 0), (1, 1), (0, 1), (3, 4), (0, 3)]
    image_index, text_index = columns(pairs)
    reading = together(mask, QUERIES, CPU, text_index, image_index, IMAGES)
    mine.bert.match(queries, ids, reading, mine.bert.keys_values(images))
    words, of_queries = 3 + 5 + 5 + 4 + 6, QUERIES * len(pairs)
    wanted = {f"{layer}.intermediate_query": of_queries for layer in range(LAYERS)}
    wanted |= {f"{layer}.intermediate": words for layer in range(LAYERS - 1)}
    assert rows == wanted | {f"{layer}.crossattention.self.key": images.shape[:2].numel() for layer in range(0, LAYERS, EVERY)}


@pytest.mark.parametrize("method", ["look", "match"])
def test_dropout_is_drawn_for_each_pair(method):
    """What is shared without it is not shared with it; and eval is exact."""
    mine, _ = pair(dropout=0.2)
    queries, images, ids, mask = given_tensors([4] * TEXTS)

    def states() -> Tensor:
        seen = mine.bert.keys_values(images[:1].expand(3, -1, -1))
        if method == "look":
            return mine.bert.look(queries, seen)[0]
        reading = together(mask, QUERIES, CPU, torch.zeros(3, dtype=torch.long), torch.arange(3), 3)
        return mine.bert.match(queries, ids, reading, seen)

    first, second, third = states()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    first, second, third = mine.eval() and states()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(second, third)


def test_noise_falls_on_each_query_before_the_first_layer():
    mine, _ = pair(dropout=0.5)
    queries, images, _, _ = given_tensors([2])
    dropped = mine.bert._embedded(queries, 50).view(50, -1) == 0
    assert 0.4 < dropped.float().mean() < 0.6 and len(dropped.unique(dim=0)) == 50
    (keys, _), *_ = mine.bert.look(queries, mine.bert.keys_values(images))[1]
    assert len(keys.flatten(1).unique(dim=0)) == IMAGES
    (keys, _), *_ = mine.eval().bert.look(queries, mine.bert.keys_values(images))[1]
    assert len(keys.flatten(1).unique(dim=0)) == 1
