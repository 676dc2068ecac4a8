"""What docs/reliability.md promises of the order: whole epochs of all ranks, with their queues and gathering, in one process."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_mafa.config.schema import Grit
from lavis_mafa.runners import loading
from lavis_mafa.runners.loading import GritFeed

EPOCHS = 3
DIM = 4
Result = TypeVar("Result")


# --- ranks -------------------------------------------------------------------------------------------------------------


class Ranks:
    """W ranks as threads, which meet in every gathering as the processes of a group do."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=30)
        self.box: list[Any] = [None] * world
        self.own = threading.local()

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """``work(rank)`` on all ranks at once; their results in rank order."""

        def as_rank(rank: int) -> Result:
            self.own.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()  # the others must not wait for it
                raise

        gathering = {"gather_rows": lambda rows, _: self.gather(rows), "gather_in_rank_order": lambda t: torch.cat(self.gather(t))}
        with patch.multiple(loading, **gathering):
            with ThreadPoolExecutor(self.world) as threads:
                return list(threads.map(as_rank, range(self.world)))

    def gather(self, value: Any) -> list[Any]:
        self.box[self.own.rank] = value
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found


# --- a training without a model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A training's layout. Everything that it collects is a function of (epoch, index), as of a model on one seed."""

    size: int
    batch: int
    world: int
    grit: Grit
    seed: int = 0
    features: str = "random"
    unreadable: frozenset[int] = frozenset()

    @property
    def global_batch(self) -> int:
        return self.batch * self.world

    def feed(self, rank: int) -> GritFeed:
        return GritFeed(self.grit, self.size, self.batch, rank, self.world, self.seed)

    def computed(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(epoch)
        table = torch.randn(2, self.size, DIM, generator=generator)
        if self.features in ("equal", "zero"):
            table = torch.full_like(table, float(self.features == "equal"))
        elif self.features == "ties":
            table = table.sign()
        return table[0, index], table[1, index]

    def replaced(self, batch: Tensor) -> Tensor:
        """An unreadable sample is replaced by the next readable one of its batch: that is collected twice, the other never."""
        samples = batch.tolist()
        good = [s for s in samples if s not in self.unreadable]
        following = [next((s for s in samples[n:] + samples[:n] if s in good), samples[n]) for n in range(len(samples))]
        return torch.tensor(following)


@dataclass
class Trained:
    """What one rank did: the order of each epoch, the batches it served, and its state after the step asked for."""

    orders: list[Tensor] = field(default_factory=list)
    grouped: list[bool] = field(default_factory=list)
    served: list[list[list[int]]] = field(default_factory=list)
    state: dict[str, Any] | None = None


def train(plan: Plan, save_at: tuple[int, int] | None = None, states: list[dict[str, Any]] | None = None) -> list[Trained]:
    """Epochs 0 to EPOCHS - 1 on all ranks, or what is left of them from ``states`` on. ``save_at`` is (epoch, steps done)."""
    start = (states[0]["sampler"]["epoch"], states[0]["sampler"]["start_step"]) if states else (0, 0)
    return Ranks(plan.world).run(lambda rank: _train_rank(plan, rank, save_at, states and states[rank], *start))


def _train_rank(plan: Plan, rank: int, save_at: Any, state: Any, first_epoch: int, first_step: int) -> Trained:
    feed, done = plan.feed(rank), Trained()
    if state:
        feed.load_state_dict(state)
    for epoch in range(first_epoch, EPOCHS):
        step = first_step if epoch == first_epoch else 0
        feed.sampler.set_epoch(epoch)
        if plan.grit.enabled and plan.grit.collect == "separate" and step == 0:
            passed = (torch.tensor(batch) for batch in list(batches(feed)))
            feed.separate_pass(epoch, ((index, *plan.computed(epoch, index)) for index in map(plan.replaced, passed)))
        done.orders.append(feed.sampler.order.clone())
        done.grouped.append(feed.sampler.grouped)
        done.served.append([])
        for batch in batches(feed):
            done.served[-1].append(batch)
            index, step = plan.replaced(torch.tensor(batch)), step + 1
            if plan.grit.collect == "training":
                feed.collect(index, *plan.computed(epoch, index))
            if (epoch, step) == save_at:
                done.state = through_disk(feed.snapshot(step)())
        feed.end_epoch(epoch)
    return done


def batches(feed: GritFeed) -> Iterator[list[int]]:
    """As ``DataLoader(batch_size=B, drop_last=True)`` makes them."""
    indices, size = iter(feed.sampler), feed.sampler.batch_size
    while len(batch := list(islice(indices, size))) == size:
        yield batch


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- what hypothesis draws ---------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, scopes: tuple[str, ...] = ("local", "global"), collects: tuple[str, ...] = ("training", "separate")) -> Plan:
    batch, world = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    scope = draw(st.sampled_from(scopes))
    space = draw(st.integers(batch * (world if scope == "global" else 1), 20))  # M, also where B does not divide it
    grit = Grit(
        queue_size=space * draw(st.integers(1, 3)),
        search_space=space,
        batch_scope=scope,
        example_shuffle=draw(st.booleans()),
        batch_shuffle=draw(st.booleans()),
        collect=draw(st.sampled_from(collects)),
        memory=draw(st.sampled_from(["matrix", "rows"])),
    )
    size = batch * world + draw(st.integers(0, 50))
    unreadable = frozenset(draw(st.sets(st.integers(0, size - 1), max_size=2))) if batch > 2 else frozenset()
    features = draw(st.sampled_from(["random", "equal", "zero", "ties"]))
    return Plan(size, batch, world, grit, draw(st.integers(0, 5)), features, unreadable)


