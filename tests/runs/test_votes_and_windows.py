"""What one step of the loop tells others: its vote on all ranks, and where an accumulation window begins."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lavis_mafa import plugin
from lavis_mafa.config.schema import Grit, RunBlock
from lavis_mafa.models.step import StepInputs
from lavis_mafa.runners import checkpoint, loading
from lavis_mafa.runners import step as step_module
from lavis_mafa.runners.loading import GritFeed
from lavis_mafa.runners.runner_mafa import RunnerMafa
from lavis_mafa.runners.step import Vote

pytestmark = pytest.mark.slow


@pytest.fixture
def two_votes(monkeypatch):
    """Two ranks as threads whose all-reduce is the largest of both."""
    meet, box, own = threading.Barrier(2, timeout=20), [None, None], threading.local()

    def all_reduce(flags: torch.Tensor, op: object, group: object) -> None:
        assert op == dist.ReduceOp.MAX
        box[own.rank] = flags.clone()
        meet.wait()
        flags.copy_(torch.stack(box).amax(0))
        meet.wait()

    monkeypatch.setattr(step_module, "host_group", lambda: "group")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def run(*ranks: tuple[int, bool, bool]) -> list[tuple[int, bool, bool]]:
        votes, results = [Vote(lambda s=stop: s, lambda f=failed: f) for stop, failed, _ in ranks], [None, None]

        def one(rank: int) -> None:
            own.rank = rank
            results[rank] = votes[rank](ranks[rank][2])

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results

    return run


@pytest.mark.parametrize("which", [0, 1, 2, None])
@pytest.mark.parametrize("who", [0, 1])
def test_what_one_rank_says_all_hear(two_votes, which, who):
    quiet = (0, False, False)
    loud = tuple(value if number == which else quiet[number] for number, value in enumerate((15, True, True)))
    assert two_votes(*((loud, quiet) if who == 0 else (quiet, loud))) == [loud, loud]


def test_a_single_process_hears_itself():
    assert Vote(lambda: 2, lambda: True)(True) == (2, True, True)
    assert Vote()(False) == (0, False, False)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_teacher_is_moved_once_a_window(window):
    """``first_of_window`` is what momentum models look at, and the optimizer's steps are counted over the run."""
    settings = RunBlock(accum_grad_iters=window, batch_size_train=4)
    seen = SimpleNamespace(seen=0, add=lambda samples, size: setattr(seen, "seen", seen.seen + size))
    loop = SimpleNamespace(settings=settings, bad_samples=seen, cuda_enabled=False, steps_per_epoch=7)
    loop.feed, loop._on_device = SimpleNamespace(sampler=SimpleNamespace(grouped=True)), lambda samples: samples
    prepared = [RunnerMafa._prepare(loop, {"image": torch.zeros(1), "text_input": []}, epoch=3, step=step) for step in range(7)]
    inputs = [StepInputs.of(sample, "cpu") for sample in prepared]
    assert [one.first_of_window for one in inputs] == [step in range(0, 7, window) for step in range(7)]
    begun = [step for epoch in range(4) for step in range(7) if step in range(0, 7, window)]  # the windows of four epochs
    before = len(begun) - len(range(0, 7, window)) - 1
    assert [one.update for one in inputs] == [before + len(range(0, step + 1, window)) for step in range(7)]
    assert [(s["epoch"], s["iters"], s["num_iters_per_epoch"], s["grouped"]) for s in prepared] == [(3, n, 7, True) for n in range(7)]
    assert seen.seen == 28


# --- from settings to what acts on them --------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "seeds"), [("local", [7, 8]), ("global", [7, None])])
def test_the_queue_is_as_the_settings_say(scope, seeds):
    """In local scope each rank shuffles in its own way; in global scope rank 0 groups for all."""
    for rank, seed in enumerate(seeds):
        grit = Grit(queue_size=12, search_space=6, batch_scope=scope, example_shuffle=False, memory="rows")
        queue = GritFeed(grit, 24, 3, rank, 2, seed=7).queue
        if seed is None:
            assert queue is None
            continue
        assert (queue.queue_size, queue.search_space, queue.example_shuffle, queue.memory) == (12, 6, False, "rows")
        assert queue.seed == seed
    assert GritFeed(Grit(enabled=False), 24, 3, 0, 2, seed=7).queue is None and GritFeed(None, 24, 3, 0, 2, seed=7).queue is None


@pytest.mark.parametrize(("horizon", "end"), [(None, 20), (30, 30)])
def test_the_learning_rate_falls_over_the_horizon(horizon, end):
    plugin.register()
    settings = RunBlock(max_epoch=20, lr_horizon_epochs=horizon, init_lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=10)
    runner = SimpleNamespace(settings=settings, max_epoch=20, steps_per_epoch=50)
    runner.config = SimpleNamespace(run_cfg={})
    runner.optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    schedule = RunnerMafa.lr_scheduler.func(runner)
    assert [schedule.at(step) for step in (0, 10, end * 50)] == pytest.approx([1e-6, 1e-3, 1e-5])
    assert schedule.at(20 * 50 - 1) == pytest.approx(1e-5, rel=0.01) if horizon is None else schedule.at(20 * 50) > 2e-4


@pytest.mark.parametrize(("scope", "queue", "fits"), [("local", "one", False), ("global", "one", True), ("local", None, True)])
def test_parts_of_an_order_on_several_ranks_need_all_of_them(scope, queue, fits):
    feed = SimpleNamespace(queue=queue, scope=scope)
    checkpoint._check_ranks(feed, 1)
    with pytest.raises(ValueError, match="saved by 2 processes and is resumed by 1") if not fits else contextlib.nullcontext():
        checkpoint._check_ranks(feed, 2)


def test_batches_are_shuffled_anew_each_epoch_and_by_the_runs_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(loading, "next_epoch_order", lambda *given: seeds.append(given[4]) or torch.arange(24))
    for run in (7, 8):
        feed = GritFeed(Grit(queue_size=12, search_space=6), 24, 3, 0, 1, seed=run)
        for epoch in range(3):
            feed.end_epoch(epoch)
    assert len(set(seeds)) == 6
