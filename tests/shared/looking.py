"""Training steps of an albef_mafa on each of two processes with a Con-D that knows nothing: what is told, and what is returned.

python looking.py CON_D local|global, under torchrun.
"""

from __future__ import annotations

import logging
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import families
from lavis_mafa.distributed import gather_in_rank_order
from lavis_mafa.models.con_d import build_discriminator

FAMILY = ("albef", False)


def steps(con_d: str, scope: str) -> None:
    named = {"arch": "albef_mafa", "checkpoint": con_d, "precision": "fp32"}
    model = families.build(FAMILY, discriminator=named, mlm={"mask_probability": 0})
    model.settings.ecm.enabled = True
    model.set_discriminator(build_discriminator(model.settings, model))
    model.batch_scope = scope
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    for number in range(3):
        samples = families.batch(FAMILY, epoch=0, iters=number, num_iters_per_epoch=2)
        samples["image"] += dist.get_rank()
        if number == 2:  # no rank finds anything to do
            samples["text_input"] = ["a red dog"] * 4
        output = wrapped(samples)
        output.loss.backward()
        assert output.loss.isfinite() and all(value.shape == (2,) and value.isfinite().all() for value in output.ranges.values())
    gradient = gather_in_rank_order(model.itm_head.weight.grad).view(2, -1)
    assert torch.equal(gradient[0], gradient[1])
    print(f"{len(output.ranges)} ranges", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    dist.init_process_group("gloo")
    steps(sys.argv[1], sys.argv[2])
    dist.destroy_process_group()
