"""``lavis-mafa mine``: one pass that finds missing image-text connections and writes them as training data (MAFA section G.8)."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lavis_mafa.cli.options import add_pass_arguments, pass_of, positive, share
from lavis_mafa.errors import UserError

OF_CHOOSING = ("threshold", "margin", "per_image", "at_most", "reviewed")
OWN = ("batch_size", "search_space", *OF_CHOOSING)
OF_A_PASS = "cfg_path con_d miner options annotations images columns features scores write_pairs guide_features guide_margin".split()
OF_A_PASS += ["samples", "seed", "batch_size", "search_space", "force"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/mine")
    add = parser.add_argument
    add("--batch-size", type=positive, metavar="B", help="of the GRIT batches (default: run.batch_size_train, or 96)")
    add(
        "--search-space", type=positive, metavar="M", help="of GRIT, and of a resumable block (default: run.grit.search_space, or 4800)"
    )
    add("--threshold", type=share, metavar="P", help="keep pairs above this probability (default: 0.8)")
    text = "and of at least this share of the own pair's probability, e.g. 0.95 (default: 0)"
    add("--margin", type=share, help=text)
    add("--per-image", type=positive, metavar="K", help="at most so many new captions an image (default: all)")
    text = "at most so many new pairs, the most probable ones; 2000000 in the paper (default: all)"
    add("--at-most", type=positive, metavar="N", help=text)
    add("--reviewed", type=Path, metavar="MARKS", help="what people accepted and rejected: a file of `explore`, or a page's export")
    text = "choose anew from a finished result, with --reviewed or other limits, and ask no model; what is not given stays as it was"
    add("--again", type=Path, metavar="MINED", help=text)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.mine_pass import MineResult, choose_again, run_mine

    if arguments.again is not None:
        chosen = {name: getattr(arguments, name) for name in OF_CHOOSING}
        given = {name: value for name, value in vars(arguments).items() if name in OF_A_PASS and value is not False}
        nothing = [name for name, value in given.items() if value not in (None, [])]
        if nothing:
            raise UserError(f"--again and --{nothing[0].replace('_', '-')} exclude each other: nothing is searched or judged anew.")
        mined: object = choose_again(arguments.again, arguments.output, **chosen)
    else:
        mined = run_mine(pass_of(arguments), arguments.output, **{name: getattr(arguments, name) for name in OWN})
    if mined is not None:
        print(mined)
    if isinstance(mined, MineResult):
        folder = shlex.quote(str(mined.folder))
        print(f"Next: lavis-mafa explore {folder} (look at them and mark what is right); lavis-mafa report {folder} (a page)")
    return 0
