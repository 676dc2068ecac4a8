"""``lavis-mafa audit pairs.csv --images images [--con-d NAME]``: what is wrong with one's data, before any training, on one page."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from lavis_mafa.cli.options import add_columns, count, named_columns, positive
from lavis_mafa.errors import UserError

PAGE, RESULT = "audit.html", "audit.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Every file is checked as by check-data. With a Con-D the pairs are searched for false negatives as by count-false-negatives, "
        "and for missing connections as by mine, whose outputs are in the folder too. Exit code: 0 if no row is bad, 1 if some are, 2 "
        "for a mistake."
    )
    add = parser.add_argument
    add("data", type=Path, nargs="+", metavar="FILE", help="image-text pairs: .csv, .tsv, .json, .jsonl, .parquet, or folders of them")
    add("--images", type=Path, required=True, metavar="DIR", help="the folder that image paths start from")
    add_columns(parser)
    add(
        "--con-d",
        metavar="CHECKPOINT",
        help="who says what matches: a file, a run's folder, or a name such as lavis:albef_retrieval/coco",
    )
    add("--miner", metavar="CHECKPOINT", help="whose similarities find the candidates of the count (default: Con-D's own)")
    add("--samples", type=positive, metavar="N", help="show only so many pairs to Con-D, a random part (default: all)")
    add("--gallery", type=count, default=2000, metavar="N", help="show the N surest connections on the page (default: 2000)")
    add("--workers", type=count, default=2, metavar="N", help="processes that read images (default: 2)")
    add("--output", type=Path, default=Path("output/audit"), metavar="FOLDER", help="a new folder (default: output/audit)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.miner is not None and arguments.con_d is None:
        raise UserError("--miner finds candidates for a Con-D to judge; give --con-d too.")
    from lavis_mafa.files import check_unfinished, write_text
    from lavis_mafa.progress import Bar

    folder: Path = arguments.output
    check_unfinished(folder, PAGE)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} is not empty; choose another folder.")
    columns = named_columns(arguments.columns)
    named = arguments.con_d
    if named is not None:
        _check_judges(arguments)
    checked = _check(arguments, columns)
    counted = mined = None
    if arguments.con_d is not None:
        counted, mined = _judged(arguments, columns, checked)
    page = _page(arguments, checked, counted, mined)
    write_text(folder / PAGE, page)
    write_text(folder / RESULT, json.dumps({"check": checked, "count": counted, "mine": mined}, indent=2, ensure_ascii=False) + "\n")
    print(f"\nThe page: {folder / PAGE}, {Bar.format_sizeof(os.path.getsize(folder / PAGE), 'B')}")
    _say_next(arguments, named, checked["bad_rows"])
    return int(checked["bad_rows"] > 0)


def _say_next(arguments: argparse.Namespace, con_d: str | None, bad_rows: int) -> None:
    if con_d is not None:
        print(f"Next: {shlex.join(['lavis-mafa', 'explore', str(arguments.output)])} (look at the connections and mark what is right)")
    if bad_rows == 0:
        given = ["--data", *map(str, arguments.data), "--images", str(arguments.images)]
        given += ["--columns", *arguments.columns] if arguments.columns else []
        given += [] if con_d is None else ["--con-d", con_d]
        print(f"Next: {shlex.join(['lavis-mafa', 'init', *given])} --model albef --size tiny --output my.yaml")


def _check(arguments: argparse.Namespace, columns: dict[str, str]) -> dict[str, Any]:
    """As `check-data` does, and which files hold the good rows, for Con-D to judge: those whose rows all are, and others cleaned."""
    from lavis_mafa.datasets.images import MIN_SIDE
    from lavis_mafa.files import write_text
    from lavis_mafa.tools import check_data

    folder = arguments.output
    sources = check_data.from_files(arguments.data, arguments.images, columns=columns)
    if arguments.con_d is not None:
        check_data.check_columns(sources, "--con-d judges good rows alone, which audit writes anew where others are bad")
    rows = check_data.read_sources(sources)
    folder.mkdir(parents=True, exist_ok=True)
    check_data.judge(rows, sources, MIN_SIDE, arguments.workers)
    problems = check_data.find(rows)
    results = check_data.results(rows, problems)
    check_data.write_problems(folder / "problems.jsonl", rows, problems)
    write_text(folder / "check.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(check_data.format_results(results), flush=True)
    if arguments.con_d is not None:
        bad = set(rows.file_of[problems.row[problems.kind < len(check_data.BAD)]].tolist())
        results |= {"good_rows": 0, "good_files": []}
        for number, file in enumerate(rows.files):
            path, good = file.path, int((rows.file_of == number).sum())
            if number in bad:
                name = "clean" if len(rows.files) == 1 else f"clean_{number + 1}"
                path = folder / f"{name}{'.arrow' if path.suffix == '.arrow' else '.jsonl'}"
                good = check_data.write_clean(path, rows, number)
            results["good_rows"] += good
            results["good_files"] += [str(path)] if good else []
    return results


def _check_judges(arguments: argparse.Namespace) -> None:
    """That there are such checkpoints and what they are is known before the images are read; raises UserError."""
    from lavis_mafa.named_weights import fetched
    from lavis_mafa.tools.own_data import con_d_block

    for name, flag in (("con_d", "--con-d"), ("miner", "--miner")):
        if (given := getattr(arguments, name)) is not None:
            setattr(arguments, name, fetched(given, flag))
            con_d_block(getattr(arguments, name), flag)


def _judged(arguments: argparse.Namespace, columns: dict[str, str], checked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `count-false-negatives` and `mine` find in the good rows."""
    from lavis_mafa.tools.count_pass import CountResult, run_count
    from lavis_mafa.tools.mine_pass import MineResult, run_mine
    from lavis_mafa.tools.passes import Pass

    folder, good = arguments.output, checked["good_rows"]
    if good < 2:
        raise UserError(f"{good} rows are good, but a batch with negatives has at least 2; see {folder / 'problems.jsonl'}.")
    of = Pass(
        annotations=list(map(Path, checked["good_files"])),
        images=arguments.images,
        columns=columns,
        con_d=arguments.con_d,
        samples=arguments.samples,
        options=[f"run.num_workers={arguments.workers}"],
        force=True,
    )
    print(flush=True)
    counted = run_count(replace(of, miner=arguments.miner), folder / "count")
    print(f"{counted}\n", flush=True)
    mined = run_mine(of, folder / "mine")
    print(mined)
    assert isinstance(counted, CountResult) and isinstance(mined, MineResult), "of one rank, whose judge is a Con-D"
    return counted.results, mined.results


