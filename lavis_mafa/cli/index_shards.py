"""``lavis-mafa index-shards 'data/{00000..00099}.tar' --output pairs.arrow``: tar shards as annotations, without unpacking them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Shards as webdataset and img2dataset write them: KEY.jpg (or .png, .webp, ...), KEY.txt, KEY.json. Keys without an "
        "image or a caption are left out and counted. One process reads one shard after the other; for more, index parts of "
        "them: an annotation storage takes a list of indexes, or a pattern."
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, or patterns of them: {00000..00099}, *, ?")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.arrow", help="the index, which must not exist yet")
    parser.add_argument("--caption-key", metavar="NAME", help="take the caption from this key of KEY.json, not from KEY.txt")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.datasets.shards import shard_files
    from lavis_mafa.progress import Bar
    from lavis_mafa.tools.index_shards import check_output, write_index

    check_output(arguments.output)
    shards = shard_files(arguments.shards)
    total = sum(map(os.path.getsize, shards))
    with Bar(total=total, desc="shards", unit="B", unit_scale=True) as bar:
        root, pairs, left_out = write_index(shards, arguments.output, arguments.caption_key, bar.update)
    size = os.path.getsize(arguments.output)
    print(f"{pairs:,} pairs of {len(shards):,} shards: {arguments.output} ({size / pairs:.0f} bytes a pair with its caption)")
    if left_out.counts:
        print(f"Left out: {left_out}")
    print("In a YAML, below datasets.grit_pairs.build_info:")
    print(f"  annotations: {{train: {{storage: {arguments.output}}}}}\n  images: {{storage: {os.path.relpath(root)}}}")
    return 0
