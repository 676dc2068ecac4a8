"""What comes out of an ablation: each row's seeds, their mean and how sure it is, beside the paper's numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis_mafa.files import write_bytes, write_text
from lavis_mafa.tools.ablate import SHARES, Metrics, Table, Trial
from lavis_mafa.tools.significance import over_seeds, p_text, paired_over_seeds

BENCHMARKS = {"coco": "COCO's 5K test split", "flickr": "Flickr30K's 1K test split"}
SHOWN = {"tr_r1": "TR R@1", "ir_r1": "IR R@1", "agg_metrics": "mean recall"}
MANY = {"tr_r_precision": "TR R-P", "ir_r_precision": "IR R-P", "tr_map_at_r": "TR mAP@R", "ir_map_at_r": "IR mAP@R"}  # of many matches
MEANS = {"tr_mean": "TR mean", "ir_mean": "IR mean"}  # of R@1, 5, 10, where a paper has nothing else
NAMES = SHOWN | MANY | MEANS
PAPER = (
    "The paper's numbers are for {}, fine-tuned after pre-training on 4M pairs or more: "
    "compare the order of the rows with them, not the numbers."
)
SURE = 3  # seeds from which on a table has intervals and tests


def collect(
    table: Table, benchmark: str, base: str, options: list[str], trials: list[Trial], many_matches: bool = False
) -> dict[str, Any]:
    """Everything that is known of a table's rows so far, as it goes into ``results.json``.

    Of each row: the options, the metrics of the paper's ``benchmark``, those of each seed and split, over seeds their ``mean``,
    ``spread`` (the standard deviation of a sample) and ``half`` of the mean's 95 % interval, both None for one seed; and, ``against``
    the first and the last row that are scored, the paired differences over the seeds of both.

    Args:
        trials: every row with every seed, finished or not.
        many_matches: a query of this base matches much, so that R-Precision and mAP@R are shown too.
    """
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        own = [trial for trial in trials if trial.row == row]
        if trials and not own:
            continue  # a row that this base cannot have
        done = [(trial, metrics) for trial in own if (metrics := trial.metrics()) is not None]
        found = [metrics for _, metrics in done]
        paper = row.paper.get(benchmark, {})
        if len(paper) == 6:  # R@1, 5 and 10 both ways
            paper = {**paper, "agg_metrics": round(statistics.mean(paper.values()), 1)}
        rows.append(
            {
                "number": row.number,
                "name": row.name,
                "options": own[0].runs[0].options[len(options) : -1] if own else row.options,  # without the base's and the seed
                "paper": paper,
                "seeds": {str(t.seed): {"folder": str(t.runs[-1].finished()), **metrics} for t, metrics in done},
                "shares": {str(trial.seed): shares for trial in own if (shares := trial.shares())},
                "search_space": own[0].runs[0].search_space if own else None,
                "mean": _over_seeds(found, statistics.mean),
                "spread": _over_seeds(found, lambda values: statistics.stdev(values) if len(values) > 1 else None),
                "half": _over_seeds(found, over_seeds),
            }
        )
    scored = [row for row in rows if row["seeds"]]
    for one in scored:
        one["against"] = {str(other["number"]): _paired(one, other) for other in (scored[0], scored[-1]) if other is not one}
    about = {"table": table.key, "title": table.title, "benchmark": benchmark, "base": base, "options": options}
    about["shown"] = [*SHOWN, *(MANY if many_matches else [])]
    return {**about, "note": PAPER.format(BENCHMARKS[benchmark]), "rows": rows}


def _over_seeds(seeds: list[Metrics], statistic: Callable[[list[float]], Any]) -> dict[str, dict[str, Any]]:
    """A statistic of each metric that all seeds have of a split."""
    result = {}
    for split in dict.fromkeys(split for metrics in seeds for split in metrics):
        values = [metrics[split] for metrics in seeds if split in metrics]
        result[split] = {name: statistic([v[name] for v in values]) for name in values[0] if all(name in v for v in values)}
    return result


def _paired(row: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split -> metric -> the difference of two rows over the seeds that both have; nothing where that is one seed."""
    seeds = [(own, other["seeds"][seed]) for seed, own in row["seeds"].items() if seed in other["seeds"]]
    result: dict[str, dict[str, Any]] = {}
    for split in row["mean"]:
        values = [(a[split], b[split]) for a, b in seeds if split in a and split in b]
        if len(values) > 1:
            names = [name for name in values[0][0] if all(name in of for pair in values for of in pair)]
            result[split] = {name: paired_over_seeds([a[name] for a, _ in values], [b[name] for _, b in values]) for name in names}
    return result


