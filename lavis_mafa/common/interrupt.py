"""Ctrl-C ends the command for sure, with one line.

Python's own way is not enough once a data loader has workers: they are interrupted too and print tracebacks, and an interrupt that
lands in a fork hook or in a ``__del__`` is swallowed, so that the run goes on, fails on its dead workers, or waits for them forever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

EXIT_CODE = 130
PATIENCE = 5.0  # seconds for the normal way out, which closes files and removes what is half written

_asked = False


def asked() -> bool:
    """Whether ctrl-C was pressed: whatever fails after that fails because of it."""
    return _asked


def watch(goodbye: str) -> None:
    """From now on the first ctrl-C raises ``KeyboardInterrupt`` here, but not in forked workers, and the process ends within
    ``PATIENCE`` seconds whatever becomes of that. A second one ends it at once."""
    process = os.getpid()
    reader, writer = os.pipe()  # a lock could be held where the signal arrives; a pipe cannot

    def end_after_patience() -> None:
        os.read(reader, 1)
        time.sleep(PATIENCE)
        leave(goodbye)

    def on_interrupt(*_: Any) -> None:
        global _asked
        if os.getpid() != process:
            return
        if _asked:
            leave(goodbye)
        _asked = True
        sys.unraisablehook = lambda _: None  # half-built loaders complain when they are collected
        os.write(writer, b"x")
        raise KeyboardInterrupt

    threading.Thread(target=end_after_patience, name="ctrl-C", daemon=True).start()
    signal.signal(signal.SIGINT, on_interrupt)


def leave(goodbye: str) -> NoReturn:
    """Say so, end the workers, and end; without the interpreter's own way out, which would wait for threads and workers."""
    print(goodbye, file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(EXIT_CODE)
