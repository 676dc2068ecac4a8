"""An index of tar shards: for each image-text pair where its image lies, and the caption; what ``grit_pairs`` reads as annotations."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.annotations import is_printed_list
from lavis_mafa.datasets.ids import is_missing, pc
from lavis_mafa.datasets.shards import Member, Sample, image_of, read_samples
from lavis_mafa.datasets.stored import PLACE
from lavis_mafa.errors import UserError
from lavis_mafa.files import replacing

SCHEMA = pa.schema({"image": pa.string(), **PLACE, "caption": pa.string()})
ROWS_AT_ONCE = 1 << 16
NO_IMAGE, NO_CAPTION = "without an image", "without a caption"
UNREADABLE = "whose caption is no UTF-8, no JSON or longer than 1 MiB"
NO_TEXT = "whose caption is blank, a printed list or how a missing one is written"
Progress = Callable[[int], None]


@dataclass
class LeftOut:
    """Samples that are no pairs: how many, by why, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        self.counts[why] += 1
        self.first.setdefault(why, name)

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {why} (the first: {self.first[why]})" for why, count in self.counts.items())


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a shard, in its order."""

    samples: list[Sample]
    images: list[Member]
    captions: pa.Array  # string [P]


def pairs_of(path: Path, caption_key: str | None, left_out: LeftOut, progress: Progress = lambda _: None) -> Pairs:
    """The samples of a shard that have an image and a caption; the others are counted in ``left_out``.

    Args:
        caption_key: of ``KEY.json`` the key of the caption; None takes ``KEY.txt``.

    Raises:
        UserError: none has both, two images are of one key, or whatever ``read_samples`` finds.
    """
    kind = "txt" if caption_key is None else "json"
    samples = read_samples(path, {kind}, progress)
    found: list[tuple[str, Sample, Member, str]] = []
    for key, sample in samples.items():
        image, caption = image_of(path, sample), _caption(sample.get(kind), caption_key)
        if image is None:
            left_out.add(NO_IMAGE, f"{path}/{key}")
        elif caption in (NO_CAPTION, UNREADABLE):
            left_out.add(caption, f"{path}/{key}")
        else:
            found.append((key, sample, image, caption))
    captions = pa.array([caption for *_, caption in found], pa.string())
    said = pc.invert(pc.or_(is_missing(captions), pc.fill_null(is_printed_list(captions), False))).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(~said):
        left_out.add(NO_TEXT, f"{path}/{found[row][0]}")
    kept = [one for one, is_said in zip(found, said, strict=True) if is_said]
    if not kept:
        raise UserError(f"{path} holds no pair: of {len(samples)} keys none has an image and {_wanted(samples, caption_key)}.")
    return Pairs([sample for _, sample, *_ in kept], [image for _, _, image, _ in kept], captions.filter(pa.array(said)))


def _caption(member: Member | None, key: str | None) -> str:
    """Without blanks around it; NO_CAPTION or UNREADABLE where there is none."""
    if member is None:
        return NO_CAPTION
    if member.content is None:
        return UNREADABLE
    try:
        text = member.content.decode("utf-8-sig")
        value = text if key is None else json.loads(text)
    except (ValueError, RecursionError):
        return UNREADABLE
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return NO_CAPTION
    try:
        value.encode()  # JSON can escape half of a character
    except UnicodeEncodeError:
        return UNREADABLE
    return value.strip()


def _wanted(samples: dict[str, Sample], key: str | None) -> str:
    if key is not None:
        return f"a text {key!r} in KEY.json (--caption-key)"
    in_json = any("json" in sample for sample in samples.values())
    return "a caption in KEY.txt" + ("; --caption-key NAME takes it from KEY.json" if in_json else "")


@contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchFileWriter]:
    """A writer of a file of Arrow's IPC format that is whole or absent, and new: check it with :func:`check_output` before."""
    with replacing(path) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield writer


def check_output(path: Path) -> None:
    """Before anything heavy: a new .arrow file in a folder that is there; raises UserError."""
    if path.suffix != ".arrow":
        raise UserError(f"--output is {str(path)!r}; allowed: a file that ends in .arrow.")
    if path.exists():
        raise UserError(f"--output: {path} exists already and is never overwritten; choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"--output: the folder {path.parent} does not exist.")


def write_index(shards: Sequence[Path], output: Path, caption_key: str | None, progress: Progress) -> tuple[Path, int, LeftOut]:
    """Write the index of these shards.

    Returns:
        The folder that its paths start from, the number of pairs, and what was left out.

    Raises:
        UserError: from a shard; nothing is written then.
    """
    root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    names = [str(shard.absolute().relative_to(root)) for shard in shards]
    left_out, pairs, waiting = LeftOut(), 0, list[pa.RecordBatch]()
    with arrow_file(output, SCHEMA) as writer:

        def write() -> None:
            table = pa.Table.from_batches(waiting, SCHEMA).combine_chunks()
            writer.write_table(table)
            waiting.clear()

        for number, shard in enumerate(shards):
            found = pairs_of(shard, caption_key, left_out, progress)
            count = len(found.images)
            columns = {
                "image": pa.array([f"{names[number]}/{image.name}" for image in found.images]),
                "shard": pa.DictionaryArray.from_arrays(pa.array(np.full(count, number, np.int32)), names),
                "offset": pa.array([image.offset for image in found.images], pa.int64()),
                "size": pa.array([image.size for image in found.images], pa.int64()),
                "caption": found.captions,
            }
            waiting.append(pa.record_batch(columns, schema=SCHEMA))
            pairs += count
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                write()
        if waiting:
            write()
    return root, pairs, left_out
