"""``lavis-mafa train-teacher``: ViLTA's language teacher from captions alone, in minutes and without a download."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_mafa.cli.options import count, number, positive
from lavis_mafa.cli.train import add_yaml_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/language_teacher"), metavar="FOLDER", help="default: output/language_teacher")
    add("--steps", type=positive, default=2000, help="of training (default: 2000)")
    add("--batch-size", type=positive, default=256, metavar="B", help="captions a step (default: 256)")
    add("--learning-rate", type=number, default=1e-3, metavar="RATE", help="at its peak (default: 0.001)")
    add("--width", type=positive, default=128, help="size of a token (default: 128)")
    add("--layers", type=positive, default=4, help="default: 4")
    add("--heads", type=positive, default=4, help="attention heads (default: 4)")
    add("--seed", type=count, default=0, help="of weights, order and masks (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.files import check_unfinished

    check_unfinished(arguments.output, "config.json")
    from lavis_mafa.tools.language_teacher import Recipe, make_teacher

    recipe = Recipe(**{name: getattr(arguments, name) for name in Recipe.__dataclass_fields__})
    captions, share = make_teacher(arguments.cfg_path, arguments.options, arguments.output, recipe)
    print(f"Trained on {captions:,} captions; of the masked words of those held out it guesses {share:.1%}.")
    print(f"To use it: --options model.language_teacher.init={arguments.output} model.itm.synthetic.mode=add")
    return 0
