"""What ``check-data`` prints and writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lavis_mafa.analysis.data_check.judging import Verdicts
from lavis_mafa.analysis.data_check.problems import BAD, KINDS, Found, describe, describe_all
from lavis_mafa.analysis.data_check.rows import Rows

EXAMPLES = 3


def results(rows: Rows, verdicts: Verdicts, found: Found) -> dict[str, Any]:
    """Counts and first examples of each kind; ``bad_rows`` are those that training would refuse or replace."""
    kinds = {}
    for number, kind in enumerate(KINDS):
        places = np.flatnonzero(found.kind == number)
        affected = len(np.unique(found.row[places]))
        examples = [describe(rows, verdicts, found, int(place)) for place in places[:EXAMPLES]]
        kinds[kind] = {"rows": affected, "share": affected / len(rows), "examples": examples}
    bad = np.unique(found.row[found.kind < len(BAD)])
    counts = {"rows": len(rows), "images": len(rows.path), "captions": len(rows.caption), "bad_rows": len(bad)}
    return {"files": [str(file) for file in rows.files], **counts, "kinds": kinds}


def format_results(results: dict[str, Any]) -> str:
    """A table, and the first examples below it."""
    total = f"{results['rows']:,} rows, {results['images']:,} images, {results['captions']:,} captions"
    lines = [f"{total}: {', '.join(results['files'])}", "", f"{'':34}{'rows':>12}{'share':>10}"]
    for kind, text in KINDS.items():
        of_kind = results["kinds"][kind]
        lines.append(f"{text:34}{of_kind['rows']:>12,}{of_kind['share']:>10.3%}")
    for kind, text in KINDS.items():
        examples = results["kinds"][kind]["examples"]
        if examples:
            lines += ["", f"{text}, for example:"]
            lines += [f"  {e['file']}, row {e['row']}: {e['reason']}" for e in examples]
    return "\n".join(lines)


def write_problems(path: Path, rows: Rows, verdicts: Verdicts, found: Found) -> None:
    """One JSON object a line, in the order of rows; whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for problem in describe_all(rows, verdicts, found):
                file.write(json.dumps(problem, ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
