"""``lavis-mafa count-false-negatives``: MAFA's Tables 1 and 9 and Figures 2 and 5 for one's own data, before any training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.given import add_given_arguments, check_ways, given_features, judge_flag, open_given, pairs_written, sources
from lavis_mafa.cli.options import positive, share
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.objectives.trust import Medians
    from lavis_mafa.tools.candidates import Encoder, Known, ReadableRows
    from lavis_mafa.tools.judges import Given

RESULT = "count.json"

# --- flags that `mine` has too ------------------------------------------------------------------------------------------


def add_pass_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """What is read, who mines, who judges, and the rest that a pass needs; sizes are left to the command."""
    parser.add_argument("--cfg-path", metavar="YAML", help="whose model is Con-D and whose training data are read")
    text = "Con-D's weights: a run's folder or a file of ours, or LAVIS's retrieval or ITM ones"
    parser.add_argument("--con-d", metavar="CHECKPOINT", help=text)
    add_given_arguments(parser)
    parser.add_argument("--samples", type=positive, metavar="N", help="only so many samples, a random part (default: all)")
    parser.add_argument("--seed", type=int, help="of the shuffle and of GRIT's starts (default: run.seed)")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for the result (default: {output})")
    parser.add_argument("--force", action="store_true", help="give a result even where the scores say that they cannot judge")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.num_workers=8")


def sizes(arguments: argparse.Namespace, config: Any) -> tuple[list[int], list[int]]:
    """All B and M that are asked for, else those that the YAML trains with; raises UserError unless 2 <= B <= M."""
    from omegaconf import OmegaConf

    def asked(given: Any, key: str, default: int) -> list[int]:
        given = int(OmegaConf.select(config, key) or default) if given is None else given
        return given if isinstance(given, list) else [given]

    batch_sizes = asked(arguments.batch_size, "run.batch_size_train", 96)
    random_only = getattr(arguments, "random_only", False)
    search_spaces = [] if random_only else asked(arguments.search_space, "run.grit.search_space", 4800)
    for size in batch_sizes:
        if size < 2:
            raise UserError(f"--batch-size is {size}, but a batch with negatives has at least 2 samples.")
        for space in search_spaces:
            if size > space:
                raise UserError(f"--batch-size is {size}, but must not exceed --search-space ({space}).")
    return batch_sizes, search_spaces


def find_weights(arguments: argparse.Namespace) -> None:
    """``--con-d`` and ``--miner`` become files, whether they are named by a path, a run's folder or a name; raises UserError."""
    from lavis_mafa.named_weights import fetched

    for name, flag in (("con_d", "--con-d"), ("miner", "--miner")):
        if (given := getattr(arguments, name, None)) is not None:
            setattr(arguments, name, fetched(given, flag))


def refuse_meaningless(found: Iterable[Medians], force: bool, judge: str = "--con-d") -> None:
    """Raises UserError where Con-D cannot judge (:meth:`Medians.why_not`) under any of the ways to sample, unless forced."""
    medians = next((medians for medians in found if medians.why_not()), None)
    if medians is not None and not force:
        raise UserError(
            f"{judge} cannot judge these data: {medians.why_not()}; medians: {medians}. What it decides means nothing, so no result is "
            f"given. Give {'a Con-D that' if judge == '--con-d' else 'one that'} was trained on such images and texts; or, where most "
            "captions do fit many of the images, --force, and it is marked."
        )


