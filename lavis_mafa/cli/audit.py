"""``lavis-mafa audit pairs.csv --images images [--con-d NAME]``: what is wrong with one's data, before any training, on one page."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lavis_mafa.cli.options import add_columns, count, named_columns, positive
from lavis_mafa.errors import UserError

PAGE, YAML, RESULT = "audit.html", "data.yaml", "audit.json"


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
    block = None if arguments.con_d is None else _model(arguments)
    checked = _check(arguments, columns)
    counted = mined = None
    if block is not None:
        counted, mined = _judged(arguments, columns, block, checked)
    page = _page(arguments, checked, counted, mined)
    write_text(folder / PAGE, page)
    write_text(folder / RESULT, json.dumps({"check": checked, "count": counted, "mine": mined}, indent=2, ensure_ascii=False) + "\n")
    print(f"\nThe page: {folder / PAGE}, {Bar.format_sizeof(os.path.getsize(folder / PAGE), 'B')}")
    return int(checked["bad_rows"] > 0)


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


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ``model`` block of the pass: of the miner, with Con-D as its ``discriminator``, or of Con-D itself; raises UserError."""
    from lavis_mafa.cli.count_false_negatives import find_weights
    from lavis_mafa.cli.init import con_d_block

    find_weights(arguments)
    judge = con_d_block(arguments.con_d, "--con-d")
    if arguments.miner is None:
        return {**judge, "ecm": {"enabled": False}, "itc": {"smoothing": 0}}
    discriminator = {"arch": judge["arch"], "model_type": judge["model_type"], "checkpoint": arguments.con_d}
    return {**con_d_block(arguments.miner, "--miner"), "discriminator": discriminator}


def _judged(
    arguments: argparse.Namespace, columns: dict[str, str], block: dict[str, Any], checked: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `count-false-negatives` and `mine` find in the good rows; both are run on a YAML that stays in the folder."""
    import torch
    import yaml

    from lavis_mafa.cli import count_false_negatives, mine
    from lavis_mafa.config.schema import type_defaults

    folder, on_gpu = arguments.output, torch.cuda.is_available()
    good = checked["good_rows"]
    if good < 2:
        raise UserError(f"{good} rows are good, but a batch with negatives has at least 2; see {folder / 'problems.jsonl'}.")
    arch, size = block["arch"], block["model_type"]
    sizes = type_defaults(arch, size)["model"]["image_encoder"]
    block |= {"image_encoder": {"precision": "fp32"}} if sizes.get("precision") == "fp16" and not on_gpu else {}
    pairs = min(arguments.samples or good, good)
    batch = min(96, max(2, pairs // 4))  # the paper's sizes, as far as there are pairs
    space = max(batch, min(4_800, pairs // 2))
    info = {"annotations": {"train": {"storage": checked["good_files"]}}, "images": {"storage": str(arguments.images)}}
    processor = {"eval": {"name": "albef_image_eval", "image_size": sizes["image_size"]}}
    processor["train"] = {**processor["eval"], "name": "albef_image_train"}
    run = {"task": "mafa_pretrain", "batch_size_train": batch, "grit": {"search_space": space, "queue_size": space}}
    run |= {"num_workers": arguments.workers, "precision": "bf16" if on_gpu else "fp32", "device": "cuda" if on_gpu else "cpu"}
    data = {"grit_pairs": {"build_info": {**info, **({"columns": columns} if columns else {})}, "vis_processor": processor}}
    (folder / YAML).write_text(yaml.safe_dump({"model": block, "datasets": data, "run": run}, sort_keys=False, allow_unicode=True))
    found = []
    for command, name in ((count_false_negatives, "count"), (mine, "mine")):
        parser, flags = argparse.ArgumentParser(), ["--cfg-path", str(folder / YAML), "--con-d", arguments.con_d, "--force"]
        command.add_arguments(parser)
        flags += ["--samples", str(arguments.samples)] if arguments.samples else []
        flags += ["--miner", arguments.miner] if arguments.miner and name == "count" else []
        print(flush=True)
        command.run(parser.parse_args([*flags, "--output", str(folder / name)]))
        found.append(json.loads((folder / name / command.RESULT).read_text(encoding="utf-8")))
    return found[0], found[1]


def _page(arguments: argparse.Namespace, checked: dict[str, Any], counted: dict[str, Any] | None, mined: dict[str, Any] | None) -> str:
    """One file that needs no other: what was checked and, with a Con-D, what was counted and mined, with a gallery."""
    from lavis_mafa import __version__
    from lavis_mafa.tools.check_data import BAD, KINDS
    from lavis_mafa.tools.report import Table, render

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
    import pyarrow as pa
    import pyarrow.parquet as pq
    from omegaconf import DictConfig, OmegaConf

    from lavis_mafa.datasets.ids import pc
    from lavis_mafa.objectives.pretraining import EcmSettings
    from lavis_mafa.tools.count import format_count
    from lavis_mafa.tools.curves import score_histogram
    from lavis_mafa.tools.gallery import distinct_candidates, gallery_data, rows_of_all
    from lavis_mafa.tools.mine import format_mined
    from lavis_mafa.tools.run_files import Run

    folder, ecm = arguments.output, EcmSettings()
    table = pq.read_table(folder / "mine" / "connections.parquet")
    table = table.filter(pc.and_(pc.greater_equal(table["image"], 0), pc.greater_equal(table["text"], 0)))
    p = table["probability"]
    verdict = pc.if_else(
        pc.greater(p, ecm.threshold), "positive", pc.if_else(pc.greater(p, ecm.ambiguous_from), "ambiguous", "negative")
    )
    zeros = pa.array([0] * len(table), pa.int64())
    parts = {name: table[name] for name in ("direction", "image", "text", "probability")}
    connections = pa.table({**parts, "verdict": verdict, "epoch": zeros, "step": zeros})
    config = OmegaConf.load(folder / YAML)
    assert isinstance(config, DictConfig)
    looked = Run(folder.name, folder, config, [], {}, connections)
    data = rows_of_all([looked])
    candidates = [distinct_candidates(0, connections, data[0])]
    scores = [(c.probability, c.true) for c in candidates[0]]
    return {
        "counted": counted,
        "count_text": format_count(counted),
        "mined": mined,
        "mine_text": format_mined(mined),
        "histograms": [score_histogram(str(arguments.con_d), 0, scores, ecm.threshold, ecm.ambiguous_from)] if scores else [],
        "gallery": gallery_data([looked], data, candidates, arguments.gallery),
        "truth": any(true is not None for _, true in scores),
    }
