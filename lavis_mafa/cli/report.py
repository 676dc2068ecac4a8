"""``lavis-mafa report``: one HTML page about one or more runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_mafa.cli.options import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run (with metrics.jsonl), of `mine`, or of `count-false-negatives`",
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="where the page goes (default: report.html)")
    parser.add_argument(
        "--gallery",
        type=count,
        default=5000,
        metavar="N",
        help="show the N surest connections, of both directions in turn (default: 5000; 0: none)",
    )


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.progress import Bar
    from lavis_mafa.tools.report import write_report

    output: Path = arguments.output
    runs, gallery = write_report(arguments.runs, output, arguments.gallery)
    for name, problem in gallery["problems"].items():
        print(f"{name}: {problem}")
    shown = f", {len(gallery['lists']['gallery']):,} of {gallery['candidates']:,} recorded connections" if gallery["candidates"] else ""
    print(f"{output}: {', '.join(run.name for run in runs)}{shown}, {Bar.format_sizeof(output.stat().st_size, 'B')}")
    return 0
