"""Flags that several commands have, and numbers as people write them: 5000000, 5_000_000, 5e6."""

from __future__ import annotations

import argparse
import math

from lavis_mafa.errors import UserError

LARGEST = 10**15  # more than there will ever be of anything that is counted here


def add_columns(parser: argparse.ArgumentParser, when: str = "") -> None:
    """``--columns image=filepath caption=title``; :func:`named_columns` reads it."""
    text = f"{when}what the files call image, caption, ... where they differ, e.g. image=filepath caption=title"
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=text)


def named_columns(given: list[str]) -> dict[str, str]:
    """Our names of columns -> those of the files.

    Raises:
        UserError: another form, or no name of a column of ours.

    Example:
        >>> named_columns(["image=filepath", "caption=title"])
        {'image': 'filepath', 'caption': 'title'}
    """
    from lavis_mafa.config.data import COLUMNS, check_columns

    for one in given:
        if "=" not in one or one.startswith("="):
            raise UserError(f"--columns takes OURS=THEIRS, such as image=filepath, not {one!r}.")
    columns = dict(one.split("=", 1) for one in given)
    if len(columns) < len(given):
        raise UserError(f"--columns names a column of ours twice: {' '.join(given)}.")
    check_columns("--columns", columns, COLUMNS["grit_pairs"])
    return columns


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
