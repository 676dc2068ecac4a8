"""``lavis-mafa compare RUN_A RUN_B``: two runs query by query, with intervals, a paired test, and the result in words."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.tools.run_files import Run

SHOWN = ["r_precision", "r1", "map_at_r"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folders of two runs that evaluated retrieval on the same data")
    parser.add_argument("--split", nargs="+", default=[], metavar="SPLIT", help="default: all that both runs have")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"r1, r5, r10, r_precision, map_at_r, or with itc_ before it; the first is put in words (default: {' '.join(SHOWN)})",
    )
    parser.add_argument("--names", nargs=2, metavar="NAME", help="what to call them (default: as their folders)")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.run_files import open_runs, query_splits, read_queries

    runs = open_runs(arguments.runs)
    if len(runs) < 2:
        raise UserError(f"{arguments.runs[0]} is both runs; give two.")
    names: list[str] = arguments.names or [run.name for run in runs]
    shared = [split for split in query_splits(runs[0].folder) if split in query_splits(runs[1].folder)]
    splits = list(dict.fromkeys(arguments.split or shared))
    if not splits:  # says which run has what
        for one in runs:
            read_queries(one.folder, next(iter(query_splits(runs[0].folder)), "val"))
    texts = [_of_split(runs, names, split, list(dict.fromkeys(arguments.metric or SHOWN))) for split in splits]
    print("\n\n".join(texts))
    return 0


def _of_split(runs: list[Run], names: list[str], split: str, metrics: list[str]) -> str:
    from lavis_mafa.progress import Bar
    from lavis_mafa.tools.run_files import read_queries
    from lavis_mafa.tools.significance import DIRECTIONS, interval, metric_name, of_direction, p_text, paired

    a, b = (run.folder for run in runs)
    rows, words = [["", *names, f"{names[0]} - {names[1]}", ""]], []
    for direction, metric in Bar([*product(DIRECTIONS, metrics)], desc=f"drawing queries of {split}", unit="metric", delay=1):
        found = paired(a, b, split, metric, direction)
        cells = []
        for folder, mean in ((a, found.mean_a), (b, found.mean_b)):
            low, high = interval(*of_direction(read_queries(folder, split), folder, metric, direction))
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        difference = f"{found.difference:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
        rows.append([f"{direction.upper()} {metric_name(metric)}", *cells, difference, p_text(found.p)])
        words += [found.sentence(*names)] if metric == metrics[0] else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:4]), row[4]]).rstrip() for row in rows]
    asked = read_queries(a, split)["direction"].to_pylist()
    queries = f"{asked.count('tr'):,} images, {asked.count('ir'):,} texts"
    return "\n".join([f"{split}: {queries}; per cent, 95 % bootstrap intervals, paired sign-flip test", *lines, "", *words])
