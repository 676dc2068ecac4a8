"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard curves, and a bar or plain lines with rate and ETA."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lavis_mafa.distributed import gather_objects, is_distributed

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 5.0  # short epochs would fill the terminal; metrics.jsonl has every record


class MetricsLog:
    """Averages tensors on the device between two log points, so that a step never waits for the host.

    Args:
        folder: where ``metrics.jsonl`` and ``tensorboard/`` go; None on all ranks but the first.
        steps_per_epoch: of one rank.
        samples_per_step: of all ranks.
        total_steps: of the whole run, for the ETA.
    """

    def __init__(self, folder: Path | None, steps_per_epoch: int, samples_per_step: int, total_steps: int) -> None:
        self.folder, self.steps_per_epoch = folder, steps_per_epoch
        self.samples_per_step, self.total_steps = samples_per_step, total_steps
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.pending = self.skipped = self.timed = 0
        self.last_time = time.perf_counter()
        self.last_line = float("-inf")
        self.writer: Any = None
        self.bar: Any = None
        if folder is not None and sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Remember one step; a figure that is not finite (nothing to measure, a step not applied) is left out of its average."""
        for name, value in figures.items():
            value = value.detach().float()
            there = torch.isfinite(value)
            self.sums[name] = self.sums.get(name, 0) + torch.where(there, value, 0.0)
            self.counts[name] = self.counts.get(name, 0) + there
        self.pending += 1
        self.timed += 1

    def state_dict(self) -> dict[str, Any]:
        """What is not written yet, so that a resumed run writes the same records."""
        return {"sums": self.sums, "counts": self.counts, "pending": self.pending, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Go on with what was not written yet; checkpoints from before this was kept have None."""
        if state is not None:
            self.sums, self.counts = ({k: v.to(device) for k, v in state[name].items()} for name in ("sums", "counts"))
            self.pending, self.skipped = int(state["pending"]), int(state["skipped"])

    def flush(self, epoch: int, step: int, learning_rate: float, derive: Any = None) -> dict[str, float]:
        """Average over steps and ranks, write, print. Every rank must call it.

        Args:
            epoch: from 0.
            step: steps done in this epoch.
            learning_rate: of the last step.
            derive: optional function from the averages to further figures (ratios of averaged counts).
        """
        if self.pending == 0:
            return {}
        names = sorted(self.sums)
        table = torch.stack([torch.stack([self.sums[n].float(), self.counts[n].float()]) for n in names]).cpu()
        if is_distributed():
            parts = gather_objects((names, table))
            if all(n == names for n, _ in parts):
                table = torch.stack([t for _, t in parts]).sum(dim=0)
        averages = {n: float(s / c) for n, (s, c) in zip(names, table, strict=True) if c > 0}
        if derive is not None:
            averages = derive(averages)
        now = time.perf_counter()
        done = epoch * self.steps_per_epoch + step
        rate = self.timed / max(now - self.last_time, 1e-9)
        record = {
            "epoch": epoch,
            "step": step,
            "samples_seen": done * self.samples_per_step,
            **averages,
            "learning_rate": learning_rate,
            "samples_per_second": rate * self.samples_per_step,
        }
        if self.skipped:
            record["skipped_steps"] = self.skipped
        self.sums, self.counts = {}, {}
        self.pending = self.skipped = self.timed = 0
        self.last_time = now
        if self.folder is not None:
            self._write(record, done, rate)
        return record

    def restart_clock(self) -> None:
        """Do not count what happened since the last record (evaluation, building) into the rate."""
        self.last_time, self.timed = time.perf_counter(), 0

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()

    def _write(self, record: dict[str, Any], done: int, rate: float) -> None:
        assert self.folder is not None
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done)
        for name, value in record.items():
            if name not in ("epoch", "step", "samples_seen"):
                self.writer.add_scalar(name, value, done)
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(_short(record), refresh=True)
        elif done >= self.total_steps or time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = datetime.timedelta(seconds=int((self.total_steps - done) / max(rate, 1e-9)))
            logger.info(
                "epoch %d step %d/%d  %s  %.1f samples/s  left %s",
                record["epoch"],
                record["step"],
                self.steps_per_epoch,
                _short(record),
                record["samples_per_second"],
                left,
            )


def _short(record: dict[str, Any]) -> str:
    shown = ["loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm", "itm_accuracy_positive", "itm_accuracy_negative"]
    shown += ["new_positive_share", "false_negative_share"]
    names = {"itm_accuracy_positive": "acc+", "itm_accuracy_negative": "acc-"}
    names |= {"new_positive_share": "new+", "false_negative_share": "fn"}
    return " ".join(f"{names.get(n, n.removeprefix('loss_'))} {record[n]:.3f}" for n in shown if n in record)
