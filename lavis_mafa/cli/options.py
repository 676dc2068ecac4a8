"""Numbers on the command line, as people write them: 5000000, 5_000_000, 5e6."""

from __future__ import annotations

import argparse
import math

LARGEST = 10**15  # more than there will ever be of anything that is counted here


def positive(text: str, least: int = 1) -> int:
    """A whole number from ``least``.

    Raises:
        argparse.ArgumentTypeError: something else.

    Example:
        >>> positive("1e6"), positive("1_000")
        (1000000, 1000)
    """
    value = _float(text)
    if not least <= value <= LARGEST or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text.replace("_", "")) if text.replace("_", "").isdecimal() else int(value)


def count(text: str) -> int:
    """A whole number from 0; raises ArgumentTypeError."""
    return positive(text, 0)


def number(text: str) -> float:
    """A number above 0; raises ArgumentTypeError."""
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str, most: float = 1.0) -> float:
    """A number from 0 to ``most``; raises ArgumentTypeError."""
    value = _float(text)
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and {most:g}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
