"""Grounding: maps against a pair alone and against loops, boxes against counted pixels."""

from __future__ import annotations

import math
import random

import pytest
import torch

import reduced
import reduced_blip
from lavis_mafa.models.grounding import PAIRS_AT_ONCE, box_scores, expression_maps, heat_of, hottest_box, itc_maps, itm_maps
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading

MODELS = {"albef": reduced, "blip": reduced_blip}


# --- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_matching_map_is_the_mean_of_its_own_pairs_tokens(kind):
    model, samples = MODELS[kind].ours(), MODELS[kind].batch(4)
    image, text = torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        tokens, texts = model.image_rows(samples["image"])[0], model.text_rows(samples["text_input"])[0]
    maps = itm_maps(model, tokens, texts, image, text)
    zero = torch.zeros(1, dtype=torch.long)
    for found, i, t in zip(maps, image.tolist(), text.tolist(), strict=True):
        ids, mask = model.words([samples["text_input"][t]])
        alone = model.text_rows([samples["text_input"][t]])[0]
        words = word_maps(model, model.keys_values(tokens[i : i + 1]), alone, Reading.of(mask, model.device, zero, zero, 1))
        assert ids[0, -1] == model.tokenizer.sep_token_id and len(words) == mask.sum()
        wanted = torch.stack([words[w] for w in range(len(words) - 1)]).mean(dim=0)
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-3)
        assert found.shape == (16,) and found.min() >= 0 and found.max() > 0


def test_a_map_of_the_cosine_is_that_of_four_loops():
    """The gradient by hand: what the cosine gains where the class token looks a little more at one patch."""
    model, pixels = reduced.ours(), reduced.batch(2)["image"]
    with torch.no_grad():
        texts = model.text_rows(reduced.CAPTIONS[:2])[1]
        before = {name: p.grad for name, p in model.named_parameters()}
        every, crossed = torch.arange(2), itc_maps(model, pixels, texts, torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
        found = itc_maps(model, pixels, texts, every, every)
    torch.testing.assert_close(crossed[1:], found.flip(0), atol=1e-7, rtol=1e-4)
    assert not torch.allclose(crossed[0], crossed[1], rtol=1e-2), "another text has another map"
    assert all(p.grad is before[name] for name, p in model.named_parameters()) and not found.requires_grad
    vit = model.visual_encoder
    block, heads = vit.blocks[-1], reduced.HEADS
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        states = vit(pixels)
        handle.remove()
        q, k, v = block.attn.qkv(block.norm1(kept[0])).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(reduced.WIDTH / heads)).softmax(dim=-1)

        def cosine(weights: torch.Tensor) -> torch.Tensor:
            x = kept[0].double() + block.attn.double().proj((weights @ v.double()).transpose(1, 2).flatten(2))
            x = vit.norm.double()(x + block.mlp.double()(block.norm2.double()(x)))
            first = torch.nn.functional.normalize(model.vision_proj.double()(x[:, 0]), dim=-1)
            return (first * texts.double()).sum(dim=1)

        base, wanted = cosine(attention.double()), torch.zeros(2, 16)
        for head in range(heads):
            for patch in range(16):
                more = attention.double().clone()
                more[:, head, 0, 1 + patch] += 1e-6
                gain = (cosine(more) - base) / 1e-6
                wanted[:, patch] += (gain.clamp_min(0) * attention[:, head, 0, 1 + patch]).float() / heads
    assert states.shape[1] == 17 and wanted.max() > 0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-2)


def test_a_frozen_model_has_maps_too():
    model = reduced.ours().requires_grad_(False)
    with torch.no_grad():
        texts = model.text_rows(reduced.CAPTIONS[:2])[1]
    every = torch.arange(2)
    assert itc_maps(model, reduced.batch(2)["image"], texts, every, every).max() > 0
    assert model.visual_encoder.blocks[-1].attn.attention_map is None


@pytest.mark.parametrize("heat", ["itm", "itc"])
def test_maps_of_many_texts_are_those_of_each_alone(heat, monkeypatch):
    model, image = reduced.ours(), reduced.batch(3)["image"]
    texts, of_image = [reduced.CAPTIONS[n] for n in (0, 1, 3, 1)], torch.tensor([2, 0, 0, 1])
    alone = [expression_maps(model, image[i : i + 1], [text], torch.tensor([0]), heat) for i, text in zip(of_image, texts, strict=True)]
    monkeypatch.setitem(PAIRS_AT_ONCE, heat, 3)
    torch.testing.assert_close(expression_maps(model, image, texts, of_image, heat), torch.cat(alone), atol=1e-7, rtol=1e-3)


# --- boxes -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_pixel_loops():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for power in (0.0, 0.5, 1.0):
        width, height = rng.randint(4, 13), rng.randint(4, 13)
        heat = torch.randn(height, width, generator=generator)
        boxes = []
        while len(boxes) < 3:
            left, right = sorted(rng.sample(range(width + 1), 2))
            top, bottom = sorted(rng.sample(range(height + 1), 2))
            boxes.append((left + 0.25, top + 0.5, right + 0.75, bottom + 0.5))  # truncated, as the authors' code does
        wanted = []
        for left, top, right, bottom in boxes:
            columns, rows = range(int(left), int(right)), range(int(top), int(bottom))
            inside = [float(heat[y, x]) for y in rows for x in columns if x < width and y < height]
            wanted.append(sum(inside) / ((right - left) * (bottom - top)) ** power)
        assert box_scores(heat, boxes, power).tolist() == pytest.approx(wanted, abs=1e-5)
        best = max(range(3), key=wanted.__getitem__)
        assert hottest_box(heat, boxes, power) == (boxes[best] if wanted[best] > 0 else None)


def test_where_nothing_is_hot_there_is_no_box():
    box = (0, 0, 2, 2)
    assert hottest_box(torch.ones(4, 4), [box]) == box
    assert hottest_box(torch.zeros(4, 4), [box]) is hottest_box(-torch.ones(4, 4), [box]) is hottest_box(torch.ones(4, 4), []) is None


def test_a_map_lies_on_its_image_as_its_patches_do():
    for patch in range(16):
        heat = heat_of(torch.eye(16)[patch], width=40, height=20)
        y, x = divmod(int(heat.argmax()), 40)
        assert heat.shape == (20, 40) and (x // 10, y // 5) == (patch % 4, patch // 4)
