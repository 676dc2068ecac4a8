"""Draw ``false-negative.png``, the README's picture, from built emoji data: ``python docs/make_picture.py data/emoji``."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

PAIRS = [("noto/1F436", "dog face"), ("twemoji/1F436", "something to do with pet"), ("openmoji/1F34E", "red apple")]
MATCHES = {(0, 1), (1, 0)}  # both drawings are dogs, and a dog is a pet
GREEN, RED, GREY = "#1a7f37", "#b42318", "#9a9a9a"


def main(folder: Path) -> None:
    figure = Figure(figsize=(8.4, 3.3), dpi=120, facecolor="white")
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0, 8.4), ylim=(0, 3.3))
    axis.axis("off")
    for row, (name, text) in enumerate(PAIRS):
        height = 2.65 - row
        image = Image.open(folder / "images" / f"{name}.png")
        axis.imshow(image, extent=(0.9, 1.7, height - 0.4, height + 0.4), aspect="auto", zorder=3)
        axis.text(5.35, height, f"“{text}”", fontsize=13, va="center")
        axis.plot([1.9, 5.2], [height, height], color="black", linewidth=1.8)
    for image in range(3):
        for text in range(3):
            if image == text:
                continue
            false = (image, text) in MATCHES
            axis.plot(
                [1.9, 5.2],
                [2.65 - image, 2.65 - text],
                color=RED if false else GREY,
                linewidth=2.2 if false else 0.9,
                linestyle="-" if false else (0, (3, 3)),
                zorder=1,
            )
    axis.text(5.35, 0.12, "black: labelled as matching   dashed: not matching", fontsize=8, color="#555")
    axis.text(0.25, 0.12, "red: false negatives, they match but are labelled as not matching", fontsize=8, color=RED)
    axis.set_aspect("equal")
    figure.savefig(Path(__file__).with_name("false-negative.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
