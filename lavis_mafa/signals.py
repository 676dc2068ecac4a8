"""Ctrl-C and what a cluster or a terminal sends before it takes a process away end a command for sure, and a training once it is saved:
SIGTERM, SIGUSR1 and SIGUSR2 (Slurm's --signal, submitit), SIGXCPU (a limit of CPU time) and SIGHUP (the terminal was closed).

Python's own way is not enough once a data loader has workers: they are interrupted too and print tracebacks, and an interrupt that
lands in a fork hook or in a ``__del__`` is swallowed, so that the run goes on, fails on its dead workers, or waits for them forever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

PATIENCE = 5.0  # seconds for the normal way out, which closes files and removes what is half written
ONCE_MORE = 1.0  # seconds: a second ctrl-C that comes sooner is the same one, passed on by a launcher
ALWAYS = (signal.SIGINT, signal.SIGTERM)
# where nobody else has taken them: under nohup SIGHUP is ignored, submitit has handlers of its own
IF_FREE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

_first: tuple[int, float] | None = None  # the first signal and when it came
_process = os.getpid()
_own_process = False
_postponed = False
_leaving = threading.Event()
_finishing = threading.Lock()
_goodbye = ""


class Stopped(SystemExit):
    """A signal ended a training, which has saved itself; the exit code is the one shells give to that signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message


def asked() -> int:
    """The number of the signal, or 0: whatever fails after one came fails because of it."""
    return int(_first[0]) if _first is not None else 0


def exit_code() -> int:
    """What shells give to the signal: 130 for ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 129 for SIGHUP."""
    return 128 + (asked() or signal.SIGINT)


def watch(goodbye: str) -> None:
    """From now on the first signal raises ``KeyboardInterrupt`` here, but not in forked workers, and the process ends within
    ``PATIENCE`` seconds whatever becomes of that, or when the checkpoint that is being written is complete. A second ctrl-C ends it
    at once."""
    global _goodbye, _own_process
    _goodbye, _own_process = goodbye, True

    def end_after_patience() -> None:
        _leaving.wait()
        time.sleep(PATIENCE)
        leave()

    threading.Thread(target=end_after_patience, name="signals", daemon=True).start()
    _install()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, the first signal only makes :func:`asked` tell it: who trains looks at it, saves, and raises :class:`Stopped`.

    One that came too late for that raises ``KeyboardInterrupt`` at the end. Works without :func:`watch` too.
    """
    global _postponed, _first
    if not _leaving.is_set():
        _first = None  # of a training that a signal ended earlier in this process
    before = _install()
    _postponed = True
    try:
        yield
    finally:
        _postponed = False
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked():
        if not _own_process:  # a notebook goes on
            raise KeyboardInterrupt
        _leave_soon()


def finished_first() -> threading.Lock:
    """``with finished_first():`` what is done inside (writing a checkpoint), by one thread at a time, is waited for when a signal ends
    the process."""
    return _finishing


def patient_worker(_: int) -> None:
    """``worker_init_fn`` of data loaders: a terminal, torchrun and Slurm signal workers too, whose last batches are still wanted.

    They end with their owner, or when it tells them to. PyTorch would have them end at once, and fail the training.
    """
    for number in (signal.SIGINT, *IF_FREE):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: who sent SIGTERM cannot be known, so it ends a worker
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    owner = os.getppid()

    def listen_to_owner() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so that the thread, which sees the sender, gets it
    threading.Thread(target=listen_to_owner, name="SIGTERM", daemon=True).start()


def leave(at_once: bool = False) -> NoReturn:
    """Wait for what must be finished, say goodbye, and end."""
    if not at_once:
        _finishing.acquire()  # main and the patient thread may both come here: one goes on
    with contextlib.suppress(OSError):
        print(_goodbye, file=sys.stderr, flush=True)
        sys.stdout.flush()
    end_process(exit_code())


def end_process(code: int) -> NoReturn:
    """Without the interpreter's own way out, which would wait for threads, workers, and a main thread that hangs."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _install() -> dict[int, Any]:
    """Take the signals; returns the handlers they had."""
    global _process
    if threading.current_thread() is not threading.main_thread():
        return {}
    _process = os.getpid()
    free = (number for number in IF_FREE if signal.getsignal(number) in (signal.SIG_DFL, _on_signal))
    return {number: signal.signal(number, _on_signal) for number in (*ALWAYS, *free)}


def _on_signal(number: int, _: Any) -> None:
    global _first
    if os.getpid() != _process:  # a forked child: the terminal's ctrl-C is not meant for it
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if _first is not None:
        if number == signal.SIGINT and time.monotonic() - _first[1] > ONCE_MORE and _own_process:
            leave(at_once=True)
        return
    _first = number, time.monotonic()
    if not _postponed:
        _leave_soon()
    try:
        os.write(2, b"\nstopping: this step is finished and the run saved; ctrl-C once more stops at once\n")
    except OSError:  # the terminal is gone: nothing that is said later may end the run before it is saved
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nowhere, output)


def _leave_soon() -> NoReturn:
    sys.unraisablehook = lambda _: None  # half-built loaders complain when they are collected
    _leaving.set()
    raise KeyboardInterrupt
