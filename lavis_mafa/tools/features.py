"""Features that some dual encoder gave before: of N pairs, an image's and a text's each, in the order of the annotations.

They stay on the disk where they are ``.npy`` files (memory-mapped); what is taken from them is normalised then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.objectives.trust import is_sane
from lavis_mafa.progress import Bar

ROWS_AT_ONCE = 16_384
ENOUGH = 20_000  # pairs, to see whether they are pairs
SIDES = ("image", "text")
FORMS = "two .npy files or folders of them (images, texts), or one .parquet with the columns image_features and text_features"


class Features(NamedTuple):
    """``image`` and ``text`` [N, d], floating-point numbers as they were stored."""

    image: np.ndarray
    text: np.ndarray

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """LongTensor[n] -> image and text features of these pairs, [n, d] fp32 of length 1 each."""
        return unit_rows(self.image, index), unit_rows(self.text, index)

    def digest(self) -> str:
        """16 hexadecimal digits that change with any number in them."""
        found = hashlib.sha256()
        for name, side in zip(SIDES, self, strict=True):
            for start in _starts(side, f"digest of {name} features"):
                found.update(side[start : start + ROWS_AT_ONCE].tobytes())
        return found.hexdigest()[:16]


def unit_rows(features: np.ndarray, index: Tensor) -> Tensor:
    """[N, d], LongTensor[n] -> these rows, [n, d] fp32 of length 1."""
    return torch.nn.functional.normalize(torch.from_numpy(features[index.numpy()].astype(np.float32)), dim=1)


def read_features(paths: Sequence[Path], rows: int, flag: str = "--features") -> Features:
    """Features of ``rows`` pairs: one row a pair, so that an image with several captions has as many equal rows.

    Args:
        paths: of images and of texts, each a ``.npy`` file, or a folder of such, which are joined in the order of their names (in
            memory); or one ``.parquet`` file with lists of numbers: ``image_features``, ``text_features`` (or ``image``, ``text``).
        flag: for messages.

    Raises:
        UserError: no such file, or of another kind; arrays that are not [rows, d] of floating-point numbers, of the same d; a row that
            is not finite, or zero throughout. Nothing is ever unpickled.

    Example:
        >>> image, text = features = read_features([Path("images.npy"), Path("texts.npy")], rows=100_000)
        >>> features.rows(torch.arange(4))[0].norm(dim=1)
        tensor([1., 1., 1., 1.])
    """
    endings = [_ending(path, flag) for path in paths]
    if endings == [".npy", ".npy"]:
        found = Features(*(_joined(path, flag) for path in paths))
    elif endings == [".parquet"]:
        found = _of_parquet(paths[0], flag)
    else:
        given = " ".join(map(str, paths))
        raise UserError(f"{flag} is {given}; allowed: {FORMS}.")
    names = [f"{path}" for path in paths] * (2 // len(paths))
    for side, name, array in zip(SIDES, names, found, strict=True):
        if array.dtype.kind != "f" or array.ndim != 2:
            raise UserError(
                f"{flag}: the {side} features in {name} are {array.dtype} {list(array.shape)}; allowed: float16, float32 or float64 "
                "[pairs, numbers of a feature]."
            )
        if len(array) != rows:
            raise UserError(
                f"{flag}: {name} has {len(array):,} rows of {side} features, but there are {rows:,} pairs; it takes one row a pair, in "
                "the order of the annotations."
            )
    if found.image.shape != found.text.shape:
        raise UserError(
            f"{flag}: images have {found.image.shape[1]:,} numbers each, but texts {found.text.shape[1]:,}; allowed: features of one "
            "dual encoder, after its projections."
        )
    for side, name, array in zip(SIDES, names, found, strict=True):
        _check_rows(array, f"{flag}: the {side} features in {name}")
    return found


def check_own_pairs(features: Features, flag: str = "--features") -> None:
    """Raises UserError where the image and the text of a pair are no more alike than those of two pairs: rows in another order, or
    features of two models."""
    rows = torch.randperm(len(features.image), generator=torch.Generator().manual_seed(0))[:ENOUGH]
    image, text = features.rows(rows)
    own, other = (image * text).sum(dim=1), (image * text.roll(1, dims=0)).sum(dim=1)
    if len(rows) > 1 and not is_sane(own - other):
        raise UserError(
            f"{flag}: image and text of a pair are hardly more alike (mean cosine {float(own.mean()):.3f}) than those of two pairs "
            f"({float(other.mean()):.3f}). Are the rows in the order of the annotations, and both of one model? --force goes on."
        )


def _ending(path: Path, flag: str) -> str:
    """Of the file, or of the folder's files."""
    if not path.exists():
        raise UserError(f"{flag} is {str(path)!r}, but there is no such file.")
    return ".npy" if path.is_dir() else path.suffix.lower()