# W * B = 6 of 37: a tail of one, queues that never fill in an epoch, a search space that no batch divides
ODD = Plan(37, 3, 2, Grit(queue_size=70, search_space=7, batch_scope="global"), unreadable=frozenset({5}))
any_plan = plans() | plans().map(lambda plan: replace(plan, grit=replace(plan.grit, enabled=False)))
whole_trainings = settings(deadline=None, max_examples=30)


# --- the promises ------------------------------------------------------------------------------------------------------


@whole_trainings
@given(any_plan)
@example(ODD)
def test_every_epoch_is_a_permutation_that_all_ranks_share(plan):
    ranks = train(plan)
    steps = plan.size // plan.global_batch
    for epoch in range(EPOCHS):
        order = ranks[0].orders[epoch]
        assert order.sort().values.tolist() == list(range(plan.size))
        assert all(torch.equal(rank.orders[epoch], order) for rank in ranks)
        by_grit = plan.grit.enabled and (epoch > 0 or plan.grit.collect == "separate")
        assert [rank.grouped[epoch] for rank in ranks] == [by_grit] * plan.world
        served = [index for rank in ranks for batch in rank.served[epoch] for index in batch]
        assert len(served) == len(set(served))  # nobody twice
        assert all([len(batch) for batch in rank.served[epoch]] == [plan.batch] * steps for rank in ranks)
        # step j of all ranks is the j-th run of W * B samples of the order
        together = [sum((rank.served[epoch][step] for rank in ranks), []) for step in range(steps)]
        assert together == order[: steps * plan.global_batch].view(steps, -1).tolist()


@whole_trainings
@given(plans(collects=("training",)))
@example(ODD)
def test_what_the_tail_dropped_is_served_in_the_next_epoch(plan):
    ranks = train(plan)
    before: set[int] = set()
    for epoch in range(EPOCHS):
        served = {index for rank in ranks for batch in rank.served[epoch] for index in batch}
        # the tail and the unreadable ones come first; they fit unless the data are little more than one step
        if len(before) + len(plan.unreadable) <= plan.size // plan.global_batch * plan.global_batch:
            assert before <= served
        before = set(range(plan.size)) - served


@whole_trainings
@given(any_plan)
@example(ODD)
def test_the_same_seed_gives_the_same_orders(plan):
    for one, other in zip(train(plan), train(plan), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.orders, other.orders, strict=True))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("collect", ["training", "separate"])
