"""SoftMask: word maps against LAVIS's own Grad-CAM, masked images and what the step makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
import reduced
from lavis_mafa.config.check import check_combinations
from lavis_mafa.errors import UserError
from lavis_mafa.models import soft_masks
from lavis_mafa.models.soft_masks import looking_layers, told_of, word_maps
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives.itc import itc_loss
from lavis_mafa.objectives.soft_mask import soft_mask

CAPTIONS = reduced.CAPTIONS


both = pytest.mark.parametrize("family", ["albef", "blip"])


def build(family: str = "albef", **changes: Any) -> Any:
    return families.build((family, False), **changes)


def batch(family: str = "albef", **more: Any) -> dict[str, Any]:
    return families.batch((family, False), **more)


def encoded(model: Any, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image states [B, N, width], text states [B, T, width], ids, mask."""
    ids, mask = model.words(captions)
    with torch.no_grad():
        return model.image_states(batch()["image"]), model.text_states(ids, mask), ids, mask


@pytest.mark.parametrize("by", ["grad_cam", "attention"])
def test_word_maps_are_those_of_lavis(by):
    """One pair at a time by its own text encoder, with its hooks and a whole backward pass; several texts of one image among them."""
    model, lavis = build(), reduced.lavis_pretrain()
    lavis.load_state_dict(model.state_dict(), strict=False)
    image_index, text_index = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 3])
    images, texts, _, mask = encoded(model, CAPTIONS)
    reading = Reading.of(mask, model.device, text_index, image_index, len(images))
    before = {name: p.grad for name, p in model.named_parameters()}
    found = word_maps(model, model.keys_values(images), (texts, mask), reading, 1, by)
    assert all(p.grad is before[name] for name, p in model.named_parameters()) and not found.requires_grad

    bert, place = lavis.text_encoder.bert, 0
    cross = bert.encoder.layer[reduced.FUSION].crossattention.self
    cross.save_attention = True
    for image, text in zip(image_index.tolist(), text_index.tolist(), strict=True):
        length = int(mask[text].sum())
        states = bert(
            encoder_embeds=texts[text : text + 1, :length],
            attention_mask=torch.ones(1, length),
            encoder_hidden_states=images[image : image + 1],
            encoder_attention_mask=torch.ones(1, images.shape[1]),
            return_dict=True,
            mode="fusion",
        ).last_hidden_state
        lavis.itm_head(states[:, 0])[0, 1].backward()
        attention, gradient = cross.get_attention_map()[0], cross.get_attn_gradients()[0]
        wanted = (attention * gradient.clamp(min=0) if by == "grad_cam" else attention).mean(dim=0)[:, 1:].detach()
        torch.testing.assert_close(found[place : place + length], wanted, atol=1e-7, rtol=1e-3)
        assert wanted.max() > 1e-4
        place += length
    assert place == len(found)


@both
def test_the_attention_itself_asks_no_layer_above(family):
    model = build(family)
    ids, mask = model.words(CAPTIONS)
    every = torch.arange(4)
    reading, images = Reading.of(mask, model.device, every, every, 4), model.keys_values(model.image_states(batch(family)["image"]))
    texts = model.text_states(ids, mask) if family == "albef" else ids
    before = word_maps(model, images, (texts, mask), reading, 1, "attention")
    looking_layers(model)[1].query.weight.data.fill_(float("nan"))
    assert torch.equal(word_maps(model, images, (texts, mask), reading, 1, "attention"), before) and before.max() > 0
    assert word_maps(model, images, (texts, mask), reading, 1).isnan().any()


def test_a_frozen_model_has_maps_and_a_layer_that_is_not_there_none():
    model = build().requires_grad_(False)
    images, texts, _, mask = encoded(model, CAPTIONS)
    every = torch.arange(4)
    reading = Reading.of(mask, model.device, every, every, 4)
    with torch.no_grad():
        assert word_maps(model, model.keys_values(images), (texts, mask), reading).max() > 0
    for layer in (0, 2):
        with pytest.raises(UserError, match=f"the layer is {layer}; allowed: 1 or more, and below 2"):
            word_maps(model, model.keys_values(images), (texts, mask), reading, layer)


