"""blip2_opt_mafa at a size for a CPU, with the image encoder and Q-Former of the reduced BLIP-2."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf

import reduced_blip2 as blip2
from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.blip2_opt import Blip2OptMafa

SIZES: dict[str, Any] = {
    "arch": "blip2_opt_mafa",
    "model_type": "tiny",
    "image_encoder": blip2.SIZES["image_encoder"],
    "qformer": blip2.SIZES["qformer"],
    "language_model": {"init": None, "precision": "fp32", "width": 32, "layers": 2, "heads": 2},
}


def block(**changes: Any) -> Any:
    return typed_block("model", OmegaConf.merge(OmegaConf.create(SIZES), OmegaConf.create(changes)))


def ours(seed: int = 3, **changes: Any) -> Blip2OptMafa:
    torch.manual_seed(seed)
    model = Blip2OptMafa(block(**changes))
    blip2.spread(model)
    return model.eval()
