"""Memory and time that BLIP-2 stage 1 and stage 2 need on a GPU at the paper's size, computed.

    python benchmarks/blip2_cost.py [--stage-1 48 16] [--stage-2 64 16] [--gpus 8]

The tables of docs/blip2.md: ``lavis-mafa plan`` for each variant of Con-D and each OPT side by side, and the largest batches.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any

from con_d_overhead import settings
from grouping import machine
from omegaconf import OmegaConf

from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.tools.cost import StepSize, cost_of
from lavis_mafa.tools.plan import gpu_memory

GB, SIZES, LENGTH = 1e9, (16, 24, 40, 80), 32
RESERVE = 2e9  # CUDA's context and the allocator's gaps
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

    def peak(batch: int) -> int:
        cost = cost_of(block, StepSize(batch, LENGTH, gathered), precision, "cuda", own_vit)
        return sum(gpu_memory(cost, gpus).values())

    few, many = peak(8), peak(16)
    pair = (many - few) / 8
    return few - 8 * pair, pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-1", type=int, nargs="+", default=[48, 16], help="batch sizes per GPU")
    parser.add_argument("--stage-2", type=int, nargs="+", default=[64, 16], help="batch sizes per GPU")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of a GPU in bf16")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    parser.add_argument("--captions", type=float, default=5e6)
    parser.add_argument("--epochs", type=int, default=10)
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
        parts = cost_of(block, StepSize(4, LENGTH, gathered), own_vit=own_vit).flops
        flops = sum(part.total for part in parts.values()) / 4
        seconds = flops / (arguments.tflops * 1e12 * arguments.share)
        hours = seconds * arguments.captions * arguments.epochs / arguments.gpus / 3600
        steps = ", ".join(f"{batch}: {batch * seconds:.2f} s" for batch in batches[name])
        print(f"{name:<26}{flops / 1e9:>13,.0f}{hours:>8.1f}   {steps}")


if __name__ == "__main__":
    main()
