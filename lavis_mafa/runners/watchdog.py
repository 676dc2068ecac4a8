"""For how long a thread has been at one and the same place in its Python code.

Signs of life of the ranks of a job, and what they say about who died and who holds the others up.

The thread with which one rank watches others and shows itself; see ``rank_watch``.

A job of several ranks ends within a stated time when one of them dies or hangs, and says which.

Each rank has a thread that tells the others, through a store, what its main thread does; ``mark`` is all that the main thread calls.
Rank 0's thread looks at all ranks, the others' at rank 0, so traffic grows with the number of ranks and not with its square.

How long it takes until the others have ended, with exit code 3, after a rank

- was killed or failed, where a collective reports that (gloo): at once on the same machine, else ``GONE_AFTER``;
- was killed on rank 0's machine, or raised an error, and nothing reports it (nccl): ``GONE_AFTER``;
- was lost with its machine or network: ``DEAD_AFTER``;
- hangs: ``run.rank_timeout_minutes`` in which no rank moves. To move is to pass a mark or to be at another line of Python. Each
  rank's stacks are then in ``hang_rank<r>.txt``. A rank that is busy without end is stopped by the process group's own timeout.

Up to ten seconds more may pass, in which signs are read and stacks written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from lavis_mafa import signals as interrupt
from lavis_mafa.distributed import barrier, rank, world_size
from lavis_mafa.errors import RankLost


class Stillness:
    """Looks at a thread from outside; a call that waits, for another rank or for a disk, does not move.

    Args:
        thread: its number, as ``threading.get_ident`` gives it.

    Attributes:
        seconds: it did not move, as of the last look.
        where: the innermost file, line and function.
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.seconds, self.where = 0.0, ""
        self._place: list[tuple[int, int]] = []

    def look(self, elapsed: float, progress: int) -> None:
        """Look again, ``elapsed`` seconds after the last time; another ``progress`` is movement too. Takes 0.03 ms."""
        innermost = frame = sys._current_frames().get(self.thread)
        place = [(progress, 0)]
        while frame is not None:
            place.append((id(frame.f_code), frame.f_lasti))  # a line that is reached again in another call is the same place
            frame = frame.f_back
        self.seconds = self.seconds + elapsed if place == self._place else 0.0
        self._place = place
        if innermost is not None:
            file = "/".join(Path(innermost.f_code.co_filename).parts[-2:])
            self.where = f"{file}:{innermost.f_lineno} in {innermost.f_code.co_name}"


RUNNING, DONE, STOPPED, FAILED, LOST = "running", "done", "stopped", "failed", "lost"
AGAIN = "Start again from the last checkpoint with --resume auto."
NAMED = 4  # ranks in one message


@dataclass(frozen=True)
class Sign:
    """What a rank says about itself every few seconds."""

    rank: int
    host: str
    place: str  # where its process number means something: host and container
    pid: int
    beat: int = 0  # number of this sign
    progress: int = 0  # how many marks it passed; ranks pass the same ones in the same order
    phase: str = "starting"  # the last of them
    where: str = ""  # file, line and function it is in
    still: float = 0.0  # seconds it has been at that very place
    state: str = RUNNING  # DONE; STOPPED: was asked to; FAILED: of its own error; LOST: for another's

    @classmethod
    def own(cls, rank: int) -> Sign:
        """The first sign of this process."""
        return cls(rank, socket.gethostname(), own_place(), os.getpid())

    @classmethod
    def read(cls, text: bytes) -> Sign:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        return f"{self.phase}; at {self.where}" if self.where else self.phase

    @property
    def process_is_gone(self) -> bool:
        """Whether this machine knows that the process ended; a rank elsewhere can only fall silent."""
        if self.place != own_place():
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"  # ended, but not collected
        except (FileNotFoundError, ProcessLookupError):
            return Path("/proc/self/stat").exists()


