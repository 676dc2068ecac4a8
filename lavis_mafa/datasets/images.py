"""Opening images the same way everywhere."""

from __future__ import annotations

from os import PathLike

from PIL import Image, ImageFile


def load_rgb(path: str | PathLike[str]) -> Image.Image:
    """Open an image as RGB; what is transparent becomes white (a plain ``convert`` would show the colour hidden there).

    Raises:
        OSError: the file is missing, torn or no image (``PIL.UnidentifiedImageError`` is one).
    """
    # LAVIS tells PIL to accept torn files, for every program that imports it; half a picture is no sample
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with Image.open(path) as image:
        return on_white(image)


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
