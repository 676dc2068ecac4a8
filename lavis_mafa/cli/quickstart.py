"""``lavis-mafa quickstart``: the main job end to end on drawings, in minutes on a laptop CPU, with ALBEF or with BLIP-2."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

from lavis_mafa.errors import UserError

ALBEF, BLIP2 = "mafa/quickstart/scenes", "mafa/quickstart/blip2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for data, runs and the report (default: quickstart)")
    parser.add_argument(
        "--model",
        choices=("albef", "blip2"),
        default="albef",
        help="albef: random batches, GRIT and MAFA on scenes, with a report; blip2: stage 1 with MAFA, stage 2, captions and answers "
        "(default: albef)",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of all runs")


def run(arguments: argparse.Namespace) -> int:
    started, folder = time.perf_counter(), arguments.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder: cannot write {folder}: {error.strerror}.") from error
    show = _albef if arguments.model == "albef" else _blip2
    show(folder, arguments.options, started)
    return 0


def _albef(folder: Path, options: list[str], started: float) -> None:
    import torch

    from lavis_mafa.datasets.scenes.build import build_scenes
    from lavis_mafa.runners.job import run_job
    from lavis_mafa.tools.quickstart import albef_results, albef_text, write_report
    from lavis_mafa.weights import shipped

    scenes, start, con_d = folder / "scenes", shipped("scenes_start"), shipped("scenes_con_d")
    _say("1/5  the data: scenes composed of emoji, with captions that tell part of what is there")
    build_scenes(scenes)
    data = [f"datasets.grit_scenes.build_info.root={scenes}", f"model.tokenizer={scenes}/vocab.txt", f"model.pretrained={start}"]

    def run(name: str, *more: str) -> Any:
        return run_job(f"{ALBEF}/{name}.yaml", [*data, f"run.output_dir={folder}/{name}", *more, *options])

    _say("2/5  the start: a tiny ALBEF that comes with the package, trained with random negatives; scored alone")
    first = run("start", "run.evaluate=true")
    _say("3/5  random batches, with negatives sampled by similarity")
    random = run("random")
    _say("4/5  GRIT: batches of similar pairs and the hardest negatives, be they true or false")
    grit = run("grit")
    _say("5/5  MAFA: the same, but Con-D looks at every hardest negative, and false ones become positives")
    mafa = run("mafa", f"model.discriminator.checkpoint={con_d}")

    runs = {"start": first.output_dir, "random": random.output_dir, "GRIT": grit.output_dir, "MAFA": mafa.output_dir}
    results = albef_results(runs, mafa.datasets, mafa.settings.batch_size_train)
    minutes = (time.perf_counter() - started) / 60
    about = {
        "made by": " ".join(["lavis-mafa quickstart", *(["--options", *options] if options else [])]),
        "on": f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} cores, {minutes:.1f} minutes",
        "drawings": "Noto (Apache-2.0), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0)",
    }
    page = write_report(folder / "report" / mafa.output_dir.name, results, runs, about)
    print("\n" + albef_text(results))
    print(f"\n{minutes:.1f} minutes. The page with mined connections: {page}\nThe metrics: {page.with_name('results.json')}")


def _blip2(folder: Path, options: list[str], started: float) -> None:
    from lavis_mafa.datasets.emoji import build_emoji
    from lavis_mafa.files import last_checkpoint, write_text
    from lavis_mafa.runners.job import run_job
    from lavis_mafa.tools.quickstart import blip2_results, blip2_text

    _say("1/4  the data: emoji drawn by three artists, with their names and keywords")
    build_emoji(folder / "emoji")

    def start(yaml: str, *more: str) -> Any:
        common = [f"datasets.grit_emoji.build_info.root={folder}/emoji", f"run.output_dir={folder}/{Path(yaml).stem}"]
        return run_job(yaml, [*common, *more, *options])

    _say("2/4  Con-D: a small BLIP-2 stage 1 from scratch, which also stands in for a pre-trained ViT")
    con_d = last_checkpoint(start(f"{BLIP2}/con_d.yaml").output_dir)
    _say("3/4  stage 1 with MAFA on the frozen ViT, which Con-D shares")
    stage_1 = start(f"{BLIP2}/stage_1.yaml", f"model.pretrained={con_d}", f"model.discriminator.checkpoint={con_d}")
    _say("4/4  stage 2: its queries prompt a small language model; then captions and answers for drawings it has not seen")
    stage_2 = start(f"{BLIP2}/stage_2.yaml", f"model.stage_1={last_checkpoint(stage_1.output_dir)}")
    finished = f"model.pretrained={last_checkpoint(stage_2.output_dir)}"
    captions, answers = start(f"{BLIP2}/captions.yaml", finished), start(f"{BLIP2}/vqa.yaml", finished)

    results = blip2_results(stage_1.output_dir, captions, answers)
    path = folder / "blip2" / stage_1.output_dir.name / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print("\n" + blip2_text(results))
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. The metrics: {path}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
