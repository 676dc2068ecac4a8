"""Each distinct image is opened and each distinct caption cleaned, by the functions that training uses."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lavis_mafa.analysis.data_check.rows import Numbers, Rows
from lavis_mafa.datasets.annotations import clean_caption, is_printed_list, shortened
from lavis_mafa.datasets.ids import is_missing, pc
from lavis_mafa.datasets.images import ImageTooLargeError, ImageTooSmallError, load_rgb
from lavis_mafa.errors import EmptyCaption

IMAGE_KINDS = ("", "missing", "unreadable", "too_large", "too_small")
AT_ONCE = 32
Verdict = tuple[str, str, int]


@dataclass
class Verdicts:
    """What is wrong with U images and C captions."""

    image: Numbers  # [U] into IMAGE_KINDS, 0 for a good one
    content: Numbers  # uint64 [U], equal for files of the same bytes; of good ones
    caption: Numbers  # Bool [C], which are bad
    printed: Numbers  # Bool [C], which of these are printed lists
    image_reason: dict[int, str] = field(default_factory=dict)
    caption_reason: dict[int, str] = field(default_factory=dict)


def judge(rows: Rows, processors: Sequence[Callable[[str], str]], min_side: int, workers: int) -> Verdicts:
    """Look at everything, with progress bars on stderr.

    Args:
        rows: what to look at.
        processors: the text processor of each source.
        min_side: a shorter side below it is too small.
        workers: processes that open images; 0 opens them here.
    """
    images, captions = len(rows.path), len(rows.caption)
    verdicts = Verdicts(np.zeros(images, np.uint8), np.zeros(images, np.uint64), np.zeros(captions, bool), np.zeros(captions, bool))
    _judge_captions(rows, processors, verdicts)
    for number, (kind, reason, content) in enumerate(_judged_images(rows.path, min_side, workers)):
        verdicts.image[number], verdicts.content[number] = IMAGE_KINDS.index(kind), content
        if reason:
            verdicts.image_reason[number] = reason
    return verdicts


def judge_image(path: str, min_side: int) -> Verdict:
    """(kind of ``IMAGE_KINDS``, reason, digest of the file's bytes); the first two are empty for a good image."""
    try:
        size = load_rgb(path).size
        if min(size) < min_side:
            return "too_small", f"{size[0]}x{size[1]} pixels, but a side needs at least {min_side}", 0
        return "", "", _digest(path)
    except FileNotFoundError:
        return "missing", "", 0
    except ImageTooLargeError as error:
        return "too_large", str(error), 0
    except ImageTooSmallError as error:
        return "too_small", str(error), 0
    except OSError as error:
        return "unreadable", str(error), 0


class _Images(Dataset):
    def __init__(self, paths: pa.Array, min_side: int) -> None:
        self.paths, self.min_side = paths, min_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Verdict:
        return judge_image(self.paths[index].as_py(), self.min_side)


def _judged_images(paths: pa.Array, min_side: int, workers: int) -> Iterator[Verdict]:
    # its workers die with the command, read ahead no further than needed, and share the Arrow column
    loader = DataLoader(_Images(paths, min_side), batch_size=AT_ONCE, num_workers=workers, collate_fn=list)
    with tqdm(total=len(paths), desc="images", unit="image", file=sys.stderr) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def _judge_captions(rows: Rows, processors: Sequence[Callable[[str], str]], verdicts: Verdicts) -> None:
    for number, process in enumerate(processors):
        first, end = np.searchsorted(rows.source_of, [number, number + 1])
        captions = rows.caption[first:end]
        distinct = pc.unique(captions)
        reasons = {}
        for index in tqdm(range(len(distinct)), desc="captions", unit="caption", file=sys.stderr):
            try:
                clean_caption(process, distinct[index].as_py())
            except EmptyCaption as error:
                reasons[index] = str(error)
        if rows.caption_text(first) == "caption":  # what grit_pairs refuses, and LAVIS's data sets would train on
            for wrong, what in ((is_missing, "is how a missing caption is written"), (is_printed_list, "is a printed list")):
                for index in np.flatnonzero(pc.fill_null(wrong(distinct), False).to_numpy(zero_copy_only=False)):
                    reasons.setdefault(int(index), f"The caption {shortened(distinct[index].as_py())} {what}.")
        printed = pc.fill_null(is_printed_list(captions), False).to_numpy(zero_copy_only=False)
        verdicts.printed[first:end] = printed
        places = pc.index_in(captions, value_set=distinct).to_numpy()
        for place in np.flatnonzero(np.isin(places, list(reasons))):
            verdicts.caption[first + place] = True
            verdicts.caption_reason[int(first + place)] = reasons[int(places[place])]


def _digest(path: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return int.from_bytes(digest.digest(), "big")
