"""Trains the tiny model for half an hour while it is killed again and again, then once without, and compares.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--folder output/soak]

Data are the embedded emoji, of which one image or caption in a hundred is spoilt. The first run is started with ``--resume auto``, and
ended after a random time by SIGKILL, SIGTERM or SIGINT, until the minutes are over. The second run trains as many steps without a
stop. Each writes down which samples it trained on and its memory. Reported are

- lost samples: readable ones that an epoch left out although they were not its tail, or left out twice in a row;
- steps that were trained again after a kill with other samples than the first time;
- numbers in the last checkpoint (weights, optimizer, queue, order, random states) that differ between the two runs;
- memory growth of the run without stops per 1,000 steps, by the straight line that fits best after the first 500.

What came out: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grouping import machine

from lavis_mafa.datasets.emoji import build_emoji

BATCH = 16
YAML = """
model:
  arch: albef_mafa
  model_type: tiny
  discriminator: {arch: ground_truth}
  image_encoder: {image_size: 32, patch_size: 8, width: 32, depth: 2, heads: 2}
  text_encoder: {init: null, width: 32, layers: 3, fusion_layer: 1, heads: 2}
  itc: {momentum_distillation: {queue_size: 256}}
  embed_dim: 16
datasets:
  grit_pairs:
    build_info:
      annotations: {train: {storage: DATA/soak.jsonl}}
      images: {storage: DATA}
    vis_processor:
      train: {name: albef_image_train, image_size: 32, min_scale: 0.6, flip: false, randaugment: null}
run: {task: mafa_pretrain, runner: runner_mafa, max_epoch: 100000, lr_horizon_epochs: 100, batch_size_train: 16, warmup_steps: 50,
  init_lr: 1.0e-3, num_workers: 1, max_bad_share: 0.05, grit: {queue_size: 480, search_space: 96}, log_freq: 20, save_every_steps: 40,
  device: cpu}
