"""Whatever a file holds, it is opened as an upright RGB image or refused with a reason that names it."""

from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lavis_mafa.datasets.images import MAX_PIXELS, MIN_SIDE, ImageError, ImageTooLargeError, ImageTooSmallError, load_rgb
from lavis_mafa.datasets.indexed import UNREADABLE

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif


def load(tmp_path: Path, content: bytes, name: str = "x.png") -> Image.Image:
    (tmp_path / name).write_bytes(content)
    return load_rgb(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b"", ImageError, "the file is empty"),
        (b"no image at all", ImageError, "none of AVIF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", ImageError, "cannot identify"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", ImageError, "cannot identify"),
        (encode(NOISE, "PNG")[:900], ImageError, "truncated"),
        (encode(NOISE, "JPEG")[:700], ImageError, "truncated"),
        (encode(NOISE, "WEBP", lossless=True)[:700], ImageError, ""),
        (png_of_size(50_000, 50_000), ImageTooLargeError, f"more than {MAX_PIXELS:,} pixels"),
        (png_of_size(12_000, 12_000), ImageTooLargeError, f"12000x12000 pixels, more than {MAX_PIXELS:,}"),
        (encode(NOISE.resize((1, 1)), "PNG"), ImageTooSmallError, f"1x1 pixels, but a side needs at least {MIN_SIDE}"),
        (encode(NOISE.resize((300, 3)), "JPEG"), ImageTooSmallError, "300x3 pixels"),
        (encode(Image.new("F", (8, 8)), "TIFF"), ImageError, "floating-point"),
        (encode(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), ImageError, "32-bit numbers"),
    ],
)
def test_refused_with_a_reason(tmp_path: Path, content: bytes, error: type, reason: str) -> None:
    with pytest.raises(error) as refused:
        load(tmp_path, content)
    assert isinstance(refused.value, UNREADABLE)
    assert reason in str(refused.value) and str(tmp_path / "x.png") in str(refused.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(ImageTooLargeError):
        load(tmp_path, png_of_size(50_000, 50_000))
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_missing_files_folders_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_rgb(tmp_path / "gone.png")
    with pytest.raises(IsADirectoryError):
        load_rgb(tmp_path)
    with pytest.raises(ImageError, match="null"):
        load_rgb(f"{tmp_path}/a\0b.png")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    for name in (tmp_path / "x.png", "/dev/zero"):
        with pytest.raises(ImageError, match="neither a file nor a link to one"):
            load_rgb(name)


@pytest.mark.parametrize(("megabytes", "fits"), [(5, True), (17, False)])
def test_a_long_compressed_text_is_no_reason_to_refuse(tmp_path: Path, megabytes: int, fits: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("description", "x" * (megabytes << 20), zip=True)
    content = encode(NOISE, "PNG", pnginfo=text)
    if fits:
        assert load(tmp_path, content).size == NOISE.size
    else:
        with pytest.raises(ImageError, match="x.png"):
            load(tmp_path, content)


def test_32_bit_numbers_are_what_their_largest_says(tmp_path: Path) -> None:
    for largest, shift in ((255, 0), (65_535, 8)):
        values = np.linspace(0, largest, 64).astype(np.int32).reshape(8, 8)
        assert (np.asarray(load(tmp_path, encode(Image.fromarray(values), "TIFF"))) == (values >> shift)[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = np.asarray(load(tmp_path, encode(Image.fromarray(values), kind)))
    assert (found == (values >> 8)[..., None]).all() and found.max() == 255


@pytest.mark.parametrize(
    ("bits", "colour", "row", "clear"),  # the first pixel's colour is the transparent one; the second one's is black
    [(2, 0, b"\x40\0", b"\0\1"), (4, 0, b"\x30\0\0\0", b"\0\3"), (16, 0, b"\x12\x34" + bytes(14), b"\x12\x34")]
    + [(16, 2, b"\x12\x34" * 3 + bytes(42), b"\x12\x34" * 3), (8, 0, b"\x11" + bytes(7), b"\0\x11")],
)
def test_the_transparent_colour_of_a_png_is_white_in_every_depth(
    tmp_path: Path, bits: int, colour: int, row: bytes, clear: bytes
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")
    image = load(tmp_path, b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", clear) + rest)
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 0))
    assert load(tmp_path, b"\x89PNG\r\n\x1a\n" + header + rest).getpixel((0, 0)) != (255, 255, 255)


def test_modes_are_what_they_look_like(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert load(tmp_path, encode(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    r, g, b = load(tmp_path, encode(red.convert("CMYK"), "JPEG")).getpixel((0, 0))
    assert r > 240 and g < 15 and b < 15
    assert load(tmp_path, encode(red.convert("P"), "PNG")).getpixel((0, 0)) == (255, 0, 0)
    assert load(tmp_path, encode(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert load(tmp_path, encode(Image.new("LA", (8, 8), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    for transparency in (0, b"\x00\xff"):
        image = load(tmp_path, encode(palette, "PNG", transparency=transparency))
        assert [image.getpixel((0, 0)), image.getpixel((1, 1))] == [(40, 50, 60), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load(tmp_path, encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (image.mode, image.size, image.getpixel((4, 4))) == ("RGB", (8, 8), (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_turns_the_image_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    """Naively: by what the standard says of the stored first row and column."""
    stored = np.asarray(NOISE)
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2)}
    turned |= {6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2), 8: np.rot90(stored)}
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load(tmp_path, encode(NOISE, kind, exif=with_orientation(orientation), **options))
    assert np.array_equal(np.asarray(image), turned[orientation])


def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", with_orientation(77).tobytes()):
        assert load(tmp_path, encode(NOISE, "JPEG", exif=exif), "x.jpg").size == NOISE.size


def test_nothing_is_warned_about(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, encode(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0"), "x.jpg")
        large = Image.new("1", (10_000, 9_000))  # PIL warns from 89 million pixels on
        assert load(tmp_path, encode(large, "PNG")).size == large.size


KINDS = {
    "PNG": [encode(NOISE, "PNG"), encode(NOISE.convert("P"), "PNG", transparency=3), encode(Image.new("I;16", (9, 9)), "PNG")],
    "JPEG": [encode(NOISE, "JPEG", exif=with_orientation(6)), encode(NOISE.convert("CMYK"), "JPEG", progressive=True)],
    "GIF": [encode(NOISE.convert("P"), "GIF", save_all=True, append_images=[NOISE.convert("P").rotate(90)])],
    "WEBP": [encode(NOISE, "WEBP", exif=with_orientation(3)), encode(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(9)])],
    "BMP": [encode(NOISE, "BMP"), encode(NOISE.convert("P"), "BMP")],
    "TIFF": [encode(NOISE, "TIFF", exif=with_orientation(8)), encode(NOISE, "TIFF", compression="tiff_lzw")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_or_missing_byte_gives_an_image_or_a_reason(tmp_path: Path, kind: str, capfd: Any) -> None:
    """``capfd``: libtiff complains on stderr from C."""
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(1 << 32)))
    draw = random.Random(seed)
    path, outcomes = tmp_path / "fuzzed", {"image": 0, "refused": 0}
    for turn in range(300):
        content = bytearray(draw.choice(KINDS[kind]))
        for _ in range(draw.choice((0, 1, 2, 4, 16))):
            # headers are short, and where most can go wrong
            place = draw.randrange(min(len(content), draw.choice((64, 300, len(content)))))
            content[place] = draw.choice((0, 255, draw.randrange(256)))
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            image = load_rgb(path)
        except UNREADABLE as error:
            assert str(path) in str(error), f"FUZZ_SEED={seed}, turn {turn}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"FUZZ_SEED={seed}, turn {turn}") from error
        else:
            assert image.mode == "RGB" and min(image.size) >= MIN_SIDE, f"FUZZ_SEED={seed}, turn {turn}"
            outcomes["image"] += 1
    assert min(outcomes.values()) > 0, (seed, outcomes)
