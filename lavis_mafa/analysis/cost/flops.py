"""FLOPs of a training step by part, counted by running it on tensors without memory: two a multiply-add, matrix products alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lavis_mafa.analysis.cost.build import build, build_con_d
from lavis_mafa.analysis.cost.step import CON_D, CON_D_VIT, IMAGE, StepSize, leaf, no_memory, pretend, run_step


@dataclass(frozen=True)
class Flops:
    """Of one part: forward, and backward with its recomputing."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def count(forward: Callable[[], Any]) -> tuple[Flops, Any]:
    """FLOPs of a forward and of the backward from all it returns; what it returns.

    Backward is counted, not assumed: twice the forward where weights and inputs want gradients, nothing for frozen parts.
    """
    with FlopCounterMode(display=False) as first:
        output = forward()
    roots = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad and t.grad_fn is not None]
    with FlopCounterMode(display=False) as second:
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    return Flops(float(first.get_total_flops()), float(second.get_total_flops())), output


def step_flops(settings: Any, size: StepSize, own_vit: bool = False) -> dict[str, Flops]:
    """FLOPs of each part of one step on one GPU.

    Args:
        settings: a typed ``model:`` block of ours; its files are not needed and never read.
        size: of the step.
        own_vit: a BLIP-2 Con-D brings its own image encoder.

    Example:
        >>> step_flops(settings, StepSize(batch=48, text_length=32))["image encoder"].backward  # frozen
        0.0
    """
    settings = in_fp32(settings)
    parts: dict[str, Flops] = {}

    def record(name: str, forward: Callable[[], Any]) -> Any:
        flops, output = count(forward)
        parts[name] = parts.get(name, Flops()) + flops
        return leaf(output)

    with torch.device("meta"):
        model, con_d = build(settings), build_con_d(settings, own_vit)
    # the meta device is five times as fast as fake tensors, but knows no autocast, and OPT makes a number out of a tensor
    meta = settings.arch != "blip2_opt_mafa"
    device = "meta" if meta else "cpu"
    with contextlib.ExitStack() as stack:
        if meta:
            stack.enter_context(patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()))
            stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: False))
        else:
            stack.enter_context(no_memory())
            pretend(model, device)
        run_step(model, con_d, size, device, record)
        vit = _own_vit(con_d)
        if vit is not None:
            side = settings.image_encoder.image_size
            with torch.no_grad():
                parts[CON_D_VIT], _ = count(lambda: vit(torch.empty(size.batch, 3, side, side, device=device)))
            parts[CON_D] = Flops(parts[CON_D].forward - parts[CON_D_VIT].forward)
    return parts


def grit_flops_of_pair(grit: Any, dim: int) -> float:
    """What ordering costs for each pair, on the CPU and beside the step: similarities of a sub-queue in both directions."""
    if not grit.enabled:
        return 0.0
    # by rows, one direction is computed at each hop, and half of the rows are dropped whenever half are visited
    return grit.search_space * dim * (4.0 if grit.memory == "matrix" else 4.0 / 3.0)


def in_fp32(settings: Any) -> Any:
    """The block for counting: FLOPs do not depend on precision, and nothing is recomputed here."""
    settings = deepcopy(settings)
    for name in ("image_encoder", "language_model"):
        part = getattr(settings, name, None)
        if part is not None and hasattr(part, "precision"):
            setattr(settings, name, replace(part, precision="fp32"))
    settings.image_encoder.gradient_checkpointing = False
    if getattr(settings, "discriminator", None) is not None:
        settings.discriminator.precision = "fp32"
    return settings


def recomputed(settings: Any, parts: dict[str, Flops]) -> dict[str, Flops]:
    """With gradient checkpointing the image encoder's forward runs once more."""
    if not settings.image_encoder.gradient_checkpointing or not parts[IMAGE].backward:
        return parts
    return {**parts, IMAGE: parts[IMAGE] + Flops(0.0, parts[IMAGE].forward)}


def _own_vit(con_d: Any) -> Any:
    if con_d is None:
        return None
    return None if con_d.shared else con_d.network.image_states
