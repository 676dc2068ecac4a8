"""Grounding by a model that saw no box: does the Grad-CAM of its score lie on the thing that a text names? (ALBEF section 6)"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lavis_mafa.config.data import ending
from lavis_mafa.datasets.annotations import LEAVES, clean_caption
from lavis_mafa.datasets.formats import Columns, known_columns, one_message
from lavis_mafa.datasets.ids import shown_json
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.errors import EmptyCaption, UserError
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading, named_images
from lavis_mafa.objectives.soft_mask import word_cam
from lavis_mafa.tools.significance import Accuracy

Box = tuple[int, int, int, int]  # left, top, right, bottom
CORNERS = ("left", "top", "right", "bottom")
COLUMNS = Columns(single=("image", "text", "box"), several="boxes", optional=(), hint="")
FIGURES = {
    "quadrant": "hottest quadrant has the box's middle",
    "point": "hottest point is in the box",
    "box": "hottest of the boxes is the right one",
}
QUADRANTS = 4
PAIRS_AT_ONCE = 128

# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """A text about one thing of an image; ``box`` is where that is, and ``boxes`` are those of all things, that one among them."""

    where: str  # for messages
    image: Path
    text: str
    box: Box
    boxes: tuple[Box, ...]


def read_boxes(path: Path, images: Path | None = None) -> list[Expression]:
    """Expressions from a .parquet or .jsonl file with ``image``, ``text``, ``box`` and ``boxes``, such as those of ``build-scenes``.

    A box is ``{left, top, right, bottom}`` in whole pixels of the image, the last two exclusive.

    Args:
        images: folder that the image paths start from; None: the file's.

    Raises:
        UserError: the file is missing, broken, of another kind or without rows or a column; a row's image, text or box is none, its
            box is not among its ``boxes``, or its image is not there.
    """
    if ending(path) not in (".parquet", ".jsonl"):
        raise UserError(f"--boxes is {str(path)!r}; allowed: a .parquet or .jsonl file, such as grounding_val.parquet of scenes.")
    if not path.is_file():
        raise UserError(f"--boxes is {str(path)!r}, but there is no such file.")
    with one_message(path):
        table = pyarrow.parquet.read_table(path) if ending(path) == ".parquet" else pyarrow.json.read_json(path)
        rows = table.select(known_columns(path, COLUMNS, table.column_names)).to_pylist()
    if not rows:
        raise UserError(f"{path}: no rows.")
    folder = path.parent if images is None else images
    found = [_expression(f"{path}, row {number}", row, folder) for number, row in enumerate(rows, 1)]
    there = {image: image.is_file() for image in {one.image for one in found}}
    missing = next((one for one in found if not there[one.image]), None)
    if missing is not None:
        raise UserError(f"{missing.where}: no image at {missing.image}; --images is the folder that the paths start from.")
    return found


def _expression(where: str, row: dict[str, Any], folder: Path) -> Expression:
    for name in ("image", "text"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: '{name}' is {shown_json(row[name])}; allowed: a text.")
    if re.search(LEAVES, row["image"]):
        raise UserError(f"{where}: the image path {row['image']!r} leaves the image folder; allowed: paths below it.")
    if not isinstance(row["boxes"], list):
        raise UserError(f"{where}: 'boxes' is {shown_json(row['boxes'])}; allowed: a list of boxes.")
    box, boxes = _corners(where, row["box"]), tuple(_corners(where, one) for one in row["boxes"])
    if box not in boxes:
        raise UserError(f"{where}: the box {shown_json(row['box'])} is not among the {len(boxes)} of 'boxes', so none could be right.")
    return Expression(where, folder / row["image"], row["text"], box, boxes)


def _corners(where: str, value: Any) -> Box:
    corners: list[Any] = [value.get(name) for name in CORNERS] if isinstance(value, dict) else []
    if corners and all(isinstance(corner, int) for corner in corners):
        left, top, right, bottom = corners
        if 0 <= left < right and 0 <= top < bottom:
            return left, top, right, bottom
    raise UserError(f"{where}: a box is {shown_json(value)}; allowed: whole numbers left < right and top < bottom, from 0.")


# --- maps -------------------------------------------------------------------------------------------------------------


def itm_maps(
    model: Any, image_tokens: Tensor, texts: tuple[Tensor, ...], image_index: Tensor, text_index: Tensor, layer: int | None = None
) -> Tensor:
    """Where P of B texts look in K images for the matching logit: the mean map of all tokens but the last, [SEP].

    Args: as ``match_rows`` takes them, with indices on the host; ``layer``: see :func:`lavis_mafa.models.soft_masks.word_maps`.

    Returns:
        [P, patches], nowhere negative.
    """
    image_tokens, image_index = named_images(image_tokens, image_index)
    reading = Reading.of(texts[-1], image_tokens.device, text_index, image_index, len(image_tokens))
    assert reading.layout is not None, "indices on the host"
    with torch.no_grad():
        images = model.keys_values(image_tokens)
    maps = word_maps(model, images, texts, reading, layer)
    return torch.stack([words[:-1].mean(dim=0) for words in maps.split(reading.layout.lengths)])


def itc_maps(model: Any, image: Tensor, text_features: Tensor, image_index: Tensor, text_index: Tensor) -> Tensor:
    """Where the class token of the image encoder's last block looks for P cosines of K images and B texts.

    Args:
        image: [K, 3, H, W]. text_features: [B, d]. image_index, text_index: LongTensor[P].

    Returns:
        [P, patches], nowhere negative.
    """
    last, given = model.visual_encoder.blocks[-1], list[Tensor]()
    handle = last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        with torch.no_grad():
            model.image_states(image)
    finally:
        handle.remove()
    states = given[0].index_select(0, image_index.to(image.device)).requires_grad_()  # so that a frozen model has maps too
    texts = text_features.index_select(0, text_index.to(text_features.device))
    last.attn.save_attention = True
    try:
        with torch.enable_grad():
            features = model.image_features(model.visual_encoder.norm(last(states)))
            attention = last.attn.attention_map
            (gradient,) = torch.autograd.grad((features * texts).sum(), attention)
    finally:
        last.attn.save_attention, last.attn.attention_map = False, None
    return word_cam(attention.detach()[:, :, :1], gradient[:, :, :1])[:, 0, 1:]


# --- judged -----------------------------------------------------------------------------------------------------------


def heat_of(cam: Tensor, width: int, height: int) -> Tensor:
    """A map over square patches, [patches], at its image's size, [height, width]: bicubic, as ALBEF's code has it."""
    side = math.isqrt(len(cam))
    grid = cam.float().view(1, 1, side, side)
    return F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def hottest_point(heat: Tensor) -> tuple[int, int]:
    """Column and row of the greatest value of [height, width]."""
    place = int(heat.argmax())
    return place % heat.shape[1], place // heat.shape[1]


def hottest_quadrant(heat: Tensor) -> int:
    """Upper left 0, upper right 1, lower left 2, lower right 3: the greatest mean of [height, width]."""
    down, across = heat.shape[0] // 2, heat.shape[1] // 2
    quarters = [heat[:down, :across], heat[:down, across:], heat[down:, :across], heat[down:, across:]]
    return int(torch.stack([quarter.mean() for quarter in quarters]).argmax())


def quadrant_of(box: Box, width: int, height: int) -> int:
    """The quadrant that a box's middle lies in."""
    left, top, right, bottom = box
    return 2 * int(top + bottom >= height) + int(left + right >= width)


