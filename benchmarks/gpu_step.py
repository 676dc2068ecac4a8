"""What a whole training step takes on one GPU at the paper's size, in time and memory, and what `lavis-mafa plan` computes for it.

    python -W ignore benchmarks/gpu_step.py [--batch-size 96] [--steps 20] [--tiny]

Measured: the runner's step (forward, backward, gradient norm, fused AdamW) on random images and captions of 25 tokens, models from
scratch; the median of single steps, each waited for. Con-D is a model of the same size, untrained, so its answers are replaced: a tenth
of the hard negatives are new positives. Data loading is not in it.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from statistics import median
from typing import Any

import lavis  # noqa: F401 - registers our models
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.plugin import register
from lavis_mafa.runners.step import Stepper
from lavis_mafa.tasks.pretrain import MafaPretrainTask
from lavis_mafa.tools.cost import build, build_con_d
from lavis_mafa.tools.plan import Wanted, machine, make_plan

TOKENS, SHARE, WARM_UP = 25, 10, 4
RUNS = [  # model, run.precision, TF32, Con-D's precision
    ("albef_mafa", "bf16", False, None),
    ("albef_mafa", "bf16", False, "bf16"),
    ("albef_mafa", "fp32", True, None),
    ("albef_mafa", "fp32", True, "bf16"),
    ("albef_mafa", "fp32", False, None),
    ("albef_mafa", "fp32", False, "bf16"),
    ("blip_mafa", "bf16", False, None),
    ("blip_mafa", "bf16", False, "bf16"),
]


class Judge:
    """Asks Con-D, and answers for it."""

    def __init__(self, con_d: Any) -> None:
        self.con_d = con_d

    def in_step(self, *step: Any) -> Judge:
        return Judge(self.con_d.in_step(*step))

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        self.con_d.match_probability(samples, image_index, text_index)
        return torch.where(torch.arange(len(image_index), device=image_index.device) % SHARE == 0, 0.9, 0.1)


def batch_of(block: Any, size: int, number: int, device: torch.device) -> dict[str, Any]:
    rng, side = random.Random(number), block.image_encoder.image_size
    captions = [" ".join(f"word{rng.randrange(2000, 8000)}" for _ in range(TOKENS - 2)) for _ in range(size)]
    index = torch.arange(size, device=device) + size * number
    image = torch.randn(size, 3, side, side, device=device)
    return {"image": image, "text_input": captions, "index": index, "image_key": index, "grouped": True, "epoch": 2}


def run(arch: str, kind: str, precision: str, tf32: bool, con_d: str | None, size: int, steps: int, device: torch.device) -> str:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    config = OmegaConf.load(CONFIGS / f"{arch}_{kind}.yaml").model
    changes: dict[str, Any] = {"max_text_length": TOKENS, "itc": {"smoothing": 0.5}, "ecm": {"enabled": con_d is not None}}
    changes |= {} if con_d is None else {"discriminator": {"arch": arch, "checkpoint": "untrained", "precision": con_d}}
    changes |= {"mlm": {"mask_probability": 0.5}} if arch == "albef_mafa" else {}
    block: Any = typed_block("model", OmegaConf.merge(config, changes))
    settings: Any = typed_block("run", OmegaConf.create({"precision": precision, "device": device.type, "batch_size_train": size}))
    plan = make_plan(block, settings, Wanted(new_positives=0.0 if con_d is None else 2 / SHARE))
    torch.manual_seed(0)
    with device:
        model, judge = build(block), build_con_d(block)
    model.to(device)
    if judge is not None:
        model.set_discriminator(Judge(judge))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.02, fused=True)
    step = Stepper(MafaPretrainTask(settings), model, optimizer, None, settings, device, lambda bad: (0, False, bad))
    batches, seconds = [batch_of(block, size, number, device) for number in range(3)], []
    for number in range(WARM_UP + steps):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = now(device)
        assert step(batches[number % 3], number, 10**6).applied, "a loss or gradient is not finite"
        seconds.append(now(device) - begin)
    milliseconds = 1000 * median(seconds[WARM_UP:])
    spread = f"{1000 * min(seconds[WARM_UP:]):.0f} to {1000 * max(seconds[WARM_UP:]):.0f}"
    what = f"{arch} {precision}{' TF32' if tf32 else ''}, {'GRIT' if con_d is None else f'MAFA, Con-D {con_d}'}"
    line = f"{what:<42}{milliseconds:>6.0f} ms ({spread}), {size / milliseconds * 1000:,.0f} pairs a second"
    if device.type == "cpu":
        return line
    peak = torch.cuda.max_memory_allocated()
    line += f"; peak {peak / 1e9:.2f} GB, computed {plan.peak / 1e9:.2f} GB and {plan.total / 1e12:.1f} TFLOP"
    return line


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this script on a CPU")
    arguments = parser.parse_args()
    register()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine(device)}; {arguments.batch_size} pairs a step, the median of {arguments.steps} steps")
    for arch, precision, tf32, con_d in RUNS:
        kind = "tiny" if arguments.tiny else "base"
        print(run(arch, kind, precision, tf32, con_d, arguments.batch_size, arguments.steps, device), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
