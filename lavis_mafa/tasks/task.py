"""What our tasks share: typed settings, a training step that hands the model's whole output to the runner, and for those that generate
texts going through a split, joining what the ranks made, and writing it down."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_mafa.config.check import check_device, check_lavis, doubtful
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.datasets.lavis_rows import read_checked
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.distributed import gather_objects, rank
from lavis_mafa.errors import UserError
from lavis_mafa.files import write_text
from lavis_mafa.progress import Bar

logger = logging.getLogger(__name__)
Task = TypeVar("Task", bound="MafaTask")
Made = TypeVar("Made")


class MafaTask(BaseTask):
    """Base of ``mafa_pretrain`` and the tasks after it, such as ``mafa_vqa``; ``run`` is the task's own typed block."""

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
                try:
                    lacking = [key for key in self.evaluates if split in parts and key not in parts[split][0]]
                except OSError:  # the runner reads all images to evaluate, and names those that cannot be read
                    continue
                if lacking:
                    raise UserError(f"datasets.{name} has no {lacking[0]!r} in its split {split!r}, but {self.run.task} needs it.")
        return datasets

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> Tensor:
        """The loss alone, which is all that LAVIS's own runners ask for."""
        return self.step_output(model, samples)["loss"]

    def step_output(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """The model's whole output: every loss in it is logged."""
        return model(samples)


def batches(loader: Any, what: str, cuda_enabled: bool) -> Iterator[dict[str, Any]]:
    """The loader's batches on their device; rank 0 shows progress."""
    for samples in Bar(loader, desc=what, unit="batch"):
        yield prepare_sample(samples, cuda_enabled=cuda_enabled)


def as_id(value: Any) -> int | str:
    """A batch's id as plain Python. A text stays the text it is: GQA has both 01827492 and 1827492. A float is the number it was.

    Example:
        >>> as_id("000000391895"), as_id(torch.tensor(7)), as_id(torch.tensor(7.0))
        ('000000391895', 7, 7)
    """
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def rows_of(samples: dict[str, Any], count: int) -> list[int | None]:
    """Which rows of the data set a batch's samples are: our data sets give an ``index``, LAVIS's an ``instance_id``."""
    rows = samples.get("index", samples.get("instance_id"))
    return [None] * count if rows is None else [int(row) for row in rows]


def joined_on_rank_0(made: dict[Hashable, Made]) -> dict[Hashable, Made] | None:
    """All ranks' results by row, in the rows' order, which drops what a sampler gave out twice; None on the other ranks.

    Call it on every rank.
    """
    parts = gather_objects(made)
    if rank() != 0:
        return None
    joined = {name: value for part in parts for name, value in part.items()}
    return dict(sorted(joined.items())) if all(isinstance(name, int) for name in joined) else joined


def known_ids(ids: Iterable[int | str], known: dict[int | str, Made]) -> dict[int | str, Made]:
    """What a file knows, by the ids that the data set has: there 7 may be "7", or "007" where no other id is that number."""
    names = list(dict.fromkeys(ids))
    of_text, of_number = {str(name): name for name in known}, {int(name): name for name in known if _is_number(name)}
    same = Counter(int(name) for name in names if _is_number(name))
    own: dict[int | str, int | str] = {}
    for name in names:
        alone = _is_number(name) and same[int(name)] == 1
        found = of_text.get(str(name), of_number.get(int(name)) if alone else None)
        if found is not None and found not in names:
            own[found] = name
    return {own.get(name, name): value for name, value in known.items()}


def _is_number(name: int | str) -> bool:
    return str(name).isdecimal()


def write_result(name: str, records: list[dict[str, Any]]) -> Path:
    """Write ``<name>.json`` into the run's ``result`` folder, in the form of COCO's results."""
    path = Path(registry.get_path("result_dir")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(records, ensure_ascii=False))
    logger.info("%d results are in %s", len(records), path)
    return path
