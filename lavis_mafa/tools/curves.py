"""Plots of runs: SVG that takes its colours from the page, and PNG for elsewhere."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

TITLES = {
    "loss": "Total loss",
    "loss_itc": "ITC loss",
    "loss_imc": "IMC loss: within images, within texts (TCL)",
    "loss_lmi": "LMI loss: wholes and their parts (TCL)",
    "loss_itm": "ITM loss",
    "loss_mlm": "MLM loss",
    "loss_lm": "LM loss",
    "false_negative_share": "False share of the hardest negatives",
    "new_positive_share": "New positives, share of the hardest negatives",
    "ambiguous_share": "Ambiguous, share of the hardest negatives",
    "con_d_precision": "Con-D's precision, every sighting",
    "con_d_recall": "Con-D's recall, every sighting",
    "itm_accuracy_positive": "Matching head, right on positives",
    "itm_accuracy_negative": "Matching head, right on negatives",
    "temperature": "Temperature",
    "learning_rate": "Learning rate",
    "samples_per_second": "Samples a second",
}
LESS_ASKED = ("itm_accuracy_positive", "itm_accuracy_negative", "temperature", "learning_rate", "samples_per_second")
SHARES = ("_share", "_precision", "_recall", "_positive", "_negative")
POINTS = 400  # a line has at most so many; more than a plot of this size can show
SERIES = 6
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# stand-ins that become CSS variables in an SVG, and the light page's colours for a PNG
INK, GRID, GOOD = "#010203", "#020304", "#030405"
LINES = [f"#0405{i:02x}" for i in range(SERIES)]
VARIABLES = {INK: "--ink-2", GRID: "--line", GOOD: "--good", **{c: f"--series-{i}" for i, c in enumerate(LINES)}}
COLOURS = ["#0b62a8", "#c2500a", "#00806b", "#a03a86", "#8a6d00", "#5b5bd6"]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Palette:
    """What a plot is drawn with: text, grid, and a colour for each series."""

    ink: str
    grid: str
    lines: list[str]

    def style(self) -> Any:
        """The settings of matplotlib to draw with it."""
        colours: Any = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), self.ink)
        sizes: Any = {"font.size": 9.0, "axes.labelsize": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5}
        return matplotlib.rc_context(
            {**colours, **sizes, "axes.edgecolor": self.grid, "legend.frameon": False, "text.parse_math": False}
        )


PAGE, PRINT = Palette(INK, GRID, LINES), Palette("#333333", "#dddddd", COLOURS)


@dataclass(frozen=True)
class Plot:
    """One plot of the page; ``summary`` says in words what a reader who does not see it has to know; ``note`` stands below it."""

    title: str
    summary: str
    svg: Markup
    note: str = ""


def curves(runs: dict[str, Records], notes: dict[str, str] | None = None) -> tuple[list[Plot], list[Plot]]:
    """One plot for each loss and share that some run logged; and those of the less asked metrics. ``notes`` of some metrics."""
    logged = {n for records in runs.values() for r in records for n, v in r.items() if isinstance(v, int | float)}
    names = [*(n for n in TITLES if n in logged), *sorted(n for n in logged - set(TITLES) if n.startswith("loss"))]
    first: list[Plot] = []
    less: list[Plot] = []
    for number, name in enumerate(names):
        lines = {run: _line(records, name) for run, records in runs.items()}
        figure = Figure(figsize=(4.0, 2.5), layout="constrained")
        with PAGE.style():
            _draw(figure.subplots(), name, lines, PAGE)
        ends = (f"{run} from {y[0]:.3g} to {y[-1]:.3g}" for run, (_, y) in lines.items() if len(y))
        summary = f"{_title(name)} over samples seen: {'; '.join(ends)}."
        plot = Plot(_title(name), summary, as_svg(figure, f"curve-{number}"), (notes or {}).get(name, ""))
        (less if name in LESS_ASKED else first).append(plot)
    return first, less


def score_histogram(
    run: str, number: int, scores: list[tuple[float, bool | None]], threshold: float, ambiguous: float, judge: str = "Con-D"
) -> Plot:
    """How a judge's scores are spread, with the thresholds of ``model.ecm``; stacked by truth where it is known.

    Args:
        run: its name. number: tells its plot from other runs' in the page.
        scores: of each pair the match probability and whether it truly matches.
    """
    values, known = np.array([p for p, _ in scores]), np.array([true is True for _, true in scores])
    marks = [(threshold, f"positive above {threshold:g}", threshold <= 0.7)]
    if ambiguous < threshold:
        marks.append((ambiguous, f"negative up to {ambiguous:g}", ambiguous < 0.3))
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    with PAGE.style():
        axis = figure.subplots()
        if ambiguous < threshold:
            axis.axvspan(ambiguous, threshold, color=INK, alpha=0.1, linewidth=0)
        draw_histogram(axis, values, known, np.linspace(0, 1, 51), marks)
        finish(axis, f"{judge}'s match probability")
        axis.set_xlim(0, 1)
    shares = f"{(values > threshold).mean():.1%} are above {threshold:g}, {(values <= ambiguous).mean():.1%} not above {ambiguous:g}"
    between = float(((values > ambiguous) & (values <= threshold)).mean())
    note = f"{between:.1%} of {len(values):,} pairs are ambiguous, in the shaded zone." if ambiguous < threshold else ""
    return Plot(run, f"{len(values)} scores: {shares}.", as_svg(figure, f"scores-{number}"), note)


def draw_histogram(axis: Axes, values: Any, known: Any, bins: Any, marks: list[tuple[float, str, bool]]) -> None:
    """[n] values in ``bins``, those that are ``known`` (bool [n]) to match apart, with dashed lines.

    Each mark has a place, what it means, and whether that stands to the right of it.
    """
    below, width = np.zeros(len(bins) - 1), 0.925 * (bins[1] - bins[0])
    parts = [(values[known], GOOD, 0.9), (values[~known], LINES[0], 0.55)] if known.any() else [(values, LINES[0], 0.75)]
    for part, colour, alpha in parts:
        count, _ = np.histogram(part, bins)
        axis.bar(bins[:-1], count, width=width, align="edge", bottom=below, color=colour, alpha=alpha, linewidth=0)
        below += count
    axis.set_ylim(0, max(float(below.max()), 1.0) * 1.22)
    axis.set_ylabel("pairs")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for line, (place, words, to_the_right) in enumerate(marks):
        axis.axvline(place, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        where: dict[str, Any] = {"xy": (place, 0.99 - 0.11 * line), "xytext": (4 if to_the_right else -4, 0)}
        coordinates: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axis.annotate(words, **where, **coordinates, va="top", ha="left" if to_the_right else "right", color=INK)


def training_curves(runs: dict[str, Records]) -> bytes:
    """The main curves side by side, as PNG: one panel a metric, one line a run, over samples seen."""
    names = ("loss_itc", "loss_itm", "loss_mlm", "false_negative_share")
    figure = Figure(figsize=(12, 2.8), layout="constrained", dpi=110)
    with PRINT.style():
        axes = figure.subplots(1, len(names))
        for axis, name in zip(axes, names, strict=True):
            _draw(axis, name, {run: _line(records, name) for run, records in runs.items()}, PRINT)
            axis.set_title(_title(name), fontsize=10)
        axes[0].legend(list(runs))
        return as_png(figure)


def search_space_plot(rows: list[dict[str, Any]], shares: dict[str, str]) -> bytes:
    """MAFA's Figure 2 as PNG, over the search space M: mean recall (solid, left axis) and false negatives (dashed, right axis).

    Args:
        rows: of an ablation's results; one colour a method, which is a row's name up to its comma.
        shares: metrics of false negatives with their labels. The first that is known is drawn: the truth's, else that of new
            positives, which rows without Con-D have not.
    """
    figure = Figure(figsize=(5.4, 3.6), layout="constrained", dpi=110)
    left = figure.subplots()
    right = left.twinx()
    split = next((split for row in rows for split in row["mean"]), None)
    share = next((share for share in shares if any(share in of for row in rows for of in row["shares"].values())), None)
    for colour, method in enumerate(dict.fromkeys(row["name"].split(",")[0] for row in rows)):
        recall, false = {}, {}
        for row in rows:
            space = row["search_space"]
            if space is None or row["name"].split(",")[0] != method:
                continue
            if split in row["mean"]:
                recall[space] = row["mean"][split].get("agg_metrics")
            if known := [of[share] for of in row["shares"].values() if share in of]:
                false[space] = 100 * mean(known)
        for axis, values, style, label in ((left, recall, "-", method), (right, false, "--", None)):
            x = sorted(values)
            axis.plot(x, [values[m] for m in x], style, marker="o", markersize=4, color=f"C{colour}", label=label)
    ticks = sorted({row["search_space"] for row in rows} - {None})
    left.set(xscale="log", xlabel="search space M", ylabel=f"mean recall, {split}" if split else "mean recall")
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.minorticks_off()
    right.set_ylabel(f"{shares[share]}, % (dashed)" if share else "")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    return as_png(figure)


def legend(runs: list[str]) -> list[dict[str, str]]:
    """The same colours and dashes in the page's own words: (name, CSS colour, SVG dash array)."""
    arrays = [" ".join(str(2 * v) for v in d[1]) if isinstance(d, tuple) else "" for d in DASHES]
    return [
        {"name": run, "colour": f"var(--series-{i % SERIES})", "dashes": arrays[i % len(DASHES)] if len(runs) > 1 else ""}
        for i, run in enumerate(runs)
    ]


