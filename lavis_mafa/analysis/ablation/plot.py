"""MAFA's Figure 2: mean recall and the share of false negatives over the search space M, as PNG bytes."""

from __future__ import annotations

import io
import statistics
from typing import Any

from matplotlib.figure import Figure

SHARES = {"false_negative_share": "false negatives (known)", "new_positive_share": "false negatives (Con-D's)"}


def search_space_plot(results: dict[str, Any]) -> bytes:
    """One colour a method (a row's name up to its comma); solid: mean recall, left axis; dashed: false negatives, right axis.

    The share is that of the truth where the training data know one, else that of new positives, which rows without Con-D have not.
    """
    figure = Figure(figsize=(5.4, 3.6), layout="constrained", dpi=110)
    left = figure.subplots()
    right = left.twinx()
    split = next((split for row in results["rows"] for split in row["mean"]), None)
    methods = list(dict.fromkeys(row["name"].split(",")[0] for row in results["rows"]))
    name = next((share for share in SHARES if any(share in of for row in results["rows"] for of in row["shares"].values())), None)
    ticks: set[int] = set()
    for colour, method in enumerate(methods):
        recalls, shares = {}, {}
        for row in results["rows"]:
            if row["name"].split(",")[0] != method or row["search_space"] is None:
                continue
            ticks.add(row["search_space"])
            if split in row["mean"]:
                recalls[row["search_space"]] = row["mean"][split].get("agg_metrics")
            known = [of[name] for of in row["shares"].values() if name in of]
            if known:
                shares[row["search_space"]] = 100 * statistics.mean(known)
        for axis, values, style, label in ((left, recalls, "-", method), (right, shares, "--", None)):
            axis.plot(
                sorted(values), [values[x] for x in sorted(values)], style, marker="o", markersize=4, color=f"C{colour}", label=label
            )
    left.set_xscale("log")
    left.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    left.minorticks_off()
    left.set_xlabel("search space M")
    left.set_ylabel(f"mean recall, {split}" if split else "mean recall")
    right.set_ylabel(f"{SHARES[name]}, % (dashed)" if name else "")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
