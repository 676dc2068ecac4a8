"""Everything that is to be checked as Arrow columns: rows, the images they name, and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lavis_mafa.analysis.data_check.records import read_records
from lavis_mafa.analysis.data_check.sources import Source
from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.annotations import TEXTS, ids_of_other_images, leaves_folder, read_rows
from lavis_mafa.datasets.formats import PAIRS, Columns, pc

Numbers = np.ndarray
ASKED = Columns(single=("image",), several="question", optional=())
# a row: where it is, what it names, and what is wrong with it that only its file tells
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "caption": TEXTS,
        "image_id": pa.string(),
        "path": pa.large_string(),
        "leaves": pa.bool_(),
        "list": pa.bool_(),
        "id_of_another": pa.int64(),
        "file": pa.int32(),
        "number": pa.int64(),
    }
)


@dataclass(frozen=True)
class Rows:
    """N rows of all files in turn, naming U distinct images, with C captions."""

    image: pa.ChunkedArray  # [N] as written
    image_id: pa.ChunkedArray  # [N] null where there is none
    leaves: Numbers  # Bool [N], the path leaves the image folder
    path: pa.Array  # [U] the distinct images
    image_of: Numbers  # [N] into `path`, -1 where there is no path, or one that must not be opened
    caption: pa.ChunkedArray  # [C] as written
    row_of: Numbers  # [C] the row of each caption
    source_of: Numbers  # [C] the number of its source
    captions: Numbers  # [N] how many captions a row has
    text: list[str | None]  # [N], what kind of text the captions are, by source
    lists: Numbers  # Bool [N], a list of captions where the data set takes none
    id_of_another: Numbers  # [N] the earlier row of the file that gives the image_id to another image, from 0; -1 for none
    files: list[AnnotationFile]  # with the folder that their image paths start from
    file_of: Numbers  # [N] into `files`
    number: Numbers  # [N] of the row in its file, from 0

    def __len__(self) -> int:
        return len(self.image)

    def caption_text(self, caption: int) -> str | None:
        """What kind of text a caption is; None beyond the last one."""
        return self.text[self.row_of[caption]] if caption < len(self.row_of) else None

    def where(self, row: int) -> tuple[Path, int]:
        """The file of a row and its number there, from 1."""
        return self.files[self.file_of[row]].path, int(self.number[row]) + 1


def read_sources(sources: Sequence[Source]) -> Rows:
    """Read all files, whatever the rows hold.

    Raises:
        UserError: a file that is no list of images and captions (see :func:`lavis_mafa.datasets.annotations.read_rows`).
    """
    tables, files, of_source = [], [], []
    for number, source in enumerate(sources):
        parts = []
        for file in source.files:
            files.append(AnnotationFile(file.path, file.images or source.root))
            parts.append(_rows_of(source, files[-1], len(files) - 1))
        tables.append(source.select(pa.concat_tables(parts)))
        of_source += [number] * len(tables[-1])
    table = pa.concat_tables(tables)
    path = table["path"]
    distinct = pc.drop_null(pc.unique(path))
    counts = pc.fill_null(pc.list_value_length(table["caption"]), 0).to_numpy()
    row_of = np.repeat(np.arange(len(table)), counts)
    return Rows(
        image=table["image"],
        image_id=table["image_id"],
        leaves=table["leaves"].to_numpy(),
        path=distinct,
        image_of=pc.fill_null(pc.index_in(path, value_set=distinct), -1).to_numpy(),
        caption=pa.chunked_array([pc.list_flatten(chunk) for chunk in table["caption"].chunks], pa.string()),
        row_of=row_of,
        source_of=np.array(of_source, dtype=np.int64)[row_of],
        captions=counts,
        text=[sources[number].text for number in of_source],
        lists=table["list"].to_numpy(),
        id_of_another=table["id_of_another"].to_numpy(),
        files=files,
        file_of=table["file"].to_numpy(),
        number=table["number"].to_numpy(),
    )


def _rows_of(source: Source, file: AnnotationFile, number: int) -> pa.Table:
    table = _read(source, file.path)
    count = len(table)
    leaves = pc.fill_null(leaves_folder(table["image"]), False)
    leaves = pc.and_(leaves, False) if source.allow_absolute_paths else leaves
    others = np.full(count, -1)
    again, first = ids_of_other_images(table)
    others[again] = first
    assert file.images is not None
    columns = {
        "image": table["image"],
        "caption": table["caption"],
        "image_id": table["image_id"] if "image_id" in table.column_names else pa.nulls(count, pa.string()),
        "path": _full_paths(file.images, table["image"], leaves),
        "leaves": leaves,
        "list": _lists(file.path) if source.one_caption else np.zeros(count, dtype=bool),
        "id_of_another": others,
        "file": np.full(count, number, dtype=np.int32),
        "number": np.arange(count),
    }
    return pa.table(columns, schema=SCHEMA)


def _read(source: Source, path: Path) -> pa.Table:
    if source.text == "question":
        return read_rows(path, ASKED).rename_columns({"question": "caption"})
    if source.text is None:
        images = [record.get("image") for record in read_records(path)]
        images = [image if isinstance(image, str) else None for image in images]
        return pa.table({"image": pa.chunked_array([images], pa.string()), "caption": pa.nulls(len(images), TEXTS)})
    return read_rows(path, PAIRS)


def _lists(file: Path) -> Numbers:
    """Bool [N], where the caption is written as a list, which the table no longer tells."""
    return np.fromiter((isinstance(record.get("caption"), list) for record in read_records(file)), bool)


def _full_paths(root: Path, image: pa.ChunkedArray, leaves: pa.ChunkedArray) -> pa.ChunkedArray:
    """As ``root / image`` would be; null where there is no path, or it must not be opened."""
    image = image.cast(pa.large_string())
    below = pc.binary_join_element_wise(pa.scalar(str(root), pa.large_string()), image, pa.scalar("/", pa.large_string()))
    full = pc.if_else(pc.starts_with(image, "/"), image, below)
    usable = pc.and_(pc.not_equal(image, ""), pc.invert(leaves))
    return pc.if_else(usable, full, pa.scalar(None, pa.large_string()))
