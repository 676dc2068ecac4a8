"""``lavis-mafa mine``: one pass that finds missing image-text connections and writes them as training data (MAFA section G.8)."""

from __future__ import annotations

import argparse
import json
import shutil
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

RESULT = "mine.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/mine")
    parser.add_argument("--batch-size", type=int, metavar="B", help="of the GRIT batches (default: run.batch_size_train)")
    parser.add_argument(
        "--search-space", type=int, metavar="M", help="of GRIT, and of a resumable block (default: run.grit.search_space)"
    )
    parser.add_argument("--threshold", type=float, default=0.8, metavar="P", help="keep pairs above this probability (default: 0.8)")
    parser.add_argument(
        "--margin", type=float, default=0.0, help="and of at least this share of the own pair's probability, e.g. 0.95 (default: 0)"
    )
    parser.add_argument("--per-image", type=int, metavar="K", help="at most so many new captions an image (default: all)")
    parser.add_argument(
        "--at-most",
        type=int,
        metavar="N",
        help="at most so many new pairs, the most probable ones; 2000000 in the paper (default: all)",
    )


def run(arguments: argparse.Namespace) -> int:
    check_share("--threshold", arguments.threshold)
    check_share("--margin", arguments.margin)
    if arguments.per_image is not None and arguments.per_image < 1:
        raise UserError(f"--per-image is {arguments.per_image}, but must be at least 1.")
    if arguments.at_most is not None and arguments.at_most < 1:
        raise UserError(f"--at-most is {arguments.at_most}, but must be at least 1.")
    from lavis_mafa.analysis.connections.folder import check_unfinished

    check_unfinished(arguments.output, RESULT)
    from lavis_mafa.analysis.connections.opening import checked_config, open_pass, process_group_closed

    config = checked_config(arguments.cfg_path, arguments.options, arguments.con_d)
    (size,) = sizes_or_defaults(arguments.batch_size, config, "run.batch_size_train", 96)
    (space,) = sizes_or_defaults(arguments.search_space, config, "run.grit.search_space", 4800)
    check_sizes([size], [space], arguments.samples)
    with process_group_closed():
        _mine(arguments, open_pass(config, arguments.cfg_path, arguments.options, arguments.con_d), size, space)
    return 0


def _mine(arguments: argparse.Namespace, opened: Opened, size: int, space: int) -> None:
    from lavis_mafa.analysis.connections.blocks import Encoder
    from lavis_mafa.analysis.connections.counting import blocks_of
    from lavis_mafa.analysis.connections.folder import begin, file_digest, fingerprint
    from lavis_mafa.analysis.connections.mine_report import medians_of
    from lavis_mafa.analysis.connections.mining import mine_blocks, part_path, read_parts
    from lavis_mafa.analysis.connections.opening import progress_bar
    from lavis_mafa.analysis.connections.reading import ReadableRows, shuffled
    from lavis_mafa.analysis.connections.source_rows import SourceRows
    from lavis_mafa.distributed import barrier, rank, world_size

    run = opened.run
    rows, source = ReadableRows(opened.dataset, run.seed), SourceRows(opened.dataset)
    seed = run.seed if arguments.seed is None else arguments.seed
    blocks = blocks_of(shuffled(len(rows), seed, arguments.samples), space)
    settings = {
        "con_d": file_digest(arguments.con_d),
        "data": fingerprint(opened.dataset, rows.image_keys, opened.data_settings),
        "model": opened.model_settings,
        "precision": run.precision,
        "samples": arguments.samples,
        "seed": seed,
        "batch_size": size,
        "search_space": space,
        "threshold": arguments.threshold,
        "margin": arguments.margin,
        "per_image": arguments.per_image,
        "at_most": arguments.at_most,
        "layout": 2,  # of the blocks' files
    }
    parts = arguments.output / "blocks"
    if begin(arguments.output, settings, RESULT) and rank() == 0:
        done = sum(part_path(parts, number).exists() for number, _ in blocks)
        print(f"going on in {arguments.output}: {done} of {len(blocks)} blocks are done")
    parts.mkdir(exist_ok=True)
    waiting = sum(len(block) for number, block in blocks if not part_path(parts, number).exists())
    encoder = Encoder(opened.con_d, opened.device, run.precision)
    with progress_bar(waiting) as bar:
        truth = getattr(opened.dataset, "truth", None), getattr(opened.dataset, "concepts", None)
        reading = run.batch_size_eval, run.num_workers, bar
        # a block of each rank first: a hopeless Con-D is found before hours of work
        for some in (blocks[: world_size()], blocks):
            mine_blocks(encoder, rows, source, some, parts, size, seed, *reading)
            barrier()
            judged, _ = read_parts(parts, len(some))
            refuse_meaningless([medians_of(judged, len(rows), arguments.threshold, *truth)], arguments.force)
    if rank() == 0:
        _finish(arguments, opened.dataset, rows, source, len(blocks), settings)


def _finish(arguments: argparse.Namespace, dataset: Any, rows: Any, source: Any, blocks: int, settings: dict[str, Any]) -> None:
    """From the blocks to the result; ``mine.json``, written last, says that it is whole."""
    import numpy as np
    import pyarrow as pa

    from lavis_mafa.analysis.connections.choosing import OUTCOMES, Rules, choose
    from lavis_mafa.analysis.connections.folder import write_text
    from lavis_mafa.analysis.connections.mine_report import format_mined, mine_results
    from lavis_mafa.analysis.connections.mining import read_parts, write_parquet
    from lavis_mafa.analysis.connections.pairs_file import pairs_table

    folder = arguments.output
    judged, bad = read_parts(folder / "blocks", blocks)
    if not judged.num_rows:
        raise UserError(f"none of {len(bad)} samples could be read, the first because of {bad[0]['reason']}.")
    keys = rows.image_keys.numpy()
    rules = Rules(arguments.threshold, arguments.margin, arguments.per_image, arguments.at_most)
    outcome = choose(judged, keys, source.table["caption"], rules)
    truth = getattr(dataset, "truth", None), getattr(dataset, "concepts", None)
    results = mine_results(judged, outcome, keys, bad, *truth, arguments.threshold)
    about = {"cfg_path": arguments.cfg_path, "options": arguments.options, "con_d": arguments.con_d, "data": len(rows)}
    results = {**about, "images": str(source.root) if source.root else None, "settings": settings, **results}
    words = pa.array(OUTCOMES).take(pa.array(outcome))
    write_parquet(judged.append_column("outcome", words), folder / "connections.parquet")
    write_parquet(pairs_table(source, keys, judged, np.flatnonzero(outcome == 0)), folder / "pairs.parquet")
    if bad:
        write_text(folder / "bad_samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in bad))
    write_text(folder / RESULT, json.dumps(results, indent=2) + "\n")
    shutil.rmtree(folder / "blocks")
    print(format_mined(results))
    absolute = "" if source.root else " (with build_info.images.allow_absolute_paths: true, since the images lie in several folders)"
    print(f"\nThe pairs, for datasets.grit_pairs: {folder / 'pairs.parquet'}{absolute}")
    print(f"Every candidate and what became of it: {folder / 'connections.parquet'}; the figures: {folder / RESULT}")
