"""What our tasks share: typed settings, and a training step that hands the model's whole output to the runner."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, TypeVar

import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_mafa.config.check import check_device, check_lavis, doubtful
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.datasets.lavis_rows import read_checked
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.distributed import rank
from lavis_mafa.errors import UserError

logger = logging.getLogger(__name__)
Task = TypeVar("Task", bound="MafaTask")


class MafaTask(BaseTask):
    """Base of ``mafa_pretrain``, ``mafa_captioning`` and ``mafa_vqa``; ``run`` is the task's own typed block."""

    evaluates: tuple[str, ...] = ()  # what a sample must have

    model_block: Any = None  # the typed one; None for one of LAVIS's models

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run: Any = run or RunBlock()

    @classmethod
    def setup_task(cls: type[Task], cfg: Any = None, **kwargs: Any) -> Task:
        """With the typed blocks of what was checked; LAVIS's own train.py comes here with a configuration of its own."""
        checked = getattr(cfg, "checked", None) or check_lavis(cfg.config)
        run: Any = checked.run
        model = checked.model
        # LAVIS's own evaluate.py takes RunnerBase whatever run.runner says, and that knows no defaults
        cfg.config.run = OmegaConf.merge(OmegaConf.create(dataclasses.asdict(run)), cfg.run_cfg)
        if model is not None:
            check_device(model, run.device if torch.cuda.is_available() else "cpu", run.precision)
            for text in doubtful(model, run) if rank() == 0 else ():
                logger.warning(text)
        task = cls(run)
        task.model_block = model
        return task

    def build_model(self, cfg: Any) -> Any:
        """One of ours from its typed block, one of LAVIS's as LAVIS does."""
        if self.model_block is None:
            return super().build_model(cfg)
        return registry.get_model_class(self.model_block.arch).from_config(self.model_block)

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """LAVIS's, with a look at what the evaluation splits give: the wrong kind of data is found before hours of work."""
        datasets = read_checked(super().build_datasets, cfg)
        datasets = with_training_splits(datasets, [] if self.run.evaluate else self.run.train_splits)
        for split in {*self.run.valid_splits, *self.run.test_splits}:
            for name, parts in datasets.items():
                lacking = [key for key in self.evaluates if split in parts and key not in parts[split][0]]
                if lacking:
                    raise UserError(f"datasets.{name} has no {lacking[0]!r} in its split {split!r}, but {self.run.task} needs it.")
        return datasets

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> Tensor:
        """The loss alone, which is all that LAVIS's own runners ask for."""
        return model(samples)["loss"]

    def step_output(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """The model's whole output: every loss in it is logged."""
        return model(samples)
