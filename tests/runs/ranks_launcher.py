"""``python -m lavis_mafa`` of which rank 1 misbehaves: ``ranks_launcher.py HOW ARGUMENTS...``."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from lavis_mafa.cli.main import main

AFTER = 40  # samples: in the middle of the first epoch


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def keep_the_lock() -> None:
    ctypes.PyDLL(None).sleep(30)  # not even the watchdog's thread runs
    os._exit(9)


def on_a_sample(do: Callable[[], None]) -> None:
    """Do it when the AFTERth sample is read, and say when."""
    from lavis_mafa.datasets.pairs import ImageTextPairs

    read, count = ImageTextPairs.__getitem__, iter(range(1, 1_000_000))

    def read_and_do(self, index):
        if next(count) == AFTER:
            print(f"\nat {time.time()}", file=sys.stderr, flush=True)
            do()
        return read(self, index)

    ImageTextPairs.__getitem__ = read_and_do


def one_keeps_the_lock() -> None:
    from lavis_mafa.runners import watchdog as rank_watch

    rank_watch.DEAD_AFTER = 6.0
    if os.environ["RANK"] == "1":
        on_a_sample(keep_the_lock)


def start_differently() -> None:
    sys.argv.append("run.init_lr=0.5")
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.13.1" if name == "torch" else version(name)


def say_threads() -> None:
    atexit.register(lambda: print("threads left:", [thread.name for thread in threading.enumerate()], file=sys.stderr))


def do_not_watch() -> None:
    from lavis_mafa.runners import runner_mafa
    from lavis_mafa.runners import watchdog as rank_watch

    rank_watch.rank_watch = runner_mafa.rank_watch = lambda *_, **__: contextlib.nullcontext()


HOW = {
    "dies": lambda: on_a_sample(die),
    "hangs": lambda: on_a_sample(hang),
    "keeps_the_lock": one_keeps_the_lock,
    "other_start": start_differently,
    "other_data": lambda: sys.argv.append("datasets.grit_emoji.build_info.max_concepts=50"),
    "well": say_threads,
    "unwatched": do_not_watch,
}
ON_ALL_RANKS = ("keeps_the_lock", "well", "unwatched")

if __name__ == "__main__":
    name = sys.argv.pop(1)
    if os.environ["RANK"] == "1" or name in ON_ALL_RANKS:
        HOW[name]()
    sys.exit(main())
