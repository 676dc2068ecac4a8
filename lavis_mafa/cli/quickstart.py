"""``lavis-mafa quickstart``: the main job end to end on drawings, in minutes on a laptop CPU, with ALBEF or with BLIP-2."""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import Any

from lavis_mafa.errors import UserError

YAMLS = "mafa/quickstart/scenes"
NAMES = {"albef": "ALBEF", "blip2": "BLIP-2 (stage 1)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for data, runs and the report (default: quickstart)")
    parser.add_argument(
        "--model",
        choices=tuple(NAMES),
        default="albef",
        help="whose random batches, GRIT and MAFA are compared; blip2: its stage 1, on a frozen ViT (default: albef)",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of all runs")


def run(arguments: argparse.Namespace) -> int:
    started, folder = time.perf_counter(), arguments.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder: cannot write {folder}: {error.strerror}.") from error
    _scenes(arguments.model, folder, arguments.options, started)
    return 0


def _scenes(model: str, folder: Path, options: list[str], started: float) -> None:
    import torch

    from lavis_mafa.datasets.scenes.build import build_scenes
    from lavis_mafa.runners.job import run_job
    from lavis_mafa.tools.ablate import SCENES_PREFIXES
    from lavis_mafa.tools.quickstart import results_of, results_text, write_report
    from lavis_mafa.weights import shipped

    scenes, name, prefix = folder / "scenes", NAMES[model], SCENES_PREFIXES[f"{model}_mafa"]
    start, con_d = shipped(f"scenes_{prefix}start"), shipped(f"scenes_{prefix}con_d")
    _say("1/5  the data: scenes composed of emoji, with captions that tell part of what is there")
    build_scenes(scenes)
    data = [f"datasets.grit_scenes.build_info.root={scenes}", f"model.tokenizer={scenes}/vocab.txt", f"model.pretrained={start}"]

    def run(kind: str, *more: str) -> Any:
        return run_job(f"{YAMLS}/{prefix}{kind}.yaml", [*data, f"run.output_dir={folder}/{prefix}{kind}", *more, *options])

    _say(f"2/5  the start: a tiny {name} that comes with the package, trained with random negatives; scored alone")
    first = run("start", "run.evaluate=true")
    _say("3/5  random batches, with negatives sampled by similarity")
    random = run("random")
    _say("4/5  GRIT: batches of similar pairs and the hardest negatives, be they true or false")
    grit = run("grit")
    _say("5/5  MAFA: the same, but Con-D looks at every hardest negative, and false ones become positives")
    mafa = run("mafa", f"model.discriminator.checkpoint={con_d}")

    runs = {"start": first.output_dir, "random": random.output_dir, "GRIT": grit.output_dir, "MAFA": mafa.output_dir}
    results = results_of(runs, mafa.datasets, mafa.settings.batch_size_train)
    minutes = (time.perf_counter() - started) / 60
    given = ["--model", model] if model != "albef" else []
    about = {
        "made by": " ".join(["lavis-mafa quickstart", *given, *(["--options", *options] if options else [])]),
        "on": f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} cores, {minutes:.1f} minutes",
        "drawings": "Noto (Apache-2.0), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0)",
    }
    page = write_report(folder / "report" / f"{prefix}{mafa.output_dir.name}", results, runs, about)
    print("\n" + results_text(results))
    print(f"\n{minutes:.1f} minutes. The page with mined connections: {page}\nThe metrics: {page.with_name('results.json')}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
