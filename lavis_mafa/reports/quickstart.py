"""What the quickstart found: one table in the terminal, one JSON file, one HTML page that needs no network."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image

from lavis_mafa.common.weights import read_checkpoint
from lavis_mafa.reports.plots import training_curves
from lavis_mafa.reports.run_files import last_checkpoint, read_connections, read_evaluations, read_metrics
from lavis_mafa.reports.truth_check import batch_false_negatives, own_text_keys, score_con_d, true_matches
from lavis_mafa.runners.checkpoints import rank_file

TEMPLATES = Path(__file__).parent
SPLITS = {"val": "new drawings of known concepts", "test": "unknown concepts"}
METRICS = ("tr_r1", "ir_r1", "tr_r_precision", "ir_r_precision", "tr_map_at_r", "ir_map_at_r")


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
        name: {split: {m: values[m] for m in METRICS} for split, values in read_evaluations(run).items()}
        for name, run in (("start", start), ("GRIT", grit), ("MAFA", mafa))
    }
    sides = ("positive", "negative")
    matching = {name: [_last_epoch(run, f"itm_accuracy_{side}") for side in sides] for name, run in (("GRIT", grit), ("MAFA", mafa))}
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
    lines += ["", "Con-D on the hardest negatives, at its threshold"]
    lines.append(f"  {'texts':20s} {'pairs':>8s} {'truly match':>12s} {'precision':>10s} {'recall':>8s}")
    for name, score in results["con_d"].items():
        lines.append(f"  {name:20s} {score['pairs']:8d} {score['true_share']:12.1%} {score['precision']:10.1%} {score['recall']:8.1%}")
    lines += ["", "The matching head on its training pairs, last epoch"]
    for name, (positive, negative) in results["matching"].items():
        lines.append(f"  {name:10s} right on {positive:6.1%} of pairs labelled positive, {negative:6.1%} of those labelled negative")
    for split, meaning in SPLITS.items():
        images, texts = results["queries"][split]
        lines += ["", f"Retrieval, {meaning}: {images} images, {texts} texts (per cent; a few points are noise)"]
        lines.append(f"  {'model':15s} {'TR R@1':>8s} {'IR R@1':>8s} {'TR R-P':>8s} {'IR R-P':>8s} {'TR mAP@R':>9s} {'IR mAP@R':>9s}")
        for name, by_split in results["retrieval"].items():
            values = [by_split[split][m] for m in METRICS]
            widths = (8, 8, 8, 8, 9, 9)
            lines.append(f"  {name:15s} " + " ".join(f"{v:{w}.1f}" for v, w in zip(values, widths, strict=True)))
    return "\n".join(lines)


def write_report(folder: Path, results: dict[str, Any], grit: Path, mafa: Path, dataset: Any, about: dict[str, str]) -> Path:
    """Write ``results.json``, ``curves.png`` and ``report.html`` into ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**results, "about": about}, indent=2))
    curves = training_curves({"GRIT": read_metrics(grit), "MAFA": read_metrics(mafa)})
    (folder / "curves.png").write_bytes(curves)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("quickstart.html").render(
        results=results,
        splits=SPLITS,
        metrics=METRICS,
        about=about,
        curves=base64.b64encode(curves).decode(),
        galleries=galleries(read_connections(mafa), dataset),
    )
    (folder / "report.html").write_text(page)
    return folder / "report.html"


def galleries(connections: Any, dataset: Any, at_most: int = 12) -> dict[str, list[dict[str, Any]]]:
    """Mined connections to look at, as in the paper's Figures 7 and 8: the surest of both directions, each anchor once."""
    match = true_matches(connections, dataset, own_text_keys(dataset)).tolist()
    rows = [{**row, "true": true} for row, true in zip(connections.to_pylist(), match, strict=True)]
    rows = sorted((r for r in rows if r["verdict"] == "positive"), key=lambda r: -r["probability"])
    result: dict[str, list[dict[str, Any]]] = {"text for image": [], "image for text": []}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        anchor = row["image"] if row["direction"] == "text for image" else row["text"]
        own, new = dataset.captions(anchor)[0], dataset.captions(row["text"])[0]
        shown = (row["direction"], own)
        # two images with the very same caption say little to a reader
        if shown in seen or dataset.captions(row["image"])[0] == new or len(result[row["direction"]]) == at_most:
            continue
        seen.add(shown)
        result[row["direction"]].append(
            {
                "anchor_image": thumbnail(dataset.image_path(anchor)),
                "anchor_text": own,
                "new_image": thumbnail(dataset.image_path(row["image"])),
                "new_text": new,
                "probability": row["probability"],
                "true": row["true"],
            }
        )
    return result


def thumbnail(path: Path, size: int = 72) -> str:
    """An image as a data URL."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((size, size))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _last_epoch(run: Path, name: str) -> float:
    records = read_metrics(run)
    values = [r[name] for r in records if name in r and r["epoch"] == records[-1]["epoch"]]
    return sum(values) / len(values)


def _mean(run: Path, name: str, grouped: bool) -> float:
    """Average over logged steps; epoch 0 is in random order, the others are grouped."""
    values = [r[name] for r in read_metrics(run) if name in r and (r["epoch"] > 0) == grouped]
    return sum(values) / len(values) if values else math.nan
