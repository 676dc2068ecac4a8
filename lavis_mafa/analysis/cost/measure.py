"""Seconds of a real step on this machine, with random images and captions and untrained weights."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lavis_mafa.analysis.cost.build import build, build_con_d
from lavis_mafa.errors import UserError
from lavis_mafa.grit import group_by_similarity
from lavis_mafa.runners.step import autocast

MOST_FLOPS = 2e12  # of a step on a CPU: a minute


@dataclass(frozen=True)
class Measured:
    """Medians of a few steps."""

    machine: str
    steps: int
    seconds: float  # of a step
    con_d_seconds: float  # of it, 0 without Con-D
    grouping_seconds: float  # of one sub-queue of GRIT, 0 without

    def line(self, batch: int, search_space: int) -> str:
        text = f"Measured on {self.machine}: {self.seconds:.3f} s a step (median of {self.steps}), "
        text += f"{batch / self.seconds:,.1f} pairs a second"
        if self.con_d_seconds:
            text += f"; Con-D {100 * self.con_d_seconds / (self.seconds - self.con_d_seconds):+.1f} %"
        if self.grouping_seconds:
            share = self.grouping_seconds * batch / search_space / self.seconds
            text += (
                f"; GRIT orders {search_space} pairs in {self.grouping_seconds:.3f} s, {100 * share:.1f} % of their steps, in a thread"
            )
        return text + ". Data loading is not in it."


def measure(model_block: Any, run: Any, flops: float, text_length: int, own_vit: bool = False, steps: int = 3) -> Measured:
    """Time whole training steps of this YAML: forward, backward, AdamW.

    Raises:
        UserError: the model is too large for this machine.
    """
    device = torch.device("cuda" if run.device.startswith("cuda") and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and flops > MOST_FLOPS:
        raise UserError(
            f"--measure: a step is {flops / 1e12:,.1f} TFLOP, too much for a CPU (at most {MOST_FLOPS / 1e12:g}); "
            "try --options model.model_type=tiny, or a smaller --batch-size."
        )
    torch.manual_seed(run.seed)
    with device:
        model, con_d = build(model_block), build_con_d(model_block, own_vit)
    model.to(device)
    timed = None if con_d is None else _Timed(con_d, device)
    if hasattr(model, "set_discriminator"):
        model.set_discriminator(timed)
        if timed is None:  # of ground truth, which costs nothing
            model.settings.ecm.enabled = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.init_lr, weight_decay=run.weight_decay)
    side, batch = model_block.image_encoder.image_size, run.batch_size_train
    captions = [" ".join(["a"] * (text_length - 2))] * batch
    seconds, judging = [], []
    for turn in range(steps + 1):
        samples = {"image": torch.randn(batch, 3, side, side, device=device), "text_input": captions}
        begin = _now(device)
        with autocast(run.precision, device):
            loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if turn:  # the first one warms up
            seconds.append(_now(device) - begin)
            judging.append(0.0 if timed is None else timed.seconds)
    grouping = 0.0
    if run.grit.enabled:
        image, text = torch.nn.functional.normalize(torch.randn(2, run.grit.search_space, model_block.embed_dim), dim=-1)
        begin = time.perf_counter()
        group_by_similarity(image, text, memory=run.grit.memory)
        grouping = time.perf_counter() - begin
    return Measured(machine(device), steps, median(seconds), median(judging), grouping)


class _Timed:
    """A Con-D that keeps the seconds it takes."""

    def __init__(self, con_d: Any, device: torch.device) -> None:
        self.con_d, self.device, self.seconds = con_d, device, 0.0

    def match_probability(self, *arguments: Any) -> Any:
        begin = _now(self.device)
        probability = self.con_d.match_probability(*arguments)
        self.seconds = _now(self.device) - begin
        return probability


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> str:
    """What it was measured on, for a reader."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
