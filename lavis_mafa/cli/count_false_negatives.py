"""``lavis-mafa count-false-negatives``: MAFA's Tables 1 and 9 and Figures 2 and 5 for one's own data, before any training."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from lavis_mafa.analysis.connections.flags import (
    add_pass_arguments,
    check_share,
    check_sizes,
    refuse_meaningless,
    sizes_or_defaults,
)
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.analysis.connections.opening import Opened

RESULT = "count.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/count")
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="B", help="batch sizes (default: run.batch_size_train)")
    parser.add_argument(
        "--search-space", type=int, nargs="+", metavar="M", help="GRIT's search spaces (default: run.grit.search_space)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="P",
        help="Con-D calls a pair a match above it (default: 0.5, as in the paper's count); the first is for table and plot",
    )
    parser.add_argument(
        "--correction", type=float, default=1.0, help="human correction factor; the paper's Table 1 has 0.83 (default: 1)"
    )
    parser.add_argument(
        "--miner", metavar="CHECKPOINT", help="whose similarities mine, while --con-d judges: the paper's count (default: Con-D's own)"
    )
    parser.add_argument("--random-only", action="store_true", help="random batches alone, of any size (MAFA Figure 5)")
    for what in ("image", "text"):
        parser.add_argument(
            f"--same-{what}",
            choices=("count", "exclude"),
            help=f"may samples of the same {what} be each other's negatives (default: as model.ecm.same_{what}; the paper counts them)",
        )
    parser.add_argument("--truth", action="store_true", help="insist on a comparison with the known truth, made where there is one")


def run(arguments: argparse.Namespace) -> int:
    for threshold in arguments.threshold:
        check_share("--threshold", threshold)
    check_share("--correction", arguments.correction, above_zero=True)
    from lavis_mafa.analysis.connections.folder import check_unfinished

    check_unfinished(arguments.output, RESULT)
    from lavis_mafa.analysis.connections.opening import checked_config, open_pass, process_group_closed
    from lavis_mafa.config.schema import typed_block

    if arguments.random_only and arguments.search_space:
        raise UserError("--random-only and --search-space exclude each other: random batches have no search space.")
    config = checked_config(arguments.cfg_path, arguments.options, arguments.con_d, arguments.miner)
    sizes = sizes_or_defaults(arguments.batch_size, config, "run.batch_size_train", 96)
    spaces = [] if arguments.random_only else sizes_or_defaults(arguments.search_space, config, "run.grit.search_space", 4800)
    check_sizes(sizes, spaces, arguments.samples)
    with process_group_closed():
        opened = open_pass(config, arguments.cfg_path, arguments.options, arguments.con_d, arguments.miner)
        _count(arguments, opened, typed_block("model", config.model).ecm, sizes, spaces)
    return 0


def _count(arguments: argparse.Namespace, opened: Opened, ecm: Any, sizes: list[int], spaces: list[int]) -> None:
    from lavis_mafa.analysis.connections.blocks import Encoder
    from lavis_mafa.analysis.connections.candidates import Known
    from lavis_mafa.analysis.connections.count_plot import count_plot
    from lavis_mafa.analysis.connections.count_report import count_results, format_count
    from lavis_mafa.analysis.connections.counting import Count, count_false_negatives, samplings
    from lavis_mafa.analysis.connections.folder import write_bytes, write_text
    from lavis_mafa.analysis.connections.opening import progress_bar
    from lavis_mafa.analysis.connections.reading import ReadableRows, shuffled
    from lavis_mafa.distributed import rank

    if arguments.truth and getattr(opened.dataset, "truth", None) is None:
        raise UserError("--truth is given, but the training data has no `concept` to know the truth from, or is several data sets.")
    run, folder = opened.run, arguments.output
    seed = run.seed if arguments.seed is None else arguments.seed
    rows = ReadableRows(opened.dataset, run.seed)
    order = shuffled(len(rows), seed, arguments.samples)
    about = {"cfg_path": arguments.cfg_path, "options": arguments.options, "con_d": arguments.con_d, "miner": arguments.miner}
    known = Known(_excluded(arguments.same_image, ecm.same_image), _excluded(arguments.same_text, ecm.same_text))
    about |= {"data": len(rows), "seed": seed, "same_image": known.same_image, "same_text": known.same_text}
    encoder = Encoder(opened.con_d, opened.device, run.precision, opened.miner)

    def look(count: Count) -> None:
        refuse_meaningless([count.medians(way) for way in count.tallies], arguments.force)

    folder.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be written is found before hours of work
    ways = samplings(sizes, spaces)
    with progress_bar(len(order)) as bar:
        reading = run.batch_size_eval, run.num_workers
        count = count_false_negatives(encoder, rows, order, ways, arguments.threshold, seed, *reading, bar, known, look)
    if count.samples == 0:
        raise UserError(f"none of {len(order)} samples could be read: {', '.join(count.unreadable)}.")
    look(count)
    if rank() == 0:
        results = count_results(count, arguments.correction, about)
        print(format_count(results))
        write_bytes(folder / "count.png", count_plot(results))
        write_text(folder / RESULT, json.dumps(results, indent=2) + "\n")
        print(f"\nThe figures: {folder / RESULT}, the plot: {folder / 'count.png'}")


def _excluded(asked: str | None, as_trained: bool) -> bool:
    return as_trained if asked is None else asked == "exclude"
