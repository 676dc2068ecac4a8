"""One forward and backward on this process's share of eight samples; under torchrun the batch is that of all processes.

python gathering.py OUT: writes, for each model, the gradients, averaged as DDP does, and those of a gathering that lets no gradient
through.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reduced
import reduced_blip
from lavis_mafa.models import albef as albef_mafa
from lavis_mafa.models import blip as blip_mafa
from lavis_mafa.models import soft_masks, synthetic_texts

# both halves have 33 tokens: a mean over the tokens of each process is then that over all; one caption is on both processes
CAPTIONS = [*reduced.CAPTIONS, "a tall man in a green hat", reduced.CAPTIONS[3], "an old boat"]
CAPTIONS.append("three people walk home over the old stone bridge at night")
WITH_GRADIENT = albef_mafa.gather_own_first
# which tokens are masked is drawn by each process, and new LM pairs differ in length: both are left out
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "albef": (albef_mafa, reduced.ours, {"mlm": {"mask_probability": 0}, "ecm": {"enabled": True}}),
    "blip": (blip_mafa, reduced_blip.ours, {"ecm": {"enabled": True, "use_in": ["itc", "itm"]}}),
    "itc alone": (albef_mafa, reduced.ours, {"itm": {"weight": 0}, "mlm": {"weight": 0}, "ecm": {"enabled": True}}),
    "itm alone": (albef_mafa, reduced.ours, {"itc": {"weight": 0}, "mlm": {"weight": 0}, "ecm": {"enabled": True}}),
    "itc alone, checkpointed": (
        albef_mafa,
        reduced.ours,
        {"itm": {"weight": 0}, "mlm": {"mask_probability": 0}, "image_encoder": {"gradient_checkpointing": True}},
    ),
    "lm alone": (blip_mafa, reduced_blip.ours, {"itc": {"weight": 0}, "itm": {"weight": 0}}),
    "teacher": (albef_mafa, reduced.ours, {"mlm": {"mask_probability": 0}, "itc": {"momentum_distillation": {"queue_size": 12}}}),
    # the first word that may be replaced, by the one word that comes into question, and is masked by: nothing is drawn
    "extra pairs": (
        albef_mafa,
        reduced.ours,
        {
            "mlm": {"mask_probability": 0},
            "itc": {"focal": 2.0},
            "itm": {"synthetic": {"top_k": 1, "generator": "model"}, "soft_mask": {}},
        },
    ),
    "extra pairs, blip": (
        blip_mafa,
        reduced_blip.ours,
        {"itm": {"synthetic": {"top_k": 1}, "soft_mask": {}}, "language_teacher": {"init": "reduced"}},
    ),
    "tcl": (
        albef_mafa,
        reduced.ours,
        {
            "mlm": {"mask_probability": 0},
            "itc": {"momentum_distillation": {"queue_size": 12}, "intra_modal": ["global", "local"]},
        },
    ),
    "no queue": (blip_mafa, reduced_blip.ours, {"itc": {"momentum_distillation": {"queue_size": 0}}}),
}


def first_place(eligible: Tensor) -> Tensor:
    return torch.where(eligible.any(dim=1), eligible.float().argmax(dim=1), -1)


class EveryOther:
    """A Con-D whose verdict on a pair does not depend on who asks: both captions of even length, or both of odd length."""

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        odd = WITH_GRADIENT(torch.tensor([len(caption) % 2 for caption in samples["text_input"]]))
        return torch.where(odd[image_index] == odd[text_index], 0.9, 0.1)


def build(name: str) -> Any:
    _, ours, changes = MODELS[name]
    itc = {"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2, **changes.get("itc", {})}
    model = ours(**{**changes, "itc": itc}).train()
    model.set_discriminator(EveryOther())
    if model.settings.language_teacher is not None:
        model.set_language_teacher(reduced.language_teacher(model.tokenizer.vocab_size))
    model.batch_scope = "global"
    return model


def samples(start: int, end: int) -> dict[str, Any]:
    images = torch.randn(8, 3, reduced.SIZE, reduced.SIZE, generator=torch.Generator().manual_seed(5))
    key = torch.tensor([0, 1, 2, 3, 4, 0, 5, 6])  # one image on both processes
    views = {"image": images[start:end], "image_second_view": images.flip(3)[start:end]}
    return {**views, "text_input": CAPTIONS[start:end], "image_key": key[start:end]}


def gradients(name: str, start: int, end: int) -> dict[str, Tensor]:
    model = build(name)
    wrapped: Any = model
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):  # DDP complains in the second step of weights that had no gradient in the first
        model.zero_grad(set_to_none=True)
        with patch.object(synthetic_texts, "choose_place", first_place), patch.object(soft_masks, "choose_place", first_place):
            wrapped(samples(start, end)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **{name: buffer for name, buffer in model.named_buffers() if "queue" in name}}


def without_gradient(tensor: Tensor, with_gradient: bool = False) -> Tensor:
    """The batch's own rows keep theirs."""
    gathered = WITH_GRADIENT(tensor)
    return torch.cat([tensor, gathered[len(tensor) :]]) if with_gradient else gathered


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = dist.get_rank() * 4, dist.get_rank() * 4 + 4
    found = {name: {"whole": gradients(name, *own)} for name in MODELS}
    for name, (module, _, _) in MODELS.items():
        module.gather_own_first = without_gradient
        found[name]["cut"] = gradients(name, *own)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