# --- the command --------------------------------------------------------------------------------------------------------


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
    if not arguments.correction:
        raise UserError("--correction is 0, which leaves no false negatives; allowed: above 0, up to 1.")
    if arguments.random_only and arguments.search_space:
        raise UserError("--random-only and --search-space exclude each other: random batches have no search space.")
    check_ways(arguments)
    from lavis_mafa.files import check_unfinished

    if arguments.write_pairs is None:
        check_unfinished(arguments.output, RESULT)
    if arguments.con_d is None:
        _count_given(arguments)
        return 0
    find_weights(arguments)
    from lavis_mafa.tools.candidates import Encoder, Known, ReadableRows
    from lavis_mafa.tools.training_data import check_pass, opened_pass

    config = check_pass(arguments.cfg_path, arguments.options, arguments.con_d, arguments.miner)
    asked = sizes(arguments, config)
    with opened_pass(config, arguments.cfg_path, arguments.options, arguments.con_d, arguments.miner, arguments.features) as opened:
        run, ecm = opened.run, opened.model.ecm
        rows = ReadableRows(opened.dataset, run.seed, run.batch_size_eval, run.num_workers)
        features = given_features(arguments, opened.dataset)
        encoder = Encoder(opened.con_d, opened.device, run.precision, opened.miner if features is None else features)
        _count(arguments, encoder, rows, run.seed, Known(ecm.same_image, ecm.same_text), *asked)
    return 0


def _count_given(arguments: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from lavis_mafa.config.schema import RunBlock
    from lavis_mafa.tools.candidates import Known, ReadableRows

    asked = sizes(arguments, OmegaConf.create())
    given = open_given(arguments)
    _count(arguments, given, ReadableRows(given.dataset), RunBlock().seed, Known(same_image=True, same_text=True), *asked)


def _count(
    arguments: argparse.Namespace,
    encoder: Encoder | Given,
    rows: ReadableRows,
    seed: int,
    known: Known,
    batch_sizes: Sequence[int],
    search_spaces: Sequence[int],
) -> None:
    """``seed`` and ``known`` are those of the YAML, which flags may change."""
    from lavis_mafa.datasets.ground_truth import NO_TRUTH
    from lavis_mafa.distributed import rank
    from lavis_mafa.files import write_bytes, write_text
    from lavis_mafa.tools.candidates import Known, progress_bar, shuffled
    from lavis_mafa.tools.count import Count, count_false_negatives, count_results, format_count, samplings
    from lavis_mafa.tools.count_plots import count_plot
    from lavis_mafa.tools.judges import Given

    if arguments.truth and getattr(rows.dataset, "truth", None) is None:
        raise UserError(f"--truth is given, but {NO_TRUTH}.")
    folder = arguments.output
    seed = seed if arguments.seed is None else arguments.seed
    order = shuffled(len(rows), seed, arguments.samples)
    asked = (arguments.same_image, known.same_image), (arguments.same_text, known.same_text)
    known = Known(*(trained if flag is None else flag == "exclude" for flag, trained in asked))
    about = {"judge": encoder.judge_name, "margin": encoder.margin, **sources(arguments), "miner": arguments.miner}
    about |= {"data": len(rows), "seed": seed, "same_image": known.same_image, "same_text": known.same_text}
    thresholds = arguments.threshold or [0.5] if encoder.margin is None else [encoder.margin]

    def look(count: Count) -> None:
        refuse_meaningless((count.medians(way) for way in count.tallies), arguments.force, judge_flag(arguments))

    ways = samplings(batch_sizes, search_spaces)
    if arguments.write_pairs is None:
        folder.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be written is found before hours of work
    with progress_bar(len(order)) as bar:
        # a pass without a model is short, and all that a judge was not asked is told at once
        first_look = (lambda _: None) if isinstance(encoder, Given) else look
        count = count_false_negatives(encoder, rows, order, ways, thresholds, seed, known, bar, first_look)
    if isinstance(encoder, Given) and pairs_written(arguments, encoder):
        return
    if count.samples == 0:
        raise UserError(f"none of {len(order)} samples could be read: {', '.join(count.unreadable)}.")
    look(count)
    if rank() == 0:
        results = count_results(count, arguments.correction, about)
        print(format_count(results))
        write_bytes(folder / "count.png", count_plot(results))
        write_text(folder / RESULT, json.dumps(results, indent=2) + "\n")
        print(f"\nThe metrics: {folder / RESULT}, the plot: {folder / 'count.png'}")
