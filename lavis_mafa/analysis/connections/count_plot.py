"""Shares of false negatives over B and over M (MAFA Figures 2 and 5), and Con-D's calibration, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

SIDES = {"wrt_image": "-", "wrt_text": "--"}


def count_plot(results: dict[str, Any]) -> bytes:
    """A panel for each of B and M that has several values (B alone if neither has), one more where the truth is known."""
    ways = results["ways"]
    panels = [name for name in ("batch_size", "search_space") if len({row[name] for row in ways} - {None}) > 1] or ["batch_size"]
    panels += ["truth"] if "truth" in ways[0] else []
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained", dpi=110)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel == "truth":
            _calibration(axis, ways)
        else:
            _shares(axis, ways, panel)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    medians = {name: "-" if value is None else f"{value:.3f}" for name, value in results["medians"].items()}
    hardest = [row["medians"]["hardest"] for row in ways if row["medians"]["hardest"] is not None]
    said = f"Con-D's median p: own pairs {medians['own']}, shuffled {medians['shuffled']}"
    said += f", hardest negatives {min(hardest):.3f} to {max(hardest):.3f}" if hardest else ""
    meaningless = results["meaningless"]
    figure.suptitle(f"MEANINGLESS: {meaningless}" if meaningless else said, fontsize=7, color="red" if meaningless else "black")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _shares(axis: Any, ways: list[dict[str, Any]], over: str) -> None:
    """One colour a line of settings; solid with respect to images, dashed to texts. Over M, random batches are level lines."""
    other = "search_space" if over == "batch_size" else "batch_size"
    lines = sorted({(row["sampling"], row[other]) for row in ways}, key=str)
    ticks = sorted({row[over] for row in ways} - {None})
    for colour, (sampling, fixed) in enumerate(lines):
        rows = [row for row in ways if (row["sampling"], row[other]) == (sampling, fixed)]
        for side, style in SIDES.items():
            points = sorted((row[over] or 0, 100 * (row["false_negatives"][0][side + "_share"] or 0.0)) for row in rows)
            level = over == "search_space" and sampling == "random"
            xs, ys = (ticks, points[:1] * len(ticks)) if level else ([x for x, _ in points], points)
            label = _label(sampling, other, fixed) if style == "-" else None
            marker = "" if level else "o"
            axis.plot(xs, [y for _, y in ys], style, marker=marker, markersize=3.5, color=f"C{colour}", label=label, linewidth=1.6)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch size B" if over == "batch_size" else "search space M", fontsize=8)
    axis.set_title("false negatives, % (dashed: w.r.t. text)", fontsize=10)


def _label(sampling: str, other: str, fixed: int | None) -> str:
    return sampling if fixed is None else f"{sampling}, {'M' if other == 'search_space' else 'B'} = {fixed:,}"


def _calibration(axis: Any, ways: list[dict[str, Any]]) -> None:
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for row in ways:
        points = [(b["mean_probability"], b["true_share"]) for b in row["truth"]["calibration"] if b["pairs"]]
        label = _label(row["sampling"], "search_space", row["search_space"]) + f", B = {row['batch_size']:,}"
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3.5, label=label, linewidth=1.6)
    axis.set_xlabel("Con-D's probability", fontsize=8)
    axis.set_title("share that truly matches", fontsize=10)
