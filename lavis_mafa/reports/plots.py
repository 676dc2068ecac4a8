"""Plots of runs, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

PANELS = {
    "loss_itc": "ITC loss",
    "loss_itm": "ITM loss",
    "loss_mlm": "MLM loss",
    "false_negative_share": "false share of hardest negatives",
}


def training_curves(runs: dict[str, list[dict[str, Any]]]) -> bytes:
    """One panel a figure, one line a run, over samples seen."""
    figure = Figure(figsize=(12, 2.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(PANELS))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for run, records in runs.items():
            points = [(r["samples_seen"], r[name]) for r in records if name in r]
            axis.plot([x for x, _ in points], [y for _, y in points], label=run, linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("samples seen", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
