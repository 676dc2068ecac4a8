"""``lavis-mafa init --data pairs.csv --images images --model albef --size tiny --output my.yaml``: a YAML whose sizes fit one's data
and machine."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lavis_mafa.cli.options import add_columns, named_columns

MODELS = ("albef", "blip", "blip2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Without --con-d the YAML trains without MAFA: what comes of it can be Con-D."
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="FILE", help="pairs: .csv, .tsv, .json, .jsonl, .parquet, .arrow")
    add("--images", type=Path, required=True, metavar="DIR", help="the folder that image paths start from")
    add_columns(parser)
    for split, what in (("val", "after each epoch"), ("test", "at the end")):
        add(f"--{split}", type=Path, nargs="+", metavar="FILE", help=f"pairs to evaluate retrieval on, {what}")
    add("--model", choices=MODELS, required=True)
    add("--size", choices=("tiny", "base"), required=True, help="tiny: for a CPU, from scratch; base: the paper's, for a GPU")
    add(
        "--con-d",
        metavar="CHECKPOINT",
        help="MAFA with this Con-D: a file, a run's folder, or a name such as lavis:albef_retrieval/coco",
    )
    add("--output", type=Path, required=True, metavar="YAML", help="a new file")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.own_data import NAMES, write_yaml

    output: Path = arguments.output
    written = write_yaml(
        arguments.data,
        arguments.images,
        output,
        columns=named_columns(arguments.columns),
        val=arguments.val,
        test=arguments.test,
        model=arguments.model,
        size=arguments.size,
        con_d=arguments.con_d,
    )
    fit = written.fit
    of_steps = f"{fit.epochs} epochs of {fit.steps:,} steps with {fit.batch} pairs"
    print(f"{output}: {NAMES[arguments.model]}, {arguments.size}, {written.rows:,} rows: {of_steps}")
    if arguments.size == "base" and not written.gpu:
        print("No GPU is visible here, so it is for this CPU, on which this size takes very long; --size tiny is for trials.")
    name = shlex.quote(str(output))
    print(f"Next: lavis-mafa validate {name}; lavis-mafa train --cfg-path {name}")
    if arguments.con_d is None:
        print(f"Then MAFA, with what comes of it as Con-D: lavis-mafa init ... --con-d {written.folder}/latest --output mafa.yaml")
    return 0
