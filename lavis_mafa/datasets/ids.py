"""Ids and concepts of annotations: texts or whole numbers, which stay what they are; an empty one is none.

In a table they are texts, so that one of any length fits; ``numbers`` in the table's metadata names the columns that held numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from lavis_mafa.errors import UserError

# Arrow makes its functions when it is imported, so a type checker cannot see them
pc: Any = pyarrow.compute

# what pandas, R and SQL write for a value that is not there, and pandas reads as such
MISSING = ("", "#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null", "-NaN", "-nan", "\\N")
PATTERN = rf"^[\s\pZ]*({'|'.join(map(re.escape, MISSING))})[\s\pZ]*$"
EXACT = 1 << 53  # a float holds whole numbers up to here; beyond, several become one
NUMBERS = b"numbers"
ALLOWED = "allowed: text or a whole number"
Id = int | str


def is_missing(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bool [N], null where a text is null: it is blank, or how programs write a value that is not there (``nan``, ``None``, ...)."""
    return pc.match_substring_regex(texts, PATTERN)


def is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bool [N]: it is null, or holds nothing but blanks."""
    # a pattern, not a comparison of trimmed texts: it copies nothing
    return pc.invert(pc.fill_null(pc.match_substring_regex(texts, r"\S"), False))


def is_missing_text(text: str) -> bool:
    return text.strip() in MISSING


def id_texts(path: Path, table: pa.Table, name: str) -> tuple[pa.ChunkedArray, bool]:
    """A column of ids or concepts as texts, null where there is none; and whether all of them are whole numbers by their type.

    Floats, which pandas makes of whole numbers with gaps, are the whole numbers that they were.

    Raises:
        UserError: a value is neither; the message names file and row.
    """
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        return column.cast(pa.string()), True
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _whole_numbers(path, name, column.cast(kind)), True
    if not is_text(kind):
        raise UserError(f"{path}: column '{name}' holds {kind}; {ALLOWED}.")
    texts = column.cast(pa.string())
    texts = pc.if_else(pc.fill_null(is_missing(texts), True), pa.scalar(None, pa.string()), texts)
    return texts, name in number_columns(table)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def written_numbers(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """Of texts alone (CSV, TSV): which of the columns are whole numbers throughout, written as everybody writes them.

    ``7.0`` in a column of such is 7, as pandas writes whole numbers with gaps; ``007`` stays a text.
    """
    found = []
    for name in names:
        if name not in table.column_names:
            continue
        texts = table[name]
        there = pc.invert(pc.fill_null(is_missing(texts), True))
        if _all(pc.match_substring_regex(texts, r"^\s*-?(0|[1-9]\d*)\.0\s*$"), there):
            table = table.set_column(table.schema.get_field_index(name), name, pc.replace_substring_regex(texts, r"\.0(\s*)$", ""))
            texts = table[name]
        if _all(pc.match_substring_regex(texts, r"^(0|-?[1-9]\d*)$"), there):
            found.append(name)
    return with_numbers(table, found)


def id_of_json(what: str, value: Any) -> tuple[str | None, bool]:
    """An id of a JSON object as a text, None if there is none; and whether it is a number. UserError where it is neither."""
    if isinstance(value, str) or value is None:
        return value, False
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), True
    if isinstance(value, float) and value != value:
        return None, True
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value)), True
    raise UserError(f"{what} is {shown_json(value)}; {ALLOWED}{_lost_digits(value)}.")


def shown_json(value: Any, length: int = 60) -> str:
    try:
        return json.dumps(value)[:length]
    except RecursionError:  # it could just be read
        return f"a deeply nested {type(value).__name__}"


def with_numbers(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """The table, with these columns noted as numbers."""
    return table.replace_schema_metadata({NUMBERS: ",".join(names)})


def number_columns(table: pa.Table) -> set[str]:
    return set((table.schema.metadata or {}).get(NUMBERS, b"").decode().split(",")) - {""}


def typed_ids(table: pa.Table, name: str) -> list[Id | None]:
    """[N] ids as they were: whole numbers where the column held them, else texts."""
    texts = table[name].to_pylist()
    return [None if text is None else int(text) for text in texts] if name in number_columns(table) else texts


def collate_with_ids(samples: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A batch whose ids are an int64 tensor where they fit into one, else a list: a text stays a text, and none overflows."""
    import torch  # here, as in annotations.py: who reads annotations without training on them need not wait for it
    from torch.utils.data import default_collate

    ids = [sample[name] for sample in samples]
    fit = all(isinstance(one, int) and -(1 << 63) <= one < 1 << 63 for one in ids)
    batch = default_collate([{key: value for key, value in sample.items() if key != name} for sample in samples])
    return {**batch, name: torch.tensor(ids, dtype=torch.int64) if fit else ids}


def _all(holds: pa.ChunkedArray, where: pa.ChunkedArray) -> bool:
    """Whether something holds wherever there is a value, and there is one."""
    return bool(pc.any(where).as_py()) and bool(pc.all(pc.or_(holds, pc.invert(where))).as_py())


def _whole_numbers(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_decimal(column.type):
        texts = pc.replace_substring_regex(column.cast(pa.string()), r"\.0*$", "")
        wrong = pc.index(pc.fill_null(pc.match_substring_regex(texts, r"^-?\d+$"), True), False).as_py()
    else:
        column = pc.if_else(pc.is_nan(column.cast(pa.float64())), pa.scalar(None, pa.float64()), column.cast(pa.float64()))
        whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less(pc.abs(column), float(EXACT)))
        wrong = pc.index(pc.fill_null(whole, True), False).as_py()
    if wrong >= 0:
        value = column[wrong].as_py()
        raise UserError(f"{path}, row {wrong + 1}: '{name}' is {value}; {ALLOWED}{_lost_digits(value)}.")
    return texts if pa.types.is_decimal(column.type) else column.cast(pa.int64()).cast(pa.string())


def _lost_digits(value: Any) -> str:
    lost = isinstance(value, float) and EXACT <= abs(value) < float("inf")
    return ", and a float this large has lost its last digits" if lost else ""
