"""The global order: always a permutation, shared by all ranks, and nothing is dropped twice in a row."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order

layout = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 60)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] * drawn[1] + drawn[2])
)  # B, W, N >= W * B
scopes = st.sampled_from(["local", "global"])


def through_disk(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make_ranks(batch: int, world: int, size: int, scope: str = "local", seed: int = 0) -> list[GritSampler]:
    return [GritSampler(size, batch, rank, world, scope, seed) for rank in range(world)]


def collected(ranks: list[GritSampler], scope: str) -> list[torch.Tensor]:
    """What the ranks' queues would have seen, in the order served; grouping would only permute it."""
    served = [torch.tensor(list(sampler), dtype=torch.long) for sampler in ranks]
    if scope == "local":
        return served
    return [torch.stack([rank.view(-1, ranks[0].batch_size) for rank in served], dim=1).flatten()]


@settings(deadline=None)
@given(st.data())
def test_next_order_is_a_permutation_whatever_the_ranks_bring(data):
    size, block = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 9))
    any_list = st.lists(st.integers(0, size - 1), max_size=2 * size)  # repeats within and over ranks, anything missing
    grouped = [torch.tensor(data.draw(any_list), dtype=torch.long) for _ in range(data.draw(st.integers(0, 4)))]
    arguments = (
        grouped,
        size,
        block,
        data.draw(st.booleans()),
        data.draw(st.integers(0, 3)),
        block * data.draw(st.integers(1, 3)),
    )
    order = next_epoch_order(*arguments)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(size))
    assert torch.equal(next_epoch_order(*arguments), order)


def test_missing_samples_come_first_and_blocks_stay_aligned():
    grouped = torch.tensor([7, 3, 9, 0, 5, 2, 8, 4])
    order = next_epoch_order([grouped], 11, block=4, batch_shuffle=False, generator_seed=0).tolist()
    assert sorted(order[:3]) == [1, 6, 10]
    assert order[3:8] == [0, 5, 2, 8, 4] and order[4:8] == grouped[4:].tolist()  # the second block as it was grouped
    assert order[8:] == [7, 3, 9]  # displaced by the three: the new tail


def test_missing_samples_are_shuffled_by_the_seed():
    """In file order the captions of one image would fill whole batches."""
    orders = [next_epoch_order([torch.arange(40, 60)], 60, 4, False, seed)[:40].tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    for order in orders:
        assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:], strict=False)) < 8


def test_more_missing_than_grouped():
    order = next_epoch_order([torch.tensor([1, 2, 3, 4])], 13, block=4, batch_shuffle=False, generator_seed=0).tolist()
    assert sorted(order[:9]) == [0, 5, 6, 7, 8, 9, 10, 11, 12]
    assert order[9:] == [2, 3, 4, 1]
    assert sorted(next_epoch_order([], 5, block=2, batch_shuffle=True, generator_seed=0).tolist()) == [0, 1, 2, 3, 4]
    assert next_epoch_order([torch.tensor([0])], 6, 4, False, 0).tolist()[-1] == 0


def test_a_sample_of_two_ranks_stays_with_the_first_and_shifts_no_block():
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 5, 6, 7, 8])
    order = next_epoch_order([first, second], 9, block=2, batch_shuffle=False, generator_seed=0).tolist()
    assert order == [0, 1, 2, 3, 5, 6, 7, 8, 4]


def test_an_odd_list_shifts_no_block_of_the_ranks_after_it():
    grouped = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6]), torch.tensor([7])]
    assert next_epoch_order(grouped, 8, 2, False, 0).tolist() == [0, 1, 3, 4, 5, 6, 2, 7]


def test_batch_shuffle_moves_whole_blocks_within_what_is_served():
    order = next_epoch_order([torch.arange(70)], 70, block=4, batch_shuffle=True, generator_seed=1, global_batch=8)
    blocks = order[:64].view(16, 4)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(4))
    assert blocks[:, 0].sort().values.tolist() == list(range(0, 64, 4)) and blocks[:, 0].tolist() != list(range(0, 64, 4))
    assert order[64:].tolist() == list(range(64, 70))
    other = next_epoch_order([torch.arange(70)], 70, block=4, batch_shuffle=True, generator_seed=2, global_batch=8)
    assert not torch.equal(order, other)


