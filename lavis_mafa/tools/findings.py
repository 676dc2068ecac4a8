"""What ``count-false-negatives`` and ``mine`` found, as sections of a page: what it comes to in words, tables and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from lavis_mafa.objectives.trust import UNHEARD_OF
from lavis_mafa.tools.count import SIDES, below, capital, median_words
from lavis_mafa.tools.count_plots import count_plots
from lavis_mafa.tools.curves import PAGE, Plot, as_svg, draw_histogram, finish
from lavis_mafa.tools.gallery import Candidate
from lavis_mafa.tools.mine import MINED, QUARTILES, review_lines, rules_words
from lavis_mafa.tools.render import Table, number

LITTLE = 0.01  # share of false negatives below which a Con-D finds little to do


@dataclass(frozen=True)
class Section:
    """One result on a page. ``problem``: why it is not to be trusted; ``words``: what it comes to, a sentence each."""

    name: str
    problem: str | None
    words: list[str]
    tables: list[Table]
    plots: list[Plot] = field(default_factory=list)


def _meaningless(results: dict[str, Any]) -> str | None:
    why, judge = results["meaningless"], results["judge"]
    other = "another one that was trained on such images and texts"
    return f"Meaningless, since {why}: {judge} cannot judge these data. Try {other}." if why else None


# --- of count-false-negatives -------------------------------------------------------------------------------------------


def count_section(name: str, results: dict[str, Any], place: int) -> Section:
    """A ``count.json``; ``place`` tells its plots from those of another count on the page."""
    ways, meaningless = results["ways"], results["meaningless"]
    doubt = next((row["doubt"] for row in reversed(ways) if row["doubt"]), None)
    problem = _meaningless(results) or doubt
    words = [_who_says(results), *([] if meaningless else _count_words(results)), f"{median_words(results)}."]
    words += [results["corrected_by"]] if results.get("corrected_by") else []
    lonely = max(max(row["without_negative"].values()) for row in ways)
    if lonely:
        words.append(f"Up to {lonely:,} anchors have no negative: their batch shows nothing but their own image, or them alone.")
    words += [f"Left out: {count:,} unreadable ({reason})." for reason, count in results["unreadable"].items()]
    return Section(name, problem, words, [_count_table(results), *_threshold_table(results)], count_plots(results, place))


def _who_says(results: dict[str, Any]) -> str:
    threshold, margin, judge = results["ways"][0]["false_negatives"][0]["threshold"], results["margin"], results["judge"]
    rule = f"p\u00a0>\u00a0{threshold:g} by {judge}" if margin is None else f"a cosine by {judge} above the own pair's{below(margin)}"
    corrected = f"; counts are times {results['correction']:g} (human correction)" if results["correction"] != 1.0 else ""
    who = f"the hardest negative of each of {results['samples']:,} images and texts in its batch"
    return f"Asked about: {who}; called false: {rule}{corrected}."


def _count_words(results: dict[str, Any]) -> list[str]:
    """Random batches against GRIT's, what that means for training, and how right the judge is where that is known."""
    ways = results["ways"]
    worst = max(ways, key=_mean_share)
    share, words = _mean_share(worst), []
    random = [row for row in ways if row["search_space"] is None and row["batch_size"] == worst["batch_size"]]
    if worst["search_space"] is not None and random and (before := _mean_share(random[0])):
        words.append(
            f"GRIT (B = {worst['batch_size']:,}, M = {worst['search_space']:,}) brings {share / before:.1f} times as many as random "
            f"batches: {share:.1%} of the hardest negatives against {before:.1%}."
        )
    if share > UNHEARD_OF:
        words.append("Above a third, which no paper counts (MAFA Table 9: at most 31.7 %): look before you believe it (mine).")
    elif share < LITTLE:
        words.append("Below 1 %: train with GRIT alone; a Con-D would find little to correct.")
    else:
        words.append("Enough for MAFA: its Con-D would take these out of the negatives while training.")
    if (truth := worst.get("truth")) is not None:
        at = truth["thresholds"][0]
        words.append(
            f"By the known truth {number(truth['true_share'], True)} of these do match; {results['judge']} finds "
            f"{number(at['recall'], True)} of them, and is right in {number(at['precision'], True)} of what it calls a match."
        )
    return words


def _mean_share(row: dict[str, Any]) -> float:
    return sum(row["false_negatives"][0][f"wrt_{side}_share"] or 0.0 for side in SIDES) / len(SIDES)


def _count_table(results: dict[str, Any]) -> Table:
    kind = "p" if results["margin"] is None else "cosine"
    head = [*WAY, "of images", "share", "of texts", "share", f"median {kind}"]
    truth = "truth" in results["ways"][0]
    head += ["truly false", "precision", "recall", "calibration error"] if truth else []
    rows = []
    for row in results["ways"]:
        first, cells = row["false_negatives"][0], _way(row)
        for side in SIDES:
            cells += [f"{first[f'wrt_{side}']:,.0f}", number(first[f"wrt_{side}_share"], True)]
        cells.append(number(row["medians"]["hardest"]))
        if truth:
            known, at = row["truth"], row["truth"]["thresholds"][0]
            cells += [number(known["true_share"], True), number(at["precision"], True), number(at["recall"], True)]
            cells.append(number(known["calibration_error"]))
        rows.append(cells)
    return Table(head, rows, "False negatives among the hardest negatives of images and of texts")


