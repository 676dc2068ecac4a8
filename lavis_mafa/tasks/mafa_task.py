"""What our tasks share: typed settings, and a training step that hands the model's whole output to the runner."""

from __future__ import annotations

from typing import Any, TypeVar

from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_mafa.common.check import check_combinations
from lavis_mafa.common.settings import RunBlock
from lavis_mafa.common.typed import MODEL_BLOCKS, typed_block

Task = TypeVar("Task", bound="MafaTask")


class MafaTask(BaseTask):
    """Base of ``mafa_pretrain``, ``mafa_captioning`` and ``mafa_vqa``; ``run`` is the task's own typed block."""

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run: Any = run or RunBlock()

    @classmethod
    def setup_task(cls: type[Task], cfg: Any = None, **kwargs: Any) -> Task:
        run = typed_block("run", cfg.run_cfg)
        model = typed_block("model", cfg.model_cfg) if cfg.model_cfg.arch in MODEL_BLOCKS else None
        check_combinations(model, run)
        return cls(run)

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> Tensor:
        """The loss alone, which is all that LAVIS's own runners ask for."""
        return model(samples)["loss"]

    def step_output(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """The model's whole output: every loss in it is logged."""
        return model(samples)
