"""``lavis-mafa regroup --shards ... --features ... --output FOLDER --batch-size 96``: grouped batches for readers of streams."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_mafa.cli.options import count, positive
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "One row of features for each pair, in the order of the shards, as index-shards counts them. Read the result without "
        "shuffling samples (shards may be shuffled): every 96 pairs from the beginning of a shard are one GRIT batch."
    )
    parser.add_argument("--shards", nargs="+", required=True, metavar="SHARDS", help="as for index-shards")
    parser.add_argument("--caption-key", metavar="NAME", help="as for index-shards")
    parser.add_argument(
        "--features",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="of images and of texts: two .npy files (or folders of them), or a .parquet with image_features and text_features",
    )
    parser.add_argument("--batch-size", type=positive, required=True, metavar="B", help="pairs of a batch that will be read")
    parser.add_argument(
        "--search-space",
        type=positive,
        default=4800,
        metavar="M",
        help="pairs that are grouped together, a multiple of B (default 4800)",
    )
    parser.add_argument("--seed", type=count, default=0, help="of the shuffles and of GRIT's starts (default 0)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new shards, and order.parquet; must not exist yet"
    )
    parser.add_argument("--force", action="store_true", help="go on where image and text of a pair are hardly more alike than others")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise UserError(f"--output: {arguments.output} exists already and is never overwritten; choose another folder.")
    from lavis_mafa.datasets.shards import shard_files
    from lavis_mafa.progress import Bar
    from lavis_mafa.tools.features import check_own_pairs, read_features
    from lavis_mafa.tools.index_shards import LeftOut, pairs_of
    from lavis_mafa.tools.regroup import ORDER, grouped_order, write_shards

    left_out, samples = LeftOut(), []
    for shard in Bar(shard_files(arguments.shards), desc="shards", unit="shard"):
        samples += [(shard, sample) for sample in pairs_of(shard, arguments.caption_key, left_out).samples]
    features = read_features(arguments.features, len(samples))
    if not arguments.force:
        check_own_pairs(features)
    with Bar(total=len(samples), desc="group", unit="pair") as bar:
        order = grouped_order(features, arguments.batch_size, arguments.search_space, arguments.seed, bar.update)
    with Bar(total=len(samples), desc="write", unit="pair") as bar:
        shards = write_shards(samples, order, arguments.output, arguments.batch_size, bar.update)
    print(f"{len(samples):,} pairs in {shards:,} shards, every {arguments.batch_size} a GRIT batch: {arguments.output}")
    print(f"Which pair was which: {arguments.output / ORDER}")
    if left_out.counts:
        print(f"Left out: {left_out}")
    return 0