def as_svg(figure: Figure, prefix: str) -> Markup:
    """The figure as inline SVG: colours are the page's variables, the text is text, and ids are this plot's own.

    ``prefix`` becomes markup as it is, so it must not come from a file: matplotlib escapes what the figure shows, not this.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{prefix}-", svg)
    svg = svg.replace("xlink:href", "href")
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", "\n", svg))


def as_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def percentages(axis: Axes, whole: float) -> None:
    """The y axis from 0, in per cent of ``whole``."""
    axis.set_ylim(0, max(0.01 * whole, axis.get_ylim()[1]))
    ticks = 100 / whole * np.asarray(axis.get_yticks())
    decimals = next((d for d in (0, 1) if np.allclose(ticks, ticks.round(d))), 2)
    axis.yaxis.set_major_formatter(PercentFormatter(whole, decimals=decimals, symbol=" %"))


def finish(axis: Axes, x: str, grid: str = GRID) -> None:
    """A label, level grid lines and no frame."""
    axis.set_xlabel(x)
    axis.grid(axis="y", color=grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(length=0)


def _draw(axis: Axes, name: str, lines: dict[str, tuple[Any, Any]], palette: Palette) -> None:
    for number, (run, (x, y)) in enumerate(lines.items()):
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) == 1 else {}
        dash = DASHES[number % len(DASHES)] if len(lines) > 1 else "solid"
        axis.plot(x, y, label=run, color=palette.lines[number % SERIES], linestyle=dash, linewidth=1.6, **dots)
    finish(axis, "samples seen", grid=palette.grid)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if name.endswith(SHARES):
        percentages(axis, 1)


def _line(records: Records, name: str) -> tuple[Any, Any]:
    """[n] samples seen and [n] values, averaged in stretches where there are more than a plot can show."""
    points = [(r["samples_seen"], r[name]) for r in records if "samples_seen" in r and isinstance(r.get(name), int | float)]
    points = [p for p in points if math.isfinite(p[1])]
    if len(points) > POINTS:
        parts = np.array_split(np.array(points, dtype=np.float64), POINTS)
        points = [tuple(part.mean(axis=0)) for part in parts]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _title(name: str) -> str:
    return TITLES.get(name, name.removeprefix("loss_").replace("_", " ") + " loss")
