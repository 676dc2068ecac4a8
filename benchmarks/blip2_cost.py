"""Memory and time that BLIP-2 stage 1 and stage 2 need on a GPU at the paper's size, computed.

    python benchmarks/blip2_cost.py [--stage-1 48 16] [--stage-2 64 16] [--gpus 8] [--check]

The tables of docs/blip2.md: ``lavis-mafa plan`` for each variant of Con-D and each OPT side by side, and the largest batches.
``--check`` compares what ``plan`` adds up by parts with what autograd saves of the models' own forward, on fake tensors.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any
from unittest.mock import patch

import torch
from con_d_overhead import settings
from grouping import machine
from omegaconf import OmegaConf

from lavis_mafa.analysis.cost.build import build
from lavis_mafa.analysis.cost.flops import step_flops
from lavis_mafa.analysis.cost.memory import RESERVE, gpu_memory, lm_logits, saved_bytes, weights_of
from lavis_mafa.analysis.cost.step import StepSize, no_memory, pretend
from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.base import CONFIGS

GB, SIZES, LENGTH = 1e9, (16, 24, 40, 80), 32
CON_D = {"ecm": {"enabled": True}, "discriminator": {"arch": "blip2_mafa"}}


def opt(kind: str) -> Any:
    return typed_block("model", OmegaConf.load(CONFIGS / f"blip2_opt_mafa_{kind}.yaml").model)


def variants(gpus: int) -> dict[str, tuple[Any, int, bool, str]]:
    """Settings, gathered batches, whether Con-D has its own ViT, run.precision."""
    judged = settings("base", CON_D)
    return {
        "stage 1, no Con-D": (settings("base", {"ecm": {"enabled": False}}), 1, False, "bf16"),
        "stage 1, ViT shared": (judged, 1, False, "bf16"),
        "stage 1, shared, global": (judged, gpus, False, "bf16"),
        "stage 1, Con-D's own ViT": (judged, 1, True, "bf16"),
        "stage 2, opt2.7b": (opt("opt2.7b"), 1, False, "fp16"),
        "stage 2, opt6.7b": (opt("opt6.7b"), 1, False, "fp16"),
    }


def peaks(block: Any, gathered: int, own_vit: bool, precision: str, gpus: int) -> tuple[float, float]:
    """Bytes of a GPU: what is there without a batch, and what each pair adds."""
    weights = weights_of(block, own_vit)

    def peak(batch: int) -> int:
        size = StepSize(batch, LENGTH, gathered)
        return gpu_memory(weights, saved_bytes(block, size, precision), lm_logits(block, size), gpus).peak

    few, many = peak(8), peak(16)
    pair = (many - few) / 8
    return few - 8 * pair, pair


def saved_by_the_model(block: Any, batch: int, precision: str) -> int:
    """What autograd saves in the model's own forward."""
    with torch.device("meta"):
        model = build(block)
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    half = torch.bfloat16 if precision == "bf16" else torch.float16
    side = block.image_encoder.image_size
    words = patch("torch.nonzero", lambda there: torch.arange(there.numel(), device=there.device)[:, None])
    cuda = patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with no_memory(), cuda, words, patch("torch.cuda.is_bf16_supported", lambda *_, **__: True):
        pretend(model, "cuda")
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        samples = {"image": torch.empty(batch, 3, side, side, device="cuda"), "text_input": ["a " * 40] * batch}
        kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cuda", half), kept:
            output = model(samples)  # noqa: F841 - its graph must live
    return sum(size for storage, (size, _) in saved.items() if storage not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-1", type=int, nargs="+", default=[48, 16], help="batch sizes per GPU")
    parser.add_argument("--stage-2", type=int, nargs="+", default=[64, 16], help="batch sizes per GPU")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of a GPU in bf16")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    parser.add_argument("--captions", type=float, default=5e6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="compare with what autograd saves of the whole model")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}  {machine('cpu')}\n")

    rows = variants(arguments.gpus)
    memory = {name: peaks(*row, arguments.gpus) for name, row in rows.items()}
    print(f"{'GB per GPU':<26}{'no batch':>10}{'each pair':>11}   peak at batch")
    batches = {name: arguments.stage_1 if name.startswith("stage 1") else arguments.stage_2 for name in rows}
    for name, (constant, pair) in memory.items():
        cells = ", ".join(f"{batch}: {(constant + batch * pair) / GB:.1f}" for batch in batches[name])
        print(f"{name:<26}{constant / GB:>10.2f}{pair / GB:>11.3f}   {cells}")
    print(f"\n{f'largest batch, {RESERVE / GB:g} GB left free':<34}" + "".join(f"{size:>6} GB" for size in SIZES))
    for name, (constant, pair) in memory.items():
        largest = [max(0, int((size * GB - RESERVE - constant) / pair)) for size in SIZES]
        print(f"{name:<34}" + "".join(f"{batch or '-':>9}" for batch in largest))
    peak = f"{100 * arguments.share:g} % of {arguments.tflops:g} TFLOP/s"
    print(f"\n{arguments.gpus} GPUs, {peak}, {arguments.captions:,.0f} captions x {arguments.epochs} epochs")
    print(f"{'':<26}{'GFLOP a pair':>13}{'hours':>8}   step at batch")
    for name, (block, gathered, own_vit, _) in rows.items():
        parts = step_flops(block, StepSize(4, LENGTH, gathered), own_vit)
        flops = sum(part.total for part in parts.values()) / 4
        seconds = flops / (arguments.tflops * 1e12 * arguments.share)
        hours = seconds * arguments.captions * arguments.epochs / arguments.gpus / 3600
        steps = ", ".join(f"{batch}: {batch * seconds:.2f} s" for batch in batches[name])
        print(f"{name:<26}{flops / 1e9:>13,.0f}{hours:>8.1f}   {steps}")
    if arguments.check:
        print(f"\n{'saved by autograd, batch of 8':<34}{'by parts':>9}{'whole':>9}")
        for name in ("stage 1, no Con-D", "stage 2, opt2.7b", "stage 2, opt6.7b"):
            block, _, _, precision = rows[name]
            parts, found = saved_bytes(block, StepSize(8, LENGTH), precision), saved_by_the_model(block, 8, precision)
            added = sum(parts.values()) - parts["images"]
            print(f"{name:<34}{added / GB:>6.2f} GB{found / GB:>6.2f} GB  {100 * (added / found - 1):+.1f} %")


if __name__ == "__main__":
    main()
