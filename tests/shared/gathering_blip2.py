"""One forward and backward of blip2_mafa on this process's share of eight samples; of two processes the batch is that of both.

Losses and gradients, averaged as DDP does, for a frozen and a trained image encoder, and those of a gathering that lets no gradient
through. ``python gathering_blip2.py FOLDER`` is the second process; Con-D's checkpoint is in FOLDER.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reduced_blip2 as reduced
from gathering import first_place
from lavis_mafa.models import blip2 as blip2_mafa
from lavis_mafa.models import synthetic_texts
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.con_d import build_discriminator
from reduced import language_teacher

# of other lengths, but as many words in the first four as in the last: the LM loss is a mean over words
CAPTIONS = [
    "a red dog",
    "two birds on the roof of an old house",
    "a blue car in the rain",
    "the small cat sleeps",
    "a tall man in a green hat",
    "snow on a boat",
    "an old boat",
    "three people walk home late in the night",
]
THRESHOLD = 0.5
WITH_GRADIENT = blip2_mafa.gather_own_first


def write_con_d(folder: Path) -> None:
    """A matching network with the model's own image encoder: shared where that is frozen."""
    judge = reduced.ours(4)
    judge.visual_encoder.load_state_dict(build(folder, True, con_d=False).visual_encoder.state_dict())
    reduced.save(judge, folder / "con_d.pth")


def build(folder: Path, freeze: bool, con_d: bool = True, synthetic: bool = False) -> Blip2Mafa:
    changes: dict[str, Any] = {
        "itc": {"smoothing": 0.2, "smooth_when": "always", "consistency": 0.2},
        "ecm": {"enabled": con_d, "threshold": THRESHOLD, "ambiguous_from": THRESHOLD},
        "image_encoder": {"freeze": freeze},
        "discriminator": {"arch": "blip2", "checkpoint": str(folder / "con_d.pth"), "precision": "fp32"},
    }
    if synthetic:  # the first word that may be replaced, by the one word that comes into question: nothing is drawn
        # and in place of a text, so that each process has as many pairs whatever Con-D says
        changes |= {"itm": {"synthetic": {"top_k": 1, "mode": "replace"}}, "language_teacher": {"init": "reduced"}}
    model = reduced.ours(0, **changes).train()
    if synthetic:
        model.set_language_teacher(language_teacher(model.tokenizer.vocab_size))
    if con_d:
        model.set_discriminator(build_discriminator(model.settings, model))
    model.batch_scope = "global"
    return model


def samples(start: int, end: int) -> dict[str, Any]:
    images = torch.randn(8, 3, reduced.SIZE, reduced.SIZE, generator=torch.Generator().manual_seed(5))
    key = torch.tensor([0, 1, 2, 3, 4, 0, 5, 6])  # one image on both processes
    more = {"image_key": key[start:end], "index": torch.arange(start, end)}
    return {"image": images[start:end], "text_input": CAPTIONS[start:end], **more}


def step(folder: Path, freeze: bool, start: int, end: int, synthetic: bool = False) -> dict[str, Tensor]:
    """Losses (with the share of synthetic texts that Con-D takes for true), and gradients by name; ``probability`` [8, 8] where this
    process asked Con-D, else 0."""
    model = build(folder, freeze, synthetic=synthetic)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
    with patch.object(synthetic_texts, "choose_place", first_place):
        output = wrapped(samples(start, end))
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    judged_true = output.metrics.get("extra_judged_true_share", torch.tensor(0.0))
    losses = torch.stack([output.loss_itc, output.loss_itm, output.loss_lm, judged_true]).detach()
    probability = torch.zeros(8, 8)
    probability[output.verdicts["image"], output.verdicts["text"]] = output.verdicts["probability"]
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
        dist.all_reduce(probability, op=dist.ReduceOp.MAX)
    return {**found, "losses": losses, "probability": probability, "shared": torch.tensor(model.discriminator.shared)}


def without_gradient(tensor: Tensor, with_gradient: bool = False) -> Tensor:
    """The batch's own rows keep theirs."""
    gathered = WITH_GRADIENT(tensor)
    return torch.cat([tensor, gathered[len(tensor) :]]) if with_gradient else gathered


def on_two_processes(folder: Path, rank: int) -> dict[str, dict[str, Tensor]]:
    """Both processes call it; the same on both."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        own = rank * 4, rank * 4 + 4
        found = {"frozen": step(folder, True, *own), "trained": step(folder, False, *own)}
        found["synthetic"] = step(folder, True, *own, synthetic=True)
        blip2_mafa.gather_own_first = without_gradient
        return {**found, "cut": step(folder, False, *own)}
    finally:
        blip2_mafa.gather_own_first = WITH_GRADIENT
        dist.destroy_process_group()


if __name__ == "__main__":
    on_two_processes(Path(sys.argv[1]), rank=1)