def box_scores(heat: Tensor, boxes: Sequence[Box]) -> Tensor:
    """How hot each of n boxes is: the map's sum in it by the square root of its area; [height, width] -> [n].

    Example:
        >>> box_scores(torch.ones(4, 4), [(0, 0, 2, 2), (0, 0, 4, 4)])
        tensor([2., 4.])
    """
    sums = [heat[top:bottom, left:right].sum() / math.sqrt((right - left) * (bottom - top)) for left, top, right, bottom in boxes]
    return torch.stack(sums)


@dataclass
class Tally:
    """What was found, an entry an expression."""

    image: list[int] = field(default_factory=list)
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))  # by FIGURES
    chance: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    blank: int = 0  # maps that are 0 everywhere: they look at nothing, which is wrong

    def add(self, cam: Tensor, image: int, expression: Expression, width: int, height: int) -> None:
        """Judge a map [patches] of an image of this size."""
        left, top, right, bottom = box = expression.box
        heat = heat_of(cam, width, height)
        x, y = hottest_point(heat)
        hottest = expression.boxes[int(box_scores(heat, expression.boxes).argmax())]
        seen = bool(cam.max() > 0)
        found = {
            "quadrant": hottest_quadrant(heat) == quadrant_of(box, width, height),
            "point": left <= x < right and top <= y < bottom,
            "box": hottest == box,
        }
        guessed = {
            "quadrant": 1 / QUADRANTS,
            "point": (right - left) * (bottom - top) / (width * height),
            "box": expression.boxes.count(box) / len(expression.boxes),
        }
        for name in FIGURES:
            self.right[name].append(seen and found[name])
            self.chance[name].append(guessed[name])
        self.image.append(image)
        self.blank += not seen

    def figures(self) -> dict[str, tuple[Accuracy, float]]:
        """By each of FIGURES the accuracy, and what guessing would have."""
        image, count = torch.tensor(self.image), len(self.image)
        return {name: (Accuracy.of(torch.tensor(self.right[name]), image), sum(self.chance[name]) / count) for name in FIGURES}


