"""Steps whose loss or gradient is not finite: written down, and the end of a run when they do not stop."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_mafa.errors import UserError

logger = logging.getLogger(__name__)
SHOWN = 8  # samples in the message; the file has all


class NonFinite:
    """Watches the steps that were not applied.

    Args:
        path: where one line of JSON is written for each batch of such a step: samples, losses, score ranges.
        at_most: so many in a row end the run.

    Example:
        >>> watch = NonFinite(Path("nonfinite.rank0.jsonl"), at_most=10)
        >>> watch.add(0, 7, samples, output, applied=True)
    """

    def __init__(self, path: Path, at_most: int) -> None:
        self.path, self.at_most = path, at_most
        self.in_a_row = self.count = 0
        self._window: list[tuple[int, int, Any, Any]] = []

    def add(
        self, epoch: int, step: int, samples: dict[str, Any], output: Any, applied: bool | None, norm: Tensor | None = None
    ) -> None:
        """One batch; ``applied`` is None while its accumulation window goes on.

        Raises:
            UserError: too many in a row.
        """
        self._window.append((epoch, step, samples.get("index"), output))
        if applied is None:
            return
        window, self._window = self._window, []
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.count += 1
        records = [record(*batch, norm) for batch in window]
        with open(self.path, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        if self.count == 1:
            logger.warning("epoch %d, step %d is not applied: %s (all such steps: %s)", epoch, step + 1, told(records[-1]), self.path)
        if self.in_a_row >= self.at_most:
            raise UserError(
                f"{self.in_a_row} steps in a row (run.max_nonfinite_steps) have a loss or gradient that is not finite; none was "
                f"applied, nothing of them is in a checkpoint. The last one, epoch {epoch}, step {step + 1}: {told(records[-1])}. "
                f"All of them are in {self.path}. A lower run.init_lr, run.grad_clip: 1.0 or run.precision: fp32 usually help."
            )


def record(epoch: int, step: int, index: Any, output: Any, norm: Tensor | None) -> dict[str, Any]:
    """What is known of a batch, as JSON can hold it: numbers that are not finite become words."""
    losses = {name: _number(value) for name, value in output.items() if name.startswith("loss") and isinstance(value, Tensor)}
    ranges = {name: [_number(v) for v in value.flatten()] for name, value in (output.get("ranges") or {}).items()}
    return {
        "epoch": epoch,
        "step": step + 1,
        "losses": losses,
        "gradient_norm": None if norm is None else _number(norm),
        "ranges": ranges,
        "samples": index.tolist() if isinstance(index, Tensor) else None,
    }


def told(what: dict[str, Any]) -> str:
    """A record in one line."""
    parts = [*what["losses"].items()]
    if what["gradient_norm"] is not None:
        parts.append(("gradient norm", what["gradient_norm"]))
    words = [f"{name} {value}" for name, value in parts]
    words += [f"{name} {' to '.join(map(str, values))}" for name, values in what["ranges"].items()]
    samples = what["samples"] or []
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    if samples:
        words.append(f"samples {', '.join(map(str, samples[:SHOWN]))}{more}")
    return ", ".join(words)


def _number(value: Tensor) -> float | str:
    number = float(value.detach().float())
    return float(f"{number:.6g}") if abs(number) < float("inf") else str(number)