def test_another_seed_gives_other_orders(scope, collect):
    plan = Plan(100, 3, 2, Grit(queue_size=60, search_space=30, batch_scope=scope, collect=collect), features="equal")
    one, other = train(plan)[0].orders, train(replace(plan, seed=1))[0].orders
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({tuple(order.tolist()) for order in one}) == EPOCHS  # nor is one epoch like another


@whole_trainings
@given(plans(scopes=("global",)))
@example(ODD)
@example(replace(ODD, grit=replace(ODD.grit, collect="separate")))
def test_ranks_do_not_change_the_global_batches_of_global_scope(plan):
    """Given equal features; a stand-in for an unreadable sample comes from the rank's own batch, so none is drawn here."""
    plan = replace(plan, unreadable=frozenset())
    alone = train(replace(plan, batch=plan.global_batch, world=1))[0]
    for rank in train(plan):
        assert all(torch.equal(a, b) for a, b in zip(rank.orders, alone.orders, strict=True))


def test_ranks_do_change_the_orders_of_local_scope():
    """The first epoch is the same; from then on each rank has grouped its own share."""
    plan = Plan(96, 4, 2, Grit(queue_size=48, search_space=24))
    two, one = train(plan)[0].orders, train(replace(plan, batch=8, world=1))[0].orders
    assert torch.equal(two[0], one[0]) and not torch.equal(two[1], one[1])


def test_the_size_of_the_global_batch_changes_the_grouped_orders_alone():
    """A smaller batch cuts other blocks from the same chain; the random order of the first epoch does not know the batch."""
    plan = Plan(96, 4, 1, Grit(queue_size=48, search_space=24))
    four, eight = train(plan)[0].orders, train(replace(plan, batch=8))[0].orders
    assert torch.equal(four[0], eight[0]) and not torch.equal(four[1], eight[1])


def test_features_of_half_precision_are_grouped_as_their_fp32_values():
    """What a GPU or autocast hands over is copied to the CPU as fp32 first."""
    plan = Plan(24, 4, 1, Grit(queue_size=24, search_space=24))
    orders = []
    for convert in (lambda t: t.bfloat16(), lambda t: t.bfloat16().float()):
        feed = plan.feed(0)
        index = torch.arange(24)
        feed.collect(index, *map(convert, plan.computed(0, index)))
        feed.end_epoch(0)
        orders.append(feed.sampler.order)
    assert torch.equal(*orders)


@settings(deadline=None, max_examples=40)
@given(any_plan, st.data())
def test_a_resumed_training_serves_exactly_the_rest(plan, data):
    """Saved after any step of any epoch, read back with ``weights_only``, loaded into new objects."""
    steps = plan.size // plan.global_batch
    epoch, step = data.draw(st.integers(0, EPOCHS - 1)), data.draw(st.integers(1, steps))
    through = train(plan, save_at=(epoch, step))
    states = [rank.state for rank in through]
    for rank, resumed in zip(through, train(plan, states=states), strict=True):
        assert resumed.served[0] == rank.served[epoch][step:]
        assert resumed.served[1:] == rank.served[epoch + 1 :]
        assert all(torch.equal(a, b) for a, b in zip(resumed.orders, rank.orders[epoch:], strict=True))
        assert resumed.grouped == rank.grouped[epoch:]


@settings(deadline=None, max_examples=20)
@given(plans(scopes=("global",), collects=("training",)), st.data())
def test_a_global_training_resumes_on_fewer_ranks(plan, data):
    """Rank 0 holds the whole queue, so its state is enough for one rank with the same global batch."""
    plan = replace(plan, unreadable=frozenset())
    steps = plan.size // plan.global_batch
    epoch, step = data.draw(st.integers(0, EPOCHS - 1)), data.draw(st.integers(1, steps))
    through = train(plan, save_at=(epoch, step))[0]
    resumed = train(replace(plan, batch=plan.global_batch, world=1), states=[through.state])[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.orders, through.orders[epoch:], strict=True))


def test_ranks_that_meet_in_a_failure_do_not_hang():
    """The harness itself: one rank's error ends the others' waiting."""

    ranks = Ranks(2)

    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("one rank alone")
        ranks.gather(rank)

    with pytest.raises((threading.BrokenBarrierError, ValueError)):
        ranks.run(work)
