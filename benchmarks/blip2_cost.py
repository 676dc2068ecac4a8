"""Memory and time that BLIP-2 stage 1 and stage 2 need on a GPU at the paper's size, computed.

    python benchmarks/blip2_cost.py [--stage-1 48 16] [--stage-2 64 16] [--gpus 8] [--check]

Under ``run.precision: bf16``, with a frozen ViT and language model in fp16. Bytes:

- trained weights: 4 and 4 of gradient, 8 of AdamW, 4 of DDP's buckets, 2 of the half-precision copy that autocast keeps;
- frozen weights, Con-D's among them: 2;
- ViT states of the batch, or of all ranks' batches (``batch_scope: global``): 4 as they come, 4 normalised, for each of N x V;
- activations, all that autograd saves. Of a trained Q-Former layer with width D and H heads, n tokens attending to s keys:
  D (38 n + 4 s) + 7 H n s, that is three half-precision copies of the input (6), query (2), key and value (4 s), context (2), the
  feed-forward's input (2), its inner states before and after GELU (16), two dropout masks (2) and two inputs of norms in fp32 (8);
  probabilities twice and their mask (7). Where it attends to an image of N tokens of width V as well: D (11 n + 4 N) + 4 V N + 7 H n N.
  Of the frozen ViT nothing. Of the frozen language model of width W: W 24 n + 10 H n n a layer, because gradients flow through it to
  the Q-Former, though its weights want none: no input of a linear layer is kept, but inputs of norms (8), query, key, value (6), inner
  states (8) and masks (2) are, and scores and probabilities (10);
- logits of a head over U words: 6 kept for each of n U, 8 more while the backward begins.

``--check`` runs the very models at full size on fake tensors, which have types and shapes but no memory, and adds up what autograd
saves. FLOPs are counted on the meta device (see con_d_overhead.py).
"""

from __future__ import annotations

