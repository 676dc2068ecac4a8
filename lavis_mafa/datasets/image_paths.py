"""Image paths from annotations stay below the image folder: annotations are often other people's files."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from lavis_mafa.common.errors import UserError
from lavis_mafa.datasets.arrow_compute import pc

# absolute (on Windows too), or with a component `..`
LEAVES = r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)"


def leaves_folder(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which paths are absolute or hold a component ``..`` (even one that would come back); Bool [N], null where a path is null.

    The text alone decides: a symbolic link inside the folder was put there by whoever owns it, and may lead anywhere.

    Example:
        >>> leaves_folder(pa.chunked_array([["a/b.png", "/a.png", "a/../b.png", "a..b/c.png"]])).to_pylist()
        [False, True, True, False]
    """
    return pc.match_substring_regex(images, LEAVES)


def shown(path: str | Path) -> str:
    """The path in a message of one line: as it is, or its representation where it holds a line break or the like.

    Example:
        >>> shown("a b.png"), shown("a\\nb.png")
        ('a b.png', "'a\\\\nb.png'")
    """
    return str(path) if str(path).isprintable() else repr(str(path))


def path_hint(root: Path, image: str) -> str:
    """Why there may be no image of this path, and an empty text where nothing is odd about it.

    Example:
        >>> path_hint(Path("images"), "http://a.org/a.jpg")
        'it is an address; download the images first, and name the files.'
    """
    if "://" in image:
        return "it is an address; download the images first, and name the files."
    odd = [name for name, holds in (("a backslash", "\\" in image), ("a blank at its end", image != image.strip())) if holds]
    if not odd:
        return ""
    right = image.replace("\\", "/").strip()
    there = f"; there is {shown(root / right)}" if os.path.isfile(root / right) else ""
    return f"the path holds {' and '.join(odd)}{there}."


def check_image_paths(file: Path, images: pa.ChunkedArray) -> None:
    """Nothing, if all of them stay in the folder.

    Raises:
        UserError: one does not; the message names file and row.
    """
    row = pc.index(leaves_folder(images), True).as_py()
    if row >= 0:
        raise UserError(
            f"{file}, row {row + 1}: image is {images[row].as_py()!r}; allowed: a path below the image folder, relative and without "
            "'..', unless build_info.images.allow_absolute_paths is true."
        )
