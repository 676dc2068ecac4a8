"""An ablation's figures over its seeds, beside the paper's: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_mafa.analysis.ablation.runs import Figures, Trial
from lavis_mafa.analysis.ablation.tables import BENCHMARKS, Table
from lavis_mafa.reports.tables import ITC

ALONE = "  ranked by ITC alone"
SHOWN = {"tr_r1": "TR R@1", "ir_r1": "IR R@1", "agg_metrics": "mean recall"}
MEANS = {"tr_mean": "TR mean", "ir_mean": "IR mean"}  # of R@1, 5, 10, where a paper has nothing else
PAPER = (
    "The paper's figures are for {}, fine-tuned after pre-training on 4M pairs or more: "
    "compare the order of the rows with them, not the figures."
)


def collect(table: Table, benchmark: str, base: str, options: list[str], trials: Sequence[Trial]) -> dict[str, Any]:
    """Everything that is known of a table's rows so far, by row and seed.

    Args:
        table: whose rows.
        benchmark: whose figures of the paper.
        base: the YAML that was run. options: what it was run with. trials: every row with every seed, finished or not.

    Returns:
        per row the options, the paper's figures, those of each seed and split, and their ``mean`` and ``spread`` (the standard
        deviation of a sample, None for one seed).
    """
    rows = []
    for row in table.rows:
        own = [trial for trial in trials if trial.row == row]
        if trials and not own:
            continue  # a row that this base cannot have
        seeds = {trial.seed: (str(trial.runs[-1].finished()), figures) for trial in own if (figures := trial.figures()) is not None}
        mean, spread = _over_seeds([figures for _, figures in seeds.values()])
        rows.append(
            {
                "number": row.number,
                "name": row.name,
                "options": own[0].runs[0].options[len(options) : -1] if own else row.options,  # without the base's and the seed
                "paper": _with_mean_recall(row.paper.get(benchmark, {})),
                "seeds": {str(seed): {"folder": folder, **figures} for seed, (folder, figures) in seeds.items()},
                "shares": {str(trial.seed): shares for trial in own if (shares := trial.shares())},
                "search_space": own[0].runs[0].search_space if own else None,
                "mean": mean,
                "spread": spread,
            }
        )
    about = {"table": table.key, "title": table.title, "benchmark": benchmark, "base": base, "options": options}
    return {**about, "note": PAPER.format(BENCHMARKS[benchmark]), "rows": rows}


def format_terminal(results: dict[str, Any]) -> str:
    """The table with aligned columns, one for each split that was scored."""
    lines = [results["title"]]
    for split, header, rows in _tables(results):
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines += ["", f"{split} split of {results['base']}: mean ± standard deviation over seeds, per cent"]
        for cells in [header, *rows]:
            aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", results["note"]])


def format_markdown(results: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {results['title']}"]
    for split, header, rows in _tables(results):
        lines += ["", f"`{split}` split of `{results['base']}`: mean ± standard deviation over seeds, per cent.", ""]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(cells)} |" for cells in rows)]
    changed = f"Options of all rows: `{' '.join(results['options'])}`." if results["options"] else ""
    lines += ["", results["note"], *([changed] if changed else []), "", "| row | options |", "|---|---|"]
    lines += [f"| {row['number']} | `{' '.join(row['options']) or 'none'}` |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def write_results(folder: Path, results: dict[str, Any], plotted: bool = False) -> None:
    """``results.json``, ``table.md`` and, of a table over the search space, ``figure.png`` in ``folder``, each replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"results.json": (json.dumps(results, indent=2) + "\n").encode(), "table.md": format_markdown(results).encode()}
    if plotted:
        from lavis_mafa.analysis.ablation.plot import search_space_plot

        contents["figure.png"] = search_space_plot(results)
    for name, content in contents.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)


def _tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(split, header, rows of cells), for each split that any row was scored on."""
    splits = list(dict.fromkeys(split for row in results["rows"] for split in row["mean"]))
    names = SHOWN | MEANS
    given = [m for m in names if any(m in row["paper"] for row in results["rows"])]
    shown = [*SHOWN, *(m for m in MEANS if m in given)]
    header = ["row", "", *(names[m] for m in shown), "seeds", *(f"paper {names[m]}" for m in given)]
    tables = []
    for split in splits:
        rows = []
        for row in results["rows"]:
            count = sum(split in figures for figures in row["seeds"].values())
            mean, spread = row["mean"].get(split, {}), row["spread"].get(split, {})
            paper = [_cell(row["paper"].get(m), None) for m in given]
            measured = [_cell(mean.get(m), spread.get(m)) for m in shown]
            rows.append([str(row["number"]), row["name"], *measured, str(count), *paper])
            if any(f"{ITC}{m}" in mean for m in shown):
                measured = [_cell(mean.get(f"{ITC}{m}"), spread.get(f"{ITC}{m}")) for m in shown]
                rows.append(["", ALONE, *measured, str(count), *("" for _ in given)])
        tables.append((split, header, rows))
    return tables


def _cell(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def _with_mean_recall(paper: dict[str, float]) -> dict[str, float]:
    return paper if len(paper) < 6 else {**paper, "agg_metrics": round(statistics.mean(paper.values()), 1)}


def _over_seeds(seeds: list[Figures]) -> tuple[Figures, dict[str, dict[str, float | None]]]:
    mean: Figures = {}
    spread: dict[str, dict[str, float | None]] = {}
    for split in dict.fromkeys(s for figures in seeds for s in figures):
        values = [figures[split] for figures in seeds if split in figures]
        metrics = [m for m in values[0] if all(m in v for v in values)]
        mean[split] = {m: statistics.mean(v[m] for v in values) for m in metrics}
        spread[split] = {m: statistics.stdev(v[m] for v in values) if len(values) > 1 else None for m in metrics}
    return mean, spread
