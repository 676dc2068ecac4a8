"""``lavis-mafa mine``: one pass that finds missing image-text connections and writes them as training data (MAFA section G.8)."""

from __future__ import annotations

import argparse

from lavis_mafa.cli.options import add_pass_arguments, pass_of, positive, share

OWN = ("batch_size", "search_space", "threshold", "margin", "per_image", "at_most")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/mine")
    add = parser.add_argument
    add("--batch-size", type=positive, metavar="B", help="of the GRIT batches (default: run.batch_size_train, or 96)")
    add(
        "--search-space", type=positive, metavar="M", help="of GRIT, and of a resumable block (default: run.grit.search_space, or 4800)"
    )
    add("--threshold", type=share, metavar="P", help="keep pairs above this probability (default: 0.8)")
    text = "and of at least this share of the own pair's probability, e.g. 0.95 (default: 0)"
    add("--margin", type=share, default=0.0, help=text)
    add("--per-image", type=positive, metavar="K", help="at most so many new captions an image (default: all)")
    text = "at most so many new pairs, the most probable ones; 2000000 in the paper (default: all)"
    add("--at-most", type=positive, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.mine_pass import run_mine

    mined = run_mine(pass_of(arguments), arguments.output, **{name: getattr(arguments, name) for name in OWN})
    if mined is not None:
        print(mined)
    return 0