def ground(
    model: Any,
    expressions: Sequence[Expression],
    processors: tuple[Any, Any],
    by: str = "itm",
    layer: int | None = None,
    images_at_once: int = 32,
) -> Tally:
    """Judge the maps of all expressions, image by image.

    Args:
        model: of ALBEF's or BLIP's kind, in eval mode.
        processors: of images and texts, as the model is evaluated with.
        by: ``itm``: the matching logit; ``itc``: the cosine.
        layer: of ``itm``; see :func:`lavis_mafa.models.soft_masks.word_maps`.

    Raises:
        UserError: an image cannot be read, a box lies outside of its image, a text holds no word, or there is no such layer.
    """
    see, read = processors
    about: dict[Path, list[Expression]] = defaultdict(list)
    for one in expressions:
        about[one.image].append(one)
    tally, images = Tally(), list(about)
    with tqdm(total=len(expressions), desc=f"Grad-CAM of {by.upper()}", unit="text") as bar:
        for first in range(0, len(images), images_at_once):
            chunk = images[first : first + images_at_once]
            pictures = [_opened(about[image]) for image in chunk]
            pixels = torch.stack([see(picture) for picture in pictures]).to(model.device)
            asked = [(place, one) for place, image in enumerate(chunk) for one in about[image]]
            with torch.no_grad():
                tokens = model.image_rows(pixels)[0] if by == "itm" else None
                texts, features = model.text_rows([_read(read, one) for _, one in asked])
            for part in torch.arange(len(asked)).split(PAIRS_AT_ONCE):
                of_image = torch.tensor([asked[number][0] for number in part.tolist()])
                if tokens is not None:
                    maps = itm_maps(model, tokens, texts, of_image, part, layer)
                else:
                    maps = itc_maps(model, pixels, features, of_image, part)
                for number, cam in zip(part.tolist(), maps.cpu(), strict=True):
                    place, one = asked[number]
                    tally.add(cam, first + place, one, *pictures[place].size)
                bar.update(len(part))
    return tally


def _opened(expressions: Sequence[Expression]) -> Any:
    """Their image, with all of their boxes inside."""
    where, path = expressions[0].where, expressions[0].image
    try:
        picture = load_rgb(path)
    except OSError as error:
        raise UserError(f"{where}: {error}") from error
    width, height = picture.size
    for one in expressions:
        for box in one.boxes:
            if box[2] > width or box[3] > height:
                raise UserError(f"{one.where}: the box {box} lies outside of {path.name}, which is {width} x {height} pixels.")
    return picture


def _read(process: Any, expression: Expression) -> str:
    try:
        return clean_caption(process, expression.text)
    except EmptyCaption as error:
        raise UserError(f"{expression.where}: {error}") from error


def format_figures(figures: dict[str, tuple[Accuracy, float]]) -> str:
    """A line a figure, in per cent."""
    lines = [f"{'right (%)':42}{'model':>7}{'95 % interval':>18}{'chance':>9}"]
    for name, (one, chance) in figures.items():
        ends = "" if one.low is None or one.high is None else f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        lines.append(f"{FIGURES[name]:42}{100 * one.accuracy:7.1f}{ends:>18}{100 * chance:9.1f}")
    return "\n".join(lines)
