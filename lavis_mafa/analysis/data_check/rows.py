"""Everything that is to be checked as Arrow columns: rows, the images they name, and their captions."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from lavis_mafa.analysis.data_check.records import read_records
from lavis_mafa.analysis.data_check.sources import Source
from lavis_mafa.datasets.annotations import read_rows
from lavis_mafa.datasets.arrow_compute import pc
from lavis_mafa.datasets.image_paths import leaves_folder

Numbers = np.ndarray


@dataclass(frozen=True)
class Rows:
    """N rows of all files in turn, naming U distinct images, with C captions."""

    image: pa.ChunkedArray  # [N] as written
    leaves: Numbers  # Bool [N], the path leaves the image folder
    path: pa.Array  # [U] the distinct images
    image_of: Numbers  # [N] into `path`, -1 where there is no path, or one that must not be opened
    caption: pa.ChunkedArray  # [C] as written
    row_of: Numbers  # [C] the row of each caption
    source_of: Numbers  # [C] the number of its source
    captions: Numbers  # [N] how many captions a row has
    lists: Numbers  # Bool [N], a list of captions where the data set takes none
    files: list[Path]
    ends: list[int]  # of each file: the number of rows up to its end

    def __len__(self) -> int:
        return len(self.image)

    def where(self, row: int) -> tuple[Path, int]:
        """The file of a row and its number there, from 1."""
        number = bisect.bisect_right(self.ends, row)
        return self.files[number], row - (self.ends[number - 1] if number else 0) + 1


def read_sources(sources: Sequence[Source]) -> Rows:
    """Read all files, whatever the rows hold.

    Raises:
        UserError: a file that is no list of images and captions (see :func:`lavis_mafa.datasets.annotations.read_rows`).
    """
    tables, paths, files, ends, of_source, lists = [], [], [], [0], [], []
    for number, source in enumerate(sources):
        left = source.limit
        for file in source.files:
            table = read_rows(file).select(["image", "caption"])[:left]
            left = None if left is None else left - len(table)
            tables.append(table.append_column("leaves", _leaves(source, table["image"])))
            paths.append(_full_paths(source.root, tables[-1]))
            lists.append(_lists(file, len(table)) if source.one_caption else np.zeros(len(table), bool))
            files.append(file)
            ends.append(ends[-1] + len(table))
            of_source += [(number, len(table))]
    table, path = pa.concat_tables(tables), pa.chunked_array([chunk for p in paths for chunk in p.chunks], pa.large_string())
    distinct = pc.drop_null(pc.unique(path))
    image_of = pc.fill_null(pc.index_in(path, value_set=distinct), -1).to_numpy()
    counts = pc.fill_null(pc.list_value_length(table["caption"]), 0).to_numpy()
    row_of = np.repeat(np.arange(len(table)), counts)
    numbers = np.repeat([number for number, _ in of_source], [rows for _, rows in of_source])
    caption = pa.chunked_array([pc.list_flatten(chunk) for chunk in table["caption"].chunks], pa.string())
    leaves = table["leaves"].to_numpy()
    numbers, is_list = numbers[row_of], np.concatenate(lists)
    return Rows(table["image"], leaves, distinct, image_of, caption, row_of, numbers, counts, is_list, files, ends[1:])


def _lists(file: Path, rows: int) -> Numbers:
    """Bool [rows], where the caption is written as a list, which the table no longer tells."""
    records = islice(read_records(file), rows)
    return np.fromiter((isinstance(record.get("caption"), list) for record in records), bool)


def _leaves(source: Source, image: pa.ChunkedArray) -> pa.ChunkedArray:
    leaves = pc.fill_null(leaves_folder(image), False)
    return pc.and_(leaves, False) if source.allow_absolute_paths else leaves


def _full_paths(root: Path, table: pa.Table) -> pa.ChunkedArray:
    """As ``root / image`` would be; null where there is no path, or it must not be opened."""
    image = table["image"].cast(pa.large_string())
    below = pc.binary_join_element_wise(pa.scalar(str(root), pa.large_string()), image, pa.scalar("/", pa.large_string()))
    full = pc.if_else(pc.starts_with(image, "/"), image, below)
    usable = pc.and_(pc.not_equal(image, ""), pc.invert(table["leaves"]))
    return pc.if_else(usable, full, pa.scalar(None, pa.large_string()))
