"""Images in random order from tar shards and from one Arrow file, against a file each; and how long shards take to index.

    python -W ignore benchmarks/shards.py [--images 1000] [--rounds 9] [--pairs 50000]

JPEGs of 256 x 256 pixels (noise as smooth as photographs are, quality 90), in five shards of img2dataset's kind. ``bytes`` reads them,
``RGB`` decodes them too, as training does before it augments. Medians of the CPU time of an image, read in each way before the next
one, in random order; everything is in the page cache. What a disk adds is the same for all, but for the inodes that files need. The
index is of a shard with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` of ``--pairs`` keys, and its time is scaled to a million.

Measured with ``--images 300 --rounds 9 --pairs 30000`` on two cores of an AMD EPYC beside other programs, 2026-11-26:

    JPEGs of 22 KB
    files, bytes            18,819 images/s     53.1 us an image   1.00 x files
    files, RGB               2,254 images/s    443.7 us an image   1.00 x files
    tar shards, bytes       23,500 images/s     42.6 us an image   1.25 x files
    tar shards, RGB          2,490 images/s    401.6 us an image   1.10 x files
    Arrow file, bytes       26,040 images/s     38.4 us an image   1.38 x files
    Arrow file, RGB          2,516 images/s    397.4 us an image   1.12 x files
    index, caption from txt: 78 s for a million pairs, 46 bytes a pair beside it
    index, caption from json: 81 s for a million pairs, 46 bytes a pair beside it
"""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from grouping import machine
from loading import photograph

from lavis_mafa.cli.main import main as lavis_mafa
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.stored import image_source
from lavis_mafa.tools.index_shards import write_index

SHARDS, DIFFERENT = 5, 50


def write_shard(path: Path, keys: range, jpegs: list[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for key in keys:
            caption = f"a photograph of number {key} of all that were taken"
            about = {"caption": caption, "url": f"https://example.org/{key}.jpg", "width": 256, "height": 256, "status": "success"}
            for kind, content in (("jpg", jpegs[key % len(jpegs)]), ("txt", caption.encode()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key:09}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def read_rates(folder: Path, jpegs: list[bytes], images: int, rounds: int) -> None:
    (folder / "images").mkdir()
    for key in range(images):
        (folder / f"images/{key:09}.jpg").write_bytes(jpegs[key % len(jpegs)])
    rows = [{"image": f"{key:09}.jpg", "caption": f"number {key}"} for key in range(images)]
    (folder / "files.json").write_text(json.dumps(rows))
    for number, keys in enumerate(np.array_split(np.arange(images), SHARDS)):
        write_shard(folder / f"{number:05}.tar", range(keys[0], keys[-1] + 1), jpegs)
    lavis_mafa(["index-shards", str(folder / "*.tar"), "--output", str(folder / "shards.arrow")])
    lavis_mafa(["pack", str(folder / "files.json"), "--images", str(folder / "images"), "--output", str(folder / "pack.arrow")])
    sets = [("files", "files.json", folder / "images"), ("tar shards", "shards.arrow", folder), ("Arrow file", "pack.arrow", folder)]
    reads = {
        f"{name}, {how}": functools.partial(read, root, read_annotations([folder / file]), how == "RGB")
        for name, file, root in sets
        for how in ("bytes", "RGB")
    }
    spent: dict[str, list[int]] = {name: [] for name in reads}
    draw, names = np.random.default_rng(0), [*reads]
    for row in (row for _ in range(rounds) for row in draw.permutation(images).tolist()):
        for name in draw.permutation(names).tolist():
            began = time.process_time_ns()
            reads[name](row)
            spent[name].append(time.process_time_ns() - began)
    found = {name: statistics.median(times) / 1000 for name, times in spent.items()}
    for name, each in found.items():
        of_files = found[f"files, {name.split(', ')[1]}"] / each
        print(f"{name:20} {1e6 / each:9,.0f} images/s {each:8.1f} us an image   {of_files:.2f} x files")


def read(root: Path, table: pa.Table, decode: bool, row: int) -> None:
    source = image_source(root, table, row)
    load_rgb(source) if decode else source.read_bytes()


def index_rate(folder: Path, pairs: int) -> None:
    write_shard(folder / "many.tar", range(pairs), [b"\xff" * 3000])
    for key in (None, "caption"):
        began = time.process_time()
        write_index([folder / "many.tar"], folder / f"{key}.arrow", key, lambda _: None)
        spent = time.process_time() - began
        captions = read_annotations([folder / f"{key}.arrow"])["caption"].combine_chunks().flatten().nbytes
        beside = ((folder / f"{key}.arrow").stat().st_size - captions) / pairs
        each = f"{1e6 * spent / pairs:.0f} s for a million pairs, {beside:.0f} bytes a pair beside it"
        print(f"index, caption from {'txt' if key is None else 'json'}: {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=50_000)
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}  {machine('cpu')}")
    draw = np.random.default_rng(0)
    jpegs = []
    for _ in range(min(DIFFERENT, arguments.images)):
        photograph(256, 256, draw).save(buffer := io.BytesIO(), "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    print(f"JPEGs of {np.mean([*map(len, jpegs)]) / 1024:.0f} KB")
    with tempfile.TemporaryDirectory() as name:
        read_rates(Path(name), jpegs, arguments.images, arguments.rounds)
        index_rate(Path(name), arguments.pairs)


if __name__ == "__main__":
    main()
