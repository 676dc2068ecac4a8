"""Texts that name one thing of an image, where that is, and the boxes to find it among: what grounding is evaluated on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from torch.utils.data import Dataset, default_collate

from lavis_mafa.config.data import AnnotationFile, ending
from lavis_mafa.datasets.annotations import LEAVES, clean_caption, shown
from lavis_mafa.datasets.formats import SAME_IMAGE, Columns, as_named, known_columns, one_message, read_records
from lavis_mafa.datasets.ids import Id, id_of_json, is_missing_text, shown_json
from lavis_mafa.datasets.images import load_rgb, upright_size
from lavis_mafa.errors import EmptyCaption, UserError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image, the last two exclusive
CORNERS = ("left", "top", "right", "bottom")
HIT = 0.5  # the overlap from which on a box is the right one
EXPRESSIONS = Columns(single=("image",), several="text", optional=(SAME_IMAGE,))  # to train on: no box is looked at
BOXES = Columns(single=("image", "text", "box"), several="boxes", optional=("expression_id",))


def overlap(one: Box, other: Box) -> float:
    """Area that two boxes share by the area that they cover (IoU). It is RefCOCO's, whose right and bottom pixels are inside.

    Example:
        >>> overlap((0, 0, 4, 4), (2, 0, 6, 4))
        0.3333333333333333
    """
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other)) - shared
    return shared / covered


@dataclass(frozen=True)
class Expression:
    """A text about one thing of an image; ``box`` is where that is, and it is to be found among ``boxes``."""

    where: str  # for messages
    expression_id: Id
    image: Path
    text: str
    box: Box
    boxes: tuple[Box, ...]

    def right(self, box: Box | None) -> bool:
        """Whether a box of an image lies on the thing."""
        return box is not None and overlap(self.box, box) >= HIT

    @property
    def hits(self) -> int:
        """How many of the boxes do."""
        return sum(map(self.right, self.boxes))


def read_expressions(
    files: Sequence[AnnotationFile], images: Path | None = None, allow_absolute_paths: bool = False, select: Any = None
) -> list[Expression]:
    """Expressions from .parquet, .json or .jsonl files with ``image``, ``text``, ``box`` and ``boxes``, and if they are to be named
    with ``expression_id`` (else they are numbered from 0), such as the ``grounding`` view of ``build-scenes``.

    A box is ``{left, top, right, bottom}`` in pixels of the image, the last two exclusive.

    Args:
        images: folder that image paths start from, where a file has none of its own; None: the file's.
        allow_absolute_paths: they may leave it.
        select: a table -> the rows to use.

    Raises:
        UserError: a file is missing, broken, of another kind or without rows or a column; a row's image, text or box is none or of
            another form, its image is not there, or its id is there twice or in some rows only.
    """
    found: list[tuple[str, dict[str, Any], Path]] = []
    for file in files:
        folder = file.images or images or file.path.parent
        found += [(f"{shown(file.path)}, row {number}", row, folder) for number, row in enumerate(_rows(file.path, file.columns), 1)]
    if select is not None:
        found = [found[number] for number in select(pa.table({"row": range(len(found))}))["row"].to_pylist()]
    ids = _ids([where for where, _, _ in found], [row.get("expression_id") for _, row, _ in found])
    expressions = [_expression(one, *row, allow_absolute_paths) for one, row in zip(ids, found, strict=True)]
    there = {image: image.is_file() for image in {one.image for one in expressions}}
    missing = next((one for one in expressions if not there[one.image]), None)
    if missing is not None:
        raise UserError(f"{missing.where}: no image at {shown(missing.image)}; is that the folder the paths start from?")
    return expressions


def _rows(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    if ending(path) not in (".parquet", ".json", ".jsonl"):
        raise UserError(f"{shown(path)}: boxes are read from .parquet, .json or .jsonl, such as grounding_val.parquet of scenes.")
    if not path.is_file():
        raise UserError(f"{shown(path)}: there is no such file.")
    with one_message(path):
        theirs = as_named(path, BOXES, columns)[1]
        if ending(path) == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
            wanted = [name for name in names if theirs.get(name, name) in BOXES.known]
            table = pyarrow.parquet.read_table(path, columns=wanted)
            table.validate(full=True)
            records = table.to_pylist()
        else:
            records = list(read_records(path, BOXES, columns))
            names = list(dict.fromkeys(name for record in records for name in record))
        if not records:
            raise UserError(f"{shown(path)}: no rows.")
        ours = {theirs.get(name, name): name for name in names}
        if "box" in ours and "boxes" not in ours:
            raise UserError(
                f"{shown(path)}: no column 'boxes', the list of boxes that each row's thing is to be found among; where grounding is "
                "evaluated each row needs them: those of all things of the image, or what a detector finds there."
            )
        known = known_columns(path, BOXES, [theirs.get(name, name) for name in names])
    return [{name: record.get(ours[name]) for name in known} for record in records]


def _ids(places: list[str], given: list[Any]) -> list[Id]:
    """Texts and whole numbers as they are, or the rows' numbers."""
    found: list[Id] = []
    row_of: dict[Id, str] = {}
    for where, value in zip(places, given, strict=True):
        text, is_number = id_of_json(f"{where}: 'expression_id'", value)
        if text is None or is_missing_text(text):
            if any(one is not None for one in given):
                raise UserError(f"{where}: no expression_id; allowed: one in every row, or no such column.")
            return list(range(len(places)))
        one: Id = int(text) if is_number else text
        if row_of.setdefault(one, where) != where:
            raise UserError(f"{where}: expression_id {one!r} is that of {row_of[one]}, too; allowed: once.")
        found.append(one)
    return found


