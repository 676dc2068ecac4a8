"""One forward and backward on this process's share of eight samples; under torchrun the batch is that of all processes.

python gathering.py OUT: writes the gradients, averaged as DDP does, and those of a gathering that lets no gradient through.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lavis_mafa.models import albef_mafa
from lavis_mafa.models.albef_mafa import AlbefMafa

spec = importlib.util.spec_from_file_location("reduced", Path(__file__).with_name("reduced.py"))
reduced = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reduced)

CAPTIONS = [*reduced.CAPTIONS, "a tall man in a green hat by the river", "snow", "an old boat", "three people walk home at night"]
WITH_GRADIENT = albef_mafa.gather_own_first


class EveryOther:
    """A Con-D whose verdict on a pair does not depend on who asks: both captions of even length, or both of odd length."""

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        odd = WITH_GRADIENT(torch.tensor([len(caption) % 2 for caption in samples["text_input"]]))
        return torch.where(odd[image_index] == odd[text_index], 0.9, 0.1)


def build(**changes: Any) -> AlbefMafa:
    itc = {"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2}
    model = reduced.ours(itc=itc, mlm={"mask_probability": 0}, ecm={"enabled": True}, **changes).train()
    model.set_discriminator(EveryOther())
    model.batch_scope = "global"
    return model


def samples(start: int, end: int) -> dict[str, Any]:
    images = torch.randn(8, 3, reduced.SIZE, reduced.SIZE, generator=torch.Generator().manual_seed(5))
    key = torch.tensor([0, 1, 2, 3, 4, 0, 5, 6])  # one image on both processes
    return {"image": images[start:end], "text_input": CAPTIONS[start:end], "image_key": key[start:end]}


def gradients(start: int, end: int) -> dict[str, Tensor]:
    model = build()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
    wrapped(samples(start, end)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def without_gradient(tensor: Tensor, with_gradient: bool = False) -> Tensor:
    """The batch's own rows keep theirs."""
    gathered = WITH_GRADIENT(tensor)
    return torch.cat([tensor, gathered[len(tensor) :]]) if with_gradient else gathered


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = dist.get_rank() * 4, dist.get_rank() * 4 + 4
    found = {"whole": gradients(*own)}
    albef_mafa.gather_own_first = without_gradient
    found["cut"] = gradients(*own)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
