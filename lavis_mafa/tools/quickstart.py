"""What the quickstart shows of its runs: tables for the terminal, one JSON file and one page that needs no network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lavis_mafa.files import last_checkpoint, write_bytes, write_text
from lavis_mafa.runners.checkpoint import rank_file
from lavis_mafa.tools import curves
from lavis_mafa.tools.render import Table, number
from lavis_mafa.tools.report import ITC, by_score, con_d_score, report_page
from lavis_mafa.tools.run_files import last_epoch, open_runs, read_connections, read_evaluations, read_metrics
from lavis_mafa.tools.significance import DIRECTIONS, Comparison, half_widths, paired
from lavis_mafa.weights import read_checkpoint

AT_MOST = 2000  # connections in the page
SPLITS = {"val": "new scenes", "test": "new scenes by another artist"}
COMPARED = "r_precision"
COLUMNS = {  # of the terminal's retrieval table
    "tr_r1": "TR R@1",
    "ir_r1": "IR R@1",
    "tr_r_precision": "TR R-P",
    "ir_r_precision": "IR R-P",
    "tr_map_at_r": "TR mAP@R",
    "ir_map_at_r": "IR mAP@R",
}


def results_of(runs: dict[str, Path], datasets: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Every number of the table; ``runs``: the folders of "start" (evaluated alone), "random", "GRIT" and "MAFA"."""
    dataset = datasets["train"].datasets[0]
    keys, connections = own_text_keys(dataset), read_connections(runs["MAFA"])
    metrics = {name: read_metrics(run) for name, run in runs.items() if name != "start"}
    orders = {
        "random": torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)),
        "GRIT": read_checkpoint(rank_file(last_checkpoint(runs["GRIT"]), 0))["feed"]["sampler"]["order"],
    }
    ends = {name: last_epoch(records) for name, records in metrics.items()}
    return {
        "batches": {name: batch_false_negatives(order, batch_size, dataset, keys) for name, order in orders.items()},
        "chosen_false_negatives": {name: ends[name].get("false_negative_share", math.nan) for name in orders},
        "con_d": score_con_d(connections, dataset, keys),
        "matching": {name: [end["itm_accuracy_positive"], end["itm_accuracy_negative"]] for name, end in ends.items()},
        "retrieval": {name: {split: _retrieval(run, split) for split in SPLITS} for name, run in runs.items()},
        "compared": {
            split: {
                other: {side: asdict(paired(runs["MAFA"], runs[other], split, COMPARED, side)) for side in DIRECTIONS}
                for other in ("GRIT", "random", "start")
            }
            for split in SPLITS
        },
        "queries": {split: [len(datasets[split]), len(datasets[split].text)] for split in SPLITS},
    }


def _retrieval(run: Path, split: str) -> dict[str, Any]:
    """The metrics that are shown, ITC's alone after ``itc_``, each with half of its 95 % interval after ``half_``."""
    kept = (*COLUMNS, "rank_by", *(f"{ITC}{name}" for name in COLUMNS))
    values, halves = read_evaluations(run)[split], half_widths(run, split)
    found = {name: values[name] for name in kept if name in values}
    return found | {f"half_{name}": halves[name] for name in found if name in halves}


def own_text_keys(dataset: Any) -> Tensor:
    """LongTensor[N]: the truth's key of each row's caption, for data with one caption a row."""
    return torch.tensor([dataset.truth.text_key(dataset.captions(i)[0]) for i in range(len(dataset))])


def batch_false_negatives(order: Tensor, batch_size: int, dataset: Any, text_keys: Tensor) -> dict[str, float]:
    """``per_batch`` and ``share`` of false negatives among all off-diagonal pairs of the whole batches of ``order`` (LongTensor[N])."""
    batches = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    total = 0
    for rows in batches:
        match = dataset.truth.matrix(dataset.concepts[rows], text_keys[rows])
        total += int(match.sum() - match.diagonal().sum())
    return {"per_batch": total / len(batches), "share": total / len(batches) / (batch_size * (batch_size - 1))}


def score_con_d(connections: pa.Table, dataset: Any, text_keys: Tensor) -> dict[str, Any]:
    """:func:`con_d_score` of every recorded sighting."""
    image, text = (torch.tensor(connections[name].to_pylist()) for name in ("image", "text"))
    match = dataset.truth.matches(dataset.concepts[image], text_keys[text]).tolist()
    score = con_d_score(list(zip(match, (verdict == "positive" for verdict in connections["verdict"].to_pylist()), strict=True)))
    return {name: score[name] for name in ("pairs", "true_share", "precision", "recall")}