def _joined(path: Path, flag: str) -> np.ndarray:
    if not path.is_dir():
        return _mapped(path, flag)
    files = sorted(path.glob("*.npy"))
    if len({len(file.name) for file in files}) > 1:
        raise UserError(
            f"{flag}: the .npy files in {path} have names of different lengths ({files[0].name}, ..., {files[-1].name}), which say no "
            "order: is 10 before 2? Allowed: numbers of equally many digits."
        )
    parts = [_mapped(part, flag) for part in files]
    if not parts:
        raise UserError(f"{flag}: {path} holds no .npy file; allowed: {FORMS}.")
    shapes = {(part.dtype, *part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise UserError(f"{flag}: the .npy files in {path} differ in type or width: {', '.join(sorted(map(str, shapes)))}.")
    return np.concatenate(parts)


def _mapped(path: Path, flag: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError) as error:  # also of an array of Python objects, which only a pickle can hold
        raise UserError(f"{flag}: {path} cannot be read: {' '.join(str(error).split())}; allowed: a .npy file of numbers.") from error


def _of_parquet(path: Path, flag: str) -> Features:
    try:
        there = pq.read_schema(path).names
        names = [next((name for name in (f"{side}_features", side) if name in there), "") for side in SIDES]
        if not all(names):
            raise UserError(f"{flag}: {path} has the columns {', '.join(there)}; needed: image_features and text_features.")
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{flag}: {path} is not readable as Parquet: {' '.join(str(error).split())}") from error
    return Features(*(_array(table[name], f"{flag}: column {name!r} of {path}") for name in names))


def _array(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """[N, d] of N lists of d numbers."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(f"{where} holds {kind}; allowed: lists of floating-point numbers.")
    parts = [chunk.flatten() for chunk in column.chunks]  # of which one array could not have 2 ** 31 numbers
    if column.null_count or any(part.null_count for part in parts):
        raise UserError(f"{where}: a row is null, or holds one; allowed: lists of floating-point numbers.")
    if not pa.types.is_fixed_size_list(kind):
        length = pc.list_value_length(column).to_numpy()
        if other := np.flatnonzero(length != length[:1]).tolist():
            raise UserError(
                f"{where}: row {other[0] + 1} has {length[other[0]]} numbers, but row 1 has {length[0]}; allowed: equally many."
            )
    numbers = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts]) if parts else np.zeros(0, np.float32)
    return numbers.reshape(len(column), len(numbers) // max(len(column), 1))


def _starts(array: np.ndarray, what: str) -> Iterable[int]:
    """Where the parts begin in which an array is read, which may take minutes."""
    return Bar(range(0, len(array), ROWS_AT_ONCE), desc=what, unit="part", delay=1)


def _check_rows(array: np.ndarray, where: str) -> None:
    for start in _starts(array, "features"):
        with np.errstate(over="ignore"):  # then it is not finite, as it is said below
            length = np.linalg.norm(array[start : start + ROWS_AT_ONCE].astype(np.float32), axis=1)
        bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
        if len(bad):
            what = "zero throughout" if length[bad[0]] == 0 else "not finite"
            raise UserError(f"{where}: row {start + bad[0] + 1} is {what}; allowed: a feature of a pair that was read, in every row.")
