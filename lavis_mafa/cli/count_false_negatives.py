"""``lavis-mafa count-false-negatives``: MAFA's Tables 1 and 9 and Figures 2 and 5 for one's own data, before any training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lavis_mafa.cli.options import add_columns, named_columns, positive, share

if TYPE_CHECKING:
    from lavis_mafa.tools.passes import Pass

# --- flags that `mine` has too ------------------------------------------------------------------------------------------


def add_pass_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """What is read, who mines, who judges, and the rest that a pass needs; sizes are left to the command."""
    parser.add_argument("--cfg-path", metavar="YAML", help="whose model is Con-D and whose training data are read")
    text = "Con-D's weights: a run's folder or a file of ours, or LAVIS's retrieval or ITM ones"
    parser.add_argument("--con-d", metavar="CHECKPOINT", help=text)
    text = "the pairs, in place of --cfg-path: files, folders or patterns"
    parser.add_argument("--annotations", type=Path, nargs="+", metavar="FILE", help=text)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where their image paths start from")
    add_columns(parser)
    given = parser.add_argument_group("with embeddings you have already", "no model, no image and no LAVIS is needed")
    add = given.add_argument
    text = "whose similarities decide what is a hard negative, also with --con-d: IMAGES.npy TEXTS.npy, or one .parquet; a row a pair"
    add("--features", type=Path, nargs="+", metavar="FILE", help=text)
    text = "who judges: .parquet or .csv with image_row, text_row (from 0) and probability, by any model"
    add("--scores", type=Path, nargs="+", metavar="FILE", help=text)
    text = "write the pairs that --scores lacks (without it, all that are asked about), to be judged, and nothing else"
    add("--write-pairs", type=Path, metavar="FILE", help=text)
    text = "or a second dual encoder's features, as --features: its cosines judge"
    add("--guide-features", type=Path, nargs="+", metavar="FILE", help=text)
    text = "of a guide: a match is above the own pair's cosine less this (default: 0)"
    add("--guide-margin", type=share, metavar="X", help=text)
    parser.add_argument("--samples", type=positive, metavar="N", help="only so many samples, a random part (default: all)")
    parser.add_argument("--seed", type=int, help="of the shuffle and of GRIT's starts (default: run.seed)")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for the result (default: {output})")
    parser.add_argument("--force", action="store_true", help="give a result even where the scores say that they cannot judge")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.num_workers=8")


def pass_of(arguments: argparse.Namespace) -> Pass:
    """What these flags say; raises UserError for columns of another form."""
    from dataclasses import fields

    from lavis_mafa.tools.passes import Pass

    given = vars(arguments) | {"columns": named_columns(arguments.columns)}
    return Pass(**{field.name: given[field.name] for field in fields(Pass) if field.name in given})


# --- the command --------------------------------------------------------------------------------------------------------

OWN = ("batch_size", "search_space", "threshold", "correction", "random_only", "same_image", "same_text", "truth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/count")
    add = parser.add_argument
    add("--batch-size", type=positive, nargs="+", metavar="B", help="batch sizes (default: run.batch_size_train, or 96)")
    add("--search-space", type=positive, nargs="+", metavar="M", help="GRIT's search spaces (default: run.grit.search_space, or 4800)")
    text = "Con-D calls a pair a match above it (default: 0.5, as in the paper's count); the first is for table and plot"
    add("--threshold", type=share, nargs="+", metavar="P", help=text)
    add("--correction", type=share, default=1.0, help="human correction factor; the paper's Table 1 has 0.83 (default: 1)")
    text = "whose similarities mine, while --con-d judges: the paper's count (default: Con-D's own)"
    add("--miner", metavar="CHECKPOINT", help=text)
    add("--random-only", action="store_true", help="random batches alone, of any size (MAFA Figure 5)")
    for what in ("image", "text"):
        text = f"may samples of the same {what} be each other's negatives (default: as model.ecm.same_{what}; the paper counts them)"
        add(f"--same-{what}", choices=("count", "exclude"), help=text)
    add("--truth", action="store_true", help="insist on a comparison with the known truth, made where there is one")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.count_pass import run_count

    counted = run_count(pass_of(arguments), arguments.output, **{name: getattr(arguments, name) for name in OWN})
    if counted is not None:
        print(counted)
    return 0
