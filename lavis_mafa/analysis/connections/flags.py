"""Command-line flags that both offline passes have, and what is wrong with them alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.options import positive
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.models.sanity import Medians


def add_pass_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """``--cfg-path``, ``--con-d`` and the rest that a pass needs; sizes are left to the command."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="whose model is Con-D and whose training data are read")
    parser.add_argument("--con-d", required=True, metavar="CHECKPOINT", help="Con-D's weights: ours, or LAVIS's retrieval or ITM ones")
    parser.add_argument("--samples", type=positive, metavar="N", help="only so many samples, a random part (default: all)")
    parser.add_argument("--seed", type=int, help="of the shuffle and of GRIT's starts (default: run.seed)")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for the result (default: {output})")
    parser.add_argument(
        "--force", action="store_true", help="print and write a result even where Con-D's scores say that it cannot judge"
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.num_workers=8")


def check_sizes(batch_sizes: Sequence[int], search_spaces: Sequence[int], samples: int | None) -> None:
    """B >= 2, B <= M, something to read; raises UserError."""
    for size in batch_sizes:
        if size < 2:
            raise UserError(f"--batch-size is {size}, but a batch with negatives has at least 2 samples.")
        for space in search_spaces:
            if size > space:
                raise UserError(f"--batch-size is {size}, but must not exceed --search-space ({space}).")
    if samples is not None and samples < 1:
        raise UserError(f"--samples is {samples}, but must be at least 1.")


def check_share(flag: str, value: float, above_zero: bool = False) -> None:
    """A probability or share; raises UserError."""
    if not (0.0 < value <= 1.0 if above_zero else 0.0 <= value <= 1.0):
        raise UserError(f"{flag} is {value:g}, but must be {'above 0 and at most 1' if above_zero else 'between 0 and 1'}.")


def refuse_meaningless(found: Sequence[Medians], force: bool) -> None:
    """Raises UserError where Con-D cannot judge (:meth:`Medians.why_not`) under any of the ways to sample, unless forced."""
    medians = next((medians for medians in found if medians.why_not()), None)
    if medians is not None and not force:
        raise UserError(
            f"--con-d cannot judge these data: {medians.why_not()}; medians: {medians}. What it decides means nothing, so no result is "
            "given. Give a Con-D that was trained on such images and texts; or, where most captions do fit many of the images, "
            "--force, and it is marked."
        )


def sizes_or_defaults(given: Any, config: Any, key: str, default: int) -> list[int]:
    """What the command line says, else what the YAML trains with."""
    from omegaconf import OmegaConf

    if given is not None:
        return given if isinstance(given, list) else [given]
    return [int(OmegaConf.select(config, key) or default)]
