"""``runner_mafa``: LAVIS's runner with a loop of its own, for CPU, GPU and DDP alike, with GRIT and exact resume."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lavis_mafa.common import interrupt
from lavis_mafa.common.distributed import barrier, broadcast_object, is_distributed, rank, world_size
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.weights import read_checkpoint, read_weights
from lavis_mafa.runners.bad_samples import BadSamples
from lavis_mafa.runners.checkpoints import CheckpointFolder, load_model, random_state, read_resumable, restore_random_state
from lavis_mafa.runners.connection_record import ConnectionRecord
from lavis_mafa.runners.evaluating import evaluate_split
from lavis_mafa.runners.grit_feed import GritFeed
from lavis_mafa.runners.loaders import eval_loader, train_loader
from lavis_mafa.runners.metrics_log import MetricsLog
from lavis_mafa.runners.run_block import new_folder, run_settings
from lavis_mafa.runners.stepping import Stepper, autocast
from lavis_mafa.tasks.mafa_pretrain import MafaPretrainTask

logger = logging.getLogger(__name__)


class RunnerMafa(RunnerBase):
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
        self.settings = run_settings(cfg.run_cfg, isinstance(task, MafaPretrainTask))
        # RunnerBase reads the YAML itself and has no defaults for most keys
        cfg.config.run = OmegaConf.merge(OmegaConf.create(dataclasses.asdict(self.settings)), cfg.run_cfg)
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
        return is_distributed()

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
                    broadcast_buffers=not isinstance(self.task, MafaPretrainTask),
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
            run = self.config.run_cfg
            scheduler = registry.get_lr_scheduler_class(self.settings.lr_sched)
            if scheduler is None:
                raise UserError(f"run.lr_sched is {self.settings.lr_sched!r}; known: {', '.join(registry.list_lr_schedulers())}.")
            self._lr_sched = scheduler(
                optimizer=self.optimizer,
                max_epoch=self.settings.lr_horizon_epochs or self.max_epoch,
                min_lr=self.settings.min_lr,
                init_lr=self.settings.init_lr,
                decay_rate=run.get("lr_decay_rate", 1),
                warmup_start_lr=self.settings.warmup_lr,
                warmup_steps=self.settings.warmup_steps,
                steps_per_epoch=self.steps_per_epoch,
            )
        return self._lr_sched

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    def setup_output_dir(self) -> None:
        """``<working directory>/output_dir/job_id``, the same on all ranks and never one that exists."""
        parent = Path(self.settings.output_dir).absolute()
        self.output_dir = broadcast_object(new_folder(parent, self.job_id) if rank() == 0 else None)
        self.result_dir = self.output_dir / "result"
        for name, path in (("result_dir", self.result_dir), ("output_dir", self.output_dir)):
            registry.mapping["paths"].pop(name, None)  # a second run in one process is legitimate
            registry.register_path(name, str(path))

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
                grit = self.settings.grit if isinstance(self.task, MafaPretrainTask) else None
                loader, self.feed = train_loader(dataset, size, grit, self.settings, pin)
            else:
                shared = self.use_distributed and self.config.run_cfg.get("use_dist_eval_sampler", True)
                loader = eval_loader(dataset, size, collate, self.settings, pin, shared)
            loaders.append(loader)
        return loaders

    # --- training --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        started = time.time()
        if rank() == 0:
            self.log_config()
        if self.evaluate_only:
            for split in self.valid_splits:
                self._evaluate_split(split, "evaluate")
        else:
            self._train_epochs()
        self._test()
        logger.info("finished in %s; files in %s", datetime.timedelta(seconds=int(time.time() - started)), self.output_dir)

    def _train_epochs(self) -> None:
        model = self.model  # before the optimizer looks at its parameters
        if self.resume_ckpt_path is not None:
            self._load_checkpoint(self.resume_ckpt_path)
        total = self.max_epoch * self.steps_per_epoch
        total = min(total, self.settings.max_steps or total)
        samples = self.settings.batch_size_train * world_size()
        self.log = MetricsLog(self.output_dir if rank() == 0 else None, self.steps_per_epoch, samples, total)
        record = ConnectionRecord(self.output_dir / "connections", rank(), self.settings.record_connections, self.steps_per_epoch)
        try:
            for epoch in range(self.start_epoch, self.max_epoch):
                if epoch * self.steps_per_epoch + self.start_step >= total:
                    break
                model.train()
                finished = self._train_epoch(epoch, record, total)
                record.write(epoch)
                if finished:
                    self._validate(epoch)
                    last = (epoch + 1) * self.steps_per_epoch >= total
                    if (epoch + 1) % self.settings.save_every_epochs == 0 or last:
                        self.save(f"{epoch}", epoch, step=0, next_epoch=epoch + 1)
                else:
                    self.save(f"{epoch}_{self.start_step}", epoch, step=self.start_step, next_epoch=epoch)
                    self._validate(epoch)
                    break
                self.start_step = 0
                barrier()
        finally:
            self.log.close()

    def _train_epoch(self, epoch: int, record: ConnectionRecord, total: int) -> bool:
        """Train one epoch from ``start_step`` on; False when ``max_steps`` ended it early."""
        assert self.feed is not None
        settings, loader = self.settings, self.train_loader
        stepper = Stepper(self.task, self.model, self.optimizer, self.scaler, settings, self.device)
        loader.dataset.set_epoch(epoch)
        self.feed.begin_epoch(epoch)
        if settings.grit.enabled and settings.grit.collect == "separate" and self.start_step == 0 and self.feed.queue is not None:
            self.feed.separate_pass(epoch, self._feature_pass())
        self.log.restart_clock()
        steps = self.steps_per_epoch
        for step, samples in enumerate(loader, start=self.start_step):
            samples = self._prepare(samples, epoch, step)
            self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            output = stepper(samples, step, steps)
            self.log.add(losses_and_figures(output))
            if output.get("image_features") is not None and settings.grit.collect == "training":
                self.feed.collect(samples["index"], output["image_features"], output["text_features"])
            record.add(epoch, step, output.get("verdicts"))
            if interrupt.asked():  # Python can swallow a ctrl-C that lands in a fork hook
                raise KeyboardInterrupt
            done, global_step = step + 1, epoch * steps + step + 1
            # gradients of half an accumulation window are in no checkpoint: save and stop between windows
            whole = done % settings.accum_grad_iters == 0 and done < steps
            save = whole and settings.save_every_steps is not None and done % settings.save_every_steps == 0
            stop = whole and global_step >= total
            if done % self.log_freq == 0 or done == steps or save or stop:
                self._flush(epoch, done)  # also looks for NaN, so before anything is saved
            if stop:
                self.start_step = done
                return False
            if save:
                self.save(f"{epoch}_{done}", epoch, step=done, next_epoch=epoch)
                self.log.restart_clock()
        self.feed.end_epoch(epoch)
        return True

    def _prepare(self, samples: dict[str, Any], epoch: int, step: int) -> dict[str, Any]:
        self.bad_samples.add(samples, self.settings.batch_size_train)
        samples = prepare_sample(samples, cuda_enabled=self.cuda_enabled)
        assert self.feed is not None
        samples["first_of_window"] = step % self.settings.accum_grad_iters == 0
        samples.update(epoch=epoch, iters=step, num_iters_per_epoch=self.steps_per_epoch, grouped=self.feed.sampler.grouped)
        return samples

    def _flush(self, epoch: int, done: int) -> None:
        derive = getattr(self.task, "derived_figures", None)
        record = self.log.flush(epoch, done, self.optimizer.param_groups[0]["lr"], derive)
        losses = {name: value for name, value in record.items() if name.startswith("loss")}
        if any(value != value or abs(value) == float("inf") for value in losses.values()):
            raise UserError(
                f"the loss is not finite at epoch {epoch}, step {done}: {losses}. Nothing was saved since the last checkpoint; "
                "a lower run.init_lr, run.grad_clip: 1.0 or run.precision: fp32 usually help."
            )

    @torch.no_grad()
    def _feature_pass(self) -> Any:
        """All features without training, for GRIT's separate pass."""
        model = self.unwrap_dist_model(self.model)
        model.eval()
        for samples in self.train_loader:
            self.bad_samples.add(samples, self.settings.batch_size_train)
            samples = prepare_sample(samples, cuda_enabled=self.cuda_enabled)
            with autocast(self.settings.precision, self.device):
                image, text = model.grit_features(samples)
            yield samples["index"], image, text
        model.train()

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _validate(self, epoch: int) -> None:
        for split in self.valid_splits:
            result = self._evaluate_split(split, epoch)
            metric = (result or {}).get("agg_metrics")
            if metric is not None and split == "val" and metric > self.best_metric:
                self.best_metric, self.best_epoch = float(metric), epoch
                self.save("best", epoch, step=0, next_epoch=epoch + 1, with_state=False)

    def _test(self) -> None:
        if self.test_splits and self.best_epoch is not None:
            path = self.checkpoints.path("best")
            barrier()
            load_model(self.unwrap_dist_model(self.model), read_weights(path), path)
        for split in self.test_splits:
            self._evaluate_split(split, "best" if self.best_epoch is not None else "last")

    def _evaluate_split(self, split: str, epoch: int | str) -> dict[str, Any] | None:
        loader = self.dataloaders.get(split)
        if loader is None:
            raise UserError(f"run names the split {split!r}, but the data sets have: {', '.join(sorted(self.dataloaders))}.")
        model = self.unwrap_dist_model(self.model)
        return evaluate_split(self.task, model, loader, self.datasets[split], split, epoch, self.output_dir, self.cuda_enabled)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, name: str, epoch: int, step: int, next_epoch: int, with_state: bool = True) -> None:
        """Write everything a resumed run needs; ``step`` steps of ``next_epoch`` are done."""
        content = None
        if rank() == 0:
            content = {
                "model": self.unwrap_dist_model(self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "config": self.config.to_dict(),
                "epoch": epoch,
                "next_epoch": next_epoch,
                "step": step,
                "best_metric": self.best_metric,
                "best_epoch": self.best_epoch,
            }
        state = None
        if with_state:
            assert self.feed is not None
            state = {"feed": self.feed.state_dict(step), "random": random_state(self.device)}
        self.checkpoints.save(name, content, state, rank())

    def _load_checkpoint(self, url_or_filename: str) -> None:
        content, state = read_resumable(url_or_filename, rank())
        load_model(self.unwrap_dist_model(self.model), content["model"], url_or_filename)
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler is not None and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.start_epoch = int(content.get("next_epoch", content["epoch"] + 1))
        self.start_step = int(content.get("step", 0))
        self.best_metric = float(content.get("best_metric", float("-inf")))
        self.best_epoch = content.get("best_epoch")
        self._take_best_along(Path(url_or_filename))
        if state is not None:
            _ = self.train_loader  # builds the feed
            assert self.feed is not None
            try:
                self.feed.load_state_dict(state["feed"])
            except ValueError as error:
                raise UserError(f"run.resume_ckpt_path: {url_or_filename}: {error}") from error
            restore_random_state(state["random"], self.device)
        logger.info("resuming %s at epoch %d, step %d", url_or_filename, self.start_epoch, self.start_step)

    def _take_best_along(self, resumed: Path) -> None:
        """The best checkpoint so far lies in the old run's folder; without it, or with a later one, the best starts anew."""
        if self.best_epoch is None:
            return
        best = resumed.with_name("checkpoint_best.pth")
        if rank() == 0 and best.is_file():
            content = read_checkpoint(best)
            if (content.get("best_epoch"), content.get("best_metric")) == (self.best_epoch, self.best_metric):
                shutil.copyfile(best, self.checkpoints.path("best"))
        barrier()
        if not self.checkpoints.path("best").is_file():
            self.best_metric, self.best_epoch = float("-inf"), None

    def log_config(self) -> None:
        OmegaConf.save(OmegaConf.create(self.config.to_dict()), self.output_dir / "config.yaml")


def losses_and_figures(output: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss and figure of a step, by name."""
    figures = {name: value for name, value in output.items() if name.startswith("loss") and isinstance(value, Tensor)}
    return {**figures, **(output.get("figures") or {})}
