"""What is done for the sake of tens of millions of rows changes no order: against one row at a time, and against sorting."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order, seeded_generator
from lavis_mafa.grit import sampler as sampler_module


def order_by_rows(grouped: list[list[int]], size: int, block: int, batch_shuffle: bool, seed: int, global_batch: int) -> list[int]:
    """Phase 4 as a permutation of rows, made one row at a time."""
    met: set[int] = set()
    whole: list[int] = []
    rest: list[int] = []
    for rows in grouped:
        for start in range(0, len(rows), block):
            new = [row for row in dict.fromkeys(rows[start : start + block]) if row not in met]
            met.update(new)
            (whole if len(new) == block else rest).extend(new)
    generator = seeded_generator("grit order", seed)
    missing = [row for row in range(size) if row not in met]
    missing = [missing[place] for place in torch.randperm(len(missing), generator=generator)]
    ordered = whole + rest
    displaced = len(missing) if len(missing) <= len(ordered) else min(len(missing) % block, len(ordered))
    order = missing + ordered[displaced:] + ordered[:displaced]
    if batch_shuffle:
        blocks = torch.randperm(size // global_batch * global_batch // block, generator=generator)
        places = [place for b in blocks.tolist() for place in range(b * block, (b + 1) * block)]
        order = [order[place] for place in places] + order[len(places) :]
    return order


@st.composite
def lists_of_ranks(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Shares of a permutation as ranks bring them, or anything at all; and N."""
    size = draw(st.integers(1, 60))
    if draw(st.booleans()):
        rows, ranks = draw(st.permutations(range(size))), draw(st.integers(1, 4))
        rows = rows[: draw(st.integers(0, size))]
        return [rows[rank::ranks] for rank in range(ranks)], size
    return draw(st.lists(st.lists(st.integers(0, size - 1), max_size=2 * size), max_size=4)), size


@settings(deadline=None, max_examples=300)
@given(lists_of_ranks(), st.integers(1, 7), st.integers(1, 3), st.booleans(), st.integers(0, 3), st.booleans(), st.data())
def test_the_order_is_that_of_permuting_rows(drawn, block, blocks, batch_shuffle, seed, many, data):
    """Whatever the lists' types, the pieces that are looked at at a time, and the type that N asks for."""
    lists, size = drawn
    tensors = [torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))) for rows in lists]
    with patch.multiple(sampler_module, PIECE=data.draw(st.integers(1, 20)), INT32_ROWS=0 if many else 2**31):
        order = next_epoch_order(tensors, size, block, batch_shuffle, seed, block * blocks)
    assert order.dtype == (torch.int64 if many else torch.int32)
    assert order.tolist() == order_by_rows(lists, size, block, batch_shuffle, seed, block * blocks)


@pytest.mark.parametrize("epoch", range(3))
def test_a_random_order_is_the_same_in_both_types(epoch):
    orders = []
    for limit in (0, 2**31):
        with patch.object(sampler_module, "INT32_ROWS", limit):
            sampler = GritSampler(5000, 3, seed=epoch)
            sampler.set_epoch(epoch)
        orders.append(sampler.order)
    assert [order.dtype for order in orders] == [torch.int64, torch.int32] and torch.equal(orders[0], orders[1].long())


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 9), min_size=8, max_size=10) | st.permutations(range(9)), st.sampled_from([0, 0, 0, -1, 2**32]))
def test_what_is_set_is_what_sorting_finds_to_be_a_permutation(rows, added):
    sampler, order = GritSampler(9, 4), torch.tensor(rows)
    order[-1] += added  # 2**32 is 0 in four bytes
    if order.sort().values.tolist() == list(range(9)):
        sampler.set_order(order, 1, grouped=True)
        assert sampler.order.tolist() == rows and sampler.order.dtype == torch.int32
    else:
        with pytest.raises(ValueError, match="not a permutation of the data set's 9 samples"):
            sampler.set_order(order, 1, grouped=True)


def wide(state: dict) -> dict:
    """As earlier versions saved it: all row numbers in eight bytes."""
    return {name: value.long() if isinstance(value, Tensor) and value.dtype == torch.int32 else value for name, value in state.items()}


def test_states_of_earlier_versions_go_on_the_same():
    sampler, queue = GritSampler(50, 4, seed=3), GritQueue(queue_size=8, search_space=4)
    rows = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(0))
    for index in sampler.order[:28].split(4):
        queue.collect(index, rows[0, index], rows[1, index])
    states = sampler.state_dict(step=7), queue.state_dict()
    assert (states[0]["order"].dtype, states[1]["finished"].dtype) == (torch.int32, torch.int32)
    ends = []
    for sampler_state, queue_state in (states, tuple(map(wide, states))):
        sampler, queue = GritSampler(50, 4), GritQueue(queue_size=8, search_space=4)
        sampler.load_state_dict(sampler_state)
        queue.load_state_dict(queue_state)
        ends.append((list(sampler), queue.finish_epoch()))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    assert ends[1][1].dtype == torch.int32
