"""Statements about two images, in any of the annotation formats, as rows of ``image0``, ``image1``, ``sentence`` and ``label``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from lavis_mafa.config.data import STATEMENT, ending
from lavis_mafa.datasets.formats import STATEMENTS, TWO, known_columns, read_records
from lavis_mafa.datasets.ids import id_of_json, shown_json, with_numbers, written_numbers
from lavis_mafa.errors import UserError

LABELS = {label.lower(): label for label in STATEMENT}
TEXTS = (*STATEMENTS.single, "sentence", "sentence_id")


def read_statements(path: Path, names: Mapping[str, str]) -> pa.Table:
    """The rows of one file as :data:`STATEMENTS`, whatever they hold: texts may be null or empty, a label any text.

    A file has two paths as ``images`` (NLVR2's layout, and the scenes'), or as ``image0`` and ``image1``. A label is true or false, as
    a truth value or as a text in any case. ``names``: ours -> the file's, of columns that it calls otherwise.

    Raises:
        UserError: a column is missing, or a row has another number of images, or something that is no text; it names the row.
    """
    cells: dict[str, list[str | None]] = {name: [] for name in TEXTS}
    numbers = True
    rows = ({**record, **_renamed(path, record, names)} for record in read_records(path, STATEMENTS))
    first = next(rows, {})
    _check_columns(path, first)
    for row, record in enumerate(chain([first] if first else [], rows), 1):
        where = f"{path}, row {row}"
        one, is_number = id_of_json(f"{where}: 'sentence_id'", record.get("sentence_id"))
        numbers &= is_number or one is None
        values = (*_images(where, record), _label(where, record.get("label")), _text(where, "sentence", record.get("sentence")), one)
        for name, value in zip(TEXTS, values, strict=True):
            cells[name].append(value)
    try:
        table = pa.table(cells, schema=pa.schema(dict.fromkeys(TEXTS, pa.string())))
    except UnicodeEncodeError as error:  # JSON can escape half of a pair of UTF-16
        raise UserError(f"{path}: a text holds half of a character, {error.object[:40]!a}; allowed: whole ones.") from error
    if ending(path) in (".csv", ".tsv"):
        return written_numbers(table, ("sentence_id",))
    return with_numbers(table, ["sentence_id"] if numbers else [])


def _renamed(path: Path, record: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    absent = next((theirs for theirs in names.values() if theirs not in record), None)
    if absent is not None:
        raise UserError(f"{path}: no column '{absent}', which columns names; its columns are {', '.join(map(str, record))}.")
    return {ours: record[theirs] for ours, theirs in names.items()}


def _check_columns(path: Path, first: dict[str, Any]) -> None:
    if not first:
        return
    if "images" not in first and not any(name in first for name in TWO):
        found = ", ".join(map(str, first))
        raise UserError(f"{path}: no column 'images' (two paths), nor 'image0' and 'image1'; its columns are {found}.")
    known_columns(path, STATEMENTS, [*first, *(TWO if "images" in first else ())])


def _images(where: str, record: dict[str, Any]) -> tuple[str | None, str | None]:
    if "images" not in record:
        first, second = (_text(where, name, record.get(name)) for name in TWO)
        return first, second
    images = record["images"]
    if not isinstance(images, list) or len(images) != len(TWO) or not all(isinstance(one, str) for one in images):
        raise UserError(f"{where}: 'images' is {shown_json(images)}; allowed: a list of two paths.")
    return images[0], images[1]


def _label(where: str, value: Any) -> str | None:
    if isinstance(value, bool):
        return STATEMENT[value]
    text = _text(where, "label", value, "true, false")
    return text if text is None else LABELS.get(text.strip().lower(), text)


def _text(where: str, name: str, value: Any, allowed: str = "a text") -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{name}' is {shown_json(value)}; allowed: {allowed}.")
    return value
