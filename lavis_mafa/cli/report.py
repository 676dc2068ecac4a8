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
    from lavis_mafa.errors import UserError
    from lavis_mafa.tools.report import pictures_of, report_page
    from lavis_mafa.tools.run_files import open_runs

    output: Path = arguments.output
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; give a file, such as {output / 'report.html'}.")
    runs = open_runs(arguments.runs)
    page, gallery = report_page(runs, arguments.gallery, pictures=pictures_of(runs, output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}.") from error
    for name, problem in gallery["problems"].items():
        print(f"{name}: {problem}")
    shown = f", {len(gallery['lists']['gallery']):,} of {gallery['candidates']:,} recorded connections" if gallery["candidates"] else ""
    print(f"{output}: {', '.join(run.name for run in runs)}{shown}, {output.stat().st_size / 1e6:.1f} MB")
    return 0
