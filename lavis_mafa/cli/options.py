"""Flags that several commands have, and numbers as people write them: 5000000, 5_000_000, 5e6."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.tools.passes import Pass

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


def add_pass_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """What is read, who mines, who judges, and the rest that a pass needs; sizes are left to the command."""
    parser.add_argument("--cfg-path", metavar="YAML", help="whose model is Con-D and whose training data are read")
    text = "Con-D's weights: a run's folder or a file of ours, or LAVIS's retrieval or ITM ones"
    parser.add_argument("--con-d", metavar="CHECKPOINT", help=text)
    text = "the pairs, in place of --cfg-path: files, folders or patterns"
    parser.add_argument("--annotations", type=Path, nargs="+", metavar="FILE", help=text)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where their image paths start from")
    add_columns(parser)
    given = parser.add_argument_group("with embeddings you have already", "no model, no image and no LAVIS is needed")
    add = given.add_argument
    text = "whose similarities decide what is a hard negative, also with --con-d: IMAGES.npy TEXTS.npy, or one .parquet; a row a pair"
    add("--features", type=Path, nargs="+", metavar="FILE", help=text)
    text = "who judges: .parquet or .csv with image_row, text_row (from 0) and probability, by any model"
    add("--scores", type=Path, nargs="+", metavar="FILE", help=text)
    text = "write the pairs that --scores lacks (without it, all that are asked about), to be judged, and nothing else"
    add("--write-pairs", type=Path, metavar="FILE", help=text)
    text = "or a second dual encoder's features, as --features: its cosines judge"
    add("--guide-features", type=Path, nargs="+", metavar="FILE", help=text)
    text = "of a guide: a match is above the own pair's cosine less this (default: 0)"
    add("--guide-margin", type=share, metavar="X", help=text)
    parser.add_argument("--samples", type=positive, metavar="N", help="only so many samples, a random part (default: all)")
    parser.add_argument("--seed", type=int, help="of the shuffle and of GRIT's starts (default: run.seed)")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for the result (default: {output})")
    parser.add_argument("--force", action="store_true", help="give a result even where the scores say that they cannot judge")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.num_workers=8")


def pass_of(arguments: argparse.Namespace) -> Pass:
    """What these flags say; raises UserError for columns of another form."""
    from dataclasses import fields

    from lavis_mafa.tools.passes import Pass

    given = vars(arguments) | {"columns": named_columns(arguments.columns)}
    return Pass(**{field.name: given[field.name] for field in fields(Pass) if field.name in given})


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
