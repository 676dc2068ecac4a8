"""Soft masks and the focal loss against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lavis_mafa.objectives.itc import itc_loss
from lavis_mafa.objectives.soft_mask import FAINT, soft_mask, word_cam

MAPS = st.integers(2, 20).flatmap(lambda n: st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e3)), min_size=n, max_size=n))


def test_word_cam_equals_four_loops():
    torch.manual_seed(0)
    attention, gradient = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = word_cam(attention, gradient)
    for b in range(2):
        for word in range(4):
            for patch in range(5):
                total = 0.0
                for head in range(3):
                    total += max(0.0, gradient[b, head, word, patch].item()) * attention[b, head, word, patch].item()
                assert found[b, word, patch].item() == pytest.approx(total / 3, rel=1e-5)


def filled(cam: list[float], share: float) -> list[float]:
    """Water poured until it holds what it should: the level is found by halving."""
    greatest = max(cam) or 1.0
    cam = [value / greatest + FAINT for value in cam]
    low, high = 0.0, 1e9
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(1.0, level * value) for value in cam) < share * len(cam) else (low, level)
    return [min(1.0, high * value) for value in cam]


@settings(deadline=None, max_examples=200)
@given(MAPS, st.floats(0.05, 0.95))
def test_a_mask_is_the_map_filled_up_to_its_share(cam, share):
    found = soft_mask(torch.tensor([cam]), share)[0].tolist()
    assert found == pytest.approx(filled(cam, share), abs=2e-5)
    assert sum(found) == pytest.approx(share * len(cam), abs=1e-4 * len(cam)) and 0 <= min(found) and max(found) <= 1


def test_a_map_of_nothing_masks_all_alike():
    assert soft_mask(torch.zeros(1, 6), 0.25).tolist() == [[pytest.approx(0.25)] * 6]
    few = soft_mask(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), 0.5)[0].tolist()  # one patch cannot hold the half of four
    assert few == pytest.approx([1 / 3, 1.0, 1 / 3, 1 / 3], abs=1e-5)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share is"):
            soft_mask(torch.zeros(1, 6), share)


@pytest.mark.parametrize("focal", [0.0, 0.5, 2.0])
def test_focal_itc_equals_the_loops(focal):
    torch.manual_seed(0)
    i2t, t2i = torch.randn(4, 6), torch.randn(4, 6)
    i2t[0, 5] = -math.inf  # a pair that takes no part
    targets = torch.rand(4, 6)
    targets[0, 5] = 0.0
    targets /= targets.sum(dim=1, keepdim=True)
    wanted = 0.0
    for logits in (i2t, t2i):
        for row, of_row in zip(logits.tolist(), targets.tolist(), strict=True):
            for p, y in zip(oracles.softmax(row), of_row, strict=True):
                wanted -= y * (1 - p) ** focal * math.log(p) / 8 if y else 0.0
    assert itc_loss(i2t, t2i, targets, targets, focal).item() == pytest.approx(wanted, rel=1e-5)


def test_what_is_told_for_certain_has_a_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    itc_loss(logits, logits, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.5).backward()
    assert logits.grad.isfinite().all()
