"""Images that lie inside larger files, tar shards and Arrow files, and are read there: nothing is unpacked.

A table of annotations may say of each row in which file its image's bytes lie, and where: its columns ``PLACE``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError

PLACE: dict[str, pa.DataType] = {
    "shard": pa.dictionary(pa.int32(), pa.string()),  # the file, from the image folder on
    "offset": pa.int64(),  # in bytes
    "size": pa.int64(),
}
OPEN = 256  # files of a process at once; the system's own limit is often 1024


class StoredImage(NamedTuple):
    """Bytes ``offset`` to ``offset + size`` of ``file``; ``name`` is what messages call the image.

    Read as a ``Path`` is: ``str``, ``is_file`` and ``read_bytes``.

    Example:
        >>> StoredImage("data/00000.tar/000000012.jpg", "data/00000.tar", 512, 3011).read_bytes()[:2]
        b'\\xff\\xd8'
    """

    name: str
    file: str
    offset: int
    size: int

    def __str__(self) -> str:
        return self.name

    def is_file(self) -> bool:
        return os.path.isfile(self.file)

    def read_bytes(self) -> bytes:
        """Raises OSError: the file cannot be opened, or ends before."""
        content = os.pread(_opened(self.file).descriptor, self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"{self.file} ends within it; index the shards again")
        return content


Source = Path | StoredImage  # where an image is


class _Opened:
    """A file for ``os.pread``, which has no position that processes could share: it is the same before and after a fork."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_opened = functools.lru_cache(OPEN)(_Opened)


def image_source(root: Path, table: pa.Table, row: int, column: str = "image") -> Source:
    """Where the image of a row of annotations is; ``root`` is the folder that paths, of images and of shards, start from."""
    image = table[column][row].as_py()
    # for each sample of training: the list of all column names, and two paths, take twice the time
    shard = table["shard"][row].as_py() if table.schema.get_field_index("shard") >= 0 else None
    if shard is None:
        return root / image
    name, file = os.path.join(root, image), os.path.join(root, shard)
    return StoredImage(name, file, table["offset"][row].as_py(), table["size"][row].as_py())


def has_places(table: pa.Table) -> bool:
    return all(name in table.column_names for name in PLACE)


def places_of(path: Path, table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """The columns ``PLACE`` of a file's table, looked at, and none where it has not all three.

    Raises:
        UserError: one is of another type, or a row's are not all there or negative.
    """
    if not has_places(table):
        return {}
    columns = {}
    for name, kind in PLACE.items():
        try:
            columns[name] = table[name].cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{path}: column '{name}' holds {table[name].type}; allowed: {kind}, as index-shards writes it.") from error
    there = [column.is_valid() for column in columns.values()]
    negative = pc.or_(pc.less(columns["offset"], 0), pc.less(columns["size"], 0))
    partly = pc.or_(pc.xor(there[0], there[1]), pc.xor(there[0], there[2]))
    if (row := pc.index(pc.or_(partly, pc.fill_null(negative, False)), True).as_py()) >= 0:
        values = {name: column[row].as_py() for name, column in columns.items()}
        raise UserError(f"{path}, row {row + 1}: its image lies at {values}; allowed: a file and two numbers from 0.")
    return columns


def places_from(root: Path, table: pa.Table) -> pa.Table:
    """The table with shards as paths from ``root`` on, where they lie below it: an Arrow file names itself by its absolute path."""
    if not has_places(table):
        return table
    shards = table["shard"].cast(pa.string())
    named = {
        one: str(Path(one).relative_to(root.absolute())) for one in pc.unique(shards).drop_null().to_pylist() if _is_below(root, one)
    }
    if not named:
        return table
    place = pc.index_in(shards, value_set=pa.array(list(named)))
    shards = pc.coalesce(pc.take(pa.array(list(named.values())), place), shards)
    return table.set_column(table.schema.get_field_index("shard"), "shard", shards.cast(PLACE["shard"]))


def _is_below(root: Path, shard: str) -> bool:
    return Path(shard).is_absolute() and Path(shard).is_relative_to(root.absolute())


def check_shards(root: Path, table: pa.Table) -> None:
    """Every shard that a table names is there, and as long as its images need.

    Raises:
        UserError: naming the first that is not.
    """
    if not has_places(table):
        return
    _opened.cache_clear()  # a file may have been replaced since it was opened
    end = pc.add(table["offset"], table["size"])
    needed = pa.table({"shard": table["shard"].cast(pa.string()), "end": end}).group_by("shard").aggregate([("end", "max")])
    absent, short = [], []
    for shard, most in zip(needed["shard"].to_pylist(), needed["end_max"].to_pylist(), strict=True):
        if shard is None:
            continue
        file = root / shard
        if not file.is_file():
            absent.append(file)
        elif (length := file.stat().st_size) < most:
            short.append(f"{file} holds {length:,} bytes, but its images need {most:,}; copy it again, or index the shards again.")
    if absent:
        others = f" ({len(absent)} of {len(needed)} are missing)" if len(absent) > 1 else ""
        raise UserError(f"no shard {absent[0]}{others}; images.storage is the folder that shards start from, here {root}.")
    if short:
        raise UserError(*short)
