"""Who died, who hangs, and who holds the others up: what a watchdog concludes from heartbeats."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lavis_mafa.distributed import check_backends
from lavis_mafa.errors import UserError
from lavis_mafa.runners import watchdog as module
from lavis_mafa.runners.watchdog import DEAD_AFTER, ENDED, FAILED, GONE_AFTER, Heartbeat, Watchdog, mark, marked, rank_watch

CLOSED = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:50381.")


def heartbeat(rank: int, number: int = 1, **changes: Any) -> Heartbeat:
    return Heartbeat(rank, f"rank {rank} (host, pid {100 + rank})", number, **changes)


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """Watchdogs of two ranks in this process, which end with an exception in place of the process."""
    store, made = dist.HashStore(), []

    def make(timeout: float = 1000.0, count: int = 2) -> list[Watchdog]:
        for rank in range(count):
            monkeypatch.setattr(Watchdog, "count", 0)
            made.append(Watchdog(store, rank, count, timeout, tmp_path))
            made[-1].interval = min(made[-1].interval, 0.1)
        return made

    def exit_thread(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(module.interrupt, "end_process", exit_thread)
    yield make
    for watchdog in made:
        watchdog._end.set()


def test_a_hang_is_when_no_running_rank_moves(ranks):
    zero, one = ranks(timeout=10.0)
    zero.own.still = 9.0
    assert zero.judge([heartbeat(1, still=11.0)], 0.0) is None
    zero.own.still = 12.0
    assert "no rank has moved for 11 s." in zero.judge([heartbeat(1, still=11.0)], 0.0)
    assert one.judge([heartbeat(0, still=11.0)], 0.0) is None, "only rank 0 knows all"
    zero.own.state = ENDED
    assert zero.judge([heartbeat(1, still=11.0)], 0.0) is not None
    assert zero.judge([heartbeat(1, still=50.0, state=FAILED)], 0.0) is None


def test_the_rank_with_the_fewest_marks_is_named(ranks):
    zero, *_ = ranks(timeout=40.0, count=9)
    zero.own.still, zero.own.marks = 41.0, 9
    late = heartbeat(2, still=40.0, marks=8, phase="loading data, epoch 1 step 37", where="a/b.py:3 in read")
    message = zero.judge([heartbeat(1, still=40.0, marks=9), late], 0.0)
    wanted = "The others wait for rank 2 (host, pid 102), loading data, epoch 1 step 37, at a/b.py:3 in read."
    assert f"no rank has moved for 40 s. {wanted}" in message and "hang_rank*.txt. run.rank_timeout_minutes is 0.666" in message
    several = zero.judge([heartbeat(rank, still=40.0) for rank in range(1, 9)], 0.0)
    assert "rank 4 (host, pid 104), starting, at  and 4 more" in several and "rank 5" not in several
    equally_far = zero.judge([heartbeat(rank, still=40.0, marks=9, where=f"{rank}.py") for rank in (1, 2)], 0.0)
    assert "All passed the same marks: " in equally_far and "at 1.py" in equally_far and "at 2.py" in equally_far


@pytest.mark.parametrize("rank", [0, 1])
def test_silence_is_death_after_a_stated_time(ranks, rank):
    watchdog = ranks()[rank]
    other = {"rank": 1 - rank, "phase": "training, epoch 0 step 3"}
    assert watchdog.judge([heartbeat(**other)], 2.0) is None
    assert watchdog.judge([heartbeat(**other)], DEAD_AFTER - 1.0) is None
    assert watchdog.judge([heartbeat(**other, number=2)], 5.0) is None
    assert watchdog.judge([heartbeat(**other, number=2)], DEAD_AFTER - 1.0) is None
    message = watchdog.judge([heartbeat(**other, number=2)], 1.0)
    assert f"rank {1 - rank} (host, pid 10{1 - rank}) died or cannot be reached" in message
    assert "no heartbeat for 90 s, last seen training, epoch 0 step 3" in message


def test_a_rank_that_left_is_not_called_dead(ranks):
    zero, _ = ranks()
    for _ in range(5):
        assert zero.judge([heartbeat(1, state=ENDED)], DEAD_AFTER) is None


@pytest.mark.parametrize("other", [{"state": FAILED}, {"alarm": "lost"}])
def test_an_error_and_a_rank_that_a_collective_misses_are_told_sooner(ranks, other):
    zero, _ = ranks()
    assert zero.judge([heartbeat(1, **other)], 0.0) is None
    assert zero.judge([heartbeat(1, **other)], GONE_AFTER - 1.0) is None
    assert "rank 1 (host, pid 101)" in zero.judge([heartbeat(1, **other)], 1.0)


def test_a_suspended_job_has_lost_nobody(ranks, monkeypatch):
    zero, _ = ranks()
    asked: list[float] = []
    monkeypatch.setattr(zero, "judge", lambda others, elapsed: asked.append(elapsed))
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(hours))
    threading.Timer(0.5, zero.finish, [KeyError()]).start()
    zero._run()
    assert asked and max(asked) <= 2 * zero.interval


def test_another_line_of_code_or_a_mark_is_movement(ranks):
    zero, _ = ranks()
    go = threading.Event()
    waiting = threading.Thread(target=lambda: (go.wait(), time.sleep(30)), daemon=True)
    waiting.start()
    zero.main = waiting.ident
    time.sleep(0.2)
    for _ in range(3):
        zero.look(5.0)
    assert zero.own.still == 10.0 and "threading.py" in zero.own.where and zero.own.where.endswith("in wait")
    zero.own.marks += 1
    zero.look(5.0)
    assert zero.own.still == 0.0
    go.set()
    time.sleep(0.5)
    zero.look(5.0)
    assert zero.own.still == 0.0 and "in <lambda>" in zero.own.where


def test_rank_0_waits_at_the_end_until_the_others_are_through(ranks):
    zero, one = ranks()
    for watchdog in (zero, one):
        watchdog.start()
    threading.Timer(0.5, one.finish).start()
    started = time.monotonic()
    zero.finish()
    assert 0.4 < time.monotonic() - started < 5


@pytest.mark.parametrize("dead", [0, 1])
def test_after_the_error_of_a_collective_the_dead_rank_is_named_once_and_all_leave(ranks, monkeypatch, capsys, dead):
    monkeypatch.setattr(module, "GONE_AFTER", 0.5)
    survivors = ranks(count=3)
    gone = survivors.pop(dead)  # posts no heartbeat any more
    for watchdog in survivors:
        watchdog.start()
    for watchdog in survivors:
        threading.Thread(target=watchdog.finish, args=(CLOSED,)).start()
    for watchdog in survivors:
        watchdog._thread.join(timeout=20)
        assert not watchdog._thread.is_alive() and watchdog.store.get("verdict")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"lavis-mafa: {gone.own.name} died" in said and "--resume auto" in said


def test_a_collective_that_timed_out_names_who_has_not_come(ranks, capsys):
    zero, one = ranks()
    one.own.marks += 1
    for watchdog in (zero, one):
        watchdog.start()
    one.finish(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    zero._thread.join(timeout=20)
    assert f"a collective timed out. The others wait for {zero.own.name}, starting" in capsys.readouterr().err


@pytest.mark.parametrize("error", [CLOSED, RuntimeError("size mismatch")])
def test_an_error_with_all_ranks_alive_stays_what_it_is(ranks, monkeypatch, capsys, error):
    monkeypatch.setattr(module, "GONE_AFTER", 0.5)
    zero, one = ranks()
    for watchdog in (zero, one):
        watchdog.start()
    one.finish(error)
    assert not one.store.get("verdict") and not capsys.readouterr().err


def test_a_single_process_has_no_watchdog():
    before = threading.active_count()
    with rank_watch(0.1, Path("nowhere")):
        mark("training")
        assert threading.active_count() == before
    assert list(marked("abc", epoch=0)) == ["a", "b", "c"]


def test_ranks_that_would_talk_differently_are_refused_before_they_wait_for_each_other():
    store, said = dist.HashStore(), {}

    def check(rank: int) -> None:
        try:
            check_backends(store, rank, 3, "gloo" if rank == 2 else "nccl")
        except UserError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert said.keys() == {0, 2} and said[0] == said[2]
    assert "nccl on rank 0 (" in said[0] and "gloo on rank 2 (" in said[0]