def results_text(results: dict[str, Any]) -> str:
    """The results for a terminal of 120 columns."""
    lines = ["False negatives, known: a caption matches every scene that has all it names"]
    lines.append(f"  {'batches':10s} {'pairs a batch':>14s} {'of all pairs':>13s} {'of the negatives that ITM is given':>35s}")
    for name, count in results["batches"].items():
        chosen = results["chosen_false_negatives"][name]
        lines.append(f"  {name:10s} {count['per_batch']:14.1f} {count['share']:12.1%} {chosen:34.1%}")
    score = results["con_d"]
    lines += ["", "Con-D on the hardest negatives, at its threshold; a pair counts as often as it was recorded"]
    shares = f"{score['precision']:.1%} precision, {score['recall']:.1%} recall"
    lines.append(f"  {score['pairs']:,} pairs, {score['true_share']:.1%} truly match: {shares}")
    lines += ["", "The matching head on its training pairs, last epoch"]
    for name, (positive, negative) in results["matching"].items():
        lines.append(f"  {name:10s} right on {positive:6.1%} of pairs labelled positive, {negative:6.1%} of those labelled negative")
    for split, meaning in SPLITS.items():
        images, texts = results["queries"][split]
        lines += ["", f"Retrieval, {meaning}: {images:,} images, {texts:,} texts (per cent ± half of the 95 % bootstrap interval)"]
        lines.append(f"  {'model':7s} {'ranked by':9s} " + " ".join(f"{head:>12s}" for head in COLUMNS.values()))
        for name, by_split in results["retrieval"].items():
            for values, halves in zip(by_score(by_split[split]), by_score(_halves(by_split[split])), strict=True):
                cells = " ".join(f"{_with_half(values[m], halves.get(m)):>12s}" for m in COLUMNS)
                lines.append(f"  {name:7s} {values.get('rank_by', '-'):9s} {cells}")
        lines += [f"  {sentence}." for sentence in _sentences(results, split)]
    return "\n".join(lines)


def _halves(values: dict[str, Any]) -> dict[str, Any]:
    halves = {name.removeprefix("half_"): value for name, value in values.items() if name.startswith("half_")}
    return halves | {"rank_by": values.get("rank_by")}


def _with_half(value: float, half: float | None) -> str:
    return f"{value:.1f}" if half is None else f"{value:.1f} ± {half:.1f}"


def _sentences(results: dict[str, Any], split: str) -> list[str]:
    """MAFA against each other run, in words."""
    return [
        Comparison(**found).sentence("MAFA", "its start" if other == "start" else other if other == "GRIT" else f"{other} batches")
        for other, sides in results["compared"][split].items()
        for found in sides.values()
    ]


def write_report(folder: Path, results: dict[str, Any], runs: dict[str, Path], about: dict[str, str]) -> Path:
    """Write ``results.json``, ``curves.png`` and ``report.html`` into ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps({**results, "about": about}, indent=2))
    start, *compared = (replace(run, name=name) for run, name in zip(open_runs([*runs.values()]), runs, strict=True))
    write_bytes(folder / "curves.png", curves.training_curves({run.name: run.metrics for run in compared}))
    shown = [replace(start, metrics=[]), *compared]  # of the start its retrieval alone
    words = {f"{split}: {meaning}": _sentences(results, split) for split, meaning in SPLITS.items()}
    own = {"tables": _tables(results), "queries": results["queries"], "meaning": SPLITS, "words": words, "about": about}
    page, _ = report_page(shown, AT_MOST, "quickstart.html", **own)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _tables(results: dict[str, Any]) -> dict[str, Table]:
    """The page's own tables, by the names its template has for them."""
    batches = [
        [name, f"{c['per_batch']:.1f}", number(c["share"], True), number(results["chosen_false_negatives"][name], True)]
        for name, c in results["batches"].items()
    ]
    score = results["con_d"]
    con_d = [f"{score['pairs']:,}", *(number(score[key], True) for key in ("true_share", "precision", "recall"))]
    matching = [[name, *(number(side, True) for side in sides)] for name, sides in results["matching"].items()]
    head = ["batches", "false pairs a batch", "of all pairs", "of the negatives that ITM is given"]
    sides = ["run", "right on pairs labelled positive", "right on pairs labelled negative"]
    return {
        "batches": Table(head, batches, "Known: a caption matches every scene that has all it names"),
        "con_d": Table(["pairs", "truly match", "precision", "recall"], [con_d], "Every recorded sighting of a pair, at the threshold"),
        "matching": Table(sides, matching, "Share of pairs"),
    }
