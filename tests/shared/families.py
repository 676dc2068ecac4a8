"""The three families at a size for a CPU, by name, for tests that hold for each of them."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import reduced
import reduced_blip
import reduced_blip2

REDUCED: dict[str, Any] = {"albef": reduced, "blip": reduced_blip, "blip2": reduced_blip2}
TEACHER = {"momentum_distillation": {"queue_size": 12, "momentum": 0.9}}
# BLIP-2 has no momentum teacher
FAMILIES = [("albef", False), ("albef", True), ("blip", False), ("blip", True), ("blip2", False)]
NAMES = [f"{name} with a teacher" if teacher else name for name, teacher in FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=NAMES)


def build(family: tuple[str, bool], con_d: Any = None, **changes: Any) -> Any:
    """In training mode; with ECM if there is a Con-D."""
    name, teacher = family
    itc = {**(TEACHER if teacher else {}), **changes.pop("itc", {})}
    ecm = {"enabled": con_d is not None, "use_in": ["itc", "itm", "lm"], "resample_ambiguous": True, **changes.pop("ecm", {})}
    built, random = _built(name, json.dumps({"itc": itc, "ecm": ecm, **changes}))
    torch.set_rng_state(random)
    model = deepcopy(built, {id(built.tokenizer): built.tokenizer})
    model.set_discriminator(con_d)
    return model


@lru_cache(maxsize=16)
def _built(name: str, settings: str) -> tuple[Any, Tensor]:
    """Many tests ask for the same model; it and torch's random state after it."""
    return REDUCED[name].ours(**json.loads(settings)).train(), torch.get_rng_state()


def batch(family: tuple[str, bool], count: int = 4, **more: Any) -> dict[str, Any]:
    samples = REDUCED[family[0]].batch(count, index=torch.arange(count), image_key=torch.arange(count), epoch=1, num_iters_per_epoch=2)
    return {**samples, **more}


class Always:
    """A Con-D that says the same of every pair; of an image with a NaN or infinite pixel it says NaN, as a network does."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        return self.probability + 0.0 * samples["image"].flatten(1).sum(dim=1)[image_index]


def step(model: Any, samples: dict[str, Any], seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(samples)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
