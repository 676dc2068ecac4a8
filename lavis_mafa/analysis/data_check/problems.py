"""What was found, row by row: what training would refuse or replace, and what is there twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavis_mafa.analysis.data_check.duplicates import duplicate_captions, duplicate_images
from lavis_mafa.analysis.data_check.judging import IMAGE_KINDS, Verdicts
from lavis_mafa.analysis.data_check.rows import Numbers, Rows
from lavis_mafa.datasets.annotations import path_hint, shortened, shown

BAD = {
    "leaves_folder": "image path leaves the folder",
    "no_image": "no image path",
    "missing": "missing image",
    "unreadable": "unreadable image",
    "too_large": "image too large",
    "too_small": "image too small",
    "empty_caption": "empty caption",
    "list_of_captions": "list of captions",
    "id_of_another": "image_id of another image",
}
TWICE = {
    "duplicate_image": "image with the bytes of another",
    "duplicate_row": "image and caption of another row",
    "duplicate_caption": "caption of another image",
}
KINDS = {**BAD, **TWICE}


@dataclass(frozen=True)
class Found:
    """Parallel arrays, in the order of rows: a kind (its number in ``KINDS``), a row, and what it is about.

    ``about`` is the number of an image for its kinds, of a caption for captions' (-1: the row has none), else -1; ``first`` is
    the image or caption that a duplicate repeats.
    """

    kind: Numbers
    row: Numbers
    about: Numbers
    first: Numbers


def find(rows: Rows, verdicts: Verdicts) -> Found:
    """Put the verdicts of images and captions to the rows they belong to."""
    parts: list[Numbers] = []
    every, images = np.arange(len(rows)), np.arange(len(rows.path))

    def add(kind: str, row: Numbers, about: Numbers | int = -1, first: Numbers | int = -1) -> None:
        number = list(KINDS).index(kind)
        parts.append(np.stack(np.broadcast_arrays(row, number, about, first)))

    add("leaves_folder", every[rows.leaves])
    add("no_image", every[~rows.leaves & (rows.image_of < 0)])
    with_image = every[rows.image_of >= 0]
    image = rows.image_of[with_image]
    for number, kind in enumerate(IMAGE_KINDS[1:], 1):
        of_kind = verdicts.image[image] == number
        add(kind, with_image[of_kind], image[of_kind])
    first = duplicate_images(verdicts)
    again = (first != images)[image]
    add("duplicate_image", with_image[again], image[again], first[image[again]])
    texts = np.array([text is not None for text in rows.text], dtype=bool)
    add("empty_caption", every[texts & (rows.captions == 0)])
    add("list_of_captions", every[rows.lists])
    add("id_of_another", every[rows.id_of_another >= 0])
    for kind, of_kind in (("empty_caption", ~verdicts.printed), ("list_of_captions", verdicts.printed)):
        bad = np.flatnonzero(verdicts.caption & of_kind)
        add(kind, rows.row_of[bad], bad)
    for kind, of_caption in zip(("duplicate_row", "duplicate_caption"), duplicate_captions(rows, verdicts), strict=True):
        again = np.flatnonzero(of_caption != np.arange(len(of_caption)))
        add(kind, rows.row_of[again], again, of_caption[again])
    row, kinds, about, firsts = np.concatenate(parts, axis=1)
    order = np.lexsort((about, kinds, row))
    return Found(kinds[order], row[order], about[order], firsts[order])


def describe(rows: Rows, verdicts: Verdicts, found: Found, place: int) -> dict[str, Any]:
    """The line of ``problems.jsonl`` for ``found``'s entry ``place``."""
    kind, row = list(KINDS)[found.kind[place]], int(found.row[place])
    file, number = rows.where(row)
    reason = _reason(rows, verdicts, kind, row, int(found.about[place]), int(found.first[place]))
    return {"file": str(file), "row": number, "image": rows.image[row].as_py(), "kind": kind, "reason": reason}


def describe_all(rows: Rows, verdicts: Verdicts, found: Found) -> Iterator[dict[str, Any]]:
    """All lines of ``problems.jsonl``."""
    return (describe(rows, verdicts, found, place) for place in range(len(found.kind)))


def _reason(rows: Rows, verdicts: Verdicts, kind: str, row: int, about: int, first: int) -> str:
    if kind == "leaves_folder":
        return "the path is absolute or holds '..'"
    if kind == "id_of_another":
        return f"{rows.image_id[row].as_py()!r} is the image_id of another image in row {rows.id_of_another[row] + 1}"
    if kind in ("empty_caption", "list_of_captions") and about >= 0:
        return verdicts.caption_reason[about]
    if kind == "empty_caption":
        return "The row has no caption."
    if kind == "duplicate_image":
        return f"the same bytes as {shown(rows.path[first].as_py())}"
    if kind in TWICE:
        file, number = rows.where(int(rows.row_of[first]))
        return f"{shortened(rows.caption[first].as_py())} is the caption of {file}, row {number} too"
    if kind == "no_image":
        return "the row names no image"
    if kind == "list_of_captions":
        return "LAVIS's own data sets take one text for a caption, no list"
    hint = path_hint(rows.files[rows.file_of[row]].images or Path(), rows.image[row].as_py())
    return verdicts.image_reason.get(about) or f"no file {shown(rows.path[about].as_py())}{hint and '; ' + hint}"
