"""``lavis-mafa pack PAIRS --output pairs.arrow``: images and captions in one file, from Parquet with image bytes or from folders."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Parquet and Arrow files hold images as bytes, or as {bytes, path} as Hugging Face writes them. Of an image in several "
        "rows the bytes are written once. Images are not decoded; check-data looks at all of them. Rows without an image or a "
        "caption are left out and counted."
    )
    what = "files with image bytes (.parquet, .arrow), or annotation files; also folders and patterns"
    parser.add_argument("pairs", nargs="+", metavar="PAIRS", help=what)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of annotation files: where image paths start from")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="of annotation files: image paths may leave that folder")
    parser.add_argument("--image", default="image", metavar="COLUMN", help="the column of images, bytes or paths (default: image)")
    parser.add_argument("--caption", default="caption", metavar="COLUMN", help="and that of the captions (default: caption)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.arrow", help="the file to write, which must not exist yet")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.config.data import AnnotationFile, files_of
    from lavis_mafa.datasets.annotations import read_annotations
    from lavis_mafa.datasets.formats import PAIRS
    from lavis_mafa.progress import Bar
    from lavis_mafa.tools import pack
    from lavis_mafa.tools.index_shards import LeftOut, check_output

    check_output(arguments.output)
    files = [file for pairs in arguments.pairs for file in files_of(Path(pairs), "PAIRS")]
    names, left_out = pack.Names(arguments.image, arguments.caption), LeftOut()
    found = [pack.with_bytes(path, names) for path in files]
    tables = [one for one in found if one is not None]
    if tables and len(tables) < len(files):
        raise UserError(f"{files[found.index(None)]} holds no image bytes, but {len(tables)} of the files do; pack them one at a time.")
    if not tables and arguments.images is None:
        path = files[0]
        raise UserError(
            f"{path} has no column {names.image!r} of image bytes (--image names it), and --images, the folder that the image paths of "
            "annotations start from, is not given."
        )
    if tables:
        count, schema = sum(one.rows for one in tables), pack.schema_of(files, names)
    else:
        called = {"image": names.image, "caption": names.caption}
        given = [AnnotationFile(path, None, called) for path in files]
        table = read_annotations(given, replace(PAIRS, hint=""), allow_absolute_paths=arguments.allow_absolute_paths)
        count, schema = len(table), pack.schema_of_annotations(table)
    with Bar(total=count, desc="pack", unit="pair") as bar:
        if tables:
            rows = pack.rows_of_tables(files, names, left_out, bar.update)
        else:
            rows = pack.rows_of_annotations(table, arguments.images, left_out, bar.update)
        pairs, images = pack.write_pack(rows, schema, arguments.output)
    size = os.path.getsize(arguments.output)
    print(f"{pairs:,} pairs of {images:,} images, {size / 1e6:,.1f} MB: {arguments.output}")
    if left_out.counts:
        print(f"Left out: {left_out}")
    print(f"In a YAML, below datasets.grit_pairs.build_info:\n  annotations: {{train: {{storage: {arguments.output}}}}}")
    return 0