"""


# --- the process that trains -------------------------------------------------------------------------------------------


def child(log: Path, arguments: list[str]) -> int:
    """The command line, with a line of ``log`` for each step."""
    from lavis_mafa.cli.main import main
    from lavis_mafa.runners.runner_mafa import RunnerMafa

    prepare = RunnerMafa._prepare

    def prepared(self: Any, samples: dict[str, Any], epoch: int, step: int) -> dict[str, Any]:
        # without pages of files, which come and go as the system likes
        memory = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        record = {"epoch": epoch, "step": step, "index": samples["index"].tolist(), "memory": 1024 * int(memory)}
        with open(log, "a") as file:
            file.write(json.dumps(record) + "\n")
        return prepare(self, samples, epoch, step)

    RunnerMafa._prepare = prepared  # type: ignore[method-assign]
    sys.argv = ["lavis-mafa", *arguments]
    return main()


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(folder / f"{name}.jsonl"), "train", "--cfg-path", str(folder / "soak.yaml")]
    command += ["--resume", "auto", "--options", f"run.output_dir={name}", *options]
    with open(folder / f"{name}.log", "ab") as log:
        # a group of its own: SIGINT and SIGTERM go to the data loader's worker too
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


# --- the torment -------------------------------------------------------------------------------------------------------


def spoil(data: Path, chance: random.Random) -> tuple[int, set[int]]:
    """Write ``soak.jsonl`` and break one in a hundred of its samples; how many there are, and the rows that are bad."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open()]
    bad_images = set(chance.sample(sorted({row["image"] for row in rows}), len(rows) // 200))
    for number, image in enumerate(sorted(bad_images)):
        path = data / image
        content = path.read_bytes()
        path.write_bytes([b"", b"no image", content[: len(content) // 2]][number % 3])
    for row in chance.sample(rows[1:], len(rows) // 200):
        row["caption"] = "?!"
    (data / "soak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows), {number for number, row in enumerate(rows) if row["image"] in bad_images or row["caption"] == "?!"}


def torment(folder: Path, minutes: float, chance: random.Random) -> Counter[str]:
    """Start, kill, start again, until the time is over; the last end is a clean one. How often what was done."""
    end, done = time.monotonic() + 60 * minutes, Counter[str]()
    while time.monotonic() < end:
        run = start(folder, "tormented")
        done["starts"] += 1
        # some of them before the training has begun
        wait = min(chance.uniform(2, 120), max(end - time.monotonic(), 60))
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        try:
            raise SystemExit(f"the run ended by itself with code {run.wait(timeout=wait)}; see {folder}/tormented.log")
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, number)
        done[signal.Signals(number).name] += 1
        run.wait(timeout=120)
    run = start(folder, "tormented")
    done["starts"] += 1
    time.sleep(60)
    os.killpg(run.pid, signal.SIGTERM)
    if run.wait(timeout=120) != 143 or "stopped after epoch" not in (folder / "tormented.log").read_text().splitlines()[-1]:
        raise SystemExit(f"the last run did not end in good order; see {folder}/tormented.log")
    done["resumes"] = (folder / "tormented.log").read_text().count("resuming ")
    return done


def accounts(log: Path, samples: int, bad: set[int]) -> tuple[int, int, int, int]:
    """Steps, steps trained again, those of them that differ, and lost samples."""
    served: dict[tuple[int, int], list[int]] = {}
    again = different = lost = 0
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # written when the process was killed
            continue
        place = record["epoch"], record["step"]
        again += place in served
        different += served.get(place, record["index"]) != record["index"]
        served[place] = record["index"]
    left_out: set[int] = set()
    for epoch in range(max(epoch for epoch, _ in served)):  # the last one is not complete
        seen = {index for (e, _), indices in served.items() if e == epoch for index in indices}
        missing = set(range(samples)) - seen - bad
        lost += max(len(missing) - samples % BATCH, 0) + len(missing & left_out)
        left_out = missing
    return len(served), again, different, lost


def growth(log: Path) -> tuple[float, float]:
    """Memory in MB at the 500th step, and its growth per 1,000 steps as a share of that."""
    memory = np.array([json.loads(line)["memory"] for line in log.read_text().splitlines()][500:]) / 1e6
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    return float(memory[0]), float(1000 * slope / memory[0])


def different_numbers(one: Any, other: Any) -> int:
    if isinstance(one, dict):
        return sum(different_numbers(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return sum(different_numbers(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return int((one != other).sum())
    return int(one != other)


def newest(folder: Path) -> dict[str, Any]:
    from lavis_mafa.files import last_checkpoint
    from lavis_mafa.runners.checkpoint import rank_file

    (run,) = folder.glob("2*")
    path = last_checkpoint(run)
    weights, state = (torch.load(file, weights_only=True) for file in (path, rank_file(path, 0)))
    return {"place": path.name, **{k: weights[k] for k in ("model", "optimizer")}, **{k: state[k] for k in ("feed", "random")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("output/soak"))
    arguments = parser.parse_args()
    folder, chance = arguments.folder.absolute(), random.Random(arguments.seed)
    folder.mkdir(parents=True)  # never into an old one
    build_emoji(folder / "data", progress=False)
    samples, bad = spoil(folder / "data", chance)
    (folder / "soak.yaml").write_text(YAML.replace("DATA", str(folder / "data")))
    print(f"{machine('cpu')}, {datetime.date.today()}, seed {arguments.seed}")
    print(f"{samples} samples, {len(bad)} of them bad", flush=True)
    done = torment(folder, arguments.minutes, chance)
    steps, again, different, lost = accounts(folder / "tormented.jsonl", samples, bad)
    kills = ", ".join(f"{done[name]} {name}" for name in ("SIGKILL", "SIGTERM", "SIGINT"))
    print(f"{steps} steps in {arguments.minutes:g} minutes; {done['starts']} starts, {done['resumes']} resumes, ended by {kills}")
    print(f"{again} steps trained again, {different} of them with other samples; lost samples: {lost}", flush=True)
    begin = time.monotonic()
    if start(folder, "untouched", f"run.max_steps={steps}").wait() != 0:
        raise SystemExit(f"the run without stops failed; see {folder}/untouched.log")
    differ = different_numbers(newest(folder / "tormented"), newest(folder / "untouched"))
    print(f"the same steps without a stop: {(time.monotonic() - begin) / 60:.1f} minutes; numbers that differ at the end: {differ}")
    print(
        f"memory: {growth(folder / 'untouched.jsonl')[0]:.0f} MB, growth per 1,000 steps: {growth(folder / 'untouched.jsonl')[1]:+.2%}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    main()
