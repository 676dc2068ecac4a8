"""Who mines and who judges, of ``count-false-negatives`` and ``mine``: Con-D, or features and scores that are there already."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.options import share
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.tools.features import Features
    from lavis_mafa.tools.judges import Given


def add_given_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a pass without a model; ``--features`` goes with one, too."""
    given = parser.add_argument_group("with embeddings you have already", "no model, no image and no LAVIS is needed")
    add = given.add_argument
    add("--annotations", type=Path, nargs="+", metavar="FILE", help="the pairs, in place of --cfg-path: files, folders or patterns")
    add("--images", type=Path, metavar="FOLDER", help="where their image paths start from; no image is opened")
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


def check_ways(arguments: argparse.Namespace) -> None:
    """Who mines and who judges: Con-D with a YAML, or features and scores or a guide with annotations; raises UserError."""
    judges = {"--con-d": arguments.con_d, "--scores": arguments.scores, "--guide-features": arguments.guide_features}
    given = [flag for flag, value in judges.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other: only one can judge.")
    if not given and arguments.write_pairs is None:
        raise UserError(
            "nobody judges: give --con-d with --cfg-path; or, for --features, --scores or --guide-features, or --write-pairs to have "
            "the pairs written that a judge of yours should see."
        )
    if arguments.guide_margin is not None and arguments.guide_features is None:
        raise UserError("--guide-margin belongs to --guide-features; --scores and --con-d have --threshold.")
    if arguments.threshold is not None and arguments.guide_features is not None:
        raise UserError("--threshold and --guide-features exclude each other: a guide has --guide-margin.")
    needed, other = ["cfg_path"], ["annotations", "images", "write_pairs"]
    if arguments.con_d is None:
        needed, other = ["annotations", "features"], ["cfg_path", "options", "miner"]
        other += ["write_pairs"] if arguments.guide_features is not None else []
    way = given[0] if given else "--write-pairs"
    for name in needed:
        if getattr(arguments, name) is None:
            raise UserError(f"{way} needs {_flag(name)}.")
    for name in other:
        if getattr(arguments, name, None):
            raise UserError(f"{way} and {_flag(name)} exclude each other; it takes {' and '.join(map(_flag, needed))}.")
    if arguments.write_pairs is not None:
        if arguments.write_pairs.suffix.lower() not in (".parquet", ".csv"):
            raise UserError(f"--write-pairs is {arguments.write_pairs}; allowed: a .parquet or .csv file.")
        if arguments.write_pairs.exists():
            raise UserError(f"--write-pairs: {arguments.write_pairs} is there, and may hold what was judged; choose another name.")
    if arguments.features is not None and getattr(arguments, "miner", None) is not None:
        raise UserError("--features and --miner exclude each other: only one can mine.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given_features(arguments: argparse.Namespace, dataset: Any, name: str = "features") -> Features | None:
    """``--features`` or ``--guide-features`` of a training set, looked at; None where there are none."""
    from lavis_mafa.tools.features import check_own_pairs, read_features
    from lavis_mafa.tools.judges import check_caption_a_row

    flag, paths = _flag(name), getattr(arguments, name)
    if paths is None:
        return None
    check_caption_a_row(dataset, flag)
    features = read_features(paths, len(dataset), flag)
    if not arguments.force:
        check_own_pairs(features, flag)
    return features


def open_given(arguments: argparse.Namespace) -> Given:
    """Pairs, features and judge of a pass without a model."""
    from lavis_mafa.tools.judges import Given, Guide, PicturelessPairs, ScoreTable

    dataset = PicturelessPairs(arguments.annotations, arguments.images)
    features, guide = (given_features(arguments, dataset, name) for name in ("features", "guide_features"))
    assert features is not None, "check_ways has seen to it"
    if guide is None:
        return Given(features, dataset, ScoreTable(arguments.scores or [], len(dataset)))
    return Given(features, dataset, Guide(guide, arguments.guide_margin or 0.0))


def pairs_written(arguments: argparse.Namespace, given: Given) -> bool:
    """After the pass: with ``--write-pairs`` the pairs that have no score are written; without, there must be none (UserError)."""
    from lavis_mafa.tools.judges import ScoreTable, write_pairs

    if not isinstance(given.judge, ScoreTable):
        return False
    if arguments.write_pairs is None:
        given.judge.check()
        return False
    pairs = given.judge.missing_pairs()
    write_pairs(pairs, given.dataset, arguments.write_pairs)
    print(f"{len(pairs[0]):,} pairs to be judged: {arguments.write_pairs}")
    print("Add a column probability (0 to 1) and give the file as --scores, beside what was given before; all else as now.")
    return True


def sources(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result says of where it is from; paths as they were written."""
    files = {name: getattr(arguments, name) or [] for name in ("annotations", "features", "scores", "guide_features")}
    given = {name: list(map(str, paths)) for name, paths in files.items()}
    return {"cfg_path": arguments.cfg_path, "options": arguments.options, "con_d": arguments.con_d, "given": given}


def judge_flag(arguments: argparse.Namespace) -> str:
    """The one that names who judges."""
    return "--con-d" if arguments.con_d else "--scores" if arguments.scores else "--guide-features"
