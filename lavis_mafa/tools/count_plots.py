"""A count of false negatives as plots (MAFA Figures 2 and 5), one PNG of all or SVG for a page; all take what ``count.json`` holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lavis_mafa.tools.count import SIDES, capital, median_words
from lavis_mafa.tools.curves import PAGE, PRINT, Palette, Plot, as_png, as_svg, finish, percentages

FEW = 20  # pairs of a bin; the share of fewer says little
MARKERS = "osD^vP"
WORDS = {"image": "of images (w.r.t. image)", "text": "of texts (w.r.t. text)"}
Ways = list[dict[str, Any]]


def count_plot(results: dict[str, Any]) -> bytes:
    """PNG: shares of false negatives and, where the truth is known, the judge's calibration with the number of pairs in each bin.

    Bars where there is one B, else lines over B, and over M where there are several.
    """
    ways = results["ways"]
    panels = _panels(ways)
    truth = "truth" in ways[0]
    figure = Figure(figsize=(4.8 * (len(panels) + truth), 3.9), layout="constrained", dpi=110)
    with PRINT.style():
        rows: Any = [[*panels, *([last] if truth else [])] for last in ("calibration", "pairs")]
        axes = figure.subplot_mosaic(rows, height_ratios=(3, 1))
        for name, draw in panels.items():
            draw(axes[name], ways, PRINT)
        if truth:
            _calibration(axes["calibration"], axes["pairs"], results, PRINT)
        meaningless = results["meaningless"]
        said = f"MEANINGLESS: {meaningless}" if meaningless else median_words(results)
        figure.suptitle(said, fontsize=8, color="#c00000" if meaningless else PRINT.ink)
        return as_png(figure)


def count_plots(results: dict[str, Any], number: int) -> list[Plot]:
    """The same for a page, a plot each; ``number`` tells them from those of another count."""
    ways = results["ways"]
    shares = "; ".join(
        f"{_way(row)}, B = {row['batch_size']:,}: " + ", ".join(f"{_percent(row, side):.1f} % {WORDS[side]}" for side in SIDES)
        for row in ways
    )
    plots: list[Plot] = []
    for title, draw in _panels(ways).items():
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        with PAGE.style():
            draw(figure.subplots(), ways, PAGE)
        plots.append(Plot(title, f"{title}: {shares}.", as_svg(figure, f"count-{number}-{len(plots)}")))
    if "truth" in ways[0]:
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        with PAGE.style():
            above, below = figure.subplots(2, height_ratios=(3, 1))
            _calibration(above, below, results, PAGE)
        title, errors = "Does it match as often as the judge says?", "; ".join(_error(row) for row in ways)
        note = f"On the grey line the judge is right. Hollow: fewer than {FEW} pairs, which say little."
        plots.append(Plot(title, f"Calibration error: {errors}.", as_svg(figure, f"calibration-{number}"), note))
    return plots


def _panels(ways: Ways) -> dict[str, Callable[[Axes, Ways, Palette], None]]:
    if len({row["batch_size"] for row in ways}) == 1:
        return {"False negatives among the hardest negatives": _bars}
    panels: dict[str, Callable[[Axes, Ways, Palette], None]] = {"False negatives over the batch size": _over_batch_size}
    if len({row["search_space"] for row in ways} - {None}) > 1:
        panels["False negatives over the search space"] = _over_search_space
    return panels


def _bars(axis: Axes, ways: Ways, palette: Palette) -> None:
    colours = _colours(ways, palette)
    for place, row in enumerate(ways):
        for side, shift, alpha in zip(SIDES, (-0.2, 0.2), (0.9, 0.45), strict=True):
            percent = _percent(row, side)
            axis.bar(place + shift, percent, width=0.37, color=colours[row["search_space"]], alpha=alpha, linewidth=0)
            at: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
            axis.annotate(f"{percent:.1f} %", (place + shift, percent), **at)
    for side, alpha in zip(SIDES, (0.9, 0.45), strict=True):
        axis.bar(0, 0, color=palette.ink, alpha=alpha, label=WORDS[side])
    top = max(_percent(row, side) for row in ways for side in SIDES)
    _finish(axis, f"batches of B = {ways[0]['batch_size']:,}", top, palette)
    axis.set_xlim(-0.6, len(ways) - 0.4)
    axis.set_xticks(range(len(ways)), [_way(row) for row in ways])


def _over_batch_size(axis: Axes, ways: Ways, palette: Palette) -> None:
    for space, colour in _colours(ways, palette).items():
        rows = sorted((row for row in ways if row["search_space"] == space), key=lambda row: row["batch_size"])
        _lines(axis, rows, "batch_size", colour, _way(rows[0]))
    _sides(axis, palette)
    _finish_over(axis, ways, "batch_size", "batch size B", palette)


def _over_search_space(axis: Axes, ways: Ways, palette: Palette) -> None:
    """A line a batch size; random batches, which have no M, are level lines."""
    used = len(_colours(ways, palette))
    spaces = sorted({row["search_space"] for row in ways} - {None})
    for number, size in enumerate(sorted({row["batch_size"] for row in ways})):
        colour = palette.lines[(used + number) % len(palette.lines)]
        rows = [row for row in ways if row["batch_size"] == size]
        grouped = sorted((row for row in rows if row["search_space"] is not None), key=lambda row: row["search_space"])
        _lines(axis, grouped, "search_space", colour, f"B = {size:,}")
        for row in (row for row in rows if row["search_space"] is None):
            level = sum(_percent(row, side) for side in SIDES) / len(SIDES)
            axis.plot([spaces[0], spaces[-1]], [level, level], color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
    axis.plot([], [], color=palette.ink, linewidth=1.2, linestyle=(0, (1, 2)), label="random batches")
    _sides(axis, palette)
    _finish_over(axis, ways, "search_space", "search space M of GRIT", palette)


def _lines(axis: Axes, rows: Ways, over: str, colour: str, label: str) -> None:
    """Solid and filled of images, dashed and hollow of texts."""
    for side, style, filled in zip(SIDES, ("-", "--"), (True, False), strict=True):
        points = [(row[over], _percent(row, side)) for row in rows]
        face = colour if filled else "none"
        line: dict[str, Any] = {
            "marker": "o",
            "markersize": 5,
            "color": colour,
            "markerfacecolor": face,
            "linewidth": 1.6,
            "clip_on": False,
        }
        axis.plot(*zip(*points, strict=True), style, label=label if filled else None, **line)


def _sides(axis: Axes, palette: Palette) -> None:
    """What solid and dashed lines are, for the legend."""
    for side, style, face in zip(SIDES, ("-", "--"), (palette.ink, "none"), strict=True):
        axis.plot([], [], style, marker="o", markersize=5, color=palette.ink, markerfacecolor=face, label=WORDS[side])


def _finish_over(axis: Axes, ways: Ways, over: str, label: str, palette: Palette) -> None:
    ticks = sorted({row[over] for row in ways} - {None})
    _finish(axis, label, max(_percent(row, side) for row in ways for side in SIDES), palette)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.margins(x=0.08)


def _finish(axis: Axes, label: str, top: float, palette: Palette) -> None:
    finish(axis, label, palette.grid)
    axis.set_ylabel("hardest negatives that are false")
    axis.set_ylim(0, max(1.0, 1.12 * top))
    percentages(axis, 100)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=2.4)


def _calibration(axis: Axes, below: Axes, results: dict[str, Any], palette: Palette) -> None:
    """Bins of probability against what truly matches; below it the number of pairs in each."""
    ways = results["ways"]
    colours, sizes = _colours(ways, palette), sorted({row["batch_size"] for row in ways})
    axis.plot([0, 1], [0, 1], color=palette.ink, linewidth=0.8, alpha=0.5)
    for number, row in enumerate(ways):
        colour, marker = colours[row["search_space"]], MARKERS[sizes.index(row["batch_size"]) % len(MARKERS)]
        bins = [b for b in row["truth"]["calibration"] if b["pairs"]]
        label = _way(row) + (f", B = {row['batch_size']:,}" if len(sizes) > 1 else "")
        for kept, style, face, name in (([b for b in bins if b["pairs"] >= FEW], "-", colour, label), (bins, "none", "none", None)):
            xs, ys = [b["mean_probability"] for b in kept], [b["true_share"] for b in kept]
            line: dict[str, Any] = {"ls": style, "linewidth": 1.5, "color": colour, "label": name, "clip_on": False}
            axis.plot(xs, ys, marker=marker, markersize=4.5, markerfacecolor=face, **line)
        every = row["truth"]["calibration"]
        width = 1 / len(every)
        places = [b["from"] + width * (0.1 + 0.8 * number / len(ways)) for b in every]
        below.bar(places, [b["pairs"] for b in every], width=0.8 * width / len(ways), align="edge", color=colour, linewidth=0)
    finish(axis, "", palette.grid)
    axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.05), ylabel="share that truly matches")
    axis.tick_params(labelbottom=False)
    percentages(axis, 1)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    kind = "match probability" if results["margin"] is None else "cosine"
    finish(below, f"{capital(results['judge'])}'s {kind}", palette.grid)
    below.set(yscale="log", xlim=(-0.02, 1.02), ylabel="pairs")
    below.set_ylim(bottom=0.8)
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    below.minorticks_off()


def _colours(ways: Ways, palette: Palette) -> dict[int | None, str]:
    """Random batches' and that of each M."""
    spaces = dict.fromkeys(row["search_space"] for row in ways)
    return {space: palette.lines[number % len(palette.lines)] for number, space in enumerate(spaces)}


def _way(row: dict[str, Any]) -> str:
    return row["sampling"] if row["search_space"] is None else f"{row['sampling']}, M = {row['search_space']:,}"


def _percent(row: dict[str, Any], side: str) -> float:
    return 100 * (row["false_negatives"][0][f"wrt_{side}_share"] or 0.0)


def _error(row: dict[str, Any]) -> str:
    error = row["truth"]["calibration_error"]
    return f"{_way(row)}, B = {row['batch_size']:,}: {'unknown' if error is None else f'{error:.3f}'}"
