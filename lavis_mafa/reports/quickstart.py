"""What the quickstart found: one table in the terminal, one JSON file, one HTML page that needs no network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.reports import curves
from lavis_mafa.reports.gallery import distinct_candidates, gallery_data
from lavis_mafa.reports.page import render, score_histogram, write_page
from lavis_mafa.reports.run_files import last_checkpoint, last_epoch, open_runs, read_connections, read_evaluations, read_metrics
from lavis_mafa.reports.tables import ITC, Table, by_score, evaluation_table, figure
from lavis_mafa.reports.training_rows import Part, TrainingRows
from lavis_mafa.reports.truth_check import batch_false_negatives, own_text_keys, score_con_d
from lavis_mafa.runners.checkpoint import rank_file
from lavis_mafa.weights import read_checkpoint

AT_MOST = 2000  # connections in the page
SPLITS = {"val": "new drawings of known concepts", "test": "unknown concepts"}
METRICS = ("tr_r1", "ir_r1", "tr_r_precision", "ir_r_precision", "tr_map_at_r", "ir_map_at_r", "agg_metrics")
SCORED = (*METRICS, "rank_by", *(f"{ITC}{name}" for name in METRICS))


def collect_results(start: Path, grit: Path, mafa: Path, datasets: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Every figure of the table, from the three runs' files and the data of all splits."""
    dataset = datasets["train"].datasets[0]
    keys = own_text_keys(dataset)
    generator = torch.Generator().manual_seed(0)
    orders = {"random": torch.randperm(len(dataset), generator=generator)}
    orders["GRIT"] = read_checkpoint(rank_file(last_checkpoint(grit), 0))["feed"]["sampler"]["order"]
    batches = {name: vars(batch_false_negatives(order, batch_size, dataset, keys)) for name, order in orders.items()}
    chosen = {"random": _mean(grit, "false_negative_share", grouped=False), "GRIT": _mean(grit, "false_negative_share", grouped=True)}
    connections = read_connections(mafa)
    scores = {
        "all texts": vars(score_con_d(connections, dataset, keys)),
        "names and aliases": vars(score_con_d(connections, dataset, keys, ("name", "alias"))),
    }
    retrieval = {
        name: {split: {m: values[m] for m in SCORED if m in values} for split, values in read_evaluations(run).items()}
        for name, run in (("start", start), ("GRIT", grit), ("MAFA", mafa))
    }
    sides = ("positive", "negative")
    ends = {name: last_epoch(read_metrics(run)) for name, run in (("GRIT", grit), ("MAFA", mafa))}
    matching = {name: [end[f"itm_accuracy_{side}"] for side in sides] for name, end in ends.items()}
    queries = {split: [len(datasets[split]), len(datasets[split].text)] for split in SPLITS}
    return {
        "batches": batches,
        "chosen_false_negatives": chosen,
        "con_d": scores,
        "matching": matching,
        "retrieval": retrieval,
        "queries": queries,
    }


def format_table(results: dict[str, Any]) -> str:
    """The results for a terminal of 100 columns."""
    lines = ["False negatives (known from the emoji's truth)"]
    lines.append(f"  {'batches':10s} {'pairs a batch':>14s} {'of all pairs':>13s} {'of hardest negatives':>21s}")
    for name, count in results["batches"].items():
        chosen = results["chosen_false_negatives"][name]
        lines.append(f"  {name:10s} {count['per_batch']:14.1f} {count['share']:12.1%} {chosen:20.1%}")
    lines += ["", "Con-D on the hardest negatives, at its threshold; a pair counts as often as it was recorded"]
    lines.append(f"  {'texts':20s} {'pairs':>8s} {'truly match':>12s} {'precision':>10s} {'recall':>8s}")
    for name, score in results["con_d"].items():
        lines.append(f"  {name:20s} {score['pairs']:8d} {score['true_share']:12.1%} {score['precision']:10.1%} {score['recall']:8.1%}")
    lines += ["", "The matching head on its training pairs, last epoch"]
    for name, (positive, negative) in results["matching"].items():
        lines.append(f"  {name:10s} right on {positive:6.1%} of pairs labelled positive, {negative:6.1%} of those labelled negative")
    for split, meaning in SPLITS.items():
        images, texts = results["queries"][split]
        lines += ["", f"Retrieval, {meaning}: {images} images, {texts} texts (per cent; a few points are noise)"]
        heads = ("TR R@1", "IR R@1", "TR R-P", "IR R-P", "TR mAP@R", "IR mAP@R", "mean R")
        lines.append(f"  {'model':7s} {'ranked by':9s} " + " ".join(f"{head:>8s}" for head in heads))
        for name, by_split in results["retrieval"].items():
            for values in by_score(by_split[split]):
                cells = " ".join(f"{values[m]:8.1f}" for m in METRICS)
                lines.append(f"  {name:7s} {values.get('rank_by', '-'):9s} {cells}")
    return "\n".join(lines)


def write_report(folder: Path, results: dict[str, Any], grit: Path, mafa: Path, dataset: Any, about: dict[str, str]) -> Path:
    """Write ``results.json``, ``curves.png`` and ``report.html`` into ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**results, "about": about}, indent=2))
    metrics = {"GRIT": read_metrics(grit), "MAFA": read_metrics(mafa)}
    (folder / "curves.png").write_bytes(curves.training_curves(metrics))
    run = replace(open_runs([mafa])[0], name="MAFA")
    rows = TrainingRows([Part(Path(dataset.vis_root), dataset.table, dataset.truth)])
    candidates = distinct_candidates(0, run.connections, rows)
    main, less = curves.curves(metrics)
    page = render(
        "quickstart.html",
        tables=_tables(results),
        about=about,
        legend=curves.legend(list(metrics)),
        curves=main,
        more_curves=less,
        histograms=[score_histogram(run, 0, candidates)],
        gallery=gallery_data([run], [rows], [candidates], AT_MOST),
    )
    write_page(folder / "report.html", page)
    return folder / "report.html"


def _tables(results: dict[str, Any]) -> dict[str, Any]:
    """The page's tables, by the names its template has for them."""
    batches = [
        [name, f"{c['per_batch']:.1f}", figure(c["share"], True), figure(results["chosen_false_negatives"][name], True)]
        for name, c in results["batches"].items()
    ]
    con_d = [
        [name, f"{s['pairs']:,}", *(figure(s[key], True) for key in ("true_share", "precision", "recall"))]
        for name, s in results["con_d"].items()
    ]
    matching = [[name, *(figure(side, True) for side in sides)] for name, sides in results["matching"].items()]
    head = ["batches", "false pairs a batch", "of all pairs", "of the hardest negatives"]
    return {
        "batches": Table(head, batches, "Known from the emoji's truth"),
        "con_d": Table(
            ["texts", "pairs", "truly match", "precision", "recall"], con_d, "Every recorded sighting of a pair, at the threshold"
        ),
        "matching": Table(["run", "right on pairs labelled positive", "right on pairs labelled negative"], matching, "Share of pairs"),
        "retrieval": [
            evaluation_table(
                "{}: {} images, {} texts".format(meaning[0].upper() + meaning[1:], *results["queries"][split]),
                list(METRICS),
                {name: by_split[split] for name, by_split in results["retrieval"].items()},
            )
            for split, meaning in SPLITS.items()
        ],
    }


def _mean(run: Path, name: str, grouped: bool) -> float:
    """Average over logged steps; epoch 0 is in random order, the others are grouped."""
    values = [r[name] for r in read_metrics(run) if name in r and (r["epoch"] > 0) == grouped]
    return sum(values) / len(values) if values else math.nan
