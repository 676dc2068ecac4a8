"""Annotations of images (captions, or questions), in any of the usual formats, as one Arrow table.

Arrow and not a list of dicts: five million rows stay under a gigabyte, and forked data-loading workers share them, since
reading a row changes no reference count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.datasets.annotation_formats import FORMATS, PAIRS, Columns, one_message
from lavis_mafa.datasets.arrow_compute import pc
from lavis_mafa.datasets.image_paths import check_image_paths

TEXTS = pa.list_(pa.string())


def read_annotations(files: Sequence[str | Path], columns: Columns = PAIRS, allow_absolute_paths: bool = False) -> pa.Table:
    """Read annotation files (.json, .jsonl, .csv, .tsv, .parquet) into one table, in the order given.

    Every row has ``image`` (a path) and ``caption`` (a text, or except in CSV and TSV a list of texts). Optional are
    ``image_id`` (rows of one image share it) and ``concept`` (what it shows: ground truth for reports). Others are ignored.
    With ``QUESTIONS`` for ``columns``, rows have ``image``, ``question`` and ``answer`` (text or list), optionally ``question_id``.

    Args:
        files: at least one.
        columns: ``PAIRS`` or ``QUESTIONS``.
        allow_absolute_paths: image paths may leave the image folder (see ``image_paths``).

    Returns:
        Columns ``image`` string, ``caption`` list<string> and, where a file has them, ``image_id`` and ``concept`` string.
        In general: ``columns.single`` string, ``columns.several`` list<string>, ``columns.optional`` string.

    Raises:
        UserError: a file is missing, unreadable, of another kind or without rows; a column is missing or of the wrong type; a
            row has an empty image, caption, question or answer, or an image path that leaves the image folder. The message
            names file and row, counted from 1 without a header.

    Example:
        >>> read_annotations(["train.jsonl"]).column_names
        ['image', 'caption']
    """
    if not files:
        raise UserError("No annotation file is given; allowed: one path or a list of paths.")
    tables = []
    for file in map(Path, files):
        tables.append(read_rows(file, columns))
        _check(file, tables[-1], columns, allow_absolute_paths)
    table = pa.concat_tables(tables, promote_options="default")
    # Arrow would keep what the parsers no longer need for its next use, but the table is there for the whole run.
    pa.default_memory_pool().release_unused()
    return table


def image_keys(table: pa.Table) -> torch.LongTensor:
    """One integer per image: rows with the same ``image_id`` (the same ``image`` path where there is no id) share a key.

    Returns:
        [N], numbered from 0 in the order of first appearance.
    """
    column = table["image"]
    if "image_id" in table.column_names:
        column = pc.coalesce(table["image_id"], column)
    # Not dictionary_encode: on a table of many chunks it keeps a dictionary for each.
    keys = pc.index_in(column, value_set=pc.unique(column))
    return torch.from_numpy(keys.to_numpy().astype(np.int64))  # type: ignore[return-value]


def read_rows(path: Path, columns: Columns = PAIRS) -> pa.Table:
    """The rows of one file, whatever they hold: texts may be null or empty, paths may lead anywhere.

    Returns:
        as :func:`read_annotations`.

    Raises:
        UserError: the file is missing, unreadable, of another kind or without rows; a column is missing or of the wrong type.
    """
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: cannot read annotations from '{path.suffix}'; allowed: {known}.{did_you_mean(path.suffix, FORMATS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file.")
    with one_message(path):
        table = read(path, columns)
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows.")
    found = {name: _strings(path, table, name, numbers=False) for name in columns.single}
    found[columns.several] = _text_lists(path, table, columns.several)
    for name in columns.optional:
        # A JSON line leaves an absent column empty, so a column without any value counts as absent.
        if name in table.column_names and table[name].null_count < table.num_rows:
            found[name] = _strings(path, table, name, numbers=True)
    return pa.table(found)


def _check(path: Path, table: pa.Table, columns: Columns, allow_absolute_paths: bool) -> None:
    for name in columns.single:
        _check_no_empty_text(path, name, table[name])
    if not allow_absolute_paths:
        check_image_paths(path, table["image"])
    _check_no_empty_list(path, columns.several, table[columns.several])


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _strings(path: Path, table: pa.Table, name: str, numbers: bool) -> pa.ChunkedArray:
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    # A number is a fine id, but never a path.
    if not (_is_text(kind) or (numbers and pa.types.is_integer(kind))):
        raise UserError(f"{path}: column '{name}' holds {kind}; allowed: text{' or whole numbers' if numbers else ''}.")
    return column.cast(pa.string())


def _text_lists(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table[name]
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type):
        return column.cast(TEXTS)
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise UserError(f"{path}: column '{name}' holds {kind}; allowed: text or lists of text.")
    # The texts stay where they are; only the boundaries of the one-text lists are new.
    lists = [pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk) for chunk in column.cast(pa.string()).chunks]
    return pa.chunked_array(lists, TEXTS)


def _check_no_empty_text(path: Path, name: str, texts: pa.ChunkedArray) -> None:
    row = pc.index(pc.fill_null(pc.not_equal(texts, ""), False), False).as_py()
    if row >= 0:
        raise UserError(f"{path}, row {row + 1}: '{name}' is empty; allowed: {'a path' if name == 'image' else 'a text'}.")


def _check_no_empty_list(path: Path, name: str, lists: pa.ChunkedArray) -> None:
    before = 0
    for chunk in lists.chunks:
        row = pc.index(pc.fill_null(pc.greater(pc.list_value_length(chunk), 0), False), False).as_py()
        if row < 0:
            # A pattern, not a comparison of trimmed texts: it copies nothing.
            text = pc.fill_null(pc.match_substring_regex(chunk.flatten(), r"\S"), False)
            position = pc.index(text, False).as_py()
            row = chunk.value_parent_indices()[position].as_py() if position >= 0 else -1
        if row >= 0:
            raise UserError(f"{path}, row {before + row + 1}: the {name} is empty or null; allowed: a text, or a list of texts.")
        before += len(chunk)