import argparse
import datetime
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
V, T = BLOCK.image_encoder.width, BLOCK.max_text_length
N = (BLOCK.image_encoder.image_size // BLOCK.image_encoder.patch_size) ** 2 + 1
CROSS = len(range(0, LAYERS, BLOCK.qformer.cross_attention_every))
BERT_WORDS, OPT_WORDS = 30523, 50272


# --- bytes ------------------------------------------------------------------------------------------------------------------


def qformer(n: int, s: int, image: bool) -> int:
    """One sample's pass through the Q-Former's layers, of which ``n - T`` or ``n`` tokens are queries where it sees the image."""
    layers = LAYERS * (D * (38 * n + 4 * s) + 7 * H * n * s) + 5 * D * n
    return layers + image * CROSS * (D * (11 * Q + 4 * N) + 4 * V * N + 7 * H * Q * N)


def activations(stage: str) -> int:
    """Bytes that autograd saves for each sample of a batch."""
    if stage == "stage 1":
        head = T * (10 * D + 6 * BERT_WORDS)
        return qformer(Q, Q, True) + qformer(T, T, False) + 3 * qformer(Q + T, Q + T, True) + qformer(T, Q + T, False) + head
    width, layers, heads = OPT[stage]
    n = Q + T
    model = layers * (24 * width * n + 10 * heads * n * n) + 4 * width * n
    return qformer(Q, Q, True) + 2 * D * Q + model + 6 * OPT_WORDS * n


def memory(stage: str, weights: tuple[float, float], batch: int, gathered: int = 1) -> dict[str, float]:
    """GB by kind; ``gathered`` is how many batches' ViT states are held."""
    trained, frozen = weights
    words = T * BERT_WORDS if stage == "stage 1" else (Q + T) * OPT_WORDS
    return {
        "trained": 22 * trained / GB,
        "frozen": 2 * frozen / GB,
        "states": batch * gathered * 8 * V * N / GB,
        "activations": batch * activations(stage) / GB,
        "logits": batch * 8 * words / GB,
    }


def largest(stage: str, weights: tuple[float, float], size: int, gathered: int = 1) -> int:
    constant = sum(memory(stage, weights, 0).values())
    return max(0, int((size - RESERVE - constant) / (sum(memory(stage, weights, 1, gathered).values()) - constant)))


# --- models -----------------------------------------------------------------------------------------------------------------


def stage_2(kind: str) -> Blip2OptMafa:
    """The released size of OPT; its 50,272 words, but a tokenizer that needs no download."""
    width, layers, heads = OPT[kind]
    config = OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    block = typed_block("model", OmegaConf.merge(OmegaConf.load(CONFIGS / f"blip2_opt_mafa_{kind}.yaml").model, PAPER))
    # the prompt's length is a number read out of a tensor
    with patch("lavis_mafa.models.blip2_opt_mafa.build_opt", lambda _: (OPTForCausalLM(config), byte_tokenizer())):
        with patch.object(torch.Tensor, "__int__", lambda _: 1):
            return Blip2OptMafa(block)


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
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
        model.to_empty(device="cuda").train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        side = BLOCK.image_encoder.image_size
        samples = {"image": torch.empty(batch, 3, side, side, device="cuda"), "text_input": ["word " * 40] * batch}
        with (
            patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
            torch.autocast("cuda", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = model(samples)
        del output
    return sum(size for storage, (size, _) in saved.items() if storage not in own)


# --- tables -----------------------------------------------------------------------------------------------------------------


def flops(stages: dict[str, Any]) -> dict[str, float]:
    """FLOPs of a step for each pair of the batch; stage 1 without Con-D, and the shares that Con-D adds."""
    step, con_d = step_parts(BLOCK, 4, T)
    vit, judge = (part[0] / 4 for part in reversed(con_d.values()))
    found = {"stage 1": sum(map(sum, step.values())) / 4, "Con-D": judge, "ViT": vit}
    for kind in OPT:
        model = stages[kind].train()
        with torch.device("meta"):
            embeds = model.ln_vision(torch.empty(4, N, V))
            parts = [count(lambda: model.opt_proj(query_pass(model, embeds)[0]))]  # noqa: B023 - called at once
            inputs = torch.empty(4, Q + T, OPT[kind][0], requires_grad=True)
            parts.append(count(lambda: model.opt_model(inputs_embeds=inputs).logits))  # noqa: B023
        found[kind] = vit + sum(map(sum, parts)) / 4
    return found


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

    models: dict[str, Any] = {"stage 1": on_meta(lambda: Blip2Mafa(BLOCK))}
    models |= {kind: on_meta(lambda: stage_2(kind)) for kind in OPT}  # noqa: B023 - called at once
    judge = weights_of(on_meta(lambda: Blip2Discriminator(BLOCK, "bf16", shared=True)).network)
    vit, work = sum(weights_of(models["stage 1"].visual_encoder)), flops(models)
    rows: dict[str, tuple[str, tuple[float, float], int, float]] = {}  # stage, weights, gathered batches, FLOPs of a pair
    trained, frozen = weights_of(models["stage 1"])
    with_judge = trained, frozen + sum(judge)
    rows["stage 1, no Con-D"] = "stage 1", (trained, frozen), 1, work["stage 1"]
    rows["stage 1, ViT shared"] = "stage 1", with_judge, 1, work["stage 1"] + work["Con-D"]
    rows["stage 1, shared, global"] = "stage 1", with_judge, arguments.gpus, work["stage 1"] + work["Con-D"]
    rows["stage 1, Con-D's own ViT"] = "stage 1", (trained, with_judge[1] + vit), 1, work["stage 1"] + work["Con-D"] + work["ViT"]
    rows |= {f"stage 2, {kind}": (kind, weights_of(models[kind]), 1, work[kind]) for kind in OPT}

    print(f"{'GB per GPU':<26}{'batch':>6}{'trained':>9}{'frozen':>8}{'states':>8}{'saved':>8}{'logits':>8}{'sum':>8}")
    for name, (stage, weights, gathered, _) in rows.items():
        for batch in arguments.stage_1 if stage == "stage 1" else arguments.stage_2:
            parts = memory(stage, weights, batch, gathered)
            cells = "".join(f"{value:>8.1f}" for value in (*parts.values(), sum(parts.values())))
            print(f"{name:<26}{batch:>6} {cells}")
    print(f"\n{f'largest batch, {RESERVE:g} GB left free':<34}" + "".join(f"{size:>6} GB" for size in SIZES))
    for name, (stage, weights, gathered, _) in rows.items():
        print(f"{name:<34}" + "".join(f"{largest(stage, weights, size, gathered) or '-':>9}" for size in SIZES))
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
        for name, model in models.items():
            formula = 2 * weights_of(model)[0] + 8 * (activations(name) + 4 * V * N)
            found = saved_bytes(model, 8)
            print(f"{name:<34}{formula / GB:>6.2f} GB{found / GB:>6.2f} GB  {100 * (formula / found - 1):+.1f} %")


if __name__ == "__main__":
    main()
