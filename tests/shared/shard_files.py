"""The same small pictures as files and as tar shards, written by webdataset itself."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

COUNT, SHARDS = 20, 5
WORDS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange", "brown", "grey"]


def jpeg(number: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"a {WORDS[number % 10]} picture with number {number}"


def write_files(folder: Path, count: int = COUNT) -> Path:
    """``folder/images`` and the annotations, whose path is returned."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        (folder / f"images/{number:09}.jpg").write_bytes(jpeg(number))
    rows = [{"image": f"{number:09}.jpg", "caption": caption(number)} for number in range(count)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def write_shards(folder: Path, count: int = COUNT) -> list[Path]:
    """``folder/00000.tar`` and so on, as img2dataset writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, numbers in enumerate(np.array_split(np.arange(count), SHARDS)):
        paths.append(folder / f"{shard:05}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for number in numbers.tolist():
                about = {"caption": f"{caption(number)}, says the JSON", "width": 24}
                writer.write({"__key__": f"{number:09}", "jpg": jpeg(number), "txt": caption(number), "json": about})
    return paths


def write_tar(path: Path, members: dict[str, bytes], **kinds: bytes) -> Path:
    """Plain members, then those of another kind (``tarfile.SYMTYPE``) by name."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        for name, kind in kinds.items():
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            archive.addfile(about)
    return path
