"""Memory of a training on each GPU and in the host: weights and optimizer by counting, what autograd saves by a run without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lavis_mafa.analysis.cost.build import build, build_con_d
from lavis_mafa.analysis.cost.step import IMAGE, LM, StepSize, leaf, modules_of, no_memory, pretend, run_step
from lavis_mafa.config.schema import Grit
from lavis_mafa.grit.grouping import MATRIX_BUDGET

RESERVE = 2e9  # CUDA's context and the allocator's gaps
INDEX, FP32 = 8, 4  # bytes
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """How many weights there are, and what they take as they are stored."""

    trained: int
    frozen: int
    teacher: int
    con_d: int
    bytes_trained: int
    bytes_frozen: int
    bytes_teacher: int  # with its queue of features
    bytes_con_d: int


def weights_of(settings: Any, own_vit: bool = False) -> Weights:
    """Count the weights of a ``model:`` block's model and Con-D on the meta device."""
    with torch.device("meta"):
        model, con_d = build(settings), build_con_d(settings, own_vit)
    groups: dict[str, list[Tensor]] = {"trained": [], "frozen": [], "teacher": []}
    for name, weight in model.named_parameters():
        kind = "teacher" if name.split(".")[0].endswith("_m") else "trained" if weight.requires_grad else "frozen"
        groups[kind].append(weight)
    queue = sum(size_of(b) for name, b in model.named_buffers() if "queue" in name)
    judge = [p for part in modules_of(None, con_d) for p in part.parameters()]
    counts = {kind: sum(p.numel() for p in group) for kind, group in groups.items()}
    sizes = {f"bytes_{kind}": sum(map(size_of, group)) for kind, group in groups.items()}
    sizes["bytes_teacher"] += queue
    return Weights(**counts, **sizes, con_d=sum(p.numel() for p in judge), bytes_con_d=sum(map(size_of, judge)))


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def saved_bytes(settings: Any, size: StepSize, precision: str, device: str = "cuda") -> dict[str, int]:
    """Bytes held when backward begins, by the part that first held them: what autograd saves, images and states; no weights.

    The step's own forward runs on tensors without memory, in ``run.precision`` and as a GPU would choose types, whether this
    machine has one or not. Con-D, without gradients, leaves nothing behind.

    Args:
        settings: a typed ``model:`` block.
        size: of the step.
        precision: run.precision.
        device: cuda or cpu.
    """
    checkpointing = settings.image_encoder.gradient_checkpointing
    settings = replace(settings, image_encoder=replace(settings.image_encoder, gradient_checkpointing=False))
    with torch.device("meta"):
        model = build(settings)
    parts: dict[str, int] = {}
    alive: dict[int, Tensor] = {}  # by storage; kept, so that no storage's address is used twice
    outputs: list[Any] = []

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_memory())
        pretend(model, device)
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        if device == "cuda":
            for name, answer in (("cuda.amp.common.amp_definitely_not_available", False), ("cuda.is_bf16_supported", True)):
                stack.enter_context(patch(f"torch.{name}", lambda *_, answer=answer, **__: answer))
        if precision != "fp32":
            stack.enter_context(torch.autocast(device, PRECISIONS[precision]))

        def record(name: str, forward: Callable[[], Any]) -> Any:
            parts.setdefault(name, 0)

            def hold(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own and storage._cdata not in alive:
                    alive[storage._cdata] = tensor
                    parts[name] += storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
                output = forward()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    hold(tensor)
            outputs.append(output)
            return leaf(output)

        run_step(model, None, size, device, record)
    side = settings.image_encoder.image_size
    parts["images"] = size.batch * 3 * side * side * FP32
    if checkpointing and parts[IMAGE]:  # a block's input for each block, and one block while it is run again
        encoder = settings.image_encoder
        tokens = (side // encoder.patch_size) ** 2 + 1
        parts[IMAGE] = encoder.depth * size.batch * tokens * encoder.width * FP32 + parts[IMAGE] // encoder.depth
    return parts


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on each GPU, computed."""

    trained: int  # weights in fp32
    frozen: int
    gradients: int
    optimizer: int  # AdamW's two moments
    buckets: int  # of DDP
    teacher: int  # and its queue
    con_d: int
    saved: int  # when backward begins, half-precision copies of weights among it
    transient: int  # as backward begins: the logits of the LM head once more in fp32, twice

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


def gpu_memory(weights: Weights, saved: dict[str, int], logits: int, gpus: int) -> GpuMemory:
    """Put together what a GPU holds at its fullest: when backward begins with the LM head, all gradients allocated.

    Args:
        weights: from :func:`weights_of`.
        saved: from :func:`saved_bytes`.
        logits: numbers that the LM head gives in one step.
        gpus: more than one means DDP.
    """
    each = FP32 * weights.trained
    return GpuMemory(
        trained=weights.bytes_trained,
        frozen=weights.bytes_frozen,
        gradients=each,
        optimizer=2 * each,
        buckets=each if gpus > 1 else 0,
        teacher=weights.bytes_teacher,
        con_d=weights.bytes_con_d,
        saved=sum(saved.values()),
        transient=2 * FP32 * logits if LM in saved else 0,
    )


def lm_logits(settings: Any, size: StepSize) -> int:
    """Numbers that the LM head gives in one step."""
    texts = round(size.batch * (1 + size.new_positives))
    if settings.arch == "blip2_opt_mafa":
        model = settings.language_model
        return size.batch * (settings.qformer.queries + size.text_length) * (50272 if model.init is not None else 260)
    share = settings.mlm.mask_probability * (size.text_length - 2) if settings.arch == "albef_mafa" else size.text_length - 1
    return round(texts * share * 30522)


@dataclass(frozen=True)
class HostMemory:
    """Bytes in the memory of the host for each process, computed."""

    queue: int  # two queues: one fills while the other is grouped
    grouping: int  # the shuffled copy, and the similarity matrices
    order: int  # which sample is served when


def grit_memory(grit: Grit, dim: int, samples: int) -> HostMemory:
    """GRIT's queue and what grouping it takes; see :mod:`lavis_mafa.grit`."""
    if not grit.enabled:
        return HostMemory(0, 0, samples * INDEX)
    queue = grit.queue_size * (2 * dim * FP32 + INDEX)
    matrices = 0
    if grit.memory == "matrix":
        pair = 2 * grit.search_space**2
        matrices = FP32 * pair * min(grit.queue_size // grit.search_space, max(1, MATRIX_BUDGET // pair))
    return HostMemory(2 * queue, 2 * queue + matrices, 2 * samples * INDEX)