def own_place() -> str:
    """Host and, where there is such a thing, the container's numbering of processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def hang(signs: Sequence[Sign], seconds: float) -> str | None:
    """The message where no running rank has moved for ``seconds``, else None.

    Example:
        >>> hang([Sign(0, "a", "a", 7, progress=9, still=60.0), Sign(1, "b", "b", 8, progress=8, still=61.0)], 60.0)
        'no rank has moved for 60 s. rank 1 (b, pid 8) holds the others up: starting. Rank 0 waits: starting.'
    """
    running = [sign for sign in signs if sign.state == RUNNING]
    if not running or min(sign.still for sign in running) < seconds:
        return None
    return f"no rank has moved for {min(sign.still for sign in running):.0f} s. {who_is_behind(running)}"


def who_is_behind(running: Sequence[Sign]) -> str:
    """Who passed the fewest marks, and what it does; in a collective all others wait for it.

    Where all passed the same ones, each rank's place is told.
    """
    fewest = min(sign.progress for sign in running)
    behind = [sign for sign in running if sign.progress == fewest]
    waiting = [sign for sign in running if sign.progress > fewest]
    more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
    if not waiting:
        return f"All passed the same marks: {', '.join(f'{sign.name} is {sign.doing}' for sign in behind[:NAMED])}{more}."
    names = ", ".join(sign.name for sign in behind[:NAMED]) + more
    verb = "holds" if len(behind) == 1 else "hold"
    return f"{names} {verb} the others up: {behind[0].doing}. Rank {waiting[0].rank} waits: {waiting[0].doing}."


def death(sign: Sign, silent: float | None = None) -> str:
    """The message about a rank that is no more, or has not been heard of for ``silent`` seconds."""
    if sign.state == FAILED:
        return f"{sign.name} ended with an error while {sign.phase}; its own message says which."
    if sign.state == STOPPED:
        return f"{sign.name} was stopped while {sign.phase}."
    if silent is None:
        return f"{sign.name} died, last seen {sign.phase}. The system's log may say why (out of memory?)."
    return f"{sign.name} died or cannot be reached: last sign of life {silent:.0f} s ago, {sign.phase}."


INTERVAL = 2.0  # seconds between two signs
GONE_AFTER = 10.0  # seconds of silence of a rank that said it failed, or whose process this machine knows to be gone
DEAD_AFTER = 90.0  # of any other: a single call can keep Python's lock for that long (parsing a JSON file of gigabytes)
SOON = 0.2  # seconds between looks at ranks that are about to finish
OF_A_COLLECTIVE = re.compile("gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|Socket Timeout")


class RankThread:
    """What a rank posts, reads and concludes.

    Args:
        store: a client that nobody else uses.
        rank, world_size: of this process.
        timeout: seconds in which some rank must move.
        folder: for ``hang_rank<r>.txt``.
    """

    number = 0  # of watches in this process, which is the same on all ranks

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float, folder: Path) -> None:
        RankThread.number += 1
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after which torchrun's store is still the same
        self.store = dist.PrefixStore(f"lavis_mafa/{restart}/{RankThread.number}", store)
        self.own = Sign.own(rank)
        self.rank, self.world_size, self.timeout, self.folder = rank, world_size, timeout, folder
        self.interval = min(INTERVAL, timeout / 5)
        self.progress, self.phase = 0, "starting"
        self.watched = [r for r in range(world_size) if r != rank] if rank == 0 else [0]
        self.heard: dict[int, tuple[int, float]] = {}  # rank -> number of its last sign, and for how long there was no other
        self.stillness = Stillness(threading.get_ident())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    # --- called by the main thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def post(self, state: str = RUNNING) -> None:
        """Show what this rank does."""
        if self.rank == 0 and self.own.beat == 0:
            self.store.set("verdict", "")
        self.own = dataclasses.replace(self._now(), beat=self.own.beat + 1, state=state)
        self.store.set(str(self.rank), self.own.write())

    def finished(self) -> None:
        """This rank is through. Rank 0, which may keep the store for all, waits here until the others are too."""
        self._end_thread(DONE)
        if self.rank != 0:
            return
        try:
            signs, before = self._read(self.watched), time.monotonic()
            while any(sign.state == RUNNING for sign in signs):
                time.sleep(min(SOON, self.interval))
                elapsed, before = time.monotonic() - before, time.monotonic()
                self._conclude(self.judge(signs, min(elapsed, 2 * self.interval)), signs)
                signs = self._read(self.watched)
        except RuntimeError:  # the launcher is gone, and we were about to go
            return

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error.

        Raises:
            RankLost: it is the error of a collective, and another rank is missing.
        """
        collective = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or OF_A_COLLECTIVE.search(str(error)))
        message = self._find_missing(str(error)) if collective else None
        if message is None:
            self._end_thread(FAILED if isinstance(error, Exception) and not interrupt.asked() else STOPPED)
            return
        first = self._first_to_speak()
        self._end_thread(LOST)
        raise RankLost(f"{message} {AGAIN}" if first else "") from error

    def _end_thread(self, state: str) -> None:
        self._end.set()
        self._thread.join(timeout=GONE_AFTER)
        try:
            self.post(state)
        except RuntimeError:  # nobody is left to read it
            return

    def _find_missing(self, error: str) -> str | None:
        """Look for the cause of a collective's error until it shows."""
        started = time.monotonic()
        numbers: dict[int, int] = {}
        while (passed := time.monotonic() - started) < GONE_AFTER:
            try:
                signs = [sign for sign in self._read(range(self.world_size)) if sign.rank != self.rank]
            except RuntimeError:
                return self._store_message()
            for sign in signs:
                silent = passed if numbers.setdefault(sign.rank, sign.beat) == sign.beat else 0.0
                if sign.state == STOPPED and interrupt.asked():
                    return None  # and so were we
                if sign.state in (FAILED, STOPPED) or (sign.state == RUNNING and sign.process_is_gone):
                    return death(sign)
                if sign.state == RUNNING and silent > 4 * self.interval:
                    return death(sign, silent)
            if "imed out" in error:
                return f"a collective timed out. {who_is_behind([self._now(), *signs])}"
            time.sleep(0.1)
        return None

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self.interval):
            # at most two intervals: a job that was suspended as a whole has lost nobody
            elapsed, before = min(time.monotonic() - before, 2 * self.interval), time.monotonic()
            self.stillness.look(elapsed, self.progress)
            try:
                self.post()
                signs, verdict = self._read(self.watched), self.store.get("verdict").decode()
            except RuntimeError:
                if self._end.wait(GONE_AFTER):  # rank 0 was through, and so are we
                    return
                self._say(self._store_message())
                end_process()
            if verdict:
                self._leave(*verdict.split())
            self._conclude(self.judge(signs, elapsed), signs)

    def judge(self, signs: Sequence[Sign], elapsed: float) -> tuple[str, str] | None:
        """What there is to conclude from signs that were read ``elapsed`` seconds after those before.

        Returns:
            ``death`` or ``hang``, and the message.
        """
        for sign in signs:
            beat, silent = self.heard.get(sign.rank, (0, 0.0))
            silent = silent + elapsed if beat == sign.beat else 0.0
            self.heard[sign.rank] = sign.beat, silent
            if silent >= GONE_AFTER and (sign.state == FAILED or (sign.state == RUNNING and sign.process_is_gone)):
                return "death", death(sign)
            if silent >= DEAD_AFTER and sign.state == RUNNING:
                return "death", death(sign, silent)
        message = hang([self.own, *signs], self.timeout) if self.rank == 0 else None
        if message is None:
            return None
        stacks = f"Where each rank is: {self.folder}/hang_rank*.txt."
        return "hang", f"{message} {stacks} run.rank_timeout_minutes is {self.timeout / 60:g}."

    def _conclude(self, verdict: tuple[str, str] | None, signs: Sequence[Sign]) -> None:
        if verdict is None:
            return
        kind, message = verdict
        others = sum(sign.state == RUNNING for sign in signs) if self.rank == 0 else self.world_size - 1
        if self._first_to_speak():
            self._say(message)
        living = str(others + (kind == "hang"))
        with contextlib.suppress(RuntimeError):  # the store is gone too
            self.store.set("verdict", f"{kind} {living}")
        self._leave(kind, living)

    def _leave(self, kind: str, living: str) -> NoReturn:
        """End this process when the other living ones have read the verdict too: a launcher ends them with the first that goes."""
        if kind == "hang":
            self._write_stacks()
        started = time.monotonic()
        with contextlib.suppress(RuntimeError):
            left = self.store.add("left", 1)
            while left < int(living) and time.monotonic() - started < 3 * self.interval:
                time.sleep(0.05)
                left = self.store.add("left", 0)
        end_process()

    def _write_stacks(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"hang_rank{self.rank}.txt", "w") as file:
                file.write(f"{self.own.name}: {self.own.doing}, for {self.own.still:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a full or lost disk may be why it hangs
            faulthandler.dump_traceback(all_threads=True)

    def _now(self) -> Sign:
        still, where = self.stillness.seconds, self.stillness.where
        return dataclasses.replace(self.own, progress=self.progress, phase=self.phase, still=still, where=where)

    def _read(self, ranks: Sequence[int]) -> list[Sign]:
        return [Sign.read(text) for text in self.store.multi_get([str(r) for r in ranks])]

    def _first_to_speak(self) -> bool:
        try:
            return self.store.add("spoken", 1) == 1
        except RuntimeError:
            return True

    def _store_message(self) -> str:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        return f"rank 0 or the launcher on its machine is gone: {place}, where the ranks find each other, does not answer."

    def _say(self, message: str) -> None:
        print(f"lavis-mafa: {message} {AGAIN}", file=sys.stderr, flush=True)


def end_process() -> NoReturn:
    """Without the interpreter's own way out, which would wait for a main thread that hangs, perhaps in writing to stdout."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(RankLost.EXIT_CODE)


_running: RankThread | None = None


def mark(phase: str) -> None:
    """Say what this rank does from now on, e.g. ``evaluating val``. All ranks pass the same marks in the same order.

    Takes a fraction of a microsecond, and does nothing where no watch runs.
    """
    if _running is not None:
        _running.phase = phase
        _running.progress += 1


def marked(batches: Iterable[Any], epoch: int, first_step: int = 0) -> Iterator[Any]:
    """The batches of a training loader, with marks for waiting for each and for what is done with it.

    Example:
        >>> for samples in marked(loader, epoch):
        ...     train_on(samples)
    """
    iterator, step = iter(batches), first_step
    while True:
        mark(f"loading data, epoch {epoch} step {step}")
        try:
            batch = next(iterator)
        except StopIteration:
            return
        mark(f"training, epoch {epoch} step {step}")
        yield batch
        step += 1


@contextlib.contextmanager
def rank_watch(timeout_minutes: float, folder: Path | None = None, url: str = "env://") -> Iterator[None]:
    """Inside, this rank watches and is watched. For a single process it does nothing; inside of another it only sets ``folder``.

    Args:
        timeout_minutes: ``run.rank_timeout_minutes``.
        folder: where ``hang_rank<r>.txt`` goes; default: the working directory.
        url: ``run.dist_url``, where the ranks find each other.

    Raises:
        RankLost: in place of a collective's error, where another rank turns out to be missing.

    Example:
        >>> with rank_watch(30.0, output_dir):
        ...     mark("evaluating val")
        ...     evaluate()
    """
    global _running
    if _running is not None or world_size() == 1:
        if _running is not None and folder is not None:
            _running.folder = folder
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    store, _, _ = next(rendezvous(url, rank(), world_size(), timeout=timedelta(seconds=60)))  # a connection of its own
    watch = RankThread(store, rank(), world_size(), 60 * timeout_minutes, folder or Path.cwd())
    watch.post()
    barrier()  # all have posted: from now on no reader waits
    watch.start()
    _running = watch
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise
    else:
        watch.finished()
    finally:
        _running = None
