"""``lavis-mafa build-scenes data/scenes``: scenes with known truth, composed of drawings from installed packages."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from lavis_mafa.cli.options import count, share
from lavis_mafa.datasets.scenes.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    world = World()
    parser.add_argument("folder", type=Path, help="where to build; it must not hold anything else")
    parser.add_argument("--train", type=count, default=16384, help="images to train on (default 16384)")
    parser.add_argument("--test", type=count, default=1000, help="images of each of val, test and unseen (default 1000)")
    parser.add_argument("--seed", type=count, default=0, help="of everything that is drawn (default 0)")
    for name, text in {
        "concepts": "sorts of things in all splits",
        "unseen": "further sorts, in the split unseen alone",
        "size": "pixels per side",
        "clutter": "coloured shapes of a scene that no caption names",
    }.items():
        parser.add_argument(f"--{name}", type=count, default=getattr(world, name), help=f"{text} (default {getattr(world, name)})")
    for name, text in {"things": "things of a scene", "named": "sorts of things that a caption names"}.items():
        low, most = getattr(world, name)
        text = f"fewest and most {text} (default {low} {most})"
        parser.add_argument(f"--{name}", type=count, nargs=2, default=(low, most), metavar=("MIN", "MAX"), help=text)
    for name, text in {
        "relations": "of captions that name two sorts, those that say where one is",
        "counts": "of phrases for several things, those that say how many; 0: every thing is there once",
        "plates": "of phrases for things on a plate, those that say its colour; 0: no plates",
        "grounds": "of captions, those that say the ground's colour",
        "wrong": "of training captions, those that are another image's and not true: false positives",
    }.items():
        parser.add_argument(f"--{name}", type=share, default=0.0, metavar="SHARE", help=f"{text} (default 0)")


def run(arguments: argparse.Namespace) -> int:
    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(World)}
    world = World(**given | {name: tuple(given[name]) for name in ("things", "named")})
    from lavis_mafa.datasets.scenes.build import build_scenes

    summary = build_scenes(arguments.folder, world, arguments.train, arguments.test, arguments.seed)
    images, views = summary.images, summary.views
    print(f"Scenes in {arguments.folder}: {', '.join(f'{number:,} {split}' for split, number in images.items())} images")
    print(f"  of {len(summary.concepts)} sorts of things, and {len(summary.unseen)} more in the split unseen.")
    for view, rows in views.items():
        print(f"  {view}: {', '.join(f'{number:,} {split}' for split, number in rows.items())}")
    print(f"What they are: {arguments.folder}/README.md; how they look: {arguments.folder}/sheet.png. To train on them:")
    options = f"datasets.grit_scenes.build_info.root={arguments.folder} model.tokenizer={arguments.folder}/vocab.txt"
    print(f"  lavis-mafa train --cfg-path mafa/quickstart/scenes/start.yaml --options {options}")
    return 0
