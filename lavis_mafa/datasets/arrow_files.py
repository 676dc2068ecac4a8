"""Files of Arrow's IPC format as annotations: memory-mapped, so that captions and images stay on the disk until they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.ids import is_text, pc
from lavis_mafa.datasets.stored import PLACE
from lavis_mafa.errors import UserError


class Images(NamedTuple):
    """Of N rows: names (null where a row has none), and bytes (null where they are not there)."""

    names: pa.ChunkedArray
    content: pa.ChunkedArray
    named_by_bytes: bool = False  # names are paths of nobody knows which folder, or numbers


def read_mapped(path: Path, image: str = "image") -> pa.Table:
    """A file (or stream) of Arrow's IPC format. Where a column holds images' bytes, the columns ``PLACE`` tell where they lie.

    See :func:`images_of` for these columns; ``image`` is what the file calls the first of them. A row without bytes shows the image of
    its name in another row, or it is a path.

    Raises:
        UserError: it was written with compression, so that images cannot be read where they lie.
        pa.ArrowException, OSError: it is broken.
    """
    whole = pa.memory_map(str(path)).read_buffer()
    table = _reader(whole).read_all()
    images = images_of(table, image)
    if images is None:
        return table
    names = _own_names(path, images) if images.named_by_bytes else images.names
    spans = [_spans(path, whole, chunk) for chunk in images.content.chunks]
    offset, size = np.concatenate([np.zeros((2, 0), np.int64), *spans], axis=1)
    there = np.concatenate([np.zeros(0, bool), *(chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in images.content.chunks)])
    if not there.all():  # of an image in several rows, the first has the bytes
        first = np.where(there, np.arange(len(there)), _first_of_name(names, there))
        there, offset, size = first >= 0, offset[first], size[first]
    shard = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(there), np.int32), mask=~there), [str(path.absolute())])
    places = {"shard": shard, "offset": pa.array(offset, mask=~there), "size": pa.array(size, mask=~there)}
    others = {name: table[name] for name in table.column_names if name not in (image, "bytes", *PLACE)}
    return pa.table({image: names, **others, **places}).replace_schema_metadata(table.schema.metadata)


def mapped_batches(path: Path) -> list[pa.RecordBatch]:
    """Of such a file or stream as it is, compressed or not."""
    reader = _reader(pa.memory_map(str(path)).read_buffer())
    return [*reader] if isinstance(reader, pa.RecordBatchReader) else [reader.get_batch(n) for n in range(reader.num_record_batches)]


def _reader(content: pa.Buffer) -> Any:
    return (pa.ipc.open_file if content[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream)(content)


def images_of(table: pa.Table, image: str = "image") -> Images | None:
    """The images that a table holds; None where it holds no bytes.

    They are the columns ``image`` (a name) and ``bytes``, as ``lavis-mafa pack`` writes them. Or ``image`` alone, which holds bytes, or
    ``{bytes, path}`` as Hugging Face writes it.
    """
    kinds = {name: table.schema.field(name).type for name in (image, "bytes") if table.column_names.count(name) == 1}
    kind, beside = kinds.get(image, pa.null()), kinds.get("bytes", pa.null())
    if is_text(kind) and _is_binary(beside):
        return Images(table[image].cast(pa.string()), table["bytes"])
    if _is_binary(kind):
        return Images(pa.chunked_array([pa.nulls(len(table), pa.string())]), table[image], True)
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind} and _is_binary(kind.field("bytes").type):
        content, given = (pc.struct_field(table[image], name) for name in ("bytes", "path"))
        return Images(given.cast(pa.string()), content, content.null_count < len(content))
    return None


def _own_names(path: Path, images: Images) -> pa.ChunkedArray:
    """With the file before each, since another one's may be called the same; images of one path but different sizes are two."""
    names, content = images.names, images.content
    rows = pa.array(np.arange(1, len(content) + 1)).cast(pa.string())
    own = pc.binary_join_element_wise(prefix(path), pc.coalesce(names, rows), "/")
    size, there = pc.fill_null(pc.binary_length(content), -1).to_numpy(), pc.is_valid(content).to_numpy()
    other = there & (size != size[_first_of_name(own, there)])
    own = pc.if_else(pa.array(other), pc.binary_join_element_wise(own, rows, " of row "), own)
    return pc.if_else(content.is_valid(), own, names)  # without bytes, it is a path as it was written


def prefix(path: Path) -> str:
    """What stands before the names of a file's images where they say nothing of a folder."""
    return f"{path.absolute().parent.name}/{path.name}"


def _first_of_name(names: pa.ChunkedArray, among: np.ndarray) -> np.ndarray:
    """[N] for each row the first one ``among`` (Bool [N]) those of its name; -1 where there is none, or no name."""
    number = pc.fill_null(pc.index_in(names, value_set=pc.drop_null(pc.unique(names))), -1).to_numpy()
    first = np.full(number.max(initial=-1) + 2, -1)  # the last one is of no name
    named = np.flatnonzero(among & (number >= 0))[::-1]
    first[number[named]] = named
    return first[number]


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _spans(path: Path, whole: pa.Buffer, cells: pa.Array) -> np.ndarray:
    """Where in a file the cells of a column of bytes lie: offsets and sizes, int64 [2, n]."""
    cells.validate(full=True)  # else they might lead out of the column
    if not len(cells):
        return np.zeros((2, 0), np.int64)
    _, offsets, data = cells.buffers()
    width = np.int64 if pa.types.is_large_binary(cells.type) else np.int32
    ends = np.frombuffer(offsets, width)[cells.offset : cells.offset + len(cells) + 1].astype(np.int64)
    start = 0 if data is None else data.address - whole.address
    if not 0 <= start <= whole.size:
        remedy = f"write it again without: lavis-mafa pack {path} --output FILE.arrow"
        raise UserError(f"{path} was written with compression, so its images cannot be read where they lie; {remedy}")
    return np.stack([ends[:-1] + start, np.diff(ends)])