def _threshold_table(results: dict[str, Any]) -> list[Table]:
    """At the other thresholds, where there are some."""
    rows = []
    for row in results["ways"]:
        for place, counted in enumerate(row["false_negatives"]):
            cells = [*_way(row), f"{counted['threshold']:g}", *(number(counted[f"wrt_{side}_share"], True) for side in SIDES)]
            if "truth" in row:
                at = row["truth"]["thresholds"][place]
                cells += [number(at["precision"], True), number(at["recall"], True)]
            rows.append(cells)
    if len(rows) == len(results["ways"]):
        return []
    head = [*WAY, "threshold", "of images", "of texts", *(["precision", "recall"] if "truth" in results["ways"][0] else [])]
    return [Table(head, rows, "Shares at every threshold")]


WAY = ["sampling", "B", "M"]


def _way(row: dict[str, Any]) -> list[str]:
    return [row["sampling"], f"{row['batch_size']:,}", "–" if row["search_space"] is None else f"{row['search_space']:,}"]


# --- of mine ------------------------------------------------------------------------------------------------------------


def mine_section(name: str, results: dict[str, Any]) -> Section:
    """A ``mine.json``: what came out of it, the scores, and what became of all candidates."""
    mined, judge, meaningless = results["mined"], results["judge"], results["meaningless"]
    images = results["images_with_new_captions"]
    problem = _meaningless(results) or results["doubt"]
    words = [f"{mined:,} new pairs for {images:,} images, from {results['samples']:,} pairs ({rules_words(results)})."]
    if not mined:
        words.append("Nothing was mined: pairs.parquet holds the original pairs alone.")
    elif not meaningless:
        words.append(
            f"One for every {results['samples'] / mined:.1f} pairs. Look at the surest and at the least sure before you train."
        )
    if results.get("mined_truly_match") is not None:
        words.append(f"By the known truth {results['mined_truly_match']:.1%} of the new pairs match.")
    words += [] if results.get("reviewed") is None else review_lines(results["reviewed"])
    words += [f"Left out: {count:,} unreadable ({reason})." for reason, count in results["unreadable"].items()]
    scores = [[of, f"{row['pairs']:,}", *(number(row[q]) for q in QUARTILES)] for of, row in results["scores"].items()]
    total = max(sum(results["outcomes"].values()), 1)
    outcomes = [
        [outcome, f"{count:,}", f"{count / total:.1%}"] for outcome, count in results["outcomes"].items() if count or outcome == MINED
    ]
    kind = "match probability" if results["settings"]["guide_margin"] is None else "cosine"
    tables = [
        Table(["pairs of", "number", *QUARTILES], scores, f"{capital(judge)}'s {kind}"),
        Table(["what became of the candidates", "pairs", "share"], outcomes, "Of every image's and every text's hardest negative"),
    ]
    return Section(name, problem, words, tables)


def own_plot(name: str, results: dict[str, Any], connections: pa.Table, candidates: list[Candidate], place: int) -> Plot:
    """Found against own: the score of each candidate less that of its anchor's own pair, or its share of it where a margin is one.

    Args:
        connections: of a run of ``mine``. candidates: the same pairs, with what is known of them.
        place: tells the plot from others of the page.
    """
    settings, judge = results["settings"], capital(results["judge"])
    true = {(c.image, c.text) for c in candidates if c.true}
    pairs = zip(connections["image"].to_pylist(), connections["text"].to_pylist(), strict=True)
    found, own = (connections[column].to_numpy().astype(np.float64) for column in ("probability", "own_probability"))
    guide, margin = settings["guide_margin"], settings["margin"]
    if guide is None and margin:
        values, bins, label = found / np.maximum(own, 1e-9), np.linspace(0, 2, 51), "found / own pair's probability"
        marks = [(margin, f"at least {margin:g} of the own pair's", margin < 1)]
        words = f"{(values >= margin).mean():.1%} are at least {margin:g} of the own pair's"
    else:
        values = found - own
        reach = max(float(np.nanmax(np.abs(values), initial=0.0)), 0.05)
        limit = 0.0 if guide is None else -guide
        bins, label = np.linspace(-reach, reach, 51), f"found - own pair's {'probability' if guide is None else 'cosine'}"
        line = f"own pair's{below(guide or 0.0)}"
        marks = [(limit, line, limit < 0)]
        words = f"{(values > limit).mean():.1%} are above the {line}"
    there = np.isfinite(values)
    values, known = np.clip(values[there], bins[0], bins[-1]), np.array([pair in true for pair in pairs], dtype=bool)[there]
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    with PAGE.style():
        axis = figure.subplots()
        draw_histogram(axis, values, known, bins, marks)
        finish(axis, label)
        axis.set_xlim(bins[0], bins[-1])
    more = "" if bins[-1] != 2 else "; twice as much and more is in the last bar"
    return Plot(
        f"{name}: found against own pairs", f"{len(values):,} pairs.", as_svg(figure, f"own-{place}"), f"{judge}: {words}{more}."
    )
