"""How we speak to a user whose input is wrong: one message, no traceback, exit code 2."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DEATH = re.compile(r"DataLoader worker \(pid.*?(is killed by signal: [\w ]+|exited unexpectedly)")


class UserError(ValueError):
    """A mistake in what the user gave us. The command line prints its message alone and exits with code 2.

    The message names the key or file, the value, what is allowed and, where there is one, the nearest right name. A check that found
    several mistakes says the first, and all of them in ``messages``.
    """

    def __init__(self, message: str, *more: str) -> None:
        super().__init__(message)
        self.messages = (message, *more)


class Mistakes:
    """What several checks refuse, so that all of it can be told at once; ``end`` is what every message ends with.

    Example:
        >>> found = Mistakes()
        >>> found(check_sizes, model)  # its result, or None where it raises UserError
        >>> found.add("run.seed is -1, but must be at least 0.")
        >>> found.end()  # raises UserError if there was anything
    """

    def __init__(self, end: str = "") -> None:
        self.messages: list[str] = []
        self._end = end

    def __call__(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run a check and keep what it says."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            for message in error.messages:
                self.add(message)
            return None

    def add(self, message: str) -> None:
        """Keep a message, once."""
        if message + self._end not in self.messages:
            self.messages.append(message + self._end)

    def end(self) -> None:
        """Raise all of it; nothing where there is nothing."""
        if self.messages:
            raise UserError(*self.messages)


class RankLost(RuntimeError):
    """A rank of the job died, hangs, or cannot be reached. The command line prints its message alone and exits with ``EXIT_CODE``.

    The message names the rank and what it did last. It is empty where another rank has said so already.
    """

    EXIT_CODE = 3


class WorkerLost(RankLost):
    """A data loader worker was killed. ``death``: what is known of it, nothing on other ranks. ``done``: what became of the run."""

    def __init__(self, death: str, done: str) -> None:
        cause = f"{death}; the system's log may say why (often: out of memory; fewer run.num_workers need less)." if death else ""
        super().__init__(" ".join(filter(None, (cause, done))))


class EmptyCaption(ValueError):
    """A caption of which cleaning leaves nothing; its sample is treated like one with an unreadable image."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'nearest'?`` or an empty string.

    Example:
        >>> did_you_mean("treshold", ["threshold", "enabled"])
        " Did you mean 'threshold'?"
    """
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


def of_the_file_system(error: OSError) -> str | None:
    """What a full disk, a missing right or a torn image says, in one line; None where an ``OSError`` is something else.

    A data loader's worker puts its whole traceback into the message of what it raises again; the last line is the error's own.
    """
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return f"{error.strerror}; what was saved before is kept."
    words = ["unusable image", "cannot identify image file", "image file is truncated"]
    words += ["No such file or directory", "broken data stream"]
    if any(word in last for word in words):
        return f"{last.split('Error: ', 1)[-1]}."
    return None


def death_of_a_worker(error: BaseException) -> str | None:
    """``a data loader worker (pid 12) is killed by signal: Killed``; None where the error is another one."""
    found = DEATH.search(str(error)) if isinstance(error, RuntimeError) else None
    return None if found is None else "a " + found[0].replace("DataLoader", "data loader", 1)
