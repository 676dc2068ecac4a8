"""A bounded sample of what Con-D decided while training, as Parquet, so that reports need no second pass."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor


class ConnectionRecord:
    """Keeps at most ``limit`` verdicts an epoch and rank, spread evenly over the epoch's steps and over both directions."""

    def __init__(self, folder: Path, rank: int, limit: int, steps_per_epoch: int, start_step: int = 0) -> None:
        self.folder, self.rank, self.limit, self.start_step = folder, rank, limit, start_step
        self.every = max(1, math.ceil(steps_per_epoch / max(limit, 1)))
        self.per_step = max(1, limit * self.every // max(steps_per_epoch, 1))
        self.rows: list[dict[str, Tensor]] = []

    def add(self, epoch: int, step: int, verdicts: dict[str, Tensor] | None) -> None:
        """Remember some of a step's verdicts; they stay on the device until the epoch ends."""
        if self.limit == 0 or verdicts is None or "probability" not in verdicts or step % self.every:
            return
        count = len(verdicts["image"])
        stride = max(1, count // self.per_step)
        # the offset moves with the step, so that no position in the batch is preferred
        chosen = torch.arange(step % stride, count, stride, device=verdicts["image"].device)[: self.per_step]
        row = {name: value[chosen] for name, value in verdicts.items()}
        row["direction"] = chosen >= count // 2
        row["step"] = torch.full_like(chosen, step)
        row["epoch"] = torch.full_like(chosen, epoch)
        self.rows.append(row)

    def write(self, epoch: int) -> Path | None:
        """Write this epoch's sample to ``connections/epoch_E_rank_R.parquet``; beside the part before it, for a resumed epoch."""
        rows, self.rows = self.rows, []
        part, self.start_step = f"_from_{self.start_step}" if self.start_step else "", 0
        if not rows:
            return None
        columns = {name: torch.cat([r[name] for r in rows]).cpu() for name in rows[0]}
        keep = columns["exists"]
        verdict = torch.where(columns["positive"], 2, torch.where(columns["ambiguous"], 1, 0))[keep]
        table = pa.table(
            {
                "epoch": columns["epoch"][keep].numpy(),
                "step": columns["step"][keep].numpy(),
                "direction": _words(["text for image", "image for text"], columns["direction"][keep].long()),
                "image": columns["image"][keep].numpy(),
                "text": columns["text"][keep].numpy(),
                "probability": columns["probability"][keep].float().numpy(),
                "verdict": _words(["negative", "ambiguous", "positive"], verdict),
            }
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch_{epoch}{part}_rank_{self.rank}.parquet"
        pq.write_table(table, path)
        return path


def _words(names: list[str], codes: Tensor) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.numpy(), type=pa.int32()), names)
