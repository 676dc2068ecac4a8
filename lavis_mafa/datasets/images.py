"""Opening images the same way everywhere, whatever a file from the web holds."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from lavis_mafa.datasets.stored import StoredImage

Box = tuple[int, int, int, int]  # left, top, right, bottom
DrawCrop = Callable[[tuple[int, int]], Box]  # of an image's width and height
# pictures alone: PIL would hand an .eps to Ghostscript, and a hostile file may have any ending
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 128_000_000  # the largest phone photographs (108 million) pass; as RGB it is 384 MB
MAX_TEXT = 16 << 20  # bytes of one compressed text in a PNG
MIN_SIDE = 4  # tracking pixels and separator lines show nothing that a caption could speak of

# what PIL's decoders raise for broken files besides OSError: they look things up, compute with and assert what a file says
BROKEN = (
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(OSError):
    """An image that cannot be used; the message names file and reason."""


class ImageTooLargeError(ImageError):
    """More than ``MAX_PIXELS``: a decompression bomb, or too much for a data loader's worker."""


class ImageTooSmallError(ImageError):
    """The shorter side is below ``MIN_SIDE``."""


def load_rgb(source: str | PathLike[str] | StoredImage, crop: DrawCrop | None = None, side: int = 1) -> Image.Image:
    """Open an image as RGB and upright.

    What is transparent becomes white (a plain ``convert`` would show the colour hidden there), 16-bit grey is scaled to 8 bits,
    EXIF's orientation is applied, and of an animation the first frame is taken.

    Args:
        source: a file, or an image inside a larger one.
        crop: draws what is cut out of it; None gives the whole.
        side: the crop's sides need no more pixels. A JPEG whose crop has twice as many is decoded at half its size (or a quarter, or
            an eighth), and the crop is smaller by that: most of a large photograph's time is spared.

    Raises:
        OSError: there is no such file (or shard), or it may not be read.
        ImageTooLargeError: more than ``MAX_PIXELS``, by its header; nothing is decoded.
        ImageTooSmallError: the shorter side is below ``MIN_SIDE``.
        ImageError: anything else: torn, empty, no image, of none of ``FORMATS``, or a pipe or a device.
    """
    with _opened(source) as image:
        _scale_transparency(image)
        box = _shrunk(image, crop, side) if crop is not None and isinstance(image, JpegImageFile) else None
        image.load()
        picture, turned = on_white(image), UPRIGHT.get(_orientation(image))
        picture = picture if turned is None else picture.transpose(turned)
        return picture if crop is None else picture.crop(box or crop(picture.size))


def thumbnail(source: str | PathLike[str] | StoredImage, side: int) -> Image.Image:
    """:func:`load_rgb`, fitted into ``side`` pixels; raises as that does."""
    picture = load_rgb(source, lambda size: (0, 0, *size), side)
    picture.thumbnail((side, side))
    return picture


def upright_size(path: str | PathLike[str]) -> tuple[int, int]:
    """Width and height of the picture that :func:`load_rgb` makes of a file, from its header; raises as that does."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


@contextmanager
def _opened(source: str | PathLike[str] | StoredImage) -> Iterator[Image.Image]:
    """An image whose header has been looked at; what is raised inside becomes an error that names it."""
    # LAVIS tells PIL to accept torn files, for every program that imports it; half a picture is no sample
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    name = str(source) if isinstance(source, StoredImage) else os.fspath(source)
    with warnings.catch_warnings():  # of corrupt metadata and large images: neither is the user's business
        warnings.simplefilter("ignore")
        try:
            with Image.open(_readable(source), formats=_formats()) as image:
                _check_size(name, image.size)
                yield image
        except (OSError, Image.DecompressionBombError, *BROKEN) as error:
            if isinstance(error, OSError) and error.filename is not None:  # missing, a folder, no permission: it names the file
                raise
            raise _named(source, name, error) from error


def _readable(source: str | PathLike[str] | StoredImage) -> str | io.BytesIO:
    if isinstance(source, StoredImage):
        return io.BytesIO(source.read_bytes())
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would wait for ever; a folder says what it is
        raise ImageError("neither a file nor a link to one")
    return os.fspath(source)


def _shrunk(image: JpegImageFile, crop: DrawCrop, side: int) -> Box:
    """Draw the crop of a JPEG, have it decoded no larger than the crop needs, and tell where the crop will be then."""
    width, height = image.size
    box = crop((height, width) if _orientation(image) > 4 else (width, height))
    pixels = min(box[2] - box[0], box[3] - box[1])
    factor = next((n for n in (8, 4, 2) if pixels >= n * side), 1)
    if factor == 1 or image.draft(None, (width // factor, height // factor)) is None:
        return box
    left, top, right, bottom = (round(edge / factor) for edge in box)
    return left, top, right, bottom


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, transparent parts on white.

    Raises:
        ValueError: its pixels are floats or numbers of more than 16 bits, of which nobody knows what is white.
    """
    if image.mode.startswith("I"):
        return _of_sixteen_bits(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came late, and depends on how Pillow was built


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageTooLargeError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
    if min(size) < MIN_SIDE:
        raise ImageTooSmallError(f"{width}x{height} pixels, but a side needs at least {MIN_SIDE}")


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    """``convert("RGB")`` would clip everything above 255 to white. Of 32-bit numbers the largest tells how many bits are meant."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit numbers; save it with 8 or 16 bits")
    bits = 0 if image.mode == "I" and values.max() <= 0xFF else 8
    grey = (values >> bits).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 0xFF
    return Image.fromarray(grey).convert("RGB")


def _scale_transparency(image: Image.Image) -> None:
    """A PNG names its transparent colour in its own number of bits, but PIL compares it with pixels of eight."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    bits = tiles[0][3] if image.format == "PNG" and tiles else ""
    if isinstance(clear, int) and bits in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if bits == "L;2" else 17) & 0xFF
    elif isinstance(clear, tuple) and bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _orientation(image: Image.Image) -> Any:
    """Read after loading: TIFF's is applied by then. A picture with broken EXIF is still a picture."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except (OSError, *BROKEN):
        return 1


def _named(source: str | PathLike[str] | StoredImage, name: str, error: Exception) -> ImageError:
    """The error with file and reason in its message, whatever PIL put there."""
    if isinstance(error, UnidentifiedImageError):
        size = source.size if isinstance(source, StoredImage) else os.path.getsize(source)
        why = "the file is empty" if size == 0 else f"none of {', '.join(_formats())}"
        return ImageError(f"cannot identify image file {name!r}: {why}")
    if isinstance(error, Image.DecompressionBombError):  # twice PIL's own limit, which is looked at first
        return ImageTooLargeError(f"unusable image {name!r}: more than {MAX_PIXELS:,} pixels")
    kind = type(error) if isinstance(error, ImageError) else ImageError
    return kind(f"unusable image {name!r}: {str(error) or type(error).__name__}")


# TIFF's reader logs what it finds odd in a header, and then raises it
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# a picture with a long description is still a picture; PIL refuses compressed texts from 1 MB on
PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT
