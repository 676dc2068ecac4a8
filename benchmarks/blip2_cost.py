"""Memory and time that BLIP-2 stage 1 and stage 2 need on a GPU at the paper's size, computed.

    python benchmarks/blip2_cost.py [--stage-1 48 16] [--stage-2 64 16] [--gpus 8] [--check]

Bytes under ``run.precision: bf16``, ViT and language model frozen in fp16:

- trained: 4 a weight, 4 of gradient, 8 of AdamW, 4 of DDP's buckets, 2 of the half-precision copy that autocast keeps;
- frozen, Con-D among it: 2 a weight;
- states: those of the ViT, 4 as they come and 4 normalised for each of N x V, of own images or all ranks' (``batch_scope: global``);
- saved by autograd. A trained Q-Former layer of width D and H heads, n tokens that attend to s keys: D (38 n + 4 s) + 7 H n s, for
  half-precision copies of the inputs of linear layers (8 n) and of query, key, value, context (4 n + 4 s), the feed-forward's states
  before and after GELU (16 n), two norms' inputs in fp32 (8 n), two dropout masks (2 n), probabilities twice and a mask. Q queries that
  see an image of N tokens of width V: D (11 Q + 4 N) + 4 V N + 7 H Q N more. Nothing of the frozen ViT. A layer of the frozen language
  model of width W: 24 W n + 10 H n n, because gradients flow through it, though linear layers whose weights want none keep no input:
  norms' inputs (8), query, key, value (6), states after ReLU (8), masks (2), scores and probabilities;
- logits over U words: 6 U n saved, 8 U n more as the backward begins.

FLOPs are counted as in con_d_overhead.py. ``--check`` runs the very models on fake tensors (no memory) and adds up what autograd saves.
"""

from __future__ import annotations

import argparse
import datetime
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from con_d_overhead import PAPER, count, on_meta, settings, step_parts
from grouping import machine
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses import FakeTensorMode

from lavis_mafa.common.typed import typed_block
from lavis_mafa.discriminators.blip2 import Blip2Discriminator
from lavis_mafa.models.blip2_mafa import Blip2Mafa
from lavis_mafa.models.blip2_opt_mafa import Blip2OptMafa
from lavis_mafa.models.blip2_pairs import query_pass
from lavis_mafa.models.language_model import byte_tokenizer
from lavis_mafa.models.mafa_model import CONFIGS

