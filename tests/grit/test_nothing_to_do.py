"""Data sets smaller than GRIT's queue, search space or batch: every sample is served, nothing is lost, nothing hangs."""

from __future__ import annotations

import pytest
import torch

from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [4, 5, 7, 8, 9, 11, 16, 17, 19, 32, 33])
def test_small_data_sets_and_short_last_queues(size, batch, background):
    """L = 16, M = 8: sizes below B * 2, M, L, and rests from 1 to less than a batch."""
    sampler = GritSampler(size, batch)
    queue = GritQueue(queue_size=16, search_space=8, background=background)
    generator = torch.Generator().manual_seed(size)
    for epoch in range(3):
        served = torch.tensor(list(sampler))
        assert len(served) == size // batch * batch and len(served.unique()) == len(served)
        for index in served.split(batch):
            queue.collect(index, torch.randn(len(index), 4, generator=generator), torch.randn(len(index), 4, generator=generator))
        grouped = queue.finish_epoch()
        assert torch.equal(grouped.sort().values, served.sort().values)
        order = next_epoch_order([grouped], size, sampler.block, True, epoch, sampler.global_batch)
        assert torch.equal(order.sort().values, torch.arange(size))
        sampler.set_order(order, epoch + 1, grouped=True)


def test_equal_features_are_grouped_as_well():
    """All captions and all images alike: no similarity says who is next."""
    queue = GritQueue(queue_size=16, search_space=8)
    queue.collect(torch.arange(19), torch.ones(19, 4), torch.ones(19, 4))
    assert sorted(queue.finish_epoch().tolist()) == list(range(19))


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="has 3 samples, fewer than one global batch of 4"):
        GritSampler(3, 4)