def _expression(one: Id, where: str, row: dict[str, Any], folder: Path, allow_absolute_paths: bool) -> Expression:
    for name in ("image", "text"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: '{name}' is {shown_json(row[name])}; allowed: a text.")
    if re.search(LEAVES, row["image"]) and not allow_absolute_paths:
        raise UserError(f"{where}: the image path {row['image']!r} leaves the image folder; allowed: paths below it.")
    if not isinstance(row["boxes"], list):
        raise UserError(f"{where}: 'boxes' is {shown_json(row['boxes'])}; allowed: a list of boxes.")
    box, boxes = _corners(where, row["box"]), tuple(_corners(where, one) for one in row["boxes"])
    return Expression(where, one, folder / row["image"], row["text"], box, boxes)


def _corners(where: str, value: Any) -> Box:
    corners: list[Any] = [value.get(name) for name in CORNERS] if isinstance(value, dict) else []
    if corners and all(type(corner) in (int, float) and math.isfinite(corner) for corner in corners):
        left, top, right, bottom = corners
        if 0 <= left < right and 0 <= top < bottom:
            return left, top, right, bottom
    form = "{left, top, right, bottom}, numbers from 0 with left < right and top < bottom"
    raise UserError(f"{where}: a box is {shown_json(value)}; allowed: {form}.")


class GroundedImages(Dataset):
    """Images, each once, with all expressions about it.

    Args:
        vis_processor: PIL RGB image -> tensor. text_processor: str -> str.

    Attributes:
        expressions: [P] as given. texts: [P] processed.
        image: [I] paths, in the order of first appearance. sizes: [I] widths and heights. about: [I] places in ``expressions``.

    Raises:
        UserError: an image has no header of one, a box lies outside of its image, or a text holds no word.
    """

    def __init__(
        self, vis_processor: Callable[[Any], Any], text_processor: Callable[[str], str], expressions: Sequence[Expression]
    ) -> None:
        self.vis_processor, self.text_processor, self.expressions = vis_processor, text_processor, expressions
        self.texts = [_clean(text_processor, one) for one in expressions]
        rows: dict[Path, list[int]] = {}
        for row, one in enumerate(expressions):
            rows.setdefault(one.image, []).append(row)
        self.image, self.about = list(rows), list(rows.values())
        self.sizes = [_size(self.image[number], [expressions[row] for row in its]) for number, its in enumerate(self.about)]

    def __len__(self) -> int:
        return len(self.image)

    def image_path(self, index: int) -> Path:
        return self.image[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``image``, ``index``. OSError where the image cannot be read."""
        return {"image": self.vis_processor(load_rgb(self.image[index])), "index": index}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return default_collate(samples)

    def asked(self, images: Iterable[int]) -> tuple[list[int], torch.LongTensor]:
        """Of K images the places of all P expressions about them, and LongTensor[P]: which of the K each is about."""
        pairs = [(row, place) for place, image in enumerate(images) for row in self.about[image]]
        return [row for row, _ in pairs], torch.tensor([place for _, place in pairs], dtype=torch.long)  # type: ignore[return-value]


def _clean(process: Callable[[str], str], expression: Expression) -> str:
    try:
        return clean_caption(process, expression.text)
    except EmptyCaption as error:
        raise UserError(f"{expression.where}: {error} Evaluation replaces nothing; leave the row out.") from error


def _size(image: Path, expressions: Sequence[Expression]) -> tuple[int, int]:
    """Width and height of an image, with all boxes inside."""
    try:
        width, height = upright_size(image)
    except OSError as error:
        raise UserError(f"{expressions[0].where}: {error}") from error
    for one in expressions:
        for box in (one.box, *one.boxes):
            if box[2] > width or box[3] > height:
                raise UserError(f"{one.where}: the box {box} lies outside of {image.name}, which is {width} x {height} pixels.")
    return width, height
