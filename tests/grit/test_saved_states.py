"""A saved state that does not fit is an error before anything changes: whoever was asked to load it stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lavis_mafa.grit import GritQueue, GritSampler

HUGE = torch.zeros(1, dtype=torch.long).expand(10**12)  # eight bytes on disk


def sampler() -> GritSampler:
    made = GritSampler(20, 3)
    made.set_order(torch.arange(19, -1, -1), epoch=2, grouped=True)
    return made


def queue() -> GritQueue:
    made = GritQueue(queue_size=8, search_space=4)
    rows = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    for index in torch.arange(11).split(4):
        made.collect(index, rows[0, index], rows[1, index])
    return made


SAMPLER = [
    ({"order": torch.zeros(20, dtype=torch.long)}, "not a permutation"),
    ({"order": torch.arange(20.0)}, "saved order is no contiguous tensor of torch.int32 or torch.int64"),
    ({"order": torch.arange(20).to_sparse()}, "saved order is no contiguous tensor"),
    ({"order": HUGE}, "saved order is no contiguous tensor"),
    ({"epoch": "one"}, "'one'"),
    ({"start_step": -1}, "cannot stand after -1 batches of 3 of 20 samples"),
    ({"start_step": 7}, "cannot stand after 7 batches"),
    ({"global_batch": 0}, "batches of 0"),
    ({"global_batch": None}, "NoneType"),
]


@pytest.mark.parametrize(("change", "said"), SAMPLER)
def test_a_sampler_state_that_does_not_fit_changes_nothing(change, said):
    loading = GritSampler(20, 3, seed=5)
    before = loading.state_dict()
    with pytest.raises((ValueError, TypeError), match=said):
        loading.load_state_dict({**sampler().state_dict(step=2), **change})
    after = loading.state_dict()
    assert torch.equal(after.pop("order"), before.pop("order")) and after == before


QUEUE = [
    ({"seed": 1}, "seed is 0, but the saved queue had 1"),
    ({"epoch": "one"}, "'one'"),
    ({"queues_grouped": 2}, "do not fit"),
    ({"finished": torch.arange(7)}, "do not fit"),
    ({"index": torch.arange(8, 12)}, "do not fit"),
    ({"image_features": torch.zeros(3, 4)}, "do not fit"),
    ({"index": torch.tensor([8.0, 9.0, 10.0])}, "saved index is no"),
    ({"text_features": torch.zeros(3, 5, dtype=torch.half)}, "saved text_features is no contiguous tensor of torch.float32"),
    ({"text_features": torch.zeros(1).expand(3, 10**12)}, "saved text_features is no contiguous"),
]


@pytest.mark.parametrize(("change", "said"), QUEUE)
def test_a_queue_state_that_does_not_fit_changes_nothing(change, said):
    loading, untouched = queue(), queue()
    with pytest.raises(ValueError, match=said):
        loading.load_state_dict({**queue().state_dict(), **change})
    assert torch.equal(loading.finish_epoch(), untouched.finish_epoch())


def test_a_state_without_an_entry():
    for loading in (sampler(), queue()):
        state: dict[str, Any] = loading.state_dict()
        del state["epoch"]
        with pytest.raises(KeyError, match="epoch"):
            loading.load_state_dict(state)
