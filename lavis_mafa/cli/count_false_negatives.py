"""``lavis-mafa count-false-negatives``: MAFA's Tables 1 and 9 and Figures 2 and 5 for one's own data, before any training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lavis_mafa.cli.options import add_pass_arguments, pass_of, positive, share

OWN = ("batch_size", "search_space", "threshold", "correction", "random_only", "same_image", "same_text", "truth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/count")
    add = parser.add_argument
    add("--batch-size", type=positive, nargs="+", metavar="B", help="batch sizes (default: run.batch_size_train, or 96)")
    add("--search-space", type=positive, nargs="+", metavar="M", help="GRIT's search spaces (default: run.grit.search_space, or 4800)")
    text = "Con-D calls a pair a match above it (default: 0.5, as in the paper's count); the first is for table and plot"
    add("--threshold", type=share, nargs="+", metavar="P", help=text)
    text = "human correction factor, or a file of marks of `explore` that tells it; the paper's Table 1 has 0.83 (default: 1)"
    add("--correction", type=_share_or_file, default=1.0, metavar="SHARE|MARKS", help=text)
    text = "whose similarities mine, while --con-d judges: the paper's count (default: Con-D's own)"
    add("--miner", metavar="CHECKPOINT", help=text)
    add("--random-only", action="store_true", help="random batches alone, of any size (MAFA Figure 5)")
    for what in ("image", "text"):
        text = f"may samples of the same {what} be each other's negatives (default: as model.ecm.same_{what}; the paper counts them)"
        add(f"--same-{what}", choices=("count", "exclude"), help=text)
    add("--truth", action="store_true", help="insist on a comparison with the known truth, made where there is one")


def _share_or_file(text: str) -> float | Path:
    return Path(text) if Path(text).suffix.lower() in (".parquet", ".csv") else share(text)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.count_pass import CountResult, run_count

    counted = run_count(pass_of(arguments), arguments.output, **{name: getattr(arguments, name) for name in OWN})
    if counted is not None:
        print(counted)
    if isinstance(counted, CountResult):
        print(f"Next: lavis-mafa report {shlex.quote(str(arguments.output))} (a page)")
    return 0
