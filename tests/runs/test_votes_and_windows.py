"""What one step of the loop tells others: its vote on all ranks, and where an accumulation window begins."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lavis_mafa.common.settings import RunBlock
from lavis_mafa.runners import vote as vote_module
from lavis_mafa.runners.training_loop import TrainingLoop
from lavis_mafa.runners.vote import Vote


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

    monkeypatch.setattr(vote_module, "host_group", lambda: "group")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def run(*ranks: tuple[int, bool, bool]) -> list[tuple[int, bool, bool]]:
        votes, results = [Vote(lambda s=stop: s, lambda f=failed: f) for stop, failed, _ in ranks], [None, None]

        def one(rank: int) -> None:
            own.rank = rank
            bad = votes[rank](ranks[rank][2])
            results[rank] = votes[rank].stop, votes[rank].failed, bad

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
    vote = Vote(lambda: 2, lambda: True)
    assert vote(True) is True and (vote.stop, vote.failed) == (2, True)
    assert Vote(lambda: 0, lambda: False)(False) is False


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_teacher_is_moved_once_a_window(window):
    """``first_of_window`` is what momentum models look at."""
    settings = RunBlock(accum_grad_iters=window, batch_size_train=4)
    seen = SimpleNamespace(seen=0, add=lambda samples, size: setattr(seen, "seen", seen.seen + size))
    loop = SimpleNamespace(settings=settings, bad_samples=seen, cuda_enabled=False, steps_per_epoch=7)
    loop.feed = SimpleNamespace(sampler=SimpleNamespace(grouped=True))
    prepared = [TrainingLoop._prepare(loop, {}, epoch=3, step=step) for step in range(7)]
    assert [sample["first_of_window"] for sample in prepared] == [step in range(0, 7, window) for step in range(7)]
    assert [(s["epoch"], s["iters"], s["num_iters_per_epoch"], s["grouped"]) for s in prepared] == [(3, n, 7, True) for n in range(7)]
    assert seen.seen == 28
