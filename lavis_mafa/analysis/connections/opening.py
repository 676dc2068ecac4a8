"""From a YAML and a checkpoint to the data and the Con-D of an offline pass."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lavis_mafa.config.read import find_yaml
from lavis_mafa.config.schema import RUN_BLOCKS, RunBlock
from lavis_mafa.distributed import init_process_group, rank
from lavis_mafa.errors import UserError
from lavis_mafa.runners import job

WITH_MATCHING = ("albef_mafa", "blip_mafa", "blip2_mafa")


@dataclass(frozen=True)
class Opened:
    """What an offline pass works with."""

    con_d: Any  # a RetrievalModel
    miner: Any  # another one, or None
    dataset: Any  # map-style, the training split of all data sets
    run: RunBlock
    device: torch.device
    model_settings: str  # digests of the `model` and `datasets` blocks
    data_settings: str


def checked_config(name: str, options: list[str], con_d: str, miner: str | None = None) -> Any:
    """The YAML, checked as far as this needs no LAVIS: what only training asks for (its own Con-D, a start) is not asked for.

    Raises:
        UserError: a mistake in it, an architecture without a matching head, or no such checkpoint.
    """
    config = job.check_yaml(name, options, files=False)
    if config.model.arch not in WITH_MATCHING:
        allowed = ", ".join(WITH_MATCHING)
        raise UserError(f"model.arch is {config.model.arch}, but Con-D needs a matching head; allowed: {allowed}. ({find_yaml(name)})")
    for flag, path in (("--con-d", con_d), ("--miner", miner)):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{flag} is {path!r}, but there is no such file.")
    return config


def open_pass(config: Any, name: str, options: list[str], con_d: str, miner: str | None = None) -> Opened:
    """Build data and Con-D; under torchrun, join the process group.

    The ``model`` block is Con-D's. With a ``miner`` it is the miner's, and Con-D is what ``model.discriminator`` describes, where there
    is such a block: any of the three families.

    Images are seen whole, by ``vis_processor.eval`` where there is one: a random crop may cut off what a caption speaks of.

    Raises:
        UserError: from the data, the names in the YAML or the checkpoint.
    """
    _, cfg = job.prepare(name, options, files=False, joins=True)
    from lavis.common.registry import registry

    from lavis_mafa.analysis.connections.con_d import load_con_d
    from lavis_mafa.config.schema import con_d_block, typed_block
    from lavis_mafa.runners.run_block import run_settings

    run = run_settings(cfg.run_cfg, config.run.task in RUN_BLOCKS)
    on_gpu = run.device.startswith("cuda") and torch.cuda.is_available()
    init_process_group(cfg.run_cfg)
    device = torch.device(f"cuda:{cfg.run_cfg.get('gpu') or 0}" if on_gpu else "cpu")
    if not on_gpu and run.precision == "fp16":
        raise UserError("run.precision is fp16, but the pass runs on a CPU; allowed there: fp32, bf16.")
    dataset = _training_data(cfg.datasets_cfg, registry)
    block: Any = typed_block("model", config.model)
    judges = miner is not None and block.discriminator is not None and block.discriminator.arch != "ground_truth"
    model = load_con_d(con_d_block(block) if judges else block, con_d, device, mines=miner is None)
    mines = None if miner is None else load_con_d(block, miner, device, "--miner")
    return Opened(model, mines, dataset, run, device, _digest(dataclasses.asdict(model.settings)), _digest(_plain(cfg.datasets_cfg)))


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextlib.contextmanager
def process_group_closed() -> Iterator[None]:
    """Leave no process group behind, whatever happens."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def progress_bar(samples: int) -> Iterator[Callable[[int], object]]:
    """Samples done, rate and time left on stderr; rank 0's alone. The rate is the mean so far, since a block scores after encoding."""
    from tqdm import tqdm

    with tqdm(total=samples, unit="pair", smoothing=0, disable=rank() != 0, file=sys.stderr, mininterval=1.0) as bar:
        yield bar.update


def _training_data(datasets: Any, registry: Any) -> Any:
    from lavis.datasets.datasets.base_dataset import ConcatDataset
    from omegaconf import OmegaConf
    from torch.utils.data import IterableDataset

    from lavis_mafa.datasets.lavis_rows import check_rows, explained

    parts = []
    for name in map(str, datasets):
        builder = registry.get_builder_class(name)(datasets[name])
        with explained(OmegaConf.create({name: datasets[name]})):
            part = builder.build_datasets().get("train")
        check_rows({name: {"train": part}})
        if part is None or isinstance(part, IterableDataset) or not hasattr(part, "__len__"):
            raise UserError(f"datasets.{name} has no training split of pairs that can be read by number, which this pass needs.")
        if builder.vis_processors.get("eval") is not None and datasets[name].get("vis_processor", {}).get("eval") is not None:
            part.vis_processor = builder.vis_processors["eval"]
        if getattr(part, "prefix_lm", False):
            part.prefix_lm = False  # whole captions are judged
        parts.append(part)
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)
