"""What Con-D costs a training step of BLIP-2 stage 1, with the model's frozen ViT shared and with a ViT of its own.

    python benchmarks/con_d_overhead.py [--batch-size 32] [--rounds 25] [--threads 1]

Two answers. The first is measured: forward, backward and optimizer of ``blip2_mafa`` at the size ``tiny``, image encoder frozen,
random images and captions. The variants take turns within a round, so that other work on the machine hits all alike, and the
overhead is the median over the rounds of each round's own ratio, of the process's CPU time (which other work hardly changes) and of
the time elapsed. The second counts FLOPs at the paper's size on the meta device
(48 images a GPU, texts of 32 tokens; ViT-g/14 at 224 px, 12 layers of Q-Former): every part's forward and its backward, which is
counted as well and comes to twice the forward where weights and inputs want gradients, to nothing for the frozen ViT and Con-D.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lavis.models.eva_vit import VisionTransformer
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavis_mafa.common.model_settings import Blip2Block, DiscriminatorBlock
from lavis_mafa.common.typed import typed_block
from lavis_mafa.discriminators import build_discriminator
from lavis_mafa.discriminators.blip2 import Blip2Discriminator
from lavis_mafa.models.albef_encoders import MINILM
from lavis_mafa.models.blip2_mafa import Blip2Mafa
from lavis_mafa.models.blip2_pairs import Blip2Pairs, match_queries, query_pass
from lavis_mafa.models.mafa_model import CONFIGS

WORDS = "a red green blue round small big smiling face heart hand animal flag cat dog sign clock moon of with and on".split()
OFF, SHARED, OWN = "ECM off", "Con-D, ViT shared", "Con-D, own ViT"


def settings(size: str, changes: dict[str, Any]) -> Blip2Block:
    """The model type's block with nothing that would be downloaded."""
    config = OmegaConf.load(CONFIGS / f"blip2_mafa_{size}.yaml").model
    block: Blip2Block = typed_block("model", OmegaConf.merge(config, OmegaConf.create({"tokenizer": MINILM}), OmegaConf.create(changes)))
    return block


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {len(names)} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


# --- measured, at the size `tiny` -----------------------------------------------------------------------------------------


def trained_and_judges(precision: str) -> tuple[Blip2Mafa, dict[str, Any]]:
    """A model whose image encoder is frozen, and Con-D of the same weights in both forms."""
    block = settings("tiny", {"image_encoder": {"freeze": True}})
    model = Blip2Mafa(block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "con_d.pth"
        torch.save({"model": model.state_dict()}, path)
        named = replace(block, discriminator=DiscriminatorBlock("blip2_mafa", str(path), precision))
        judges = {SHARED: build_discriminator(named, model), OWN: build_discriminator(named, None)}
    return model.train(), {OFF: None, **judges}


def measure(batch_size: int, rounds: int, precision: str) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    model, judges = trained_and_judges(precision)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    size = model.settings.image_encoder.image_size
    seconds: dict[str, list[float]] = {name: [] for name in judges}
    elapsed: dict[str, list[float]] = {name: [] for name in judges}
    for turn in range(rounds + 2):
        samples = {
            "image": torch.randn(batch_size, 3, size, size),
            "text_input": [" ".join(rng.choices(WORDS, k=rng.randint(3, 10))) for _ in range(batch_size)],
            "index": torch.arange(batch_size),
        }
        names = list(judges)
        for name in names[turn % 3 :] + names[: turn % 3]:
            model.settings.ecm.enabled = judges[name] is not None
            model.set_discriminator(judges[name])
            begin, begin_elapsed = time.process_time(), time.perf_counter()
            loss = model(samples).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 2:  # the first ones warm up
                seconds[name].append(time.process_time() - begin)
                elapsed[name].append(time.perf_counter() - begin_elapsed)
    print(f"{'':<20} {'CPU time':>11} {'overhead':>11}   {'quartiles':<20} {'elapsed':>11} {'overhead':>11}")
    for name, values in seconds.items():
        low, median, high = ratios(values, seconds[OFF])
        print(
            f"{name:<20} {1000 * statistics.median(values):>8.1f} ms {median:>+9.1f} %   {f'{low:+.1f} to {high:+.1f} %':<20}"
            f" {1000 * statistics.median(elapsed[name]):>8.1f} ms {ratios(elapsed[name], elapsed[OFF])[1]:>+9.1f} %"
        )


def ratios(values: list[float], off: list[float]) -> list[float]:
    """Quartiles of each round's overhead in per cent."""
    return statistics.quantiles([100 * (value / without - 1) for value, without in zip(values, off, strict=True)], n=4)


# --- counted, at the paper's size -----------------------------------------------------------------------------------------


def count(forward: Callable[[], list[Tensor]]) -> tuple[float, float]:
    """FLOPs of a forward and of the backward from its outputs."""
    with FlopCounterMode(display=False) as first:
        outputs = forward()
    with FlopCounterMode(display=False) as second:
        wanted = [output for output in outputs if output.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.ones_like(output) for output in wanted])
    return float(first.get_total_flops()), float(second.get_total_flops())


