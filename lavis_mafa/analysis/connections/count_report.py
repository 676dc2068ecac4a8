"""A count as JSON and as tables for the terminal, laid out like MAFA's Table 1."""

from __future__ import annotations

from typing import Any

from lavis_mafa.analysis.connections.counting import Count
from lavis_mafa.models.sanity import UNHEARD_OF


def count_results(count: Count, correction: float, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was counted, ready for JSON; the first threshold is the one of table and plot.

    Args:
        count: what was found.
        correction: share of Con-D's false negatives that are some by human judgement (0.83 in the paper); 1 for none.
        about: settings to write down.
    """
    rows = []
    for way, tally in count.tallies.items():
        row: dict[str, Any] = {"sampling": way.name, "batch_size": way.batch_size, "search_space": way.search_space}
        row["negatives"] = dict(zip(("wrt_image", "wrt_text"), tally.negatives.tolist(), strict=True))
        row["without_negative"] = dict(zip(("wrt_image", "wrt_text"), tally.lonely.tolist(), strict=True))
        row["false_negatives"] = tally.counts(correction)
        row["medians"] = count.medians(way).as_json()
        row["meaningless"], row["doubt"] = count.medians(way).why_not(), count.medians(way).doubt()
        if correction != 1.0:
            row["uncorrected"] = tally.counts()
        if count.truth_known:
            row["truth"] = tally.against_truth()
        rows.append(row)
    meaningless = next((row["meaningless"] for row in rows if row["meaningless"]), None)
    medians = {"own": count.own.median(), "shuffled": count.shuffled.median()}
    about = {**about, "correction": correction, "samples": count.samples, "unreadable": dict(count.unreadable)}
    return {**about, "medians": medians, "meaningless": meaningless, "ways": rows}


def format_count(results: dict[str, Any]) -> str:
    """The tables for a terminal of 100 columns."""
    threshold = results["ways"][0]["false_negatives"][0]["threshold"]
    corrected = f", times {results['correction']:g} (human correction)" if results["correction"] != 1.0 else ""
    lines = [f"False negatives among the hardest negatives of {results['samples']:,} pairs: Con-D says p > {threshold:g}{corrected}"]
    if results["meaningless"]:
        lines = [f"MEANINGLESS, since {results['meaningless']}: this Con-D cannot judge these data.", *lines]
    lines.append(f"  {'sampling':9s} {'B':>6s} {'M':>7s} {'FN w.r.t. image':>22s} {'FN w.r.t. text':>22s} {'median p':>9s}")
    for row in results["ways"]:
        cells = [_cell(row["false_negatives"][0], side) for side in ("wrt_image", "wrt_text")]
        space = "-" if row["search_space"] is None else f"{row['search_space']:,}"
        line = f"  {row['sampling']:9s} {row['batch_size']:6,d} {space:>7s} {cells[0]:>22s} {cells[1]:>22s}"
        lines.append(f"{line} {_p(row['medians']['hardest']):>9s}{'  meaningless' if row['meaningless'] else ''}")
    own, shuffled = (_p(results["medians"][name]) for name in ("own", "shuffled"))
    lines.append(f"  Con-D's median p: own pairs {own}, shuffled pairs {shuffled}; of the hardest negatives in the last column.")
    doubtful = [row for row in results["ways"] if row["doubt"]]
    lines += [f"  {max(doubtful, key=lambda row: row['medians']['hardest'])['doubt']}"] if doubtful else []
    shares = [row["false_negatives"][0][f"wrt_{side}_share"] or 0.0 for row in results["ways"] for side in ("image", "text")]
    if max(shares) > UNHEARD_OF and not results["meaningless"]:
        lines.append("  Above a third, which no paper counts (MAFA Table 9: at most 31.7 %): look before you believe it (`mine`).")
    lonely = max(max(row["without_negative"].values()) for row in results["ways"])
    if lonely:
        lines.append(f"  (up to {lonely:,} anchors have no negative: their batch shows nothing but their own image, or them alone)")
    for reason, number in results["unreadable"].items():
        lines.append(f"  left out: {number:,} unreadable ({reason})")
    if any("truth" in row for row in results["ways"]):
        lines += ["", *_truth_lines(results["ways"])]
    return "\n".join(lines)


def _truth_lines(ways: list[dict[str, Any]]) -> list[str]:
    lines = ["Con-D against the known truth, on the same negatives"]
    names = f"{'truly false':>12s} {'p >':>6s} {'precision':>10s} {'recall':>8s} {'calibration error':>18s}"
    lines.append(f"  {'sampling':9s} {'B':>6s} {'M':>7s} {names}")
    for row in ways:
        truth, space = row["truth"], "-" if row["search_space"] is None else f"{row['search_space']:,}"
        head = f"  {row['sampling']:9s} {row['batch_size']:6,d} {space:>7s} {_share(truth['true_share']):>12s}"
        for at in truth["thresholds"]:
            error = "" if truth["calibration_error"] is None else f"{truth['calibration_error']:.3f}"
            lines.append(f"{head} {at['threshold']:6g} {_share(at['precision']):>10s} {_share(at['recall']):>8s} {error:>18s}".rstrip())
            head, truth = " " * len(head), {**truth, "calibration_error": None}
    return lines


def _cell(found: dict[str, Any], side: str) -> str:
    return f"{found[side]:,.0f} ({_share(found[side + '_share'])})"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
