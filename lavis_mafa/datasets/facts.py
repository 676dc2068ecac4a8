"""What images have and captions claim: the columns ``facts`` and ``caption_facts`` of annotations, as one table holds them.

``facts`` is a list of texts, ``caption_facts`` such a list for each caption; null is unknown. Order and repeats mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.ids import is_blank, is_missing_text, is_text, pc, shown_json
from lavis_mafa.errors import UserError

TEXTS = pa.list_(pa.string())
FACTS = {"facts": TEXTS, "caption_facts": pa.list_(TEXTS)}  # both or neither
LIST, LISTS = "a list of texts", "for each caption a list of texts"


def facts_of_json(what: str, value: Any) -> list[str] | None:
    """A list of texts, None where there is none; UserError where it is something else."""
    if value is None or value != value:  # NaN
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{what} is {shown_json(value)}; allowed: {LIST}.")
    return value


def claims_of_json(what: str, value: Any, caption: str | list[Any] | None) -> list[list[str] | None] | None:
    """A list of texts for each caption; of a caption that is no list, ``value`` is that of its own."""
    if caption is None or value is None or value != value:
        return None
    if isinstance(caption, str):
        return [facts_of_json(what, value)]
    if not isinstance(value, list) or not all(isinstance(one, list | None) for one in value):
        raise UserError(f"{what} is {shown_json(value)}; allowed: {LISTS}.")
    return [facts_of_json(what, one) for one in value]


def facts_of_cell(what: str, cell: str) -> list[str] | None:
    """The same of .csv and .tsv, where a list is written as in JSON."""
    if is_missing_text(cell):
        return None
    try:
        value = json.loads(cell)
        "".join(value).encode()  # JSON can escape half a character, which is no text
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f'{what} is {cell[:60]!r}; allowed: {LIST} as JSON writes it, such as ["dog", "red"].')
    return value


def fact_columns(path: Path, table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Both columns in the types of ``FACTS``; none where they hold nothing.

    Raises:
        UserError: one of them holds nothing, or something else.
    """
    there = [name for name in FACTS if name in table.column_names and table[name].null_count < table.num_rows]
    if len(there) == 1:
        (other,) = FACTS.keys() - there
        raise UserError(f"{path}: column '{there[0]}' has values, but '{other}' has none; allowed: both, or neither.")
    several = _is_list(table["caption"].type)
    found = {}
    for name in there:
        column, nested = table[name], name == "caption_facts" and several
        if not _holds_texts(column.type, 2 if nested else 1):
            raise UserError(f"{path}: column '{name}' holds {column.type}; allowed: {LISTS if nested else LIST}.")
        found[name] = column.cast(pa.list_(TEXTS) if nested else TEXTS)
    if there and not several:
        found["caption_facts"] = one_each(found["caption_facts"])
    return found


def one_each(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """[N] values -> [N] lists of one: the values stay where they are, only the boundaries are new."""
    lists = [pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk) for chunk in column.chunks]
    return pa.chunked_array(lists, pa.list_(column.type))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _holds_texts(kind: pa.DataType, depth: int) -> bool:
    """Whether it is texts in lists in lists ..., or where nobody put any in, may be."""
    if depth and not pa.types.is_null(kind):
        return _is_list(kind) and _holds_texts(kind.value_type, depth - 1)
    return pa.types.is_null(kind) or is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def check_facts(parts: Sequence[tuple[Any, pa.Table]]) -> None:
    """Annotations that make up one data set, each with its name for messages, tell one truth.

    Raises:
        UserError: there are both ``concept`` and ``facts``; a row has more or fewer ``caption_facts`` than captions; a fact is
            empty; two rows tell different facts of one image (by its path) or one caption.
    """
    told = [(name, table) for name, table in parts if "facts" in table.column_names]
    other = next((name for name, table in parts if "concept" in table.column_names), None)
    if told and other is not None:
        raise UserError(f"{told[0][0]} tells 'facts', and {other} 'concept'; allowed: one of these two forms of truth.")
    if not told:
        return
    table = pa.concat_tables([part.select(["image", "caption", *FACTS]) for _, part in told])
    starts = np.cumsum([0, *(len(part) for _, part in told)])

    def where(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{told[part][0]}, row {row - starts[part] + 1}"

    count, wanted = (pc.list_value_length(table[name]) for name in ("caption_facts", "caption"))
    if (row := pc.index(pc.not_equal(count, wanted), True).as_py()) >= 0:
        each = f"'caption_facts' has {count[row]} lists for {wanted[row]} captions; allowed: one for each."
        raise UserError(f"{where(row)}: {each}")
    rows = np.flatnonzero(pc.and_(count.is_valid(), wanted.is_valid()).to_numpy())
    captions = table.select(["caption", "caption_facts"]).take(rows)
    of_image = "facts", "image", table["facts"], table["image"], np.arange(len(table))
    of_text = (
        "caption_facts",
        "caption",
        *map(pc.list_flatten, reversed(captions.columns)),
        np.repeat(rows, wanted.take(rows).to_numpy()),
    )
    from lavis_mafa.datasets.ground_truth import contradiction  # needs torch, which annotations without facts do not

    for name, what, lists, owners, row_of in (of_image, of_text):
        if (at := pc.index(is_blank(pc.list_flatten(lists)), True).as_py()) >= 0:
            owner = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())[at]
            raise UserError(
                f"{where(row_of[owner])}: '{name}' holds an empty fact in {shown_json(lists[owner].as_py())}; allowed: texts."
            )
        if (found := contradiction(owners, lists)) is not None:
            here, before = (shown_json(sorted(set(lists[at].as_py()))) for at in found)
            says = f"'{name}' of {what} {owners[found[0]].as_py()[:60]!r} are {here}, but {before} in {where(row_of[found[1]])}"
            raise UserError(f"{where(row_of[found[0]])}: {says}; allowed: the same in all rows.")
