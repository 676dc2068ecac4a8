"""``runner_mafa``: LAVIS's runner with a loop of its own, for CPU, GPU and DDP alike, with GRIT and exact resume."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lavis_mafa.config.check import evaluates_training
from lavis_mafa.config.schema import MODEL_BLOCKS
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.distributed import barrier, broadcast_object, group_of_one, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.runners.agreement import check_ranks_agree
from lavis_mafa.runners.bad_samples import BadSamples
from lavis_mafa.runners.checkpoints import CheckpointFolder, load_model
from lavis_mafa.runners.evaluating import evaluate_split
from lavis_mafa.runners.evaluation_images import check_evaluation_images
from lavis_mafa.runners.grit_feed import GritFeed
from lavis_mafa.runners.loaders import eval_loader, train_loader
from lavis_mafa.runners.resuming import unlock
from lavis_mafa.runners.run_block import open_folder, run_settings
from lavis_mafa.runners.stepping import autocast
from lavis_mafa.runners.training_loop import TrainingLoop
from lavis_mafa.runners.watchdog import mark, rank_watch
from lavis_mafa.tasks.task import MafaTask
from lavis_mafa.weights import read_weights

logger = logging.getLogger(__name__)


class RunnerMafa(TrainingLoop, RunnerBase):
    """Trains and evaluates our tasks and LAVIS's own, from LAVIS's YAML.

    Unlike ``runner_base`` it runs on a CPU, takes gloo, logs every loss, steps the learning rate as the scheduler asks, divides
    accumulated gradients, resumes exactly (also in the middle of an epoch), and writes below the working directory only.
    """

    # RunnerBase fills these, untyped
    _device: torch.device | None
    _model: Any
    _wrapped_model: Any
    _scaler: torch.amp.GradScaler | None
    _lr_sched: Any
    _optimizer: Any

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        self.settings = task.run if isinstance(task, MafaTask) else run_settings(cfg.run_cfg, ours=False)
        # RunnerBase reads the YAML itself and has no defaults for most keys
        cfg.config.run = OmegaConf.merge(OmegaConf.create(dataclasses.asdict(self.settings)), cfg.run_cfg)
        if not isinstance(task, MafaTask):  # ours did so when they built the data
            datasets = with_training_splits(datasets, [] if self.settings.evaluate else self.settings.train_splits)
        super().__init__(cfg, task, model, datasets, job_id)
        self.checkpoints = CheckpointFolder(self.output_dir, self.settings.keep_checkpoints)
        self.bad_samples = BadSamples(self.output_dir / "bad_samples.jsonl", self.settings.max_bad_share)
        self.feed: GritFeed | None = None
        self.start_step = 0
        self.best_metric = float("-inf")
        self.best_epoch: int | None = None

    # --- what RunnerBase builds differently ------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        if self._device is None:
            wanted = str(self.config.run_cfg.get("device", "cuda"))
            if wanted.startswith("cuda") and not torch.cuda.is_available():
                logger.warning("run.device is %s, but no GPU is visible: running on the CPU", wanted)
                wanted = "cpu"
            if wanted == "cuda" and self.use_distributed:
                wanted = f"cuda:{self.config.run_cfg.gpu}"
            self._device = torch.device(wanted)
        return self._device

    @property
    def use_distributed(self) -> bool:
        return world_size() > 1

    @property
    def train_splits(self) -> list[str]:
        """All that is trained on is in this one by now; another split may be evaluated besides."""
        return ["train"]

    @property
    def model(self) -> Any:
        """The model on its device, in DDP when there is a process group (RunnerBase returns None on a CPU)."""
        if self._wrapped_model is None:
            self._model = self._model.to(self.device)
            self._wrapped_model = self._model
            if self.use_distributed:
                for buffer in self._model.buffers():  # DDP leaves this out together with broadcast_buffers
                    torch.distributed.broadcast(buffer, src=0)
                self._wrapped_model = DistributedDataParallel(
                    self._model,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    find_unused_parameters=self.settings.find_unused_parameters,
                    # our queues are kept equal by gathering; sending them from rank 0 at every step would cost 67 MB
                    broadcast_buffers=not isinstance(self.task, MafaTask),
                )
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's AdamW and its two groups (no decay on biases and norms), fused: a seventh of the time on a CPU."""
        if self._optimizer is None:
            groups = [{**group, "fused": True} for group in super().optimizer.param_groups]
            self._optimizer = torch.optim.AdamW(groups)
        return self._optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler is None and self.settings.precision == "fp16":
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler

    @property
    def lr_scheduler(self) -> Any:
        if self._lr_sched is None:
            scheduler = registry.get_lr_scheduler_class(self.settings.lr_sched)
            if scheduler is None:
                raise UserError(f"run.lr_sched is {self.settings.lr_sched!r}; known: {', '.join(registry.list_lr_schedulers())}.")
            self._lr_sched = scheduler(
                optimizer=self.optimizer,
                max_epoch=self.settings.lr_horizon_epochs or self.max_epoch,
                min_lr=self.settings.min_lr,
                init_lr=self.settings.init_lr,
                decay_rate=self.settings.lr_decay_rate,
                warmup_start_lr=self.settings.warmup_lr,
                warmup_steps=self.settings.warmup_steps,
                steps_per_epoch=self.steps_per_epoch,
            )
        return self._lr_sched

    def setup_output_dir(self) -> None:
        """``<working directory>/output_dir/job_id``, the same on all ranks and never one that exists; or with
        ``resume_ckpt_path: auto`` that of the run it goes on with."""
        self.output_dir, checkpoint = self._agree_on_folder()
        if self.settings.resume_ckpt_path == "auto":
            self.config.config.run.resume_ckpt_path = None if checkpoint is None else str(checkpoint)
        self.result_dir = self.output_dir / "result"
        for name, path in (("result_dir", self.result_dir), ("output_dir", self.output_dir)):
            registry.mapping["paths"].pop(name, None)  # a second run in one process is legitimate
            registry.register_path(name, str(path))

    def _agree_on_folder(self) -> tuple[Path, Path | None]:
        found: tuple[Path, Path | None] | str = ""
        if rank() == 0:
            try:
                found = open_folder(Path(self.settings.output_dir).absolute(), self.job_id, self.settings, self.config.to_dict())
            except UserError as error:
                found = str(error)
        found = broadcast_object(found)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def create_loaders(
        self,
        datasets: list[Any],
        num_workers: int,
        batch_sizes: list[int],
        is_trains: list[bool],
        collate_fns: list[Any],
        dataset_ratios: Any = None,
    ) -> list[DataLoader | None]:
        pin = self.device.type == "cuda"
        loaders: list[DataLoader | None] = []
        for dataset, size, train, collate in zip(datasets, batch_sizes, is_trains, collate_fns, strict=True):
            if train and self.evaluate_only:
                loader = None  # nobody asks for it, and a set for evaluation may be smaller than a training batch
            elif train:
                grit = self.settings.grit if isinstance(self.task, MafaTask) else None
                loader, self.feed = train_loader(dataset, size, grit, self.settings, pin)
            else:
                shared = self.use_distributed and self.config.run_cfg.get("use_dist_eval_sampler", True)
                loader = eval_loader(dataset, size, collate, self.settings, pin, shared)
            loaders.append(loader)
        return loaders

    # --- training --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        of_lavis = self.config.model_cfg.arch not in MODEL_BLOCKS
        watch = rank_watch(self.settings.rank_timeout_minutes, self.output_dir, self.settings.dist_url)
        with group_of_one(of_lavis and not self.evaluate_only), watch:
            check_ranks_agree(self.config, self.datasets, self._model)
            try:
                self._train_and_test()
            finally:
                self.checkpoints.last_chance()
                unlock(self.output_dir)

    def _train_and_test(self) -> None:
        started = time.time()
        if rank() == 0:
            self.log_config()
        for split in (*self.valid_splits, *self.test_splits):
            self._loader(split)
        if self.evaluate_only:
            for split in self.valid_splits:
                self._evaluate_split(split, "evaluate")
        else:
            check_evaluation_images(self.datasets, [*self.valid_splits, *self.test_splits], self.settings.num_workers, self.output_dir)
            self._train_epochs()
        self._test()
        logger.info("finished in %s; files in %s", datetime.timedelta(seconds=int(time.time() - started)), self.output_dir)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _validate(self, epoch: int, whole: bool = True) -> None:
        """Evaluate after an epoch; a part of one, where ``max_steps`` ended it, is never the best."""
        for split in self.valid_splits:
            result = self._evaluate_split(split, epoch)
            metric = (result or {}).get("agg_metrics")
            if whole and metric is not None and split == "val" and metric > self.best_metric:
                self.best_metric, self.best_epoch = float(metric), epoch
                self.save("best", epoch, step=0, next_epoch=epoch + 1, with_state=False)

    def _test(self) -> None:
        if self.test_splits and self.best_epoch is not None:
            path = self.checkpoints.path("best")
            self.checkpoints.wait()
            barrier()
            load_model(self.unwrap_dist_model(self.model), read_weights(path), path)
        for split in self.test_splits:
            self._evaluate_split(split, "best" if self.best_epoch is not None else "last")

    def _evaluate_split(self, split: str, epoch: int | str) -> dict[str, Any] | None:
        mark(f"evaluating {split}")
        loader = self._loader(split)
        model = self.unwrap_dist_model(self.model)
        # LAVIS's tasks and models bring their own
        with autocast(self.settings.precision if isinstance(self.task, MafaTask) else "fp32", self.device):
            return evaluate_split(self.task, model, loader, self.datasets[split], split, epoch, self.output_dir, self.cuda_enabled)

    def _loader(self, split: str) -> Any:
        if split == "train":
            raise UserError(evaluates_training("run.valid_splits" if split in self.valid_splits else "run.test_splits"))
        loader = self.dataloaders.get(split)
        if loader is None:
            raise UserError(f"run names the split {split!r}, but the data sets have: {', '.join(sorted(self.dataloaders))}.")
        return loader

    def log_config(self) -> None:
        path = self.output_dir / "config.yaml"
        if not path.exists():  # a run that goes on in its folder has written it
            part = path.with_name(".config.yaml.part")
            OmegaConf.save(OmegaConf.create(self.config.to_dict()), part)
            part.replace(path)