def test_local_blocks_can_change_rank():
    """A sample is not bound to the rank that grouped it."""
    ranks = make_ranks(batch=4, world=2, size=80)
    grouped = collected(ranks, "local")
    order = next_epoch_order(grouped, 80, 4, True, 0, global_batch=8)
    for sampler in ranks:
        sampler.set_order(order, epoch=1, grouped=True)
    assert set(collected(ranks, "local")[0].tolist()) != set(grouped[0].tolist())


def test_bad_grouped_orders_are_refused():
    with pytest.raises(ValueError, match="holds index 5, but the data set has 5 samples"):
        next_epoch_order([torch.tensor([0, 5])], 5, 2, True, 0)
    with pytest.raises(ValueError, match="block is 0"):
        next_epoch_order([torch.arange(5)], 5, 0, True, 0)
    with pytest.raises(ValueError, match=r"block is 2, but must be at least 1 and divide global_batch \(5\)"):
        next_epoch_order([torch.arange(5)], 5, 2, True, 0, global_batch=5)


@settings(deadline=None)
@given(layout, scopes, st.integers(0, 4))
def test_ranks_are_disjoint_and_cover_the_whole_batches_of_the_order(shape, scope, epoch):
    batch, world, size = shape
    ranks = make_ranks(batch, world, size, scope)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    served = [list(sampler) for sampler in ranks]
    assert {len(indices) for indices in served} == {len(ranks[0])} == {size // (world * batch) * batch}
    every = sorted(index for indices in served for index in indices)
    assert every == sorted(ranks[0].order[: size // (world * batch) * world * batch].tolist())
    assert all(torch.equal(sampler.order, ranks[0].order) for sampler in ranks)


@settings(deadline=None)
@given(layout, st.integers(0, 3))
def test_ranks_share_the_global_batches_of_one_big_rank(shape, epoch):
    batch, world, size = shape
    one, ranks = GritSampler(size, world * batch), make_ranks(batch, world, size, "global")
    for sampler in (one, *ranks):
        sampler.set_epoch(epoch)
    assert collected([one], "local")[0].tolist() == collected(ranks, "global")[0].tolist()
    assert one.block == ranks[0].block == one.global_batch


@settings(deadline=None)
@given(layout, scopes, st.booleans(), st.integers(0, 5))
def test_the_dropped_tail_comes_back(shape, scope, batch_shuffle, seed):
    batch, world, size = shape
    ranks = make_ranks(batch, world, size, scope, seed)
    tail = size % (world * batch)
    assume(tail <= size - tail)
    dropped: set[int] = set()
    for epoch in range(4):
        served = {index for sampler in ranks for index in sampler}
        assert dropped <= served  # so two epochs serve every sample
        dropped = set(range(size)) - served
        sampler = ranks[0]
        order = next_epoch_order(collected(ranks, scope), size, sampler.block, batch_shuffle, epoch, sampler.global_batch)
        for sampler in ranks:
            sampler.set_order(order, epoch + 1, grouped=True)


@settings(deadline=None, max_examples=40)
@given(layout, scopes, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_whole_epochs_with_queues(shape, scope, batches_in_group, groups, background):
    """Sampler, queue and next order together: permutations all along, and batches are what was grouped."""
    batch, world, size = shape
    ranks = make_ranks(batch, world, size, scope)
    features = torch.randn(2, size, 5, generator=torch.Generator().manual_seed(0))
    search_space = ranks[0].block * batches_in_group
    queues = [GritQueue(search_space * groups, search_space, seed=q, background=background) for q in range(world)]
    for epoch in range(3):
        grouped = []
        for queue, indices in zip(queues, collected(ranks, scope), strict=False):
            for index in indices.split(ranks[0].block):
                queue.collect(index, features[0, index], features[1, index])
            grouped.append(queue.finish_epoch())
        order = next_epoch_order(grouped, size, ranks[0].block, True, epoch, ranks[0].global_batch)
        assert order.sort().values.tolist() == list(range(size))
        blocks = {tuple(sorted(block.tolist())) for block in torch.cat(grouped).split(ranks[0].block)}
        kept = sum(tuple(sorted(block.tolist())) in blocks for block in order.split(ranks[0].block))
        missing = size - sum(map(len, grouped))
        assert kept >= len(blocks) - 2 * -(-missing // ranks[0].block)
        for sampler in ranks:
            sampler.set_order(order, epoch + 1, grouped=True)
            assert sampler.grouped and sampler.epoch == epoch + 1


def test_set_epoch_keeps_a_set_order_and_draws_the_others():
    sampler, other = GritSampler(20, 3, seed=4), GritSampler(20, 3, seed=5)
    assert not torch.equal(sampler.order, other.order)
    reverse = torch.arange(19, -1, -1)
    sampler.set_order(reverse, epoch=3, grouped=True)
    sampler.set_epoch(3)
    assert sampler.grouped and torch.equal(sampler.order, reverse)
    sampler.set_epoch(4)
    assert not sampler.grouped and not torch.equal(sampler.order, reverse)
    again = GritSampler(20, 3, seed=4)
    again.set_epoch(4)
    assert torch.equal(again.order, sampler.order)
    again.set_epoch(0)
    assert not torch.equal(again.order, sampler.order)


@settings(deadline=None)
@given(layout, st.integers(0, 40))
def test_resume_serves_exactly_the_rest(shape, steps):
    batch, world, size = shape
    sampler = GritSampler(size, batch, world - 1, world)
    sampler.set_order(torch.randperm(size, generator=torch.Generator().manual_seed(1)), 2, grouped=True)
    steps = min(steps, sampler.steps_per_epoch)
    rest = list(sampler)[steps * batch :]
    resumed = GritSampler(size, batch, world - 1, world, seed=99)
    resumed.load_state_dict(through_disk(sampler.state_dict(step=steps)))
    resumed.set_epoch(2)  # as a runner does at the head of its loop
    assert list(resumed) == rest
    assert (resumed.epoch, resumed.grouped, resumed.start_step) == (2, True, steps)
    assert len(resumed) == len(sampler)
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(sampler)


def test_resume_on_other_ranks_when_the_batches_fit():
    one = GritSampler(50, 4)
    whole = list(one)
    state = one.state_dict(step=4)  # 16 samples
    two = make_ranks(4, 2, 50)
    for sampler in two:
        sampler.load_state_dict(state)
    assert collected(two, "global")[0].tolist() == whole[16:]
    with pytest.raises(ValueError, match="4 batches of 4 samples .* no whole number of batches of 6"):
        GritSampler(50, 6).load_state_dict(state)
    finished = GritSampler(50, 5)
    finished.load_state_dict(one.state_dict(step=12))
    assert list(finished) == []


def test_an_iteration_under_way_keeps_its_order():
    sampler = GritSampler(12, 3)
    expected = list(sampler)
    under_way = iter(sampler)
    head = [next(under_way) for _ in range(4)]
    sampler.set_order(torch.arange(12), epoch=1, grouped=True)
    assert head + list(under_way) == expected
    fresh = iter(sampler)
    sampler.set_epoch(2)
    assert list(fresh) == list(range(12))


def test_orders_given_and_saved_are_copies():
    sampler, order = GritSampler(12, 3), torch.arange(12)
    sampler.set_order(order, epoch=1, grouped=True)
    state = sampler.state_dict()
    order.zero_()
    assert list(sampler) == list(range(12))
    sampler.load_state_dict(state)
    state["order"].zero_()
    assert list(sampler) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_works_in_a_plain_data_loader(workers):
    sampler = GritSampler(23, 4, rank=1, world_size=2)
    sampler.start_step = 1
    loader = DataLoader(range(23), batch_size=4, sampler=sampler, drop_last=True, num_workers=workers)
    assert len(loader) == 2
    assert [batch.tolist() for batch in loader] == [sampler.order[12:16].tolist()]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="the data set has 7 samples, fewer than one global batch of 8"):
        GritSampler(7, 4, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        GritSampler(80, 4, 2, 2)
    with pytest.raises(ValueError, match="'local' or 'global'"):
        GritSampler(80, 4, batch_scope="world")
    sampler = GritSampler(9, 4)
    with pytest.raises(ValueError, match="start_step is 3, but an epoch has 2 steps"):
        sampler.start_step = 3
    for order in (torch.arange(8), torch.tensor([0, 0, 2, 3, 4, 5, 6, 7, 8]), torch.arange(1, 10)):
        with pytest.raises(ValueError, match="not a permutation of the data set's 9 samples"):
            sampler.set_order(order, 1, grouped=True)