@both
def test_an_image_is_masked_by_one_word_that_may_be_seen(family, monkeypatch):
    """Matching reads a masked image as one whose patches are multiplied one by one; nothing flows back through the mask."""
    model = build(family, itm={"soft_mask": {"share": 0.25}})
    places = torch.tensor([2, 3, -1, 4])
    monkeypatch.setattr(soft_masks, "choose_place", lambda eligible: places)
    encoded_pairs, of_batch, _ = model.encode(model.inputs(batch(family)))
    extra, images = of_batch.soft_masked, encoded_pairs.image_embeds
    assert extra.weight.tolist() == [1.0, 1.0, 0.0, 1.0] and extra.label.tolist() == [1] * 4
    assert extra.image_index.tolist() == [4, 5, 6, 7] and extra.text_index.tolist() == [0, 1, 2, 3]
    found = encoded_pairs.itm_logits(extra.image_index, extra.text_index)
    (of_images,) = torch.autograd.grad(found[:, 1].sum(), images)

    every, mask = torch.arange(4), encoded_pairs.text_mask
    texts = encoded_pairs.text_embeds if family == "albef" else encoded_pairs.text_ids
    reading = Reading.of(mask, model.device, every, every, 4)
    maps, start, masked = word_maps(model, model.keys_values(images), (texts, mask), reading), 0, images.detach().clone()
    kept = torch.ones(masked.shape[:2])
    for b, place in enumerate(places.tolist()):
        of_patches = 1 - soft_mask(maps[start + max(place, 0)], 0.25)
        for patch, share in enumerate(of_patches.tolist(), 1):
            masked[b, patch] *= share
            kept[b, patch] = share
        start += int(mask[b].sum())
    masked.requires_grad_()
    wanted = model.itm_head(model.fuse(model.keys_values(masked), texts, reading, reading.first))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    (of_masked,) = torch.autograd.grad(wanted[:, 1].sum(), masked)
    torch.testing.assert_close(of_images, of_masked * kept[:, :, None], atol=1e-6, rtol=1e-3)


def test_words_that_may_be_seen():
    model = build()
    told = told_of(model.tokenizer)
    ids = model.tokenizer("a red dog, walking on the roof of 2 houses.").input_ids
    shown = model.tokenizer.convert_ids_to_tokens([i for i in ids if told[i]])
    assert shown == ["red", "dog", "walking", "roof", "2", "houses"]


@both
def test_matching_alone_sees_masked_images(family):
    plain, _ = families.step(build(family), batch(family))
    model = build(family, itm={"soft_mask": {}})
    output, _ = families.step(model, batch(family))
    assert torch.equal(output.loss_itc, plain.loss_itc) and abs(output.loss_itm - plain.loss_itm) > 1e-4
    assert output.verdicts["image"].shape == (8,) and "itm_accuracy_extra_positive" in output.stats
    # four more pairs, of label 1
    with torch.no_grad():
        torch.manual_seed(0)
        pairs, of_batch, _ = model.encode(model.inputs(batch(family)))
        logits = pairs.itm_logits(of_batch.soft_masked.image_index, of_batch.soft_masked.text_index)
    assert of_batch.soft_masked.image_index.tolist() == [4, 5, 6, 7] and of_batch.soft_masked.text_index.tolist() == [0, 1, 2, 3]
    wanted = (12 * plain.loss_itm + torch.nn.functional.cross_entropy(logits, torch.ones(4).long(), reduction="sum")) / 16
    torch.testing.assert_close(output.loss_itm, wanted)


@both
def test_texts_without_such_a_word_change_nothing(family):
    """The further pass for the maps leaves every gradient as it is."""
    texts, off = {"text_input": ["the on a", "an and the", "a", "the"]}, {"mlm" if family == "albef" else "lm": {"weight": 0.0}}
    found, gradients = families.step(build(family, itm={"soft_mask": {}}, **off), batch(family, **texts))
    wanted, plain = families.step(build(family, **off), batch(family, **texts))
    torch.testing.assert_close(found.loss, wanted.loss)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_evaluation_masks_nothing():
    model, plain = build(itm={"soft_mask": {}}, mlm={"mask_everywhere": True}).eval(), build().eval()
    with torch.no_grad():
        torch.manual_seed(0)
        found = model(batch())
        torch.manual_seed(0)
        assert torch.equal(found.loss, plain(batch()).loss)


