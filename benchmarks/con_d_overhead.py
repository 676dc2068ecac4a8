"""What Con-D costs a training step of BLIP-2 stage 1, with the model's frozen ViT shared and with a ViT of its own.

    python benchmarks/con_d_overhead.py [--batch-size 32] [--rounds 15] [--threads 1]

Measured: forward, backward and optimizer of ``blip2_mafa`` at the size ``tiny``, image encoder frozen, random images and captions.
The variants take turns within a round, so that other work on the machine hits all alike; an overhead is the median of each round's
own ratio. "Con-D / rest" compares, within one step, Con-D's CPU time with that of everything else: what noise touches least.

Counted: FLOPs at the paper's size on the meta device (48 images a GPU, texts of 32 tokens; ViT-g/14 at 224 px, a Q-Former of 12
layers). Backward is counted too, not assumed: twice the forward where weights and inputs want gradients, nothing for frozen parts.
"""

from __future__ import annotations

import argparse
import datetime
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from grouping import machine
from omegaconf import OmegaConf
from torch import Tensor

from lavis_mafa.config.schema import Blip2Block, DiscriminatorBlock, typed_block
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.con_d import build_discriminator
from lavis_mafa.models.encoders import MINILM
from lavis_mafa.tools.cost import CON_D, CON_D_VIT, StepSize, cost_of

WORDS = "a red green blue round small big smiling face heart hand animal flag cat dog sign clock moon of with and on".split()
OFF, SHARED, OWN = "ECM off", "Con-D, ViT shared", "Con-D, own ViT"


def settings(size: str, changes: dict[str, Any]) -> Blip2Block:
    """The model type's block with nothing that would be downloaded."""
    config = OmegaConf.load(CONFIGS / f"blip2_mafa_{size}.yaml").model
    block: Blip2Block = typed_block("model", OmegaConf.merge(config, {"tokenizer": MINILM}, changes))
    return block


def trained_and_judges() -> tuple[Blip2Mafa, dict[str, Any]]:
    """A model whose image encoder is frozen, and Con-D of the same weights in both forms."""
    block = settings("tiny", {"image_encoder": {"freeze": True}})
    model = Blip2Mafa(block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "con_d.pth"
        torch.save({"model": model.state_dict()}, path)
        named = replace(block, discriminator=DiscriminatorBlock("blip2_mafa", str(path), "fp32"))
        judges = {SHARED: build_discriminator(named, model), OWN: build_discriminator(named, None)}
    return model.train(), {OFF: None, **judges}


class Timed:
    """A Con-D that keeps its own CPU seconds, in the tightest comparison there is: within one and the same step."""

    def __init__(self, con_d: Any) -> None:
        self.con_d, self.seconds = con_d, 0.0

    def in_step(self, *step: Any) -> Timed:
        self.con_d = self.con_d.in_step(*step)
        return self

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        begin = time.process_time()
        probability: Tensor = self.con_d.match_probability(samples, image_index, text_index)
        self.seconds = time.process_time() - begin
        return probability


def measure(batch_size: int, rounds: int) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    model, judges = trained_and_judges()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    size = model.settings.image_encoder.image_size
    # the step's CPU time and its time elapsed, Con-D's CPU time over that of the rest
    metrics: dict[str, list[tuple[float, float, float]]] = {name: [] for name in judges}
    names = list(judges)
    for turn in range(rounds + 2):
        samples = {
            "image": torch.randn(batch_size, 3, size, size),
            "text_input": [" ".join(rng.choices(WORDS, k=rng.randint(3, 10))) for _ in range(batch_size)],
            "index": torch.arange(batch_size),
        }
        for name in names[turn % 3 :] + names[: turn % 3]:
            judge = None if judges[name] is None else Timed(judges[name])
            model.settings.ecm.enabled = judge is not None
            model.set_discriminator(judge)
            begin = time.process_time(), time.perf_counter()
            model(samples).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cpu, elapsed = time.process_time() - begin[0], time.perf_counter() - begin[1]
            own = 0.0 if judge is None else judge.seconds
            if turn >= 2:  # the first ones warm up
                metrics[name].append((cpu, elapsed, own / (cpu - own)))
    print(f"{'':<20} {'CPU time':>10} {'overhead':>10} {'(quartiles)':>18} {'elapsed':>9} {'overhead':>10} {'Con-D/rest':>12}")
    for name, rows in metrics.items():
        (cpus, wall, shares), (off_cpus, off_wall, _) = zip(*rows, strict=True), zip(*metrics[OFF], strict=True)
        low, middle, high = overheads(cpus, off_cpus)
        print(
            f"{name:<20} {1000 * median(cpus):>7.0f} ms {middle:>+8.1f} % {f'({low:+.1f} to {high:+.1f} %)':>18}"
            f" {1000 * median(wall):>6.0f} ms {overheads(wall, off_wall)[1]:>+8.1f} % {100 * median(shares):>10.1f} %"
        )


def overheads(values: tuple[float, ...], off: tuple[float, ...]) -> list[float]:
    """Quartiles of each round's overhead in per cent."""
    return quantiles([100 * (value / without - 1) for value, without in zip(values, off, strict=True)], n=4)


def count_parts(batch: int, length: int) -> None:
    """The same for the paper's size, as ``lavis-mafa plan`` counts it."""
    block = settings("base", {"ecm": {"enabled": True}, "discriminator": {"arch": "blip2_mafa"}})
    parts = cost_of(block, StepSize(batch, length), own_vit=True).flops
    total = sum(part.total for name, part in parts.items() if name not in (CON_D, CON_D_VIT))
    print(f"{'TFLOP':<28} {'forward':>8} {'backward':>9} {'of a step':>10}")
    for name, part in parts.items():
        print(f"{name:<28} {part.forward / 1e12:>8.3f} {part.backward / 1e12:>9.3f} {100 * part.total / total:>8.1f} %")
    print(f"{'step without Con-D':<28} {total / 1e12:>8.3f} {'':>9} {100:>8.1f} %")
    shared, vit = (100 * parts[name].total / total for name in (CON_D, CON_D_VIT))
    print(f"overhead: {SHARED} {shared:+.1f} %; {OWN} {shared + vit:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="of the measured steps")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--paper-batch-size", type=int, default=48, help="per GPU, of the counted step")
    parser.add_argument("--text-length", type=int, default=32, help="of the counted step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"{datetime.date.today()}  {machine('cpu')}")
    print(f"\nmeasured: size tiny, {arguments.batch_size} pairs, {arguments.rounds} rounds")
    measure(arguments.batch_size, arguments.rounds)
    print(f"\ncounted: paper's size, {arguments.paper_batch_size} pairs, texts of {arguments.text_length} tokens")
    count_parts(arguments.paper_batch_size, arguments.text_length)


if __name__ == "__main__":
    main()
