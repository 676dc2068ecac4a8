"""Small pictures inside a page: each image once, in bounded number and size."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from lavis_mafa.datasets.images import on_white

SIDE = 96
AS_IT_IS = 8_000  # bytes; a file that is small enough already is not encoded again
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError)


class Thumbnails:
    """Numbers images in the order they are asked for; the first ones are embedded, the others named by their path.

    Args:
        at_most: how many are embedded. at_most_bytes: and how long all of their data URLs may be.
    """

    def __init__(self, at_most: int = 1500, at_most_bytes: int = 10_000_000) -> None:
        self.left, self.left_bytes = at_most, at_most_bytes
        self.entries: list[dict[str, Any]] = []
        self.numbers: dict[str, int] = {}

    def add(self, path: Path | None, otherwise: str) -> int:
        """The image's number; ``otherwise`` says what it is where there is no path."""
        name = str(path) if path is not None else otherwise
        if name not in self.numbers:
            self.numbers[name] = len(self.entries)
            self.entries.append(self._entry(path, name))
        return self.numbers[name]

    def _entry(self, path: Path | None, name: str) -> dict[str, Any]:
        if path is None:
            return {"name": name, "problem": "image not known"}
        if not path.is_file():
            return {"name": name, "problem": "image is missing"}
        if self.left <= 0:
            return {"name": name, "problem": "not embedded"}
        try:
            url = data_url(path)
        except UNREADABLE:
            return {"name": name, "problem": "image is unreadable"}
        if len(url) > self.left_bytes:
            self.left = 0
            return {"name": name, "problem": "not embedded"}
        self.left, self.left_bytes = self.left - 1, self.left_bytes - len(url)
        return {"src": url}


def data_url(path: Path, side: int = SIDE) -> str:
    """The image as a data URL, fitted into ``side`` pixels.

    Raises:
        OSError, ValueError: it is missing, torn or no image.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS sets it for the whole program
    with Image.open(path) as image:
        kind, small = image.format or "", max(image.size) <= side and path.stat().st_size <= AS_IT_IS
        image.draft("RGB", (2 * side, 2 * side))  # of a large JPEG, decode an eighth of the pixels
        picture = on_white(image)
    if small and kind in FORMATS:
        return f"data:{FORMATS[kind]};base64," + base64.b64encode(path.read_bytes()).decode()
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=72, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