def test_masked_everywhere_means_that_itc_and_itm_read_masked_texts(monkeypatch):
    model = build(mlm={"mask_everywhere": True}, itm={"negatives": "hardest"})
    mask_token = model.tokenizer.mask_token_id

    def all_masked(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masked = ids.masked_fill(model.told_here[ids], mask_token)
        return masked, torch.where(masked == mask_token, ids, -100)

    model.told_here = told_of(model.tokenizer)
    monkeypatch.setattr(model, "masked", all_masked)
    found, _ = families.step(model, batch())
    plain = build()
    monkeypatch.setattr(plain, "masked", all_masked)
    plain.told_here = model.told_here
    words = plain.words

    def masked_words(captions: list[str], gathered: bool = False) -> Any:
        ids, mask = words(captions, gathered)
        return all_masked(ids)[0], mask

    monkeypatch.setattr(plain, "words", masked_words)
    wanted, _ = families.step(plain, batch())
    torch.testing.assert_close(found.loss_itc, wanted.loss_itc)
    torch.testing.assert_close(found.loss_itm, wanted.loss_itm)
    assert abs(found.loss_itc - families.step(build(), batch())[0].loss_itc) > 1e-4


@pytest.mark.parametrize("family", ["albef", "blip", "blip2"])
def test_focal_reaches_the_step(family, monkeypatch):
    seen = []
    from lavis_mafa.objectives import pretraining

    monkeypatch.setattr(pretraining, "itc_loss", lambda *given: seen.append(given) or itc_loss(*given))
    output, _ = families.step(families.build((family, False), itc={"focal": 2.0}), families.batch((family, False)))
    assert torch.equal(output.loss_itc, itc_loss(*seen[0][:4], 2.0)) and output.loss_itc < itc_loss(*seen[0][:4])


def test_synthetic_texts_are_masked_as_their_own_texts_are(monkeypatch):
    """Else whoever has no mask would be wrong; the word that differs stays."""
    itm = {"synthetic": {"top_k": 5, "generator": "model", "judge": False}, "soft_mask": {}}
    model = build(mlm={"mask_everywhere": True, "mask_probability": 0.7}, itm=itm)
    read, asked = [], []
    of_ids = model.text_states
    monkeypatch.setattr(model, "text_states", lambda ids, *more: read.append(ids.clone()) or of_ids(ids, *more))
    monkeypatch.setattr(model, "soft_masks", lambda *given: asked.append(given) or soft_masks.soft_masks(model, *given))
    torch.manual_seed(0)
    model.encode(model.inputs(batch()))
    (shown, synthetic), (ids, _) = read, model.words(CAPTIONS)
    assert torch.equal(asked[0][2], shown)  # and masks are made by words that are shown
    changed = (synthetic != shown).sum(dim=1)
    assert changed.max() == 1 and (shown == model.tokenizer.mask_token_id).sum() > 8
    for b, place in enumerate((synthetic != shown).int().argmax(dim=1).tolist()):
        if changed[b]:
            assert synthetic[b, place] != ids[b, place] and synthetic[b, place] != model.tokenizer.mask_token_id


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("albef", {"itm": {"soft_mask": {"layer": 2}}}, "model.itm.soft_mask.layer is 2, of 2 layers that look at images"),
    ("albef", {"itm": {"soft_mask": {}}, "text_encoder": {"layers": 2}}, "Allowed: soft_mask: null"),
    ("albef", {"itm": {"soft_mask": {}, "weight": 0}}, "whose positives they are, is off"),
    ("albef", {"mlm": {"mask_everywhere": True, "weight": 0}}, "whose masks they are, is off"),
    ("albef", {"mlm": {"mask_everywhere": True}, "itc": {"weight": 0}, "itm": {"weight": 0}}, "which would read masked texts, are off"),
    ("blip", {"itc": {"weight": 0, "focal": 2.0}}, "model.itc.focal is 2, but ITC"),
    (
        "blip2",
        {"itm": {"soft_mask": {}}},
        "model.itm.soft_mask is not a setting. blip2_mafa has no soft masks: its words look at queries",
    ),
    ("albef", {"itm": {"soft_mask": {"share": 1.0}}}, "model.itm.soft_mask.share is 1"),
]


@pytest.mark.parametrize(("family", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_does_not_go_together_is_one_message(family, changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_combinations(families.REDUCED[family].block(**changes), None)
    assert len(error.value.messages) == 1
