"""``lavis-mafa check-data``: find every image and caption that training could not use, before training, and leave them out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lavis_mafa.errors import UserError

RESULT, PROBLEMS = "check.json", "problems.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Bad are rows whose image path is absent or leaves the folder, whose image is missing, unreadable, too large or too small, "
        "that have an empty caption, a printed list for one or the image_id of another image, or for LAVIS's own data sets a list of "
        "captions. Duplicates are reported, but training takes them and --clean keeps them. Exit code: 0 if no row is bad, 1 if some "
        "are, 2 for a mistake on the command line or a file of annotations that cannot be read."
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--cfg-path", metavar="YAML", help="check every split that the run of a YAML names")
    data.add_argument(
        "--annotations", type=Path, nargs="+", metavar="FILE", help="or these files: .json, .jsonl, .csv, .tsv, .parquet, or folders"
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="with --cfg-path: settings to override")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="with --annotations: where image paths start from")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="with --annotations: image paths may leave that folder")
    parser.add_argument(
        "--min-side", type=int, metavar="N", help="images with a shorter side are too small (default: as in training, 4)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that open images (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("output/check-data"), metavar="FOLDER", help="default: output/check-data")
    parser.add_argument("--clean", type=Path, metavar="FILE", help="write the good rows to this .jsonl or .json file")


def run(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    from lavis_mafa.analysis.data_check.cleaning import check_columns, check_ids, check_target, write_clean
    from lavis_mafa.analysis.data_check.judging import judge
    from lavis_mafa.analysis.data_check.problems import find
    from lavis_mafa.analysis.data_check.report import format_results, results, write_problems
    from lavis_mafa.analysis.data_check.rows import read_sources
    from lavis_mafa.analysis.data_check.sources import from_files, from_yaml
    from lavis_mafa.datasets.images import MIN_SIDE
    from lavis_mafa.files import check_unfinished, write_text

    min_side = MIN_SIDE if arguments.min_side is None else arguments.min_side
    if min_side < MIN_SIDE:
        raise UserError(f"--min-side is {min_side}, but training needs at least {MIN_SIDE}.")
    folder = arguments.output
    check_unfinished(folder, RESULT)
    if arguments.clean is not None:
        check_target(arguments.clean)
    if arguments.cfg_path is not None:
        sources = from_yaml(arguments.cfg_path, arguments.options)
    else:
        sources = from_files(arguments.annotations, arguments.images, arguments.allow_absolute_paths)
    if arguments.clean is not None and any(source.text != "caption" for source in sources):
        raise UserError("--clean writes images with captions, but the run has splits without; check the others with --annotations.")
    if arguments.clean is not None and len({file.images or source.root for source in sources for file in source.files}) > 1:
        raise UserError("--clean writes one file, but the data sets have several image folders; check them one at a time.")
    if arguments.clean is not None:
        check_columns([file.path for source in sources for file in source.files])
    folder.mkdir(parents=True, exist_ok=True)

    rows = read_sources(sources)
    if arguments.clean is not None:
        check_ids(rows)
    verdicts = judge(rows, [source.process for source in sources], min_side, arguments.workers)
    found = find(rows, verdicts)
    figures = results(rows, verdicts, found)
    write_problems(folder / PROBLEMS, rows, verdicts, found)
    if arguments.clean is not None:
        figures["cleaned_rows"] = write_clean(arguments.clean, rows, verdicts)
    write_text(folder / RESULT, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    print(format_results(figures))
    print(f"\nTraining can use {figures['rows'] - figures['bad_rows']:,} of {figures['rows']:,} rows as they are.")
    print(f"Every problem with its row: {folder / PROBLEMS}; the figures: {folder / RESULT}")
    if arguments.clean is not None:
        wrote = (
            f"{figures['cleaned_rows']:,} rows: {arguments.clean}"
            if figures["cleaned_rows"]
            else "no row is good, so no file is written"
        )
        print(f"Cleaned annotations, {wrote}")
    return int(figures["bad_rows"] > 0)


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}, but must be at least 0.")
    if arguments.annotations is not None and arguments.images is None:
        raise UserError("--annotations needs --images, the folder that the image paths start from.")
    if arguments.annotations is not None and arguments.options:
        raise UserError("--options belongs to --cfg-path; --annotations has no settings.")
    if arguments.cfg_path is not None and (arguments.images is not None or arguments.allow_absolute_paths):
        raise UserError("--images and --allow-absolute-paths belong to --annotations; a YAML has build_info.images.")
