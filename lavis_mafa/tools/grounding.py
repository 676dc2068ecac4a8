"""Grounding by a model that saw no box: does the Grad-CAM of its score lie on the thing that a text names? (ALBEF section 6)"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.datasets.boxes import Box, Expression, GroundedImages
from lavis_mafa.errors import UserError
from lavis_mafa.models.grounding import expression_maps, heat_of, hottest_box
from lavis_mafa.progress import Bar
from lavis_mafa.tools.significance import Accuracy

FIGURES = {
    "quadrant": "hottest quadrant has the box's middle",
    "point": "hottest point is in the box",
    "box": "hottest of the boxes is the right one",
}
QUADRANTS = 4


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
        seen = bool(cam.max() > 0)
        found = {
            "quadrant": hottest_quadrant(heat) == quadrant_of(box, width, height),
            "point": left <= x < right and top <= y < bottom,
            "box": expression.right(hottest_box(heat, expression.boxes)),
        }
        guessed = {
            "quadrant": 1 / QUADRANTS,
            "point": (right - left) * (bottom - top) / (width * height),
            "box": expression.hits / max(len(expression.boxes), 1),
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


def ground(model: Any, images: GroundedImages, by: str = "itm", layer: int | None = None, images_at_once: int = 32) -> Tally:
    """Judge the maps of all expressions, image by image.

    Args:
        model: of ALBEF's or BLIP's kind, in eval mode.
        by, layer: see :func:`lavis_mafa.models.grounding.expression_maps`.

    Raises:
        UserError: an image cannot be read, or there is no such layer.
    """
    tally = Tally()
    with Bar(total=len(images.expressions), desc=f"Grad-CAM of {by.upper()}", unit="text") as bar:
        for chunk in torch.arange(len(images)).split(images_at_once):
            rows, of_image = images.asked(chunk.tolist())
            pixels = torch.stack([_pixels(images, number) for number in chunk.tolist()])
            maps = expression_maps(model, pixels, [images.texts[row] for row in rows], of_image, by, layer)
            for row, number, cam in zip(rows, chunk[of_image].tolist(), maps, strict=True):
                tally.add(cam, number, images.expressions[row], *images.sizes[number])
            bar.update(len(rows))
    return tally


def _pixels(images: GroundedImages, number: int) -> Tensor:
    try:
        pixels: Tensor = images[number]["image"]
    except OSError as error:
        raise UserError(f"{images.expressions[images.about[number][0]].where}: {error}") from error
    return pixels


def format_figures(figures: dict[str, tuple[Accuracy, float]]) -> str:
    """A line a figure, in per cent."""
    lines = [f"{'right (%)':42}{'model':>7}{'95 % interval':>18}{'chance':>9}"]
    for name, (one, chance) in figures.items():
        ends = "" if one.low is None or one.high is None else f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        lines.append(f"{FIGURES[name]:42}{100 * one.accuracy:7.1f}{ends:>18}{100 * chance:9.1f}")
    return "\n".join(lines)
