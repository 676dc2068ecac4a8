"""What a mining pass found, as JSON and as tables for the terminal: quartiles of scores, and what was skipped and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from lavis_mafa.analysis.connections.choosing import OUTCOMES
from lavis_mafa.analysis.connections.counting import reason_of
from lavis_mafa.analysis.connections.pairs_file import own_scores
from lavis_mafa.analysis.connections.tally import ratio
from lavis_mafa.datasets.formats import pc
from lavis_mafa.models.sanity import Medians

QUARTILES = ("minimum", "25 %", "median", "75 %", "maximum")


def mine_results(
    judged: pa.Table,
    outcome: np.ndarray,
    image_keys: np.ndarray,
    bad: list[dict[str, Any]],
    truth: Any,
    concepts: Tensor | None,
    threshold: float,
) -> dict[str, Any]:
    """Every figure of the tables, ready for JSON.

    Args:
        judged: as ``mining.judged`` writes it, R rows.
        outcome: [R], see ``choosing.choose``.
        image_keys: [N] of the data.
        bad: samples that could not be read.
        truth: the data's ``GroundTruth``, or None.
        concepts: [N] by it.
        threshold: of what was mined.
    """
    mined = np.flatnonzero(outcome == 0)
    probability = judged["probability"].to_numpy()
    own = own_scores(judged, len(image_keys)).drop_null().to_numpy()
    shuffled = judged["shuffled_probability"].to_numpy()
    scores = {"own pairs": own, "shuffled pairs": shuffled, "candidates": probability, "mined": probability[mined]}
    medians = medians_of(judged, len(image_keys), threshold, truth, concepts)
    new = judged.take(mined)
    results: dict[str, Any] = {
        "mined": len(mined),
        "images_with_new_captions": len(np.unique(image_keys[new["image"].to_numpy()])),
        "samples": judged.num_rows // 2,
        "unreadable": dict(Counter(map(reason_of, bad))),
        "outcomes": {name: int((outcome == number).sum()) for number, name in enumerate(OUTCOMES)},
        "scores": {name: quartiles(of) for name, of in scores.items()},
        "medians": medians.as_json(),
        "meaningless": medians.why_not(),
        "doubt": medians.doubt(),
    }
    if truth is not None and concepts is not None:
        pairs = concepts[new["image"].to_numpy().copy()], truth.texts.find_all(new["caption"])
        results["mined_truly_match"] = ratio(int(truth.matches(*pairs).sum()), int(truth.knows(*pairs).sum()))
    return results


def medians_of(judged: pa.Table, count: int, threshold: float, truth: Any = None, concepts: Tensor | None = None) -> Medians:
    """What Con-D says of own pairs, shuffled ones and candidates, of whatever was judged so far of N = ``count`` samples."""
    lift = None
    if truth is not None and concepts is not None:
        there = judged.filter(pc.and_(pc.greater_equal(judged["image"], 0), pc.greater_equal(judged["text"], 0)))
        pairs = concepts[there["image"].to_numpy().copy()], truth.texts.find_all(there["caption"])
        known = truth.knows(*pairs).numpy()  # of the others nobody says whether they match
        true, above = truth.matches(*pairs).numpy()[known], (there["probability"].to_numpy() > threshold)[known]
        lift = ratio(ratio(int(true[above].sum()), int(above.sum())) or 0.0, ratio(int(true.sum()), len(true)) or 0.0)
    own = own_scores(judged, count).drop_null().to_numpy()
    columns = own, judged["shuffled_probability"].to_numpy(), judged["probability"].to_numpy()
    first, second, third = (None if np.isnan(c).all() else float(np.nanmedian(c)) for c in columns)
    return Medians(first, second, third, lift)


def quartiles(scores: np.ndarray) -> dict[str, float | int | None]:
    """Count and five figures of what is no NaN."""
    scores = scores[~np.isnan(scores)]
    figures = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(scores) else [None] * 5
    return {"pairs": len(scores), **dict(zip(QUARTILES, figures, strict=True))}


def format_mined(results: dict[str, Any]) -> str:
    """The tables for a terminal of 100 columns."""
    settings = results["settings"]
    rules = f"p > {settings['threshold']:g}"
    rules += f", at least {settings['margin']:g} of the own pair's" if settings["margin"] else ""
    rules += f", at most {settings['per_image']} an image" if settings["per_image"] is not None else ""
    rules += f", at most {settings['at_most']:,}" if settings.get("at_most") is not None else ""
    images = f"{results['images_with_new_captions']:,} images"
    lines = [f"{results['mined']:,} new pairs for {images}, from {results['samples']:,} pairs ({rules})"]
    if results["meaningless"]:
        lines = [f"MEANINGLESS, since {results['meaningless']}: this Con-D cannot judge these data.", *lines]
    if results["doubt"]:
        lines.append(results["doubt"])
    if not results["mined"]:
        lines.append("Nothing was mined: pairs.parquet holds the original pairs alone.")
    if results.get("mined_truly_match") is not None:
        lines.append(f"By the known truth {results['mined_truly_match']:.1%} of them match.")
    lines += ["", f"  {'Con-D':34s} {'pairs':>10s} " + " ".join(f"{name:>8s}" for name in QUARTILES)]
    for name, row in results["scores"].items():
        figures = " ".join("       -" if row[q] is None else f"{row[q]:8.3f}" for q in QUARTILES)
        lines.append(f"  {name:34s} {row['pairs']:10,d} {figures}")
    lines += ["", f"  {'what became of the candidates':34s} {'pairs':>10s} {'share':>8s}"]
    total = sum(results["outcomes"].values())
    for name, number in results["outcomes"].items():
        if number or name == OUTCOMES[0]:
            lines.append(f"  {name:34s} {number:10,d} {number / max(total, 1):8.1%}")
    for reason, number in results["unreadable"].items():
        lines.append(f"  {'unreadable sample: ' + reason:34s} {number:10,d}")
    return "\n".join(lines)
