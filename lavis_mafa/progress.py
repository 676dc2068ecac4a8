"""How far a long command is: on a terminal a bar with rate and time left; elsewhere, as in a log file, a plain line now and then."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # and before the first one, so that short work prints none
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_fmt}, {elapsed} so far, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} so far"


class Bar(tqdm):
    """tqdm with our settings, to be called as tqdm is, with a ``desc``: on stderr, by rank 0 alone.

    Args:
        delay: seconds before a terminal shows anything, for what is nearly always done by then.

    Example:
        >>> for samples in Bar(loader, desc="features", unit="batch"):
        ...     encode(samples)
        >>> with Bar(total=len(pairs), desc="mine", unit="pair") as bar:
        ...     mine(pairs, progress=bar.update)
    """

    # tqdm's thread looks for bars that skip too many updates; ours skip none, and data loaders fork
    monitor_interval = 0

    def __init__(self, *arguments: Any, delay: float = 0.0, disable: bool = False, **settings: Any) -> None:
        self.plain = not sys.stderr.isatty()
        if self.plain:
            how: dict[str, Any] = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
        else:
            size: dict[str, Any] = {"dynamic_ncols": True}
            if not all(os.get_terminal_size(sys.stderr.fileno())):  # a container's terminal may not tell
                size = {"ncols": 80, "nrows": 24}
            how = {"file": sys.stderr, "delay": delay, **size}
        how |= {"miniters": 1, "leave": None}  # one below another is wiped off when it is done
        super().__init__(*arguments, disable=disable or not _first(), **how | settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        return {**known, "bar_format": LINE if known["total"] else LINE_WITHOUT_TOTAL} if self.plain else known


def _first() -> bool:
    """Is this rank 0? Who reads annotations and waits for no torch is no rank of many."""
    if "torch" not in sys.modules:
        return True
    from lavis_mafa.distributed import rank

    return rank() == 0


class _Lines:
    """A line each time that tqdm draws a bar, without what moves the cursor there."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line and not line.startswith("\x1b"):
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
