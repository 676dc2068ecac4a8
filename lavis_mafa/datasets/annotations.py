"""Annotations of images (captions, or questions), in any of the usual formats, as one Arrow table of rows that were looked at.

Arrow and not a list of dicts: five million rows stay under a gigabyte, and forked data-loading workers share them, since
reading a row changes no reference count.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lavis_mafa.config.data import AnnotationFile, annotation_file, ending
from lavis_mafa.datasets.arrow_files import images_of
from lavis_mafa.datasets.facts import TEXTS, check_facts, fact_columns, one_each
from lavis_mafa.datasets.formats import FORMATS, PAIRS, SAME_IMAGE, TWO, Columns, as_named, one_message
from lavis_mafa.datasets.ids import id_texts, is_blank, is_missing, is_text, number_columns, pc, with_numbers
from lavis_mafa.datasets.statements import read_statements
from lavis_mafa.datasets.stored import PLACE, Source, places_of
from lavis_mafa.errors import EmptyCaption, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

# how Python and numpy print a list of texts: what a table of lists holds after it went through CSV
PRINTED_LIST = r"""(?s)^\s*\[\s*(['"].*['"])?\s*\]\s*$"""
# absolute (on Windows too), or with a component `..`
LEAVES = r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)"
SHOWN = 60  # characters of a caption in a message


def read_annotations(
    files: Sequence[str | Path | AnnotationFile], columns: Columns = PAIRS, allow_absolute_paths: bool = False
) -> pa.Table:
    """Read annotation files (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow) into one table, in the order given.

    Every row has ``image`` (a path) and ``caption`` (a text, or except in CSV and TSV a list of texts). Optional are
    ``image_id`` (what results call the image), ``same_image`` (equal for rows whose paths count as one image), and ground truth:
    ``concept`` (what it shows), or ``facts`` (a list of texts: all that it shows) with ``caption_facts`` (for each caption a list: what
    it claims). ``QUESTIONS`` are ``image``, ``question``, ``answer``, ``question_id`` likewise; ``SENTENCES`` ``image``, ``sentence``
    (or ``caption``), ``label``, ``sentence_id``; ``STATEMENTS`` the same of ``image0`` and ``image1``, or ``images``.

    Args:
        files: at least one. Images of one with a folder of its own get absolute paths.
        columns: ``PAIRS``, ``QUESTIONS``, ``SENTENCES`` or ``STATEMENTS``.
        allow_absolute_paths: image paths may leave the image folder.

    Returns:
        ``columns.single`` string, ``columns.several`` list<string>, and where a file has them ``columns.optional`` string (see
        :mod:`lavis_mafa.datasets.ids`), ``columns.facts`` as in :mod:`lavis_mafa.datasets.facts`; those of ``same_image`` differ from
        file to file. And ``PLACE`` where images lie inside larger files (see :mod:`lavis_mafa.datasets.stored`).

    Raises:
        UserError: a file is missing, unreadable, of another kind or without rows; a column is missing or of the wrong type; a
            row has an empty image, caption, question or answer, a caption that is a printed list, an image path that leaves the
            image folder, or the image_id of another image of its file; facts do not fit (``check_facts``). The message names file
            and row, counted from 1 without a header.

    Example:
        >>> read_annotations(["train.jsonl"]).column_names
        ['image', 'caption']
    """
    if not files:
        raise UserError("No annotation file is given; allowed: one path or a list of paths.")
    tables: list[pa.Table] = []
    for file in map(annotation_file, files):
        table = read_rows(file.path, columns, file.columns)
        _check(file.path, table, columns, allow_absolute_paths)
        if SAME_IMAGE in table.column_names:  # which counts within its file
            groups = pc.binary_join_element_wise(str(len(tables)), table[SAME_IMAGE], "/")
            table = table.set_column(table.schema.get_field_index(SAME_IMAGE), SAME_IMAGE, groups)
        tables.append(in_folder(table, file.images))
    check_facts([(annotation_file(file).path, table) for file, table in zip(files, tables, strict=True)])
    table = told_apart(pa.concat_tables(tables, promote_options="default"))
    numbers = [name for name in columns.optional if all(name in number_columns(t) for t in tables if name in t.column_names)]
    # Arrow would keep what the parsers no longer need for its next use, but the table is there for the whole run.
    pa.default_memory_pool().release_unused()
    return with_numbers(table, [name for name in numbers if name in table.column_names])


def told_apart(table: pa.Table, column: str = "image") -> pa.Table:
    """Images inside larger files that are called the same are called by their file, too."""
    if "shard" not in table.column_names:
        return table
    names, shards = table[column], table["shard"].cast(table[column].type)
    files = pa.table({"name": names, "shard": shards}).group_by("name").aggregate([("shard", "count_distinct")])
    twice = files["name"].filter(pc.greater(files["shard_count_distinct"], 1))
    if not len(twice):
        return table
    several = pc.and_(pc.is_in(names, value_set=twice.combine_chunks()), shards.is_valid())
    named = pc.if_else(several, pc.binary_join_element_wise(shards, names, pa.scalar("/", names.type)), names)
    return table.set_column(table.schema.get_field_index(column), column, named)


def in_folder(table: pa.Table, images: Path | None) -> pa.Table:
    """The table with absolute image paths, where its file has an image folder of its own."""
    if images is None:
        return table
    if not images.is_dir():
        raise UserError(f"The image folder {images} does not exist; set images to the folder the image paths start from.")
    return absolute(table, images)


def absolute(table: pa.Table, images: Path) -> pa.Table:
    """The table with paths, of images and of shards, that start from no folder: as ``images / path`` would be."""
    for name in {"image", *TWO, "shard"}.intersection(table.column_names):
        paths = table[name].cast(pa.string())
        below = pc.binary_join_element_wise(str(images.absolute()), paths, "/")
        full = pc.if_else(pc.starts_with(paths, "/"), paths, below)
        table = table.set_column(table.schema.get_field_index(name), name, full.cast(PLACE.get(name, pa.string())))
    return table


def image_keys(table: pa.Table) -> torch.LongTensor:
    """[N] keys from 0, in the order of first appearance: one a path, or one for all paths of the same ``same_image``."""
    import torch

    return torch.from_numpy(_image_keys(table))  # type: ignore[return-value]


def _image_keys(table: pa.Table) -> np.ndarray:
    images = _numbered(table["image"])
    if SAME_IMAGE not in table.column_names:
        return images
    groups, grouped = _numbered(table[SAME_IMAGE]), np.flatnonzero(table[SAME_IMAGE].is_valid().to_numpy())
    group_of = -1 - np.arange(images.max(initial=0) + 1)  # of each path: itself, or its first group
    group_of[images[grouped[::-1]]] = groups[grouped[::-1]]
    _, first, which = np.unique(group_of[images], return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[which])


def ids_of_other_images(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """[K] rows of one file, ascending, whose ``image_id`` an earlier row gives to another image; and [K] the first row of that id."""
    if "image_id" not in table.column_names:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    ids, images = _numbered(table["image_id"]), _image_keys(table)
    with_id = np.flatnonzero(table["image_id"].is_valid().to_numpy())
    first = np.zeros(ids.max(initial=0) + 1, dtype=np.int64)
    first[ids[with_id[::-1]]] = with_id[::-1]  # the first row of each id is written last
    others = with_id[images[with_id] != images[first[ids[with_id]]]]

    def path(row: int) -> str:
        return os.path.normpath(table["image"][int(row)].as_py() or "")  # one image may be a.jpg and ./a.jpg

    rows = np.array([row for row in others if path(row) != path(first[ids[row]])], dtype=np.int64)
    return rows, first[ids[rows]]


def _numbered(column: pa.ChunkedArray) -> np.ndarray:
    # Not dictionary_encode: on a table of many chunks it keeps a dictionary for each.
    return pc.index_in(column, value_set=pc.unique(column)).to_numpy().astype(np.int64)


def read_rows(path: Path, columns: Columns = PAIRS, names: Mapping[str, str] | None = None) -> pa.Table:
    """As :func:`read_annotations`, of one file, whatever its rows hold: texts may be null or empty, paths may lead anywhere.

    ``names``: what the file calls columns, where that is not what we do.
    """
    read = FORMATS.get(ending(path))
    if read is None:
        known = ", ".join(FORMATS)
        hint = did_you_mean(path.suffix, FORMATS)
        raise UserError(f"{path}: cannot read annotations from '{path.suffix}'; allowed: {known}, or compressed as .gz.{hint}")
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file.")
    with one_message(path):
        if columns.images == TWO:
            table, ours = read_statements(path, names or {}), dict[str, str]()
        else:
            named, ours = as_named(path, columns, names)
            table = read(path, named)
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows.")
    if ours:
        numbered = [ours.get(name, name) for name in number_columns(table)]
        table = with_numbers(table.rename_columns(ours), numbered)
    found = {}
    for name in columns.single:
        if not is_text(_plain(table[name].type)):
            remedy = f" Image bytes are packed first: lavis-mafa pack {path} --output FILE.arrow" if images_of(table, name) else ""
            raise UserError(f"{path}: column '{name}' holds {table[name].type}; allowed: text.{remedy}")
        found[name] = table[name].cast(pa.string())
    found[columns.several] = text_lists(path, table, columns.several)
    numbers = []
    for name in columns.optional:
        if name not in table.column_names or table[name].null_count == table.num_rows:
            continue
        texts, are_numbers = id_texts(path, table, name)
        # A JSON line leaves an absent column empty, so a column without any value counts as absent.
        if texts.null_count < table.num_rows:
            found[name] = texts
            numbers += [name] if are_numbers else []
    found |= fact_columns(path, table) if columns.facts else {}
    found |= places_of(path, table)
    return with_numbers(pa.table(found), numbers)


def _check(path: Path, table: pa.Table, columns: Columns, allow_absolute_paths: bool) -> None:
    for name in columns.single:
        kind = {"label": ", ".join(columns.labels), **dict.fromkeys(columns.images, "a path")}.get(name, "a text")
        _refuse(path, table[name], is_blank(table[name]), f"'{name}' is empty; allowed: {kind}.")
        if name == "question":
            _refuse(path, table[name], is_missing(table[name]), "the question {} is how a missing one is written; allowed: a text.")
    if not allow_absolute_paths:
        below = "a path below the image folder, relative and without '..', unless build_info.images.allow_absolute_paths is true"
        for name in (*columns.images, *(["shard"] if "shard" in table.column_names else [])):
            _refuse(path, table[name], leaves(path, table, name), f"{name} is {{}}; allowed: {below}.")
    if columns.labels:
        unknown = pc.invert(pc.is_in(table["label"], value_set=pa.array(columns.labels)))
        _refuse(path, table["label"], unknown, f"label is {{}}; allowed: {', '.join(columns.labels)}.")
    name, lists = columns.several, table[columns.several]
    texts = pc.list_flatten(lists)
    one, more = "a text, or a list of texts", f", or a list of {name}s in .json, .jsonl or .parquet"
    if columns.labels:  # each is of one text
        one, more = "one text a row", ""
    empty = f"the {name} is empty or null; allowed: {one}."
    _refuse(path, lists, pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0), empty)
    _refuse(path, texts, is_blank(texts), empty, lists)
    printed = f"the {name} {{}} is a printed list; allowed: one text a row{more}."
    _refuse(path, texts, is_printed_list(texts), printed, lists)
    if name != "answer":  # which may be `none`
        _refuse(path, texts, is_missing(texts), f"the {name} {{}} is how a missing {name} is written; allowed: a text.", lists)
    if columns.labels:
        _refuse(
            path, lists, pc.greater(pc.list_value_length(lists), 1), f"there are several {name}s, {{}}; allowed: {one}, with its label."
        )
    for row, first in zip(*(rows[:1].tolist() for rows in ids_of_other_images(table)), strict=True):
        one, image, other = (table[name][place].as_py() for name, place in (("image_id", row), ("image", row), ("image", first)))
        raise UserError(
            f"{path}, row {row + 1}: image_id {one!r} is that of {image!r} here, but of {other!r} in row {first + 1}; allowed: one "
            "image an id, or a column same_image for paths that count as one."
        )


def _refuse(path: Path, values: Any, wrong: Any, message: str, lists: pa.ChunkedArray | None = None) -> None:
    """Raises for the first of ``values`` that is wrong; ``lists`` are the rows they are from."""
    place = pc.index(wrong, True).as_py()
    if place >= 0:
        row = place if lists is None else pc.list_parent_indices(lists)[place].as_py()
        raise UserError(f"{path}, row {row + 1}: {message.format(repr(str(values[place].as_py())[:SHOWN]))}")


def is_printed_list(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bool [N], null where there is no caption: a text such as ``['a dog', 'a puppy']``, which lists become in CSV."""
    return pc.match_substring_regex(captions, PRINTED_LIST)


def text_lists(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of texts or of lists of texts as list<string>; UserError where it holds something else."""
    column = table[name]
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and is_text(_plain(kind.value_type)):
        return column.cast(pa.list_(kind.value_type)).cast(TEXTS)
    if not is_text(_plain(kind)):
        raise UserError(f"{path}: column '{name}' holds {kind}; allowed: text or lists of text.")
    return one_each(column.cast(pa.string()))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Of a dictionary (categories in pandas and Polars) what it holds."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def clean_caption(process: Callable[[str], str], caption: str | None) -> str:
    """What the text processor makes of a caption.

    Raises:
        EmptyCaption: it is null, or nothing but punctuation, blanks, control characters and the processor's ``prompt`` is left.

    Example:
        >>> clean_caption(str.lower, "A Dog")
        'a dog'
    """
    if caption is None:
        raise EmptyCaption("The caption is null.")
    try:
        text = process(caption)
    except EmptyCaption:  # its message may hold ten thousand words
        text = ""
    if not says_something(text, process):
        raise EmptyCaption(f"The caption {shortened(caption)} holds no word.")
    return text


def says_something(text: str, process: Any) -> bool:
    """Whether more than punctuation, blanks and control characters is left of a caption that ``process`` made, its prompt aside."""
    said = text.removeprefix(getattr(process, "prompt", ""))
    return any(unicodedata.category(character)[0] in "LMNS" for character in said)  # letters, accents, digits and symbols of any script


def shortened(caption: str) -> str:
    """Its representation (control characters visible), cut after ``SHOWN`` characters."""
    return repr(caption if len(caption) <= SHOWN else caption[:SHOWN] + "…")


def leaves_folder(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which paths are absolute or hold a component ``..``; Bool [N], null where a path is null. Links are not followed.

    Example:
        >>> leaves_folder(pa.chunked_array([["a/b.png", "/a.png", "a/../b.png", "a..b/c.png"]])).to_pylist()
        [False, True, True, False]
    """
    return pc.match_substring_regex(images, LEAVES)


def leaves(path: Path, table: pa.Table, name: str = "image") -> pa.ChunkedArray:
    """Bool [N]: the ``image`` or the ``shard`` of a file's row leaves the image folder. What an image inside a shard is called leads
    nowhere, and a file with the bytes in it names itself."""
    outside = pc.fill_null(leaves_folder(table[name].cast(pa.string())), False)
    if "shard" not in table.column_names:
        return outside
    if name == "image":
        return pc.and_(outside, table["shard"].is_null())
    return pc.and_(outside, pc.not_equal(table["shard"].cast(pa.string()), str(path.absolute())))


def shown(path: str | Source) -> str:
    """The path in a message of one line: as it is, or its representation where it holds a line break or the like."""
    return str(path) if str(path).isprintable() else repr(str(path))


def path_hint(root: Path, image: str) -> str:
    """Why there may be no image of this path, and an empty text where nothing is odd about it."""
    if "://" in image:
        return "it is an address; download the images first, and name the files."
    odd = [name for name, holds in (("a backslash", "\\" in image), ("a blank at its end", image != image.strip())) if holds]
    if not odd:
        return ""
    right = image.replace("\\", "/").strip()
    there = f"; there is {shown(root / right)}" if os.path.isfile(root / right) else ""
    return f"the path holds {' and '.join(odd)}{there}."
