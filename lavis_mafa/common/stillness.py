"""For how long a thread has been at one and the same place in its Python code."""

from __future__ import annotations

import sys
from pathlib import Path


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
