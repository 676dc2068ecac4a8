"""A job of several ranks ends within a stated time when one of them dies or hangs, and says which.

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
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from lavis_mafa.common.distributed import barrier, rank, world_size
from lavis_mafa.common.rank_thread import RankThread

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
