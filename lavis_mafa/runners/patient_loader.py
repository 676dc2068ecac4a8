"""A training loader whose workers may be killed (by the kernel, for want of memory): the run saves itself and stops.

PyTorch raises the news of a dead worker in the main thread wherever that is, in the middle of the optimizer's step too, after which
nothing is worth saving. Here it is told only where a batch is waited for, and what is left of the accumulation window is read by this
process itself: a sample depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lavis_mafa.errors import death_of_a_worker


def patient(loader: DataLoader, first_step: int, lost: Callable[[str], None]) -> Iterator[Any]:
    """The loader's batches, those that a lost worker owes included.

    Args:
        loader: with a ``GritSampler``.
        first_step: of the epoch, that the sampler starts with.
        lost: called with what is known about the death.
    """
    step = first_step

    def instead(error: RuntimeError) -> Iterator[Any]:
        if (death := death_of_a_worker(error)) is None:
            raise error
        lost(death)
        return iter(_in_this_process(loader, step))

    try:
        iterator: Iterator[Any] = iter(loader)
    except RuntimeError as error:  # died between two epochs
        iterator = instead(error)
    with _news_while_waiting(loader.num_workers > 0) as waiting:
        while True:
            try:
                with waiting():
                    batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                iterator = instead(error)
                continue
            yield batch
            step += 1


def _in_this_process(loader: DataLoader, step: int) -> DataLoader:
    sampler: Any = loader.sampler
    sampler.start_step = step
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=True,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
    )


@contextlib.contextmanager
def _news_while_waiting(workers: bool) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Inside, PyTorch's handler of SIGCHLD, which raises the news, is called only within the context that this one gives."""
    tell = signal.getsignal(signal.SIGCHLD)
    if not workers or not callable(tell) or threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    listening = False

    def on_death(number: int, frame: Any) -> None:
        if listening:
            tell(number, frame)

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        nonlocal listening
        listening = True
        try:
            tell(signal.SIGCHLD, None)  # of those that died since
            yield
        finally:
            listening = False

    signal.signal(signal.SIGCHLD, on_death)
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGCHLD, tell)