GB, RESERVE, SIZES = 1e9, 2.0, (16, 24, 40, 80)  # GB of a GPU; the reserve is CUDA's context and the allocator's gaps
OPT = {"opt2.7b": (2560, 32, 32), "opt6.7b": (4096, 32, 32)}  # width, layers, heads, as released
BLOCK = settings("base", {**PAPER, "ecm": {"enabled": False}})
D, H, LAYERS, Q = BLOCK.qformer.width, BLOCK.qformer.heads, BLOCK.qformer.layers, BLOCK.qformer.queries
V, T, SIDE = BLOCK.image_encoder.width, BLOCK.max_text_length, BLOCK.image_encoder.image_size
N = (SIDE // BLOCK.image_encoder.patch_size) ** 2 + 1
CROSS = len(range(0, LAYERS, BLOCK.qformer.cross_attention_every))
BERT_WORDS, OPT_WORDS = 30523, 50272
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def qformer(n: int, s: int, image: bool) -> int:
    """One sample's n tokens through the Q-Former; its queries see an image or not."""
    seen = CROSS * (D * (11 * Q + 4 * N) + 4 * V * N + 7 * H * Q * N) if image else 0
    return LAYERS * (D * (38 * n + 4 * s) + 7 * H * n * s) + 5 * D * n + seen


def activations(stage: str) -> int:
    """Bytes that autograd saves for each sample of a batch."""
    if stage == "stage 1":
        head = T * (10 * D + 6 * BERT_WORDS)
        return qformer(Q, Q, True) + qformer(T, T, False) + 3 * qformer(Q + T, Q + T, True) + qformer(T, Q + T, False) + head
    (width, layers, heads), n = OPT[stage], Q + T
    return qformer(Q, Q, True) + 2 * D * Q + layers * (24 * width + 10 * heads * n) * n + (4 * width + 6 * OPT_WORDS) * n


def memory(stage: str, weights: tuple[float, float], batch: int, gathered: int) -> dict[str, float]:
    """GB by kind; ``gathered`` is how many batches' ViT states are held."""
    words = T * BERT_WORDS if stage == "stage 1" else (Q + T) * OPT_WORDS
    return {
        "trained": 22 * weights[0] / GB,
        "frozen": 2 * weights[1] / GB,
        "states": batch * gathered * 8 * V * N / GB,
        "saved": batch * activations(stage) / GB,
        "logits": batch * 8 * words / GB,
    }


def largest(stage: str, weights: tuple[float, float], size: int, gathered: int) -> int:
    constant, one = (sum(memory(stage, weights, batch, gathered).values()) for batch in (0, 1))
    return max(0, int((size - RESERVE - constant) / (one - constant)))


def stage_2(kind: str) -> Blip2OptMafa:
    """The released size of OPT; its 50,272 words, but a tokenizer that needs no download."""
    width, layers, heads = OPT[kind]
    config = OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    block = typed_block("model", OmegaConf.merge(OmegaConf.load(CONFIGS / f"blip2_opt_mafa_{kind}.yaml").model, PAPER))
    built = patch("lavis_mafa.models.blip2_opt_mafa.build_opt", lambda _: (OPTForCausalLM(config), byte_tokenizer()))
    with built, patch.object(torch.Tensor, "__int__", lambda _: 1):  # the prompt's length
        return Blip2OptMafa(block)


MODELS: dict[str, Any] = {"stage 1": partial(Blip2Mafa, BLOCK), **{kind: partial(stage_2, kind) for kind in OPT}}


def weights_of(model: nn.Module) -> tuple[float, float]:
    """Numbers of trained and of frozen weights."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return float(trained), float(sum(p.numel() for p in model.parameters()) - trained)


def saved_bytes(model: Any, batch: int) -> int:
    """What autograd saves in one forward on a GPU under bf16, without the weights themselves."""
    model.visual_encoder.dtype = torch.float16
    for module in [*model.visual_encoder.modules(), *getattr(model, "opt_model", nn.Module()).modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.half()
    if isinstance(model, Blip2OptMafa):
        model.settings.language_model.precision = "fp16"
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with FAKE, patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
        model.to_empty(device="cuda").train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        samples = {"image": torch.empty(batch, 3, SIDE, SIDE, device="cuda"), "text_input": ["word " * 40] * batch}
        kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with patch("torch.cuda.is_bf16_supported", lambda *_, **__: True), torch.autocast("cuda", torch.bfloat16), kept:
            output = model(samples)  # noqa: F841 - its graph must live
    return sum(size for storage, (size, _) in saved.items() if storage not in own)


def flops_of_stage_2(kind: str, vit: float) -> float:
    """FLOPs of a step for each pair of the batch."""
    model = on_meta(MODELS[kind]).train()
    with torch.device("meta"):
        queries = count(lambda: model.opt_proj(query_pass(model, model.ln_vision(torch.empty(4, N, V)))[0]))
    with FAKE:  # it makes a number out of a tensor, which meta cannot
        model.opt_model.to_empty(device="cpu")
        inputs = torch.empty(4, Q + T, OPT[kind][0], requires_grad=True)
        return vit + sum(queries + count(lambda: model.opt_model(inputs_embeds=inputs).logits)) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-1", type=int, nargs="+", default=[48, 16], help="batch sizes per GPU")
    parser.add_argument("--stage-2", type=int, nargs="+", default=[64, 16], help="batch sizes per GPU")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of a GPU in bf16")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    parser.add_argument("--captions", type=float, default=5e6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="compare the formula with what autograd saves")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}  {machine('cpu')}\n")

    weights = {name: weights_of(on_meta(build)) for name, build in MODELS.items()}
    judge = sum(weights_of(on_meta(lambda: Blip2Discriminator(BLOCK, "bf16", shared=True)).network))
    encoder = sum(weights_of(on_meta(MODELS["stage 1"]).visual_encoder))
    step, con_d = step_parts(BLOCK, 4, T)
    alone = sum(map(sum, step.values())) / 4
    judging, vit = (part[0] / 4 for part in con_d.values())
    rows: dict[str, tuple[str, tuple[float, float], int, float]] = {}  # stage, weights, gathered batches, FLOPs of a pair
    trained, frozen = weights["stage 1"]
    rows["stage 1, no Con-D"] = "stage 1", weights["stage 1"], 1, alone
    rows["stage 1, ViT shared"] = "stage 1", (trained, frozen + judge), 1, alone + judging
    rows["stage 1, shared, global"] = "stage 1", (trained, frozen + judge), arguments.gpus, alone + judging
    rows["stage 1, Con-D's own ViT"] = "stage 1", (trained, frozen + judge + encoder), 1, alone + judging + vit
    rows |= {f"stage 2, {kind}": (kind, weights[kind], 1, flops_of_stage_2(kind, vit)) for kind in OPT}

    print(f"{'GB per GPU':<26}{'batch':>6}{'trained':>9}{'frozen':>8}{'states':>8}{'saved':>8}{'logits':>8}{'sum':>8}")
    for name, (stage, numbers, gathered, _) in rows.items():
        for batch in arguments.stage_1 if stage == "stage 1" else arguments.stage_2:
            parts = memory(stage, numbers, batch, gathered)
            cells = "".join(f"{value:>8.1f}" for value in (*parts.values(), sum(parts.values())))
            print(f"{name:<26}{batch:>6} {cells}")
    print(f"\n{f'largest batch, {RESERVE:g} GB left free':<34}" + "".join(f"{size:>6} GB" for size in SIZES))
    for name, (stage, numbers, gathered, _) in rows.items():
        print(f"{name:<34}" + "".join(f"{largest(stage, numbers, size, gathered) or '-':>9}" for size in SIZES))
    print(
        f"\n{arguments.gpus} GPUs, {100 * arguments.share:g} % of {arguments.tflops:g} TFLOP/s, {arguments.captions:,.0f} captions",
        end="",
    )
    print(f" x {arguments.epochs} epochs\n{'':<26}{'GFLOP a pair':>13}{'hours':>8}   step at batch")
    for name, (stage, _, _, pair) in rows.items():
        seconds = pair / (arguments.tflops * 1e12 * arguments.share)
        hours = seconds * arguments.captions * arguments.epochs / arguments.gpus / 3600
        steps = ", ".join(f"{b}: {b * seconds:.2f} s" for b in (arguments.stage_1 if stage == "stage 1" else arguments.stage_2))
        print(f"{name:<26}{pair / 1e9:>13,.0f}{hours:>8.1f}   {steps}")
    if arguments.check:
        print(f"\n{'saved by autograd, batch of 8':<34}{'formula':>9}{'found':>9}")
        for name, build in MODELS.items():
            formula = 2 * weights[name][0] + 8 * (activations(name) + 4 * V * N)
            found = saved_bytes(on_meta(build), 8)
            print(f"{name:<34}{formula / GB:>6.2f} GB{found / GB:>6.2f} GB  {100 * (formula / found - 1):+.1f} %")


if __name__ == "__main__":
    main()
