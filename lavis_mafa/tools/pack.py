"""Images and captions in one Arrow file, from tables that hold the bytes or from annotations of an image folder.

Of a row of Parquet nothing can be read without its whole row group (2 ms); of Arrow's own format, written without compression, a row
lies where it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from lavis_mafa.config.data import ending
from lavis_mafa.datasets.annotations import is_printed_list, text_lists
from lavis_mafa.datasets.arrow_files import images_of, mapped_batches, prefix
from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.formats import PAIRS, one_message
from lavis_mafa.datasets.ids import is_missing, pc
from lavis_mafa.datasets.stored import PLACE, image_source
from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.tools.index_shards import NO_CAPTION, NO_IMAGE, NO_TEXT, LeftOut, arrow_file

ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 64 << 20  # of images in a record batch
Rows = Iterator[tuple[str, dict[str, Any], bytes | None]]  # where each is from, its columns without image bytes, and these
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Names:
    """What a table calls its columns of images and captions."""

    image: str = "image"
    caption: str = "caption"


class Opened(NamedTuple):
    batches: Iterator[pa.RecordBatch]
    schema: pa.Schema
    rows: int


def opened(path: Path) -> Opened:
    """A .parquet or .arrow file, a piece at a time."""
    if ending(path) == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        return Opened(file.iter_batches(ROWS_AT_ONCE), file.schema_arrow, file.metadata.num_rows)
    batches = mapped_batches(path)
    return Opened(iter(batches), batches[0].schema if batches else pa.schema([]), sum(map(len, batches)))


def with_bytes(path: Path, names: Names) -> Opened | None:
    """The file, if it has a column of image bytes; UserError where it has, and no captions, or cannot be read."""
    if ending(path) not in (".parquet", ".arrow"):
        return None
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    with one_message(path):
        found = opened(path)
    columns = found.schema.names
    if images_of(_renamed(found.schema.empty_table(), names)) is None:
        return None
    if columns.count(names.caption) != 1:
        raise UserError(
            f"{path}: no column {names.caption!r} of captions; its columns are {', '.join(columns)}; --caption names it."
            f"{did_you_mean(names.caption, columns)}"
        )
    return found


def schema_of(files: Sequence[Path], names: Names) -> pa.Schema:
    """Of the file that is written from tables; UserError where two have different types of what is kept."""
    kept = [*PAIRS.optional, *PAIRS.facts]
    first: dict[str, pa.DataType] | None = None
    for path in files:
        schema = opened(path).schema
        types = {name: schema.field(name).type for name in kept if schema.names.count(name) == 1}
        first = types if first is None else first
        if types != first:
            raise UserError(f"{path} has other columns than {files[0]}: {types}, there {first}; pack them one at a time.")
    return pa.schema({"image": pa.string(), "bytes": pa.binary(), "caption": TEXTS, **(first or {})})


def rows_of_tables(files: Sequence[Path], names: Names, left_out: LeftOut, progress: Progress) -> Rows:
    """Of tables with image bytes. A name is put after the file's, unless the table has it beside the bytes, in a text column.

    Raises:
        UserError: a column is missing or holds something else.
    """
    for path in files:
        with one_message(path):
            number = 0
            for batch in opened(path).batches:
                table = _renamed(pa.Table.from_batches([batch]), names)
                images = images_of(table)
                assert images is not None  # with_bytes
                captions = text_lists(path, table, "caption")
                others = [name for name in (*PAIRS.optional, *PAIRS.facts) if name in table.column_names]
                lists = zip(*(table[name].to_pylist() for name in others), strict=True) if others else [()] * len(table)
                cells = zip(images.names.to_pylist(), images.content, captions.to_pylist(), _is_said(captions), lists, strict=True)
                for name, content, texts, said, other in cells:
                    number += 1
                    where = f"{path}, row {number}"
                    if images.named_by_bytes:
                        name = f"{prefix(path)}/{name or number}"
                    if name is None or (images.named_by_bytes and not content.is_valid):
                        left_out.add(NO_IMAGE, where)
                    elif not said:
                        left_out.add(NO_TEXT if texts and any(texts) else NO_CAPTION, where)
                    else:
                        yield where, {"image": name, "caption": texts, **dict(zip(others, other, strict=True))}, content.as_py()
                progress(len(table))


def schema_of_annotations(table: pa.Table) -> pa.Schema:
    """Of the file that is written from annotations."""
    return _without_places(table).schema.append(pa.field("bytes", pa.binary()))


def rows_of_annotations(table: pa.Table, root: Path, left_out: LeftOut, progress: Progress) -> Rows:
    """Of annotations as ``read_annotations`` gives them; an image that is not there is left out."""
    others, read = _without_places(table), set[str]()
    for row, columns in enumerate(r for batch in others.to_batches(ROWS_AT_ONCE) for r in batch.to_pylist()):
        progress(1)
        name = columns["image"]
        if name in read:
            yield name, columns, None
            continue
        try:
            content = image_source(root, table, row).read_bytes()
        except OSError:
            left_out.add(NO_IMAGE, name)
            continue
        read.add(name)
        yield name, columns, content


def write_pack(rows: Rows, schema: pa.Schema, output: Path) -> tuple[int, int]:
    """Write them; an image's bytes once, in the first of its rows. Returns the numbers of pairs and of images.

    Two images that are called the same get names of their own.
    """
    seen: dict[str, bytes | None] = {}  # digests by name
    called: dict[tuple[str, Any], Any] = {}  # of a file's image, the name that it got
    pairs, waiting, weight = 0, list[dict[str, Any]](), 0
    with arrow_file(output, schema) as writer:
        for where, columns, content in rows:
            own = where.rpartition(", row ")[0], columns["image"]
            name: Any = called.get(own, columns["image"]) if content is None else columns["image"]
            if content is not None:
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if seen.get(name, digest) != digest:
                    name = f"{name} of {where}"
                if name in seen:
                    content = None
                seen[name] = digest
                called[own] = name
            waiting.append({**columns, "image": name, "bytes": content})
            weight, pairs = weight + len(content or b""), pairs + 1
            if weight >= BYTES_AT_ONCE or len(waiting) == ROWS_AT_ONCE * 64:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting, weight = [], 0
        if not pairs:
            raise UserError(f"nothing to write to {output}: none of the rows has an image and a caption.")
        if not seen:
            raise UserError(
                f"nothing to write to {output}: the tables hold paths of images, without bytes. Hugging Face's save_to_disk and "
                "push_to_hub write the bytes; or pack an annotation file of these paths with --images FOLDER."
            )
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema))
    return pairs, len(seen)


def _without_places(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name in PLACE if name in table.column_names])


def _renamed(table: pa.Table, names: Names) -> pa.Table:
    """With ``image`` and ``caption`` called so."""
    for own, name in (("image", names.image), ("caption", names.caption)):
        if name != own and name in table.column_names:
            table = table.drop_columns([own] if own in table.column_names else []).rename_columns({name: own})
    return table


def _is_said(captions: pa.ChunkedArray) -> list[bool]:
    """Of [N] lists of texts, which have some, and none that ``grit_pairs`` would refuse."""
    texts, row = pc.list_flatten(captions), pc.list_parent_indices(captions).to_numpy()
    wrong = pc.or_(pc.fill_null(is_missing(texts), True), pc.fill_null(is_printed_list(texts), False)).to_numpy()
    said = pc.fill_null(pc.greater(pc.list_value_length(captions), 0), False).to_numpy().copy()
    said[row[wrong]] = False
    return said.tolist()
