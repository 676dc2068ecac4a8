"""The thread with which one rank watches others and shows itself; see ``rank_watch``."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from lavis_mafa.common import interrupt
from lavis_mafa.common.errors import RankLost
from lavis_mafa.common.rank_signs import AGAIN, DONE, FAILED, LOST, RUNNING, STOPPED, Sign, death, hang, who_is_behind
from lavis_mafa.common.stillness import Stillness

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
