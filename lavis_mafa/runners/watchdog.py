"""A job of several ranks ends within a stated time when one of them dies or hangs, and says which.

torchrun and mpirun end a job at once when one of its processes ends. For ranks that nobody looks after (srun, a cluster) and for those
that hang, each rank has a watchdog, a thread that puts a heartbeat into the ranks' common store: what the main thread does, and for how
long it has not moved, which is to pass a :func:`mark` or to be at another line of Python. Rank 0's watchdog reads all heartbeats, the
others' read rank 0's. The other ranks have ended, with exit code 3, after a rank

- failed, or was killed and a collective reports it (gloo): ``GONE_AFTER``;
- was lost with its machine or network, or was killed and nothing reports it (nccl): ``DEAD_AFTER``;
- hangs: ``run.rank_timeout_minutes`` in which no rank moves. Each rank's stacks are then in ``hang_rank<r>.txt``. A rank that is busy
  without end is stopped by the process group's own timeout.

Up to ten seconds more may pass, in which heartbeats are read and stacks written.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from lavis_mafa import signals as interrupt
from lavis_mafa.distributed import barrier, rank, world_size
from lavis_mafa.errors import RankLost

INTERVAL = 2.0  # seconds between two heartbeats
GONE_AFTER = 10.0  # seconds without a heartbeat of a rank that said it failed, or of any once a collective failed
DEAD_AFTER = 90.0  # of any other: a single call can keep Python's lock for that long (parsing a JSON file of gigabytes)
NAMED = 4  # ranks in one message
RUNNING, ENDED, FAILED = "running", "ended", "failed"
OF_A_COLLECTIVE = re.compile("gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|Socket Timeout")


@dataclass
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    name: str
    number: int = 0  # of this heartbeat
    marks: int = 0  # that it passed; ranks pass the same ones in the same order
    phase: str = "starting"  # the last of them
    where: str = ""  # file, line and function it is in
    still: float = 0.0  # seconds it has been there
    state: str = RUNNING
    alarm: str = ""  # what a collective reported: "lost" or "timeout"

    def __str__(self) -> str:
        return f"{self.name}, {self.phase}, at {self.where}"


class Watchdog:
    """What a rank posts, reads and concludes. ``store`` is a client that nobody else uses, ``timeout`` in seconds."""

    count = 0  # of watchdogs in this process, which is the same on all ranks

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float, folder: Path) -> None:
        Watchdog.count += 1
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after which torchrun's store is still the same
        self.store = dist.PrefixStore(f"lavis_mafa/{restart}/{Watchdog.count}", store)
        self.rank, self.timeout, self.folder = rank, timeout, folder
        self.watched = [str(r) for r in range(1, world_size)] if rank == 0 else ["0"]
        self.own = Heartbeat(rank, f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})")
        self.main = threading.get_ident()
        self.interval = min(INTERVAL, timeout / 5)
        self._place: list[Any] = []
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> number of its last heartbeat, and seconds since then
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.store.set("verdict", "")
        self._post()

    def start(self) -> None:
        """When all ranks have one, so that no reader waits."""
        faulthandler.dump_traceback_later(DEAD_AFTER, file=2)  # the thread puts it off again and again, from its first heartbeat on
        self._thread.start()

    def finish(self, error: BaseException | None = None) -> None:
        """The main thread is through, or ends with an error; this does not return when the error turns out to be another rank's.

        Rank 0, which may keep the store for all, stays until the others are through.
        """
        self.own.state = FAILED if isinstance(error, Exception) and not interrupt.asked() else ENDED
        if self.own.state == FAILED and isinstance(error, RuntimeError) and OF_A_COLLECTIVE.search(str(error)):
            self.own.alarm = "timeout" if "imed out" in str(error) else "lost"
            self._thread.join(GONE_AFTER + 3 * self.interval)
        self._end.set()
        self._thread.join(GONE_AFTER if error else None)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        try:
            while True:
                ended = self._end.wait(self.interval)
                # at most two intervals: a job that was suspended as a whole has lost nobody
                elapsed, before = min(time.monotonic() - before, 2 * self.interval), time.monotonic()
                # where a call in C keeps Python's lock, this thread stops too: its stack says where when the others miss its heartbeat
                faulthandler.dump_traceback_later(DEAD_AFTER, file=2)
                self.look(elapsed)
                self._post()
                verdict, *texts = self.store.multi_get(["verdict", *self.watched])
                others = [Heartbeat(**json.loads(text)) for text in texts]
                message = self.judge(others, elapsed)
                if message is not None and self.store.add("verdicts", 1) == 1:
                    say(message)
                    self.store.set("verdict", message)
                if verdict or message is not None:
                    self._leave()
                others_need_the_store = self.rank == 0 and any(one.state == RUNNING for one in others)
                if ended and (self.own.state == FAILED or not others_need_the_store):
                    return
                time.sleep(0.1 if ended else 0)
        except RuntimeError:  # of the store
            if not self._end.wait(GONE_AFTER):  # else rank 0 was through, and so are we
                place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
                say(f"rank 0 or the launcher on its machine is gone: {place}, where the ranks find each other, does not answer.")
                interrupt.end_process(RankLost.EXIT_CODE)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _post(self) -> None:
        self.own.number += 1
        self.store.set(str(self.rank), json.dumps(vars(self.own)))

    def look(self, elapsed: float) -> None:
        """Where the main thread is, and whether it moved in the seconds that elapsed; a call that waits does not. Takes 0.03 ms."""
        frames = list(traceback.walk_stack(sys._current_frames()[self.main]))
        # a line that is reached again in another call is the same place
        place = [self.own.marks, *((frame.f_code, frame.f_lasti) for frame, _ in frames)]
        self.own.still = self.own.still + elapsed if place == self._place else 0.0
        self._place = place
        code, line = frames[0][0].f_code, frames[0][1]
        self.own.where = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{line} in {code.co_name}"

    def judge(self, others: Sequence[Heartbeat], elapsed: float) -> str | None:
        """What there is to say of heartbeats that were read ``elapsed`` seconds after those before."""
        everyone = [self.own, *others]
        alarm = max(one.alarm for one in everyone)
        for one in others:
            number, silent = self._heard.get(one.rank, (0, 0.0))
            silent = silent + elapsed if number == one.number else 0.0
            self._heard[one.rank] = one.number, silent
            if one.state == FAILED and silent >= GONE_AFTER:
                return f"{one.name} ended with an error while {one.phase}; its own message says which."
            if one.state == RUNNING and silent >= (GONE_AFTER if alarm else DEAD_AFTER):
                return f"{one.name} died or cannot be reached (out of memory?): no heartbeat for {silent:.0f} s, last seen {one.phase}."
        if self.rank == 0 and alarm == "timeout":
            return f"a collective timed out. {who_is_behind(everyone)}"
        running = [one for one in everyone if one.state == RUNNING]
        if self.rank == 0 and running and (still := min(one.still for one in running)) >= self.timeout:
            stacks = f"Where each rank is: {self.folder}/hang_rank*.txt. run.rank_timeout_minutes is {self.timeout / 60:g}."
            return f"no rank has moved for {still:.0f} s. {who_is_behind(running)} {stacks}"
        return None

    def _leave(self) -> NoReturn:
        if self.own.state == RUNNING:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"hang_rank{self.rank}.txt", "w") as file:
                    print(f"{self.own}, for {self.own.still:.0f} s\n", file=file, flush=True)
                    faulthandler.dump_traceback(file)
            except OSError:  # a full or lost disk may be why it hangs
                faulthandler.dump_traceback(2)
        time.sleep(2 * self.interval)  # the others write theirs: a launcher ends them with the first that goes
        interrupt.end_process(RankLost.EXIT_CODE)


def who_is_behind(ranks: Sequence[Heartbeat]) -> str:
    """Who passed the fewest marks, and what it does: in a collective all others wait for it."""
    fewest = min(one.marks for one in ranks)
    behind = [one for one in ranks if one.marks == fewest]
    more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
    names = "; ".join(map(str, behind[:NAMED])) + more
    return f"The others wait for {names}." if len(behind) < len(ranks) else f"All passed the same marks: {names}."


def say(message: str) -> None:
    print(f"lavis-mafa: {message} Start again from the last checkpoint with --resume auto.", file=sys.stderr, flush=True)


_running: Watchdog | None = None


def mark(phase: str) -> None:
    """Say what this rank does from now on, e.g. ``evaluating val``. All ranks pass the same marks in the same order."""
    if _running is not None:
        _running.own.phase = phase
        _running.own.marks += 1


def marked(batches: Iterable[Any], epoch: int, first_step: int = 0) -> Iterator[Any]:
    """The batches of a training loader, with marks for waiting for each and for what is done with it."""
    mark(f"loading data, epoch {epoch} step {first_step}")
    for step, batch in enumerate(batches, first_step):
        mark(f"training, epoch {epoch} step {step}")
        yield batch
        mark(f"loading data, epoch {epoch} step {step + 1}")


@contextlib.contextmanager
def rank_watch(timeout_minutes: float, folder: Path | None = None, url: str = "env://") -> Iterator[None]:
    """Inside, this rank watches and is watched; ``hang_rank<r>.txt`` goes into ``folder`` or the working directory.

    For a single process it does nothing; inside of another such context it only sets the folder.
    """
    global _running
    if _running is not None or world_size() == 1:
        if _running is not None and folder is not None:
            _running.folder = folder
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    store, _, _ = next(rendezvous(url, rank(), world_size(), timeout=timedelta(seconds=60)))  # a connection of its own
    watchdog = _running = Watchdog(store, rank(), world_size(), 60 * timeout_minutes, folder or Path.cwd())
    barrier()
    watchdog.start()
    try:
        yield
    except BaseException as error:
        watchdog.finish(error)
        raise
    else:
        watchdog.finish()
    finally:
        _running = None