def format_terminal(results: dict[str, Any]) -> str:
    """The tables with aligned columns, for each split that was scored."""
    lines = [results["title"]]
    for caption, cells in _tables(results):
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", caption]
        for line in cells:
            aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", results["note"]])


def format_markdown(results: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {results['title']}"]
    for caption, (header, *rows) in _tables(results):
        lines += ["", f"{caption}.", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
    changed = [f"Options of all rows: `{' '.join(results['options'])}`."] if results["options"] else []
    lines += ["", results["note"], *changed, "", "| row | options |", "|---|---|"]
    lines += [f"| {row['number']} | `{' '.join(row['options']) or 'none'}` |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def _tables(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(caption, lines of cells, the first one the header): for each split the metrics and, of enough seeds, the differences."""
    tables = []
    for split in dict.fromkeys(split for row in results["rows"] for split in row["mean"]):
        counts = [sum(split in metrics for metrics in row["seeds"].values()) for row in results["rows"]]
        sure = min(filter(None, counts)) >= SURE
        spread = "half of its 95 % interval (Student's t)" if sure else "standard deviation"
        caption = f"{split} split of {results['base']}: mean ± {spread} over seeds, per cent"
        tables.append((caption, _metrics(results, split, counts, "half" if sure else "spread")))
        if sure and len(differences := _differences(results, split)) > 1:
            tables.append(
                (f"{split}: differences over the same seeds ± half of their 95 % interval, p of a paired t-test", differences)
            )
    return tables


def _metrics(results: dict[str, Any], split: str, counts: list[int], spread: str) -> list[list[str]]:
    given = [m for m in SHOWN | MEANS if any(m in row["paper"] for row in results["rows"])]
    shown = [*results["shown"], *(m for m in MEANS if m in given)]
    lines = [["row", "", *(NAMES[m] for m in shown), "seeds", *(f"paper {NAMES[m]}" for m in given)]]
    for row, count in zip(results["rows"], counts, strict=True):
        mean, around = row["mean"].get(split, {}), row[spread].get(split, {})
        measured = [_cell(mean.get(m), around.get(m)) for m in shown]
        lines.append([str(row["number"]), row["name"], *measured, str(count), *(_cell(row["paper"].get(m)) for m in given)])
        if any(f"itc_{m}" in mean for m in shown):
            alone = [_cell(mean.get(f"itc_{m}"), around.get(f"itc_{m}")) for m in shown]
            lines.append(["", "  ranked by ITC alone", *alone, str(count), *("" for _ in given)])
    return lines


def _differences(results: dict[str, Any], split: str) -> list[list[str]]:
    """Each row minus the first and minus the last one, by R-Precision where it is shown, else by the mean recall."""
    shown = [m for m in ("tr_r_precision", "ir_r_precision") if m in results["shown"]] or ["agg_metrics"]
    scored = [row for row in results["rows"] if split in row["mean"]]
    others = list(dict.fromkeys(str(row["number"]) for row in (scored[0], scored[-1])))
    lines = [["row", "", *(f"{NAMES[m]} - row {other}" for other in others for m in shown)]]
    for row in scored:
        cells = [row["against"].get(other, {}).get(split, {}).get(m) for other in others for m in shown]
        if any(cells):
            lines.append([str(row["number"]), row["name"], *map(_difference, cells)])
    return lines


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    test = "" if found["p"] is None else f", {p_text(found['p'])}"
    return f"{found['difference']:+.1f} ± {found['half']:.1f}{test}"


def _cell(mean: float | None, spread: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def write_results(folder: Path, results: dict[str, Any], plotted: bool) -> None:
    """``results.json``, ``table.md`` and, of a table over the search space, ``figure.png`` in ``folder``, each replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.md", format_markdown(results))
    if plotted:
        from lavis_mafa.tools.curves import search_space_plot

        write_bytes(folder / "figure.png", search_space_plot(results["rows"], SHARES))
