"""A training step on a GPU waits for it in one place: where the pairs are known that are read with images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.tools.cost import StepSize, _Step

pytestmark = pytest.mark.slow


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for tensors that say they are on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        on_gpu = any(isinstance(one, torch.Tensor) and one.device.type == "cuda" for one in args)
        read = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default)
        if on_gpu and (read or (isinstance(output, torch.Tensor) and output.device.type == "cpu")):
            self.found[str(func)] += 1
        return output


@pytest.mark.parametrize("arch", ["albef_mafa", "blip_mafa", "blip2_mafa"])
def test_a_step_waits_once(arch):
    own = OmegaConf.load(CONFIGS / f"{arch}_tiny.yaml").model
    block: Any = typed_block("model", OmegaConf.merge(own, {"model_type": "tiny", "discriminator": {"arch": arch}}))
    step, waits = _Step(block, StepSize(4, 8, new_positives=0.5), own_vit=False), Waits()
    step.model.batch_check.update = lambda *_: None  # looks at its sums after the first step, and seldom then
    with step.without_values("cuda"):
        mafa_step = step.model.forward

        def watched(samples: Any) -> Any:
            with waits:
                return mafa_step(samples)

        step.model.forward = watched
        step.run("cuda", "bf16", backward=False)
    assert sum(waits.found.values()) == 1, waits.found
