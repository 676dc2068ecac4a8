"""``lavis-mafa quickstart``: the main job end to end on emoji, in minutes on a laptop CPU."""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import Any

from lavis_mafa.common.errors import UserError

STEPS = "mafa/quickstart/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for data, runs and the report (default: quickstart)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of all three runs")


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    folder: Path = arguments.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder: cannot write {folder}: {error.strerror}.") from error
    from lavis_mafa.common.job import run_job
    from lavis_mafa.datasets.emoji import build_emoji
    from lavis_mafa.reports import quickstart as report
    from lavis_mafa.reports.run_files import last_checkpoint

    emoji = folder / "emoji"
    _say("1/4  the data: emoji drawn by three artists, with their names and keywords")
    build_emoji(emoji)

    def train(name: str, *options: str) -> Any:
        common = [f"datasets.grit_emoji.build_info.root={emoji}", f"run.output_dir={folder}/{name}"]
        return run_job(f"{STEPS}/{name}.yaml", [*common, *options, *arguments.options])

    _say("2/4  Con-D: a small ALBEF that learns what matches from curated captions; random negatives first, then sampled ones")
    first = train("con_d_1")
    start = last_checkpoint(first.output_dir)
    con_d = last_checkpoint(train("con_d_2", f"model.pretrained={start}").output_dir)
    _say("3/4  GRIT: from Con-D's first half on, grouped batches and the hardest negatives, be they true or false")
    grit = train("grit", f"model.pretrained={start}")
    _say("4/4  MAFA: the same, but Con-D looks at every hard negative, and false ones become positives")
    mafa = train("mafa", f"model.pretrained={start}", f"model.discriminator.checkpoint={con_d}")

    dataset = mafa.datasets["train"].datasets[0]
    runs = first.output_dir, grit.output_dir, mafa.output_dir
    results = report.collect_results(*runs, mafa.datasets, mafa.settings.batch_size_train)
    minutes = (time.perf_counter() - started) / 60
    about = {
        "made by": "lavis-mafa quickstart" + "".join(f" {o}" for o in (["--options", *arguments.options] if arguments.options else [])),
        "on": f"{datetime.date.today()}, {platform.machine()}, {_cores()} cores, {minutes:.1f} minutes",
        "drawings": "Noto (Apache-2.0), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0)",
    }
    page = report.write_report(folder / "report" / mafa.output_dir.name, results, *runs[1:], dataset, about)
    print("\n" + report.format_table(results))
    print(f"\n{minutes:.1f} minutes. The page with mined connections: {page}\nThe figures: {page.with_name('results.json')}")
    return 0


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _cores() -> int:
    import torch

    return torch.get_num_threads()
