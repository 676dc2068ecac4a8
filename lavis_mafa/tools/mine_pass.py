"""Missing connections as training data, as one call: data and judge are opened, gone through, and the result is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.distributed import barrier, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.files import check_unfinished, file_digest, write_text
from lavis_mafa.tools import mine
from lavis_mafa.tools.candidates import Encoder, ReadableRows, blocks_of, progress_bar
from lavis_mafa.tools.features import Features
from lavis_mafa.tools.judges import Given, Mined
from lavis_mafa.tools.marks import fitted, read_marks
from lavis_mafa.tools.passes import Judging, Pass, Unjudged, check_numbers, judging
from lavis_mafa.tools.run_files import MINED
from lavis_mafa.tools.training_data import Opened
from lavis_mafa.weights import weight_files


@dataclass(frozen=True, repr=False)
class MineResult:
    """Connections that were missing. ``folder`` holds ``pairs.parquet`` (the original pairs, then the new ones: training data),
    ``connections.parquet`` (every candidate and what became of it) and ``mine.json``, which is ``results``; printed, its tables."""

    results: dict[str, Any]
    folder: Path

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.parquet"

    def __str__(self) -> str:
        absolute = ""
        if self.results["images"] is None:
            absolute = " (with build_info.images.allow_absolute_paths: true, since the images lie in several folders)"
        return (
            f"{mine.format_mined(self.results)}\n\nThe pairs, for datasets.grit_pairs: {self.pairs}{absolute}\n"
            f"Every candidate and what became of it: {self.folder / 'connections.parquet'}; the metrics: {self.folder / MINED}"
        )

    __repr__ = __str__


def run_mine(
    of: Pass,
    folder: Path,
    *,
    batch_size: int | None = None,
    search_space: int | None = None,
    threshold: float | None = None,
    margin: float | None = None,
    per_image: int | None = None,
    at_most: int | None = None,
    reviewed: Path | None = None,
) -> MineResult | Unjudged | None:
    """Find missing image-text connections and write them as training data (MAFA section G.8). See :mod:`lavis_mafa.api`.

    A pass with a Con-D that was stopped goes on in its ``folder``.

    Returns:
        on the first rank; None on others.

    Raises:
        UserError: as of :func:`run_count`; or the folder was begun with other settings.
    """
    check_numbers(batch_size=batch_size, search_space=search_space, margin=margin, per_image=per_image, at_most=at_most)
    of.check(folder, MINED, threshold)
    one = [None if size is None else [size] for size in (batch_size, search_space)]
    bad: list[dict[str, Any]] = []
    with judging(of, *one) as found:
        source = mine.SourceRows(found.rows.dataset)
        marks = _marks(reviewed, source)
        rules = _rules(mine.Rules(guide_margin=found.encoder.margin), threshold, margin, per_image, at_most)
        settings: dict[str, Any] = {} if found.opened is None else _settings_of_model(found, found.opened)
        settings |= {"samples": of.samples, "seed": found.seed, "batch_size": found.batch_sizes[0]}
        settings |= {"search_space": found.search_spaces[0], **vars(rules)}
        blocks = blocks_of(found.order, found.search_spaces[0])
        if found.opened is None:
            assert isinstance(found.encoder, Given)
            with progress_bar(len(found.order)) as bar:  # in one go, since no block takes more than seconds
                read = found.encoder.blocks(found.rows, blocks, bar)
                parts = [mine.judged(found.encoder, block, source, settings["batch_size"], found.seed) for block in read]
            if (unjudged := found.unjudged()) is not None:
                return unjudged
            candidates = pa.concat_tables(parts).replace_schema_metadata(None)
            _look(found, candidates, rules)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            candidates, bad = _by_blocks(found, source, blocks, rules, settings, folder)
        if rank() != 0:
            return None
        origin = {"judge": found.encoder.judge_name, **found.of.sources()}
        result = _write(origin, found.rows, source, candidates, bad, rules, settings, marks, folder)
        shutil.rmtree(_parts(folder), ignore_errors=True)
    return result


def choose_again(
    before: Path,
    folder: Path,
    *,
    threshold: float | None = None,
    margin: float | None = None,
    per_image: int | None = None,
    at_most: int | None = None,
    reviewed: Path | None = None,
) -> MineResult:
    """The result in ``before`` by other rules, or with marks, from the same candidates; no model is asked, and what is not given stays,
    its marks too.

    Raises:
        UserError: ``before`` holds no whole result; or a threshold is given where a guide judged; or the marks are of other data.
    """
    check_unfinished(folder, MINED)
    mined = Mined(before)
    rules = mine.Rules(**{name: value for name, value in mined.settings.items() if name in vars(mine.Rules())})
    if threshold is not None and rules.guide_margin is not None:
        raise UserError(f"--threshold is given, but in {before} a guide judged, whose margin is {rules.guide_margin:g}.")
    source = mine.SourceRows(mined)
    source.root = mined.root
    rules, marks = _rules(rules, threshold, margin, per_image, at_most), _marks(reviewed or mined.reviewed, source)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**mined.settings, **vars(rules)}
    origin = {"judge": mined.judge_name, **mined.origin}
    return _write(origin, ReadableRows(mined), source, mined.candidates, mined.bad, rules, settings, marks, folder)


def _rules(before: mine.Rules, threshold: float | None, margin: float | None, per_image: int | None, at_most: int | None) -> mine.Rules:
    given: dict[str, Any] = {"threshold": threshold, "margin": margin, "per_image": per_image, "at_most": at_most}
    return replace(before, **{name: value for name, value in given.items() if value is not None})


def _marks(reviewed: Path | None, source: mine.SourceRows) -> tuple[Path, pa.Table] | None:
    """The marks of these data, and their file."""
    if reviewed is None:
        return None
    return reviewed, fitted(read_marks(reviewed), source.table["image"], source.table["caption"], f"--reviewed: {reviewed}")


def _settings_of_model(found: Judging, opened: Opened) -> dict[str, Any]:
    """What a pass that goes on must have in common with how it was begun."""
    features = found.encoder.miner if isinstance(found.encoder, Encoder) else None
    return {
        "con_d": file_digest(weight_files(Path(str(found.of.con_d)).expanduser(), "--con-d")),
        "data": mine.fingerprint(opened.dataset, found.rows.image_keys, opened.data_settings),
        "model": opened.model_settings,
        "features": features.digest() if isinstance(features, Features) else None,
        "precision": opened.run.precision,
        "layout": 2,  # of the blocks' files
    }


def _parts(folder: Path) -> Path:
    return folder / "blocks"


def _by_blocks(
    found: Judging, source: mine.SourceRows, blocks: Any, rules: mine.Rules, settings: dict[str, Any], folder: Path
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """All candidates, and what could not be read; blocks that are done already are not done again."""
    assert isinstance(found.encoder, Encoder)
    parts = _parts(folder)
    if mine.begin(folder, settings, MINED) and rank() == 0:
        done = sum(mine.part_path(parts, number).exists() for number, _ in blocks)
        print(f"going on in {folder}: {done} of {len(blocks)} blocks are done")
    parts.mkdir(exist_ok=True)
    waiting = sum(len(block) for number, block in blocks if not mine.part_path(parts, number).exists())
    with progress_bar(waiting) as bar:
        # a block of each rank first: a hopeless Con-D is found before hours of work
        for some in (blocks[: world_size()], blocks):
            mine.mine_blocks(found.encoder, found.rows, source, some, parts, settings["batch_size"], found.seed, bar)
            barrier()
            candidates, bad = mine.read_parts(parts, len(some))
            _look(found, candidates, rules)
    return candidates, bad


def _truth(rows: ReadableRows) -> tuple[Any, Any]:
    return getattr(rows.dataset, "truth", None), getattr(rows.dataset, "concepts", None)


def _look(found: Judging, candidates: pa.Table, rules: mine.Rules) -> None:
    found.of.refuse_meaningless([mine.medians_of(candidates, len(found.rows), rules, *_truth(found.rows))])


def _write(
    origin: dict[str, Any],
    rows: ReadableRows,
    source: mine.SourceRows,
    candidates: pa.Table,
    bad: list[dict[str, Any]],
    rules: mine.Rules,
    settings: dict[str, Any],
    marks: tuple[Path, pa.Table] | None,
    folder: Path,
) -> MineResult:
    """The files of the result; ``mine.json``, written last, says that it is whole."""
    if not candidates.num_rows:
        raise UserError(f"none of {len(bad)} samples could be read, the first because of {bad[0]['reason']}.")
    keys, captions = rows.image_keys.numpy(), source.table["caption"]
    outcome = mine.choose(candidates, keys, captions, rules, None if marks is None else marks[1])
    reviewed = None if marks is None else mine.review(candidates, keys, captions, marks[1], marks[0])
    about = origin | {"data": len(rows), "images": str(source.root) if source.root else None, "settings": settings}
    results = about | mine.mine_results(candidates, outcome, keys, bad, *_truth(rows), rules, reviewed)
    words, result = pa.array(mine.OUTCOMES).take(pa.array(outcome)), MineResult(results, folder)
    mine.write_parquet(candidates.append_column("outcome", words), folder / "connections.parquet")
    mine.write_parquet(mine.pairs_table(source, keys, candidates, np.flatnonzero(outcome == 0)), result.pairs)
    if bad:
        write_text(folder / "bad_samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in bad))
    write_text(folder / MINED, json.dumps(results, indent=2) + "\n")
    return result