def _page(arguments: argparse.Namespace, checked: dict[str, Any], counted: dict[str, Any] | None, mined: dict[str, Any] | None) -> str:
    """One file that needs no other: what was checked and, with a Con-D, what was counted and mined, with a gallery."""
    from lavis_mafa import __version__
    from lavis_mafa.tools.check_data import BAD, KINDS
    from lavis_mafa.tools.render import Table, render

    of = checked["kinds"]
    kinds = [[text, f"{of[kind]['rows']:,}", f"{of[kind]['share']:.2%}"] for kind, text in KINDS.items()]
    totals = f"{checked['rows']:,} rows, {checked['images']:,} images, {checked['captions']:,} captions"
    examples = [[KINDS[kind], Path(e["file"]).name, str(e["row"]), e["reason"]] for kind in KINDS for e in of[kind]["examples"]]
    values: dict[str, Any] = {"counted": None}
    if counted is not None and mined is not None:
        values = _connections(arguments, counted, mined)
    return render(
        "audit.html",
        checked=checked,
        kinds=Table(["what", "rows", "share"], kinds, totals),
        examples=Table(["what", "file", "row", "why"], examples, "The first of each kind") if examples else None,
        bad=[KINDS[kind] for kind in BAD if of[kind]["rows"]],
        files=", ".join(map(str, arguments.data)),
        folder=arguments.output,
        con_d=arguments.con_d,
        version=__version__,
        **values,
    )


def _connections(arguments: argparse.Namespace, counted: dict[str, Any], mined: dict[str, Any]) -> dict[str, Any]:
    from lavis_mafa.datasets.ids import pc
    from lavis_mafa.objectives.pretraining import EcmSettings
    from lavis_mafa.tools.curves import score_histogram
    from lavis_mafa.tools.findings import count_section, mine_section, own_plot
    from lavis_mafa.tools.gallery import distinct_candidates, gallery_data, rows_of_all
    from lavis_mafa.tools.run_files import open_runs

    folder, ecm = arguments.output, EcmSettings()
    looked = replace(open_runs([folder / "mine"])[0], name=folder.name)
    connections = looked.connections
    assert connections is not None, "of mine"
    p = connections["probability"]
    verdict = pc.if_else(
        pc.greater(p, ecm.threshold), "positive", pc.if_else(pc.greater(p, ecm.ambiguous_from), "ambiguous", "negative")
    )
    connections = connections.set_column(connections.schema.get_field_index("verdict"), "verdict", verdict)
    looked = replace(looked, connections=connections)
    data = rows_of_all([looked])
    candidates = [distinct_candidates(0, connections, data[0])]
    scores = [(c.probability, c.true) for c in candidates[0]]
    histograms = [
        score_histogram("Con-D", 0, scores, ecm.threshold, ecm.ambiguous_from),
        own_plot("Con-D", mined, connections, candidates[0], 0),
    ]
    return {
        "counted": count_section("count", counted, 0),
        "mined": mine_section("mine", mined),
        "histograms": histograms if scores else [],
        "gallery": gallery_data([looked], data, candidates, arguments.gallery),
        "truth": any(true is not None for _, true in scores),
    }
