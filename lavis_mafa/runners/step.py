"""One optimisation step: autocast, accumulation, clipping, loss scaling; agreed on by all ranks, not applied if not finite."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.distributed import host_group
from lavis_mafa.errors import UserError
from lavis_mafa.tasks.task import MafaTask

logger = logging.getLogger(__name__)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 8  # samples of a step that is not finite, in the message; the file has all


def autocast(precision: str, device: torch.device) -> Any:
    """The context that ``run.precision`` asks for; nothing at all for fp32."""
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=PRECISIONS[precision])


@dataclass(frozen=True)
class StepResult:
    """What became of one batch.

    Attributes:
        output: of the model; of LAVIS's tasks the loss alone.
        applied: whether the accumulation window that ended here changed the weights; None inside a window. A loss scaler that skips
            a step to find its scale did what it should: that counts as applied.
        gradient_norm: of that window, before clipping; None inside of it.
        stop: the number of the signal that asked any rank to stop, else 0 (of several the largest).
        save_failed: could some rank's last checkpoint not be written?
    """

    output: dict[str, Any]
    applied: bool | None = None
    gradient_norm: Tensor | None = None
    stop: int = 0
    save_failed: bool = False


class Vote:
    """One small all-reduce per optimizer step, on the host: no rank acts alone, and no GPU waits for it.

    ``stop`` and ``save_failed`` are asked for what :class:`StepResult` says of them, of this rank.
    """

    def __init__(self, stop: Callable[[], int] = lambda: 0, save_failed: Callable[[], bool] = lambda: False) -> None:
        self._stop, self._save_failed = stop, save_failed
        self._group = host_group()

    def __call__(self, bad: bool) -> tuple[int, bool, bool]:
        """``stop``, ``save_failed`` and "is the step bad", each the largest of any rank's."""
        flags = torch.tensor([self._stop(), self._save_failed(), bad], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return int(flags[0]), bool(flags[1]), bool(flags[2])


class Stepper:
    """Forward and backward on each batch, and the optimizer's step at the end of each accumulation window."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        settings: RunBlock,
        device: torch.device,
        vote: Callable[[bool], tuple[int, bool, bool]] | None = None,
    ) -> None:
        self.task, self.model, self.optimizer, self.scaler = task, model, optimizer, scaler
        self.settings, self.device, self.vote = settings, device, vote or Vote()
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, samples: dict[str, Any], step: int, steps_per_epoch: int) -> StepResult:
        """Train on one batch."""
        window = self.settings.accum_grad_iters
        first = step - step % window
        length = min(window, steps_per_epoch - first)  # the epoch's last window may be short
        last = step == first + length - 1
        alone = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(self.settings.precision, self.device):
                if isinstance(self.task, MafaTask):
                    output = self.task.step_output(model=self.model, samples=samples)
                else:
                    output = _of_lavis(self.task.train_step(model=self.model, samples=samples))
            loss = output["loss"] / length
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._bad_loss |= ~torch.isfinite(loss.detach())
        return self._update(output) if last else StepResult(output)

    def _update(self, output: dict[str, Any]) -> StepResult:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = float("inf") if self.settings.grad_clip is None else self.settings.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
        bad = self._bad_loss
        if self.scaler is None or self.scaler.get_scale() <= 1.0:  # else a gradient beyond fp16 is the scaler's to mend
            bad = bad | ~torch.isfinite(norm)
        stop, save_failed, bad_anywhere = self.vote(bool(bad))  # the one place where the host waits for the step
        if not bad_anywhere:
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._bad_loss = torch.zeros_like(self._bad_loss)
        return StepResult(output, not bad_anywhere, norm, stop, save_failed)


def _of_lavis(given: Any) -> dict[str, Any]:
    """What a task of LAVIS returns for a step: the loss, and in versions later than 1.0.2 its parts too."""
    loss, parts = given if isinstance(given, tuple) else (given, {})
    return {**parts, "loss": loss}


class NonFinite:
    """Writes down the steps that were not applied, a line of JSON for each of their batches; ``at_most`` in a row end the run."""

    def __init__(self, path: Path, at_most: int) -> None:
        self.path, self.at_most = path, at_most
        self.in_a_row = self.count = 0
        self._window: list[tuple[int, int, Any, Any]] = []

    def add(self, epoch: int, step: int, samples: dict[str, Any], result: StepResult) -> None:
        """Look at one batch's result; raises UserError when it is one too many."""
        self._window.append((epoch, step, samples.get("index"), result.output))
        if result.applied is None:
            return
        window, self._window = self._window, []
        if result.applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.count += 1
        records = [_record(*batch, result.gradient_norm) for batch in window]
        with open(self.path, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        if self.count == 1:
            logger.warning("epoch %d, step %d is not applied: %s (all such steps: %s)", epoch, step + 1, _line(records[-1]), self.path)
        if self.in_a_row >= self.at_most:
            raise UserError(
                f"{self.in_a_row} steps in a row (run.max_nonfinite_steps) have a loss or gradient that is not finite; none was "
                f"applied, nothing of them is in a checkpoint. The last one, epoch {epoch}, step {step + 1}: {_line(records[-1])}. "
                f"All of them are in {self.path}. A lower run.init_lr, run.grad_clip: 1.0 or run.precision: fp32 usually help."
            )


def _record(epoch: int, step: int, index: Any, output: Any, norm: Tensor | None) -> dict[str, Any]:
    """What is known of a batch, as JSON can hold it: numbers that are not finite become words."""
    return {
        "epoch": epoch,
        "step": step + 1,
        "losses": {name: _number(value) for name, value in losses_of(output).items()},
        "gradient_norm": None if norm is None else _number(norm),
        "ranges": {name: [_number(v) for v in value.flatten()] for name, value in (output.get("ranges") or {}).items()},
        "samples": index.tolist() if isinstance(index, Tensor) else None,
    }


def losses_of(output: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss in a model's output, by name."""
    return {name: value for name, value in output.items() if name.startswith("loss") and isinstance(value, Tensor)}


def _line(record: dict[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in record["losses"].items()]
    words += [] if record["gradient_norm"] is None else [f"gradient norm {record['gradient_norm']}"]
    words += [f"{name} {' to '.join(map(str, values))}" for name, values in record["ranges"].items()]
    samples = record["samples"] or []
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return ", ".join(words) + (f", samples {', '.join(map(str, samples[:SHOWN]))}{more}" if samples else "")


def _number(value: Tensor) -> float | str:
    number = float(value.detach().float())
    return float(f"{number:.6g}") if abs(number) < float("inf") else str(number)
