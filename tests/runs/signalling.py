"""The command line, except that this process gets a signal at a chosen moment: ``signalling.py MOMENT NUMBER SIGNAL train ...``.

MOMENT ``step``: in the NUMBERth training step; ``validation``: in the NUMBERth evaluation. Under torchrun the last rank signals:
SIGKILL itself, other signals the launcher, which passes them on to all ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from lavis_mafa import signals as interrupt
from lavis_mafa.cli.main import main


def strike(number: int) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) != ranks - 1:
        return
    # a launcher, or a cluster, signals the whole group, workers of data loaders included
    if ranks > 1 and number != signal.SIGKILL:
        os.kill(os.getppid(), number)
        while not interrupt.asked():  # a busy launcher may take longer than an epoch to pass it on
            time.sleep(0.01)
    elif number == signal.SIGKILL:
        os.kill(os.getpid(), number)
    else:
        os.killpg(0, number)


def at(moment: str, wanted: int, number: int) -> None:
    from lavis_mafa.runners import runner_mafa
    from lavis_mafa.runners.step import Stepper

    count = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == wanted:
                strike(number)
            return function(*arguments, **named)

        return call

    if moment == "step":
        Stepper.__call__ = counted(Stepper.__call__)  # type: ignore[method-assign]
    else:
        runner_mafa.evaluate_split = counted(runner_mafa.evaluate_split)


if __name__ == "__main__":
    moment, wanted, name = sys.argv[1:4]
    del sys.argv[1:4]
    at(moment, int(wanted), signal.Signals[name])
    sys.exit(main())
