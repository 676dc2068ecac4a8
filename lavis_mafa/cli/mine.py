"""``lavis-mafa mine``: one pass that finds missing image-text connections and writes them as training data (MAFA section G.8)."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.count_false_negatives import add_pass_arguments, find_weights, refuse_meaningless, sizes
from lavis_mafa.cli.given import check_ways, given_features, judge_flag, open_given, pairs_written, sources
from lavis_mafa.cli.options import positive, share
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from lavis_mafa.tools.candidates import ReadableRows
    from lavis_mafa.tools.mine import Rules, SourceRows
    from lavis_mafa.tools.training_data import Opened

RESULT = "mine.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pass_arguments(parser, "output/mine")
    add = parser.add_argument
    add("--batch-size", type=positive, metavar="B", help="of the GRIT batches (default: run.batch_size_train, or 96)")
    add(
        "--search-space", type=positive, metavar="M", help="of GRIT, and of a resumable block (default: run.grit.search_space, or 4800)"
    )
    add("--threshold", type=share, metavar="P", help="keep pairs above this probability (default: 0.8)")
    text = "and of at least this share of the own pair's probability, e.g. 0.95 (default: 0)"
    add("--margin", type=share, help=text)
    add("--per-image", type=positive, metavar="K", help="at most so many new captions an image (default: all)")
    text = "at most so many new pairs, the most probable ones; 2000000 in the paper (default: all)"
    add("--at-most", type=positive, metavar="N", help=text)
    add("--reviewed", type=Path, metavar="MARKS", help="what people accepted and rejected: a file of `explore`, or a page's export")
    text = "choose anew from a finished result, with --reviewed or other limits, and ask no model; what is not given stays as it was"
    add("--again", type=Path, metavar="MINED", help=text)


def run(arguments: argparse.Namespace) -> int:
    if arguments.again is None:
        check_ways(arguments)
    from lavis_mafa.files import check_unfinished

    if arguments.write_pairs is None:
        check_unfinished(arguments.output, RESULT)
    if arguments.again is not None:
        _choose_again(arguments)
        return 0
    if arguments.con_d is None:
        _mine_given(arguments)
        return 0
    find_weights(arguments)
    from lavis_mafa.tools.training_data import check_pass, opened_pass

    config = check_pass(arguments.cfg_path, arguments.options, arguments.con_d)
    (batch_size,), (search_space,) = sizes(arguments, config)
    with opened_pass(config, arguments.cfg_path, arguments.options, arguments.con_d, features=arguments.features) as opened:
        _mine(arguments, opened, batch_size, search_space)
    return 0


def _mine(arguments: argparse.Namespace, opened: Opened, batch_size: int, search_space: int) -> None:
    """From the data to blocks of candidates, which a stopped pass goes on with, to the result."""
    from lavis_mafa.distributed import barrier, rank, world_size
    from lavis_mafa.files import file_digest
    from lavis_mafa.tools import mine
    from lavis_mafa.tools.candidates import Encoder, ReadableRows, blocks_of, progress_bar, shuffled
    from lavis_mafa.weights import weight_files

    run, dataset, folder = opened.run, opened.dataset, arguments.output
    rows, source = ReadableRows(dataset, run.seed, run.batch_size_eval, run.num_workers), mine.SourceRows(dataset)
    marks = _marks(arguments, source)
    features = given_features(arguments, dataset)
    seed = run.seed if arguments.seed is None else arguments.seed
    blocks = blocks_of(shuffled(len(rows), seed, arguments.samples), search_space)
    rules = _rules(arguments)
    settings = {
        "con_d": file_digest(weight_files(Path(arguments.con_d).expanduser(), "--con-d")),
        "data": mine.fingerprint(dataset, rows.image_keys, opened.data_settings),
        "model": opened.model_settings,
        "features": None if features is None else features.digest(),
        "precision": run.precision,
        "samples": arguments.samples,
        "seed": seed,
        "batch_size": batch_size,
        "search_space": search_space,
        **vars(rules),
        "layout": 2,  # of the blocks' files
    }
    parts = folder / "blocks"
    if mine.begin(folder, settings, RESULT) and rank() == 0:
        done = sum(mine.part_path(parts, number).exists() for number, _ in blocks)
        print(f"going on in {folder}: {done} of {len(blocks)} blocks are done")
    parts.mkdir(exist_ok=True)
    waiting = sum(len(block) for number, block in blocks if not mine.part_path(parts, number).exists())
    encoder = Encoder(opened.con_d, opened.device, run.precision, features)
    with progress_bar(waiting) as bar:
        # a block of each rank first: a hopeless Con-D is found before hours of work
        for some in (blocks[: world_size()], blocks):
            mine.mine_blocks(encoder, rows, source, some, parts, batch_size, seed, bar)
            barrier()
            candidates, bad = mine.read_parts(parts, len(some))
            _refuse_meaningless(arguments, rows, candidates, rules)
    if rank() == 0:
        _write(arguments, encoder.judge_name, sources(arguments), rows, source, candidates, bad, rules, settings, marks)
        shutil.rmtree(parts)


def _mine_given(arguments: argparse.Namespace) -> None:
    """The same without a model: in one go, since no block takes more than seconds."""
    import pyarrow as pa
    from omegaconf import OmegaConf

    from lavis_mafa.config.schema import RunBlock
    from lavis_mafa.tools import mine
    from lavis_mafa.tools.candidates import ReadableRows, blocks_of, progress_bar, shuffled

    (batch_size,), (search_space,) = sizes(arguments, OmegaConf.create())
    given = open_given(arguments)
    rows, source = ReadableRows(given.dataset), mine.SourceRows(given.dataset)
    marks = _marks(arguments, source)
    seed = RunBlock().seed if arguments.seed is None else arguments.seed
    order = shuffled(len(rows), seed, arguments.samples)
    rules = _rules(arguments, mine.Rules(guide_margin=given.margin))
    with progress_bar(len(order)) as bar:
        blocks = given.blocks(rows, blocks_of(order, search_space), bar)
        candidates = pa.concat_tables([mine.judged(given, block, source, batch_size, seed) for block in blocks])
    if pairs_written(arguments, given):
        return
    _refuse_meaningless(arguments, rows, candidates, rules)
    settings = {"samples": arguments.samples, "seed": seed, "batch_size": batch_size, "search_space": search_space, **vars(rules)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    candidates = candidates.replace_schema_metadata(None)
    _write(arguments, given.judge_name, sources(arguments), rows, source, candidates, [], rules, settings, marks)


OF_A_PASS = "cfg_path con_d options annotations images features scores write_pairs guide_features guide_margin samples seed".split()
OF_A_PASS += ["batch_size", "search_space", "force"]


def _choose_again(arguments: argparse.Namespace) -> None:
    """The same result by other rules or with marks, from the candidates of a finished one."""
    if given := [name for name in OF_A_PASS if getattr(arguments, name) not in (None, [], False)]:
        raise UserError(f"--again and --{given[0].replace('_', '-')} exclude each other: nothing is searched or judged anew.")
    from lavis_mafa.tools.candidates import ReadableRows
    from lavis_mafa.tools.judges import Mined
    from lavis_mafa.tools.mine import Rules, SourceRows

    mined = Mined(arguments.again)
    before = Rules(**{name: value for name, value in mined.settings.items() if name in vars(Rules())})
    if arguments.threshold is not None and before.guide_margin is not None:
        raise UserError(f"--threshold is given, but in {arguments.again} a guide judged, whose margin is {before.guide_margin:g}.")
    source = SourceRows(mined)
    source.root = mined.root
    rules, marks = _rules(arguments, before), _marks(arguments, source)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {**mined.settings, **vars(rules)}
    _write(arguments, mined.judge_name, mined.origin, ReadableRows(mined), source, mined.candidates, mined.bad, rules, settings, marks)


def _rules(arguments: argparse.Namespace, otherwise: Rules | None = None) -> Rules:
    """Those that are given, else as they are ``otherwise``."""
    from dataclasses import replace

    from lavis_mafa.tools.mine import Rules

    given = {name: getattr(arguments, name) for name in ("threshold", "margin", "per_image", "at_most")}
    return replace(otherwise or Rules(), **{name: value for name, value in given.items() if value is not None})


def _marks(arguments: argparse.Namespace, source: SourceRows) -> pa.Table | None:
    """``--reviewed``, looked at."""
    from lavis_mafa.tools.marks import fitted, read_marks

    if arguments.reviewed is None:
        return None
    return fitted(read_marks(arguments.reviewed), source.table["image"], source.table["caption"], f"--reviewed: {arguments.reviewed}")


def _truth(rows: ReadableRows) -> tuple[Any, Any]:
    return getattr(rows.dataset, "truth", None), getattr(rows.dataset, "concepts", None)


def _refuse_meaningless(arguments: argparse.Namespace, rows: ReadableRows, candidates: pa.Table, rules: Rules) -> None:
    from lavis_mafa.tools.mine import medians_of

    refuse_meaningless([medians_of(candidates, len(rows), rules, *_truth(rows))], arguments.force, judge_flag(arguments))


def _write(
    arguments: argparse.Namespace,
    judge: str,
    origin: dict[str, Any],
    rows: ReadableRows,
    source: SourceRows,
    candidates: pa.Table,
    bad: list[dict[str, Any]],
    rules: Rules,
    settings: dict[str, Any],
    marks: pa.Table | None,
) -> None:
    """The files of the result; ``mine.json``, written last, says that it is whole."""
    import numpy as np
    import pyarrow as pa

    from lavis_mafa.files import write_text
    from lavis_mafa.tools import mine

    folder = arguments.output
    if not candidates.num_rows:
        raise UserError(f"none of {len(bad)} samples could be read, the first because of {bad[0]['reason']}.")
    keys = rows.image_keys.numpy()
    captions = source.table["caption"]
    outcome = mine.choose(candidates, keys, captions, rules, marks)
    reviewed = None if marks is None else mine.review(candidates, keys, captions, marks, arguments.reviewed)
    about = {"judge": judge, **origin, "data": len(rows)}
    about |= {"images": str(source.root) if source.root else None, "settings": settings}
    results = about | mine.mine_results(candidates, outcome, keys, bad, *_truth(rows), rules, reviewed)
    words = pa.array(mine.OUTCOMES).take(pa.array(outcome))
    mine.write_parquet(candidates.append_column("outcome", words), folder / "connections.parquet")
    mine.write_parquet(mine.pairs_table(source, keys, candidates, np.flatnonzero(outcome == 0)), folder / "pairs.parquet")
    if bad:
        write_text(folder / "bad_samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in bad))
    write_text(folder / RESULT, json.dumps(results, indent=2) + "\n")
    print(mine.format_mined(results))
    absolute = "" if source.root else " (with build_info.images.allow_absolute_paths: true, since the images lie in several folders)"
    print(f"\nThe pairs, for datasets.grit_pairs: {folder / 'pairs.parquet'}{absolute}")
    print(f"Every candidate and what became of it: {folder / 'connections.parquet'}; the metrics: {folder / RESULT}")
