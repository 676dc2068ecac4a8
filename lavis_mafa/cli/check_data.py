"""``lavis-mafa check-data``: find every image and caption that training could not use, before training, and leave them out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lavis_mafa.cli.options import add_columns, count, named_columns, positive
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
        "--annotations",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="or these files: .json, .jsonl, .csv, .tsv, .parquet, .arrow, or folders",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="with --cfg-path: settings to override")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="with --annotations: where image paths start from (of .arrow files by default theirs)",
    )
    add_columns(parser, "with --annotations: ")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="with --annotations: image paths may leave that folder")
    parser.add_argument(
        "--min-side", type=positive, metavar="N", help="images with a shorter side are too small (default: as in training, 4)"
    )
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes that open images (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("output/check-data"), metavar="FOLDER", help="default: output/check-data")
    parser.add_argument(
        "--clean", type=Path, metavar="FILE", help="write the good rows to this .jsonl or .json file (of .arrow files: .arrow)"
    )


def run(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    from lavis_mafa.datasets.images import MIN_SIDE
    from lavis_mafa.files import check_unfinished, write_text
    from lavis_mafa.tools import check_data

    columns = named_columns(arguments.columns)
    min_side = MIN_SIDE if arguments.min_side is None else arguments.min_side
    folder, clean = arguments.output, arguments.clean
    if min_side < MIN_SIDE:
        raise UserError(f"--min-side is {min_side}, but training needs at least {MIN_SIDE}.")
    check_unfinished(folder, RESULT)
    if clean is not None:
        check_data.check_target(clean)
    if arguments.cfg_path is not None:
        sources = check_data.from_yaml(arguments.cfg_path, arguments.options)
    else:
        sources = check_data.from_files(arguments.annotations, arguments.images, arguments.allow_absolute_paths, columns)
    if clean is not None:
        check_data.check_sources(sources, clean)
    folder.mkdir(parents=True, exist_ok=True)

    rows = check_data.read_sources(sources)
    if clean is not None:
        check_data.check_ids(rows)
    check_data.judge(rows, sources, min_side, arguments.workers)
    problems = check_data.find(rows)
    results = check_data.results(rows, problems)
    check_data.write_problems(folder / PROBLEMS, rows, problems)
    if clean is not None:
        results["cleaned_rows"] = check_data.write_clean(clean, rows)
    write_text(folder / RESULT, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(check_data.format_results(results))
    print(f"\nTraining can use {results['rows'] - results['bad_rows']:,} of {results['rows']:,} rows as they are.")
    print(f"Every problem with its row: {folder / PROBLEMS}; the counts: {folder / RESULT}")
    if clean is not None:
        wrote = f"{results['cleaned_rows']:,} rows: {clean}" if results["cleaned_rows"] else "no row is good, so no file is written"
        print(f"Cleaned annotations, {wrote}")
    return int(results["bad_rows"] > 0)


def _check_arguments(arguments: argparse.Namespace) -> None:
    from lavis_mafa.config.data import files_of  # needs what --help need not wait for

    files = [path for file in arguments.annotations or () for path in files_of(file, "--annotations")]
    if arguments.images is None and any(path.suffix != ".arrow" for path in files):
        raise UserError("--annotations needs --images, the folder that the image paths start from.")
    if arguments.annotations is not None and arguments.options:
        raise UserError("--options belongs to --cfg-path; --annotations has no settings.")
    if arguments.cfg_path is not None and (arguments.images or arguments.allow_absolute_paths or arguments.columns):
        raise UserError(
            "--images, --columns and --allow-absolute-paths belong to --annotations; a YAML has build_info.images and columns."
        )
