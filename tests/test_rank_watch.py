"""Who died, who hangs, and who holds the others up: what a watch concludes from signs of life."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lavis_mafa.distributed import check_backends
from lavis_mafa.errors import RankLost, UserError
from lavis_mafa.runners import watchdog as rank_thread
from lavis_mafa.runners.watchdog import (
    DEAD_AFTER,
    DONE,
    FAILED,
    GONE_AFTER,
    LOST,
    RankThread,
    Sign,
    Stillness,
    death,
    hang,
    mark,
    marked,
    rank_watch,
)

CLOSED = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:50381.")


def sign(rank: int, **changes: Any) -> Sign:
    return dataclasses.replace(Sign(rank, "host", "elsewhere", 100 + rank), **changes)


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """Watches of two ranks in this process, which end with an exception in place of the process."""
    store, made = dist.HashStore(), []

    def make(timeout: float = 1000.0) -> list[RankThread]:
        for rank in range(2):
            monkeypatch.setattr(RankThread, "number", 0)
            made.append(RankThread(store, rank, 2, timeout, tmp_path))
            made[-1].post()
        return made

    def exit_thread() -> None:
        raise SystemExit(RankLost.EXIT_CODE)

    monkeypatch.setattr(rank_thread, "end_process", exit_thread)
    yield make
    for watch in made:
        watch._end.set()


def signs_of(*watches: RankThread) -> list[Sign]:
    return [Sign.read(watches[0].store.get(str(watch.rank))) for watch in watches]


# --- what signs say --------------------------------------------------------------------------------------------------


def test_a_sign_survives_the_store():
    one = sign(3, beat=5, phase="évaluating val", still=1.5)
    assert Sign.read(one.write().encode()) == one


def test_a_hang_is_when_no_running_rank_moves():
    assert hang([sign(0, still=9.0), sign(1, still=11.0)], 10.0) is None
    assert hang([sign(0, still=0.0, state=DONE), sign(1, still=11.0)], 10.0) is not None
    assert hang([sign(0, still=50.0, state=DONE), sign(1, still=50.0, state=FAILED)], 10.0) is None


def test_the_rank_with_the_fewest_marks_is_named():
    late = sign(2, still=40.0, progress=8, phase="loading data, epoch 1 step 37", where="a/b.py:3 in read")
    message = hang([sign(0, still=41.0, progress=9, phase="training"), sign(1, still=40.0, progress=9), late], 40.0)
    assert message == (
        "no rank has moved for 40 s. rank 2 (host, pid 102) holds the others up: loading data, epoch 1 step 37; "
        "at a/b.py:3 in read. Rank 0 waits: training."
    )
    several = hang([sign(rank, still=40.0, progress=int(rank == 0)) for rank in range(9)], 40.0)
    assert several is not None and "rank 4 (host, pid 104) and 4 more hold the others up" in several and "rank 5" not in several


def test_where_all_passed_the_same_marks_each_place_is_told():
    message = hang([sign(0, still=40.0, where="x.py:1 in f"), sign(1, still=40.0, where="y.py:2 in g")], 40.0)
    assert message is not None and "All passed the same marks" in message
    assert "rank 0 (host, pid 100) is starting; at x.py:1 in f, rank 1 (host, pid 101) is starting; at y.py:2 in g" in message


def test_a_process_of_this_machine_is_known_to_be_gone_also_before_it_is_collected():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = dataclasses.replace(Sign.own(0), pid=child.pid)
    assert not own.process_is_gone and not Sign.own(0).process_is_gone
    child.kill()
    deadline = time.monotonic() + 10
    while not own.process_is_gone and time.monotonic() < deadline:  # it is a zombie now: nobody waited for it
        time.sleep(0.01)
    assert own.process_is_gone
    child.wait()
    assert own.process_is_gone
    assert not dataclasses.replace(own, place="elsewhere").process_is_gone


# --- what a watch concludes ------------------------------------------------------------------------------------------


def test_silence_is_death_after_a_stated_time(ranks):
    watch, _ = ranks()
    other = sign(1, beat=1, phase="training, epoch 0 step 3")
    assert watch.judge([other], 2.0) is None
    assert watch.judge([other], DEAD_AFTER - 1.0) is None
    assert watch.judge([dataclasses.replace(other, beat=2)], 5.0) is None
    assert watch.judge([dataclasses.replace(other, beat=2)], DEAD_AFTER - 1.0) is None
    kind, message = watch.judge([dataclasses.replace(other, beat=2)], 1.0)
    assert kind == "death"
    assert message == "rank 1 (host, pid 101) died or cannot be reached: last sign of life 90 s ago, training, epoch 0 step 3."


@pytest.mark.parametrize("state", [DONE, LOST, "stopped"])
def test_a_rank_that_left_is_not_called_dead(ranks, state):
    watch, _ = ranks()
    for _ in range(5):
        assert watch.judge([sign(1, beat=1, state=state)], DEAD_AFTER) is None


def test_a_process_that_is_gone_and_an_error_are_told_sooner(ranks):
    watch, _ = ranks()
    gone = dataclasses.replace(Sign.own(1), pid=2**22 + 1, beat=1, phase="training")
    for other, word in ((gone, "died, last seen training"), (sign(1, beat=2, state=FAILED), "ended with an error while starting")):
        assert watch.judge([other], 0.0) is None
        assert watch.judge([other], GONE_AFTER - 1.0) is None
        assert word in watch.judge([other], 1.0)[1]


def test_the_first_signs_after_a_suspended_machine_wakes_up_are_not_taken_for_silence(ranks, monkeypatch):
    watch, other = ranks()
    asked: list[float] = []
    monkeypatch.setattr(watch, "judge", lambda signs, elapsed: asked.append(elapsed))
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(rank_thread.time, "monotonic", lambda: next(hours))
    monkeypatch.setattr(watch, "interval", 0.01)
    threading.Timer(0.1, watch._end.set).start()
    watch._run()
    assert asked and max(asked) <= 0.02


def test_another_line_of_code_or_a_mark_is_movement():
    go = threading.Event()
    waiting = threading.Thread(target=lambda: (go.wait(), time.sleep(30)), daemon=True)
    waiting.start()
    assert waiting.ident is not None
    time.sleep(0.2)
    stillness = Stillness(waiting.ident)
    for _ in range(3):
        stillness.look(5.0, progress=0)
    assert stillness.seconds == 10.0 and "threading.py" in stillness.where and stillness.where.endswith("in wait")
    stillness.look(5.0, progress=1)
    assert stillness.seconds == 0.0
    stillness.look(5.0, progress=1)
    go.set()
    time.sleep(0.5)
    stillness.look(5.0, progress=1)
    assert stillness.seconds == 0.0 and "in <lambda>" in stillness.where


def test_a_hang_is_said_once_and_ends_all_ranks_with_their_stacks_written(ranks, capsys, tmp_path):
    zero, one = ranks(timeout=0.5)
    zero.progress, zero.phase, one.phase = 4, "training, epoch 0 step 4", "loading data, epoch 0 step 4"
    hangs = threading.Event()
    for watch in (zero, one):
        stuck = threading.Thread(target=hangs.wait, daemon=True)
        stuck.start()
        watch.stillness.thread = stuck.ident
        watch.start()
    for watch in (zero, one):
        watch._thread.join(timeout=20)
        assert not watch._thread.is_alive()
    hangs.set()
    said = capsys.readouterr().err
    assert said.count("lavis-mafa:") == 1 and said.count("\n") == 1
    assert f"rank 1 ({one.own.host}, pid {os.getpid()}) holds the others up: loading data, epoch 0 step 4; at " in said
    assert "hang_rank*.txt" in said and "run.rank_timeout_minutes" in said and "--resume auto" in said
    for rank in range(2):
        text = (tmp_path / f"hang_rank{rank}.txt").read_text()
        assert text.startswith(f"rank {rank} (") and "Thread 0x" in text and "in wait" in text


def test_rank_0_waits_at_the_end_until_the_others_are_through(ranks):
    zero, one = ranks()
    for watch in (zero, one):
        watch.start()
    threading.Timer(0.5, one.finished).start()
    started = time.monotonic()
    zero.finished()
    assert 0.4 < time.monotonic() - started < 5
    assert [s.state for s in signs_of(zero, one)] == [DONE, DONE]


# --- errors of the main thread ---------------------------------------------------------------------------------------


def test_the_error_of_a_collective_becomes_the_name_of_the_rank_that_died(ranks):
    zero, one = ranks()
    zero.start()
    one.own = dataclasses.replace(one.own, pid=2**22 + 1)
    one.phase = "training, epoch 0 step 3"
    one.post()
    with pytest.raises(RankLost, match=rf"^rank 1 \(.*, pid {2**22 + 1}\) died, last seen training, epoch 0 step 3.*--resume auto"):
        zero.failed(CLOSED)
    assert signs_of(zero)[0].state == LOST


def test_only_one_of_the_survivors_speaks(ranks):
    zero, one = ranks()
    zero.start()
    one.post(FAILED)
    assert one._first_to_speak()
    with pytest.raises(RankLost, match="^$"):
        zero.failed(CLOSED)


def test_an_error_of_ones_own_stays_what_it_is(ranks):
    zero, one = ranks()
    for watch in (zero, one):
        watch.start()
    zero.failed(RuntimeError("size mismatch"))
    one.failed(KeyboardInterrupt())
    assert [s.state for s in signs_of(zero, one)] == [FAILED, "stopped"]
    assert "ended with an error" in death(signs_of(zero)[0])


def test_a_collective_that_timed_out_names_who_has_not_come(ranks):
    zero, one = ranks()
    one.progress += 1
    for watch in (zero, one):
        watch.start()
    with pytest.raises(RankLost, match="^a collective timed out. rank 0 .* holds the others up: starting"):
        one.failed(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))


def test_a_collective_that_failed_while_all_live_stays_what_it_is(ranks, monkeypatch):
    monkeypatch.setattr(rank_thread, "GONE_AFTER", 0.5)
    zero, one = ranks()
    zero.interval = one.interval = 0.02
    for watch in (zero, one):
        watch.start()
    zero.failed(CLOSED)
    assert signs_of(zero, one)[0].state == FAILED


def test_a_single_process_has_no_watch():
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