def paper_size(batch: int, length: int) -> None:
    # fp32 counts what half precision would compute
    block = settings("base", {"image_encoder": {"init": None, "precision": "fp32"}, "qformer": {"init": None}})
    linspace: Any = torch.linspace  # LAVIS reads drop-path rates out of a tensor, which the meta device cannot give
    torch.linspace = lambda *a, **k: linspace(*a, **{**k, "device": "cpu"})  # type: ignore[assignment]
    try:
        with torch.device("meta"):
            model = Blip2Mafa(block)
            con_d = Blip2Discriminator(block, "fp32", shared=True)
    finally:
        torch.linspace = linspace
    con_d.network.eval().requires_grad_(False)
    model.train()

    with torch.device("meta"):
        image = torch.empty(batch, 3, block.image_encoder.image_size, block.image_encoder.image_size)
        ids, mask = torch.ones(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.long)
        triples, twice, own = torch.zeros(3 * batch).long(), torch.zeros(2 * batch).long(), torch.zeros(batch).long()
        vit = count(lambda: [VisionTransformer.forward(model.visual_encoder, image)])  # ours asks a device for its autocast
        states = torch.empty(batch, model.visual_encoder.pos_embed.shape[1], block.image_encoder.width)
        embeds = model.ln_vision(states)
        _, cache = query_pass(model, embeds)
        cache = tuple((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in cache)
        pairs = Blip2Pairs(model, embeds.detach().requires_grad_(), ids, mask, cache)
        step = {
            "ViT, frozen (B images)": vit,
            "queries (B images)": count(lambda: [model._image_feature(query_pass(model, embeds)[0])]),
            "texts (B)": count(lambda: [model._text_feature(ids, mask)]),
            "ITM (3B pairs)": count(lambda: [pairs.itm_logits(triples, triples)]),
            "LM (B texts)": count(lambda: [pairs.lm_loss(own, own)]),
        }
        network = con_d.network
        judged = count(lambda: [match_queries(network.Qformer.bert, network.query_tokens, network.itm_head, network.ln_vision(states)[twice], ids[twice], mask[twice])])
    total = sum(map(sum, step.values()))
    print(f"{'part':<26} {'forward':>10} {'backward':>10} {'share of a step':>17}   (TFLOP)")
    for name, (forward, backward) in step.items():
        print(f"{name:<26} {forward / 1e12:>10.3f} {backward / 1e12:>10.3f} {100 * (forward + backward) / total:>15.1f} %")
    print(f"{'step without Con-D':<26} {total / 1e12:>21.3f} {100:>15.1f} %")
    print(f"{'Con-D, Q-Former (2B pairs)':<26} {judged[0] / 1e12:>10.3f} {judged[1] / 1e12:>10.3f} {100 * judged[0] / total:>15.1f} %")
    print(f"{'Con-D, own ViT (B images)':<26} {vit[0] / 1e12:>10.3f} {0:>10.3f} {100 * vit[0] / total:>15.1f} %")
    print(f"overhead: {SHARED} {100 * judged[0] / total:+.1f} %; {OWN} {100 * (judged[0] + vit[0]) / total:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="of the measured steps")
    parser.add_argument("--rounds", type=int, default=25, help="steps of each variant")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the measured Con-D; bf16 is slow on most CPUs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--paper-batch-size", type=int, default=48, help="per GPU, of the counted step")
    parser.add_argument("--text-length", type=int, default=32, help="of the counted step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"{datetime.date.today()}  {machine()}")
    print(f"\nmeasured: size tiny, {arguments.batch_size} pairs, {arguments.rounds} rounds, Con-D in {arguments.precision}")
    measure(arguments.batch_size, arguments.rounds, arguments.precision)
    print(f"\ncounted: paper's size, {arguments.paper_batch_size} pairs, texts of {arguments.text_length} tokens")
    paper_size(arguments.paper_batch_size, arguments.text_length)


if __name__ == "__main__":
    main()
