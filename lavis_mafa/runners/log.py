"""What a run tells while it trains: ``metrics.jsonl``, its trackers, a bar or plain lines, and a sample of Con-D's verdicts."""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lavis.processors.blip_processors import BlipImageBaseProcessor
from PIL import Image
from torch import Tensor

from lavis_mafa.datasets.images import thumbnail
from lavis_mafa.datasets.indexed import captions_of, image_source_of
from lavis_mafa.distributed import gather_objects
from lavis_mafa.progress import Bar
from lavis_mafa.runners.trackers import Picture, Trackers, tag

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 5.0  # short epochs would fill the terminal; metrics.jsonl has every record
SHOWN, SIDE = 4, 256  # pictures of an epoch, and their pixels
# shown in a line, and how they are called there
SHORT = {"loss": "loss", "loss_itc": "itc", "loss_itm": "itm", "loss_mlm": "mlm", "loss_lm": "lm"}
SHORT |= {"itm_accuracy_positive": "acc+", "itm_accuracy_negative": "acc-", "new_positive_share": "new+", "false_negative_share": "fn"}


class MetricsLog:
    """Averages tensors on the device between two log points, so that a step never waits for the host.

    ``folder`` is None on all ranks but the first; ``samples_per_step`` are those of all ranks, ``total_steps`` those of the run.
    """

    def __init__(self, folder: Path | None, steps_per_epoch: int, samples_per_step: int, total_steps: int, trackers: Trackers) -> None:
        self.folder, self.steps_per_epoch, self.trackers = folder, steps_per_epoch, trackers
        self.samples_per_step, self.total_steps = samples_per_step, total_steps
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.pending = self.skipped = self.timed = 0
        self.last_time = time.perf_counter()
        self.last_line = float("-inf")
        self.bar = Bar(total=total_steps, unit="step") if folder is not None and sys.stderr.isatty() else None

    def add(self, metrics: dict[str, Tensor], skipped: bool = False) -> None:
        """One step; a metric that is not finite (nothing to measure, a step not applied) is left out of its average."""
        for name, value in metrics.items():
            value = value.detach().float()
            there = torch.isfinite(value)
            self.sums[name] = self.sums.get(name, 0) + torch.where(there, value, 0.0)
            self.counts[name] = self.counts.get(name, 0) + there
        self.pending += 1
        self.timed += 1
        self.skipped += skipped

    def state_dict(self) -> dict[str, Any]:
        """What is not written yet, so that a resumed run writes the same records."""
        return {"sums": self.sums, "counts": self.counts, "pending": self.pending, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Go on with what was not written yet; checkpoints from before this was kept have None."""
        if state is not None:
            self.sums, self.counts = ({k: v.to(device) for k, v in state[name].items()} for name in ("sums", "counts"))
            self.pending, self.skipped = int(state["pending"]), int(state["skipped"])

    def flush(self, epoch: int, step: int, learning_rate: float, derive: Any = None) -> dict[str, float]:
        """Average over steps and ranks, write, print. Every rank must call it, after ``step`` steps of the epoch.

        ``derive`` makes further metrics from the averages, such as ratios of averaged counts.
        """
        if self.pending == 0:
            return {}
        names = sorted(self.sums)
        table = torch.stack([torch.stack([self.sums[n].float(), self.counts[n].float()]) for n in names]).cpu()
        parts = gather_objects((names, table))
        if all(n == names for n, _ in parts):
            table = torch.stack([t for _, t in parts]).sum(dim=0)
        averages = {n: float(s / c) for n, (s, c) in zip(names, table, strict=True) if c > 0}
        if derive is not None:
            averages = derive(averages)
        now = time.perf_counter()
        done = epoch * self.steps_per_epoch + step
        rate = self.timed / max(now - self.last_time, 1e-9)
        record = {"epoch": epoch, "step": step, "samples_seen": done * self.samples_per_step, **averages}
        record |= {"learning_rate": learning_rate, "samples_per_second": rate * self.samples_per_step}
        if self.skipped:
            record["skipped_steps"] = self.skipped
        self.sums, self.counts = {}, {}
        self.pending = self.skipped = self.timed = 0
        self.last_time = now
        if self.folder is not None:
            self._write(self.folder, record, done, rate)
        return record

    def tell_missed(self) -> None:
        """Of a run that goes on in its folder: what its files have, for trackers that lack it."""
        for record in _read(self.folder, "metrics.jsonl"):
            self.trackers.missed(_figures(record), record["epoch"] * self.steps_per_epoch + record["step"])
        for record in _read(self.folder, "evaluation.jsonl"):
            done = min((record.pop("epoch") + 1) * self.steps_per_epoch, self.total_steps)
            self.trackers.missed(evaluation_figures(record.pop("split"), record), done)

    def restart_clock(self) -> None:
        """Do not count what happened since the last record (evaluation, building) into the rate."""
        self.last_time, self.timed = time.perf_counter(), 0

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _write(self, folder: Path, record: dict[str, Any], done: int, rate: float) -> None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        self.trackers.scalars(_figures(record), done)
        short = " ".join(f"{name} {record[key]:.3f}" for key, name in SHORT.items() if key in record)
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(short, refresh=True)
        elif done >= self.total_steps or time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            logger.info(
                "epoch %d step %d/%d  %s  %.1f samples/s  left %s",
                *(record["epoch"], record["step"], self.steps_per_epoch, short, record["samples_per_second"]),
                datetime.timedelta(seconds=int((self.total_steps - done) / max(rate, 1e-9))),
            )


def evaluation_figures(split: str, stats: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, by their tags."""
    return {f"{split}/{name}": float(v) for name, v in stats.items() if isinstance(v, int | float) or hasattr(v, "item")}


def _figures(record: dict[str, Any]) -> dict[str, float]:
    return {tag(name): value for name, value in record.items() if name not in ("epoch", "step", "samples_seen")}


def _read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    file = None if folder is None else folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file is not None and file.is_file() else []


class ConnectionRecord:
    """A bounded sample of what Con-D decided, as Parquet, so that reports need no second pass.

    At most ``limit`` verdicts an epoch and rank, spread evenly over the epoch's steps and over both directions.
    """

    def __init__(self, folder: Path, rank: int, limit: int, steps_per_epoch: int) -> None:
        self.folder, self.rank, self.limit = folder, rank, limit
        self.every = max(1, math.ceil(steps_per_epoch / max(limit, 1)))
        self.per_step = max(1, limit * self.every // max(steps_per_epoch, 1))
        self.due = False  # until the next step that has verdicts
        self.rows: list[dict[str, Tensor]] = []

    def add(self, epoch: int, step: int, verdicts: dict[str, Tensor] | None) -> None:
        """Take some of a step's verdicts; they stay on the device until the epoch ends."""
        self.due |= step % self.every == 0
        if self.limit == 0 or verdicts is None or "probability" not in verdicts or not self.due:
            return
        self.due = False
        count = len(verdicts["image"])
        stride = max(1, count // self.per_step)
        # the offset moves with the step, so that no position in the batch is preferred
        chosen = torch.arange(step % stride, count, stride, device=verdicts["image"].device)[: self.per_step]
        row = {name: value[chosen] for name, value in verdicts.items()}
        row |= {"direction": chosen >= count // 2, "step": torch.full_like(chosen, step), "epoch": torch.full_like(chosen, epoch)}
        self.rows.append(row)

    def write(self, epoch: int, first_step: int = 0) -> Path | None:
        """Write this epoch's sample to ``connections/``; of a resumed epoch beside the part before ``first_step``."""
        rows, self.rows, self.due = self.rows, [], False
        if not rows:
            return None
        exists = torch.cat([row["exists"] for row in rows])
        columns = {name: torch.cat([row[name] for row in rows])[exists].cpu() for name in rows[0]}
        verdict = torch.where(columns["positive"], 2, torch.where(columns["ambiguous"], 1, 0))
        table = pa.table(
            {
                "epoch": columns["epoch"].numpy(),
                "step": columns["step"].numpy(),
                "direction": _words(["text for image", "image for text"], columns["direction"].long()),
                "image": columns["image"].numpy(),
                "text": columns["text"].numpy(),
                "probability": columns["probability"].float().numpy(),
                "verdict": _words(["negative", "ambiguous", "positive"], verdict),
            }
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = f"_from_{first_step}" if first_step else ""
        path = self.folder / f"epoch_{epoch}{part}_rank_{self.rank}.parquet"
        pq.write_table(table, path)
        return path


def samples_given(samples: dict[str, Any]) -> list[Picture]:
    """The first images of a batch as the model gets them, and their captions; none where a sample has another form."""
    images, texts = samples.get("image"), samples.get("text_input")
    if not isinstance(images, Tensor) or images.dim() != 4 or texts is None:
        return []
    given = zip(images[:SHOWN].cpu(), texts, strict=False)
    return [Picture(_image(image), str(text)) for image, text in given]


def surest_connections(recorded: Path, dataset: Any) -> list[Picture]:
    """Of an epoch's record the new positives that Con-D is surest of: the image, its own captions, and the one that was found."""
    table = pq.read_table(recorded, filters=[("verdict", "=", "positive")]).sort_by([("probability", "descending")])
    return list(_distinct(table.select(["image", "text", "probability"]).to_pylist(), dataset))


def _distinct(rows: list[dict[str, Any]], dataset: Any) -> Iterator[Picture]:
    """Each caption is shown once."""
    known: set[str] = set()
    for row in rows:
        own, found = (" / ".join(captions_of(dataset, row[side])) for side in ("image", "text"))
        source = image_source_of(dataset, row["image"])
        if found in known or len(known) == SHOWN or source is None:
            continue
        known.add(found)
        try:
            image = thumbnail(source, SIDE)
        except OSError:  # it was read a while ago; a picture less is no reason to stop
            continue
        yield Picture(image, f"{own} | found: {found} ({row['probability']:.3f})")


def _image(image: Tensor) -> Image.Image:
    """[3, H, W], bytes or normalised as LAVIS's processors do without settings of their own."""
    if image.dtype != torch.uint8:
        usual = BlipImageBaseProcessor().normalize
        mean, std = (torch.tensor(values)[:, None, None] for values in (usual.mean, usual.std))
        image = ((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


def _words(names: list[str], codes: Tensor) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.numpy(), type=pa.int32()), names)
