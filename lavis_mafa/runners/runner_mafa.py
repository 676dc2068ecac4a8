"""``runner_mafa``: LAVIS's runner with a loop of its own, for CPU, GPU and DDP alike, with GRIT and exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
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

from lavis_mafa import signals as interrupt
from lavis_mafa.config.check import evaluates_training
from lavis_mafa.config.schema import MODEL_BLOCKS
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.distributed import barrier, broadcast_object, group_of_one, rank, world_size
from lavis_mafa.errors import UserError, WorkerLost
from lavis_mafa.files import replacing
from lavis_mafa.models.sanity import ShareWatch
from lavis_mafa.progress import Bar
from lavis_mafa.runners.agreement import check_ranks_agree
from lavis_mafa.runners.checkpoint import CheckpointFolder, RunState, load_model
from lavis_mafa.runners.loading import BadSamples, GritFeed, check_evaluation_images, eval_loader, patient, train_loader
from lavis_mafa.runners.log import ConnectionRecord, MetricsLog, evaluation_figures, samples_given, surest_connections
from lavis_mafa.runners.resume import open_run, say_what_differs, unlock
from lavis_mafa.runners.run_block import run_settings
from lavis_mafa.runners.step import NonFinite, Stepper, Vote, autocast, losses_of
from lavis_mafa.runners.trackers import Trackers
from lavis_mafa.runners.watchdog import mark, marked, rank_watch
from lavis_mafa.tasks.task import MafaTask
from lavis_mafa.weights import read_weights

logger = logging.getLogger(__name__)


class RunnerMafa(RunnerBase):
    """Trains and evaluates our tasks and LAVIS's own, from LAVIS's YAML.

    Unlike ``runner_base`` it runs on a CPU, takes gloo, logs every loss, steps the learning rate as the scheduler asks, divides
    accumulated gradients, resumes exactly (also in the middle of an epoch), and writes below the working directory only.
    """

    _model: Any
    feed: GritFeed  # made with the training loader
    state: RunState
    log: MetricsLog
    make_page: Callable[[Path], Path] | None = None  # about the run's folder, for trackers that keep files

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        self.settings = task.run if isinstance(task, MafaTask) else run_settings(cfg.run_cfg, ours=False)
        # RunnerBase reads the YAML itself and has no defaults for most keys
        cfg.config.run = OmegaConf.merge(OmegaConf.create(dataclasses.asdict(self.settings)), cfg.run_cfg)
        if not isinstance(task, MafaTask):  # ours did so when they built the data
            datasets = with_training_splits(datasets, [] if self.settings.evaluate else self.settings.train_splits)
        super().__init__(cfg, task, model, datasets, job_id)
        self.checkpoints = CheckpointFolder(self.output_dir, self.settings.keep_checkpoints)
        self.bad_samples = BadSamples(self.output_dir / "bad_samples.jsonl", self.settings.max_bad_share)
        trackers = self.settings.trackers if rank() == 0 and not self.evaluate_only else []
        self.trackers = Trackers(trackers, self.output_dir, self.config.to_dict())
        self.trained = 0  # steps of the run that are done
        self.lost_workers: list[str] = []  # what is known of data loader workers that were killed

    # --- what RunnerBase builds differently ------------------------------------------------------------------------

    @functools.cached_property
    def device(self) -> torch.device:
        wanted = str(self.config.run_cfg.get("device", "cuda"))
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("run.device is %s, but no GPU is visible: running on the CPU", wanted)
            wanted = "cpu"
        return torch.device(f"cuda:{self.config.run_cfg.gpu}" if wanted == "cuda" and self.use_distributed else wanted)

    @property
    def use_distributed(self) -> bool:
        return world_size() > 1

    @property
    def train_splits(self) -> list[str]:
        """All that is trained on is in this one by now; another split may be evaluated besides."""
        return ["train"]

    @property
    def resume_ckpt_path(self) -> Path | None:
        """The checkpoint that this run goes on from, whether it was named or found."""
        return self._resume_from

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    @functools.cached_property
    def model(self) -> Any:
        """The model on its device, in DDP when there is a process group (RunnerBase returns None on a CPU)."""
        self._model = model = self._model.to(self.device)
        if self.settings.compile:
            from lavis_mafa.runners.compiled import compile_parts  # here: torch's compiler takes seconds to import

            compile_parts(model)
        if not self.use_distributed:
            return model
        for buffer in model.buffers():  # DDP leaves this out together with broadcast_buffers
            torch.distributed.broadcast(buffer, src=0)
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=self.settings.find_unused_parameters,
            # our queues are kept equal by gathering; sending them from rank 0 at every step would cost 67 MB
            broadcast_buffers=not isinstance(self.task, MafaTask),
        )

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS 1.0.2's AdamW and its two groups (no decay on biases and norms), fused: a seventh of the time on a CPU."""
        decaying: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                (others if weight.ndim < 2 or any(part in name for part in ("bias", "ln", "bn")) else decaying).append(weight)
        groups = [{"params": decaying, "weight_decay": self.settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.settings.init_lr, betas=(0.9, self.settings.beta2), fused=True)

    @functools.cached_property
    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device.type) if self.settings.precision == "fp16" else None

    @functools.cached_property
    def lr_scheduler(self) -> Any:
        scheduler = registry.get_lr_scheduler_class(self.settings.lr_sched)
        if scheduler is None:
            raise UserError(f"run.lr_sched is {self.settings.lr_sched!r}; known: {', '.join(registry.list_lr_schedulers())}.")
        return scheduler(
            optimizer=self.optimizer,
            max_epoch=self.settings.lr_horizon_epochs or self.max_epoch,
            min_lr=self.settings.min_lr,
            init_lr=self.settings.init_lr,
            decay_rate=self.settings.lr_decay_rate,
            warmup_start_lr=self.settings.warmup_lr,
            warmup_steps=self.settings.warmup_steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    def setup_output_dir(self) -> None:
        """The folder of this run and the checkpoint it goes on from, both the same on all ranks."""
        found: tuple[Path, Path | None] | str = ""
        if rank() == 0:
            try:
                found = open_run(Path(self.settings.output_dir).absolute(), self.job_id, self.settings, self.config.to_dict())
            except UserError as error:
                found = str(error)
        found = broadcast_object(found)
        if isinstance(found, str):
            raise UserError(found)
        self.output_dir, self._resume_from = found
        self.result_dir = self.output_dir / "result"
        for name, path in (("result_dir", self.result_dir), ("output_dir", self.output_dir)):
            registry.mapping["paths"].pop(name, None)  # a second run in one process is legitimate
            registry.register_path(name, str(path))

    def create_loaders(self, datasets: Any, batch_sizes: Any, is_trains: Any, collate_fns: Any, **_: Any) -> list[DataLoader | None]:
        return [*map(self._create_loader, datasets, batch_sizes, is_trains, collate_fns)]

    def _create_loader(self, dataset: Any, batch_size: int, train: bool, collate: Any) -> DataLoader | None:
        pin = self.device.type == "cuda"
        if not train:
            shared = self.use_distributed and self.config.run_cfg.get("use_dist_eval_sampler", True)
            return eval_loader(dataset, batch_size, collate, self.settings, pin, shared)
        if self.evaluate_only:  # nobody asks for it, and a set for evaluation may be smaller than a training batch
            return None
        grit = self.settings.grit if isinstance(self.task, MafaTask) else None
        loader, self.feed = train_loader(dataset, batch_size, grit, self.settings, pin, bool(getattr(self._model, "intra_modal", ())))
        return loader

    # --- a run -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        of_lavis = self.config.model_cfg.arch not in MODEL_BLOCKS
        watch = rank_watch(self.settings.rank_timeout_minutes, self.output_dir, self.settings.dist_url)
        with group_of_one(of_lavis and not self.evaluate_only), watch, self.trackers:
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
        best_epoch = None
        if self.evaluate_only:
            for split in self.valid_splits:
                self._evaluate_split(split, "evaluate")
        else:
            check_evaluation_images(self.datasets, [*self.valid_splits, *self.test_splits], self.settings.num_workers, self.output_dir)
            self._train_epochs()
            best_epoch = self.state.best_epoch
        if self.test_splits and best_epoch is not None:
            path = self.checkpoints.path("best")
            self.checkpoints.wait()
            barrier()
            load_model(self.unwrap_dist_model(self.model), read_weights(path), path)
        for split in self.test_splits:
            self._evaluate_split(split, "last" if best_epoch is None else "best")
        self._hand_in_files()
        took = datetime.timedelta(seconds=int(time.time() - started))
        logger.info("finished in %s; files in %s (a page about them: lavis-mafa report %s)", took, self.output_dir, self.output_dir)

    def _hand_in_files(self) -> None:
        """What the finished run is, and the page about it, for trackers that keep files."""
        if self.trackers.keep_files:
            mark("writing the report")
            pages = [] if self.make_page is None else [self.make_page(self.output_dir)]
            self.trackers.files([*(self.output_dir / f for f in ("config.yaml", "metrics.jsonl", "evaluation.jsonl")), *pages])

    def log_config(self) -> None:
        path = self.output_dir / "config.yaml"
        if not path.exists():  # a run that goes on in its folder has written it
            with replacing(path) as part:
                OmegaConf.save(OmegaConf.create(self.config.to_dict()), part)

    # --- training --------------------------------------------------------------------------------------------------

    def _train_epochs(self) -> None:
        model, steps = self.model, self.steps_per_epoch  # the model before the optimizer, which looks at its parameters
        total = min(self.max_epoch * steps, self.settings.max_steps or self.max_epoch * steps)
        samples_per_step = self.settings.batch_size_train * world_size()
        self.log = MetricsLog(self.output_dir if rank() == 0 else None, steps, samples_per_step, total, self.trackers)
        self.state = RunState(
            model=self.unwrap_dist_model(model),
            optimizer=self.optimizer,
            scaler=self.scaler,
            feed=self.feed,
            log=self.log,
            bad_samples=self.bad_samples,
            dataset=self.train_loader.dataset.dataset,
            config=self.config.to_dict(),
            device=self.device,
        )
        self.share_watch = ShareWatch(steps)
        vote = Vote(
            stop=lambda: interrupt.asked() or (signal.SIGCHLD if self.lost_workers else 0),
            save_failed=lambda: self.checkpoints.failed,
        )
        self.stepper = Stepper(self.task, model, self.optimizer, self.scaler, self.settings, self.device, vote)
        self.record = ConnectionRecord(self.output_dir / "connections", rank(), self.settings.record_connections, steps)
        self.nonfinite = NonFinite(self.output_dir / f"nonfinite.rank{rank()}.jsonl", self.settings.max_nonfinite_steps)
        with contextlib.closing(self.log):
            first_epoch, resumed_step = self._resume(total)
            for epoch in range(first_epoch, self.max_epoch):
                first_step = resumed_step if epoch == first_epoch else 0
                if epoch * steps + first_step >= total:
                    break
                model.train()
                with interrupt.postponed():
                    stopped_step, stop_signal = self._train_epoch(epoch, first_step, total)
                    recorded = self.record.write(epoch, first_step)
                    self._save_epoch(epoch, stopped_step, stop_signal, total)
                self.trained = epoch * steps + (stopped_step or steps)
                if recorded is not None and self.trackers.names:
                    self.trackers.pictures("connections", surest_connections(recorded, self.state.dataset), self.trained)
                self._validate(epoch, whole=stopped_step is None)
                if stopped_step is not None:
                    break
                barrier()
            self.checkpoints.wait()

    def _resume(self, total: int) -> tuple[int, int]:
        """The epoch and its step to begin with; after those that the checkpoint has, where there is one."""
        path = self.resume_ckpt_path
        if path is None:
            return 0, 0
        epoch, step, settings = self.state.restore(path)
        self.trained = self.trackers.first_step = epoch * self.steps_per_epoch + step
        found = rank() == 0 and self.checkpoints.take_best_along(path, self.state.best_epoch, self.state.best_metric)
        if not broadcast_object(found):
            self.state.best_metric, self.state.best_epoch = float("-inf"), None
        logger.info("resuming %s at epoch %d, step %d", path, epoch, step)
        if self.trackers.names:
            self.log.tell_missed()
        say_what_differs(settings, self.state.config)
        # it was saved before it was evaluated, which may draw random numbers
        if step == 0:
            self._validate(epoch - 1)
        elif epoch * self.steps_per_epoch + step >= total:
            self._validate(epoch, whole=False)
        return epoch, step

    def _train_epoch(self, epoch: int, first_step: int, total: int) -> tuple[int | None, int]:
        """Train an epoch from ``first_step`` on.

        Returns:
            the steps that are done where ``max_steps`` or a signal ended it early, else None; and the signal that did, or asked for
            the end in the last step, else 0.
        """
        settings, steps, feed = self.settings, self.steps_per_epoch, self.feed
        self.train_loader.dataset.set_epoch(epoch)
        feed.sampler.set_epoch(epoch)  # a random order, unless one was made for this epoch
        if feed.collects("separate") and first_step == 0:
            feed.separate_pass(epoch, self._feature_pass())
        self.log.restart_clock()
        stop = 0
        batches = patient(self.train_loader, first_step, lost=self.lost_workers.append)
        for step, samples in enumerate(marked(batches, epoch, first_step), start=first_step):
            samples = self._prepare(samples, epoch, step)
            if step == 0 and self.trackers.names:
                self.trackers.pictures("samples", samples_given(samples), epoch * steps + 1)
            self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            result = self.stepper(samples, step, steps)
            output, stop = result.output, result.stop
            norm = {} if result.gradient_norm is None else {"gradient_norm": result.gradient_norm}
            self.log.add({**losses_of(output), **(output.get("metrics") or {}), **norm}, skipped=result.applied is False)
            self.nonfinite.add(epoch, step, samples, result)
            if output.get("image_features") is not None and feed.collects("training"):
                feed.collect(samples["index"], output["image_features"], output["text_features"])
            self.record.add(epoch, step, output.get("verdicts"))
            if result.save_failed:
                self.checkpoints.wait()  # raises, on all ranks
            done = step + 1
            # gradients of half an accumulation window are in no checkpoint: save and stop between windows
            between = done % settings.accum_grad_iters == 0 and done < steps
            ends = between and epoch * steps + done >= total
            if done % self.log_freq == 0 or done == steps or ends:
                self._flush(epoch, done)
            if between and (ends or stop):
                return done, stop
            if between and settings.save_every_steps is not None and done % settings.save_every_steps == 0:
                self.save(f"{epoch}_{done}", epoch, step=done, next_epoch=epoch)
        feed.end_epoch(epoch)
        return None, stop

    def _save_epoch(self, epoch: int, stopped_step: int | None, stop: int, total: int) -> None:
        """Save what an epoch, or the part of it that was trained, has come to: before validating, which may take long.

        Raises:
            Stopped: a signal asked for the end, and everything is saved.
            WorkerLost: a data loader worker was killed, here or on another rank, and everything is saved.
        """
        if stopped_step is not None:
            name = f"{epoch}_{stopped_step}"
            self.save(name, epoch, step=stopped_step, next_epoch=epoch)
        else:
            name = f"{epoch}"
            last = (epoch + 1) * self.steps_per_epoch >= total
            regular = (epoch + 1) % self.settings.save_every_epochs == 0
            if regular or last or self.valid_splits or stop:
                self.save(name, epoch, step=0, next_epoch=epoch + 1)
        if stop:
            self.checkpoints.wait()
            at = f"epoch {epoch}" + ("" if stopped_step is None else f", step {stopped_step}")
            said = f"stopped after {at}; saved as {self.checkpoints.path(name)}. Go on with run.resume_ckpt_path=auto (--resume auto)."
            said = said if rank() == 0 else ""
            if stop == signal.SIGCHLD:
                raise WorkerLost("".join(self.lost_workers[-1:]), said)
            raise interrupt.Stopped(said, stop)

    def save(self, name: str, epoch: int, step: int, next_epoch: int, with_state: bool = True) -> None:
        """Save everything a resumed run needs; ``step`` steps of ``next_epoch`` are done. Written beside the training."""
        mark(f"saving {name}")
        content = self.state.content(epoch, next_epoch, step) if rank() == 0 else None
        self.checkpoints.save(name, content, self.state.of_rank(step) if with_state else None, rank())

    def _prepare(self, samples: dict[str, Any], epoch: int, step: int) -> dict[str, Any]:
        self.bad_samples.add(samples, self.settings.batch_size_train)
        samples = self._on_device(samples)
        samples.update(epoch=epoch, iters=step, num_iters_per_epoch=self.steps_per_epoch, grouped=self.feed.sampler.grouped)
        samples["window"] = self.settings.accum_grad_iters
        return samples

    def _on_device(self, samples: dict[str, Any]) -> dict[str, Any]:
        return self.train_loader.dataset.normalised(prepare_sample(samples, cuda_enabled=self.cuda_enabled))

    def _flush(self, epoch: int, done: int) -> None:
        derive = getattr(self.task, "derived_metrics", None)
        record = self.log.flush(epoch, done, self.optimizer.param_groups[0]["lr"], derive)
        if rank() == 0:
            self.share_watch.look(record)

    @torch.no_grad()
    def _feature_pass(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All features without training, for GRIT's separate pass."""
        model = self.unwrap_dist_model(self.model)
        model.eval()
        for samples in Bar(self.train_loader, desc="features for GRIT", unit="batch"):
            self.bad_samples.add(samples, self.settings.batch_size_train)
            samples = self._on_device(samples)
            with autocast(self.settings.precision, self.device):
                image, text = model.grit_features(samples)
            yield samples["index"], image, text
        model.train()

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _validate(self, epoch: int, whole: bool = True) -> None:
        """Evaluate after an epoch; a part of one, where ``max_steps`` ended it, is never the best."""
        for split in self.valid_splits:
            result = self._evaluate_split(split, epoch)
            metric = (result or {}).get("agg_metrics")
            if whole and metric is not None and split == "val" and metric > self.state.best_metric:
                self.state.best_metric, self.state.best_epoch = float(metric), epoch
                self.save("best", epoch, step=0, next_epoch=epoch + 1, with_state=False)

    def _evaluate_split(self, split: str, epoch: int | str) -> dict[str, Any] | None:
        mark(f"evaluating {split}")
        loader = self._loader(split)
        model = self.unwrap_dist_model(self.model)
        # LAVIS's tasks and models bring their own
        with autocast(self.settings.precision if isinstance(self.task, MafaTask) else "fp32", self.device):
            stats = evaluate_split(self.task, model, loader, self.datasets[split], split, epoch, self.output_dir, self.cuda_enabled)
        self.trackers.scalars(evaluation_figures(split, stats or {}), self.trained)
        return stats

    def _loader(self, split: str) -> Any:
        if split == "train":
            raise UserError(evaluates_training("run.valid_splits" if split in self.valid_splits else "run.test_splits"))
        loader = self.dataloaders.get(split)
        if loader is None:
            raise UserError(f"run names the split {split!r}, but the data sets have: {', '.join(sorted(self.dataloaders))}.")
        return loader


@torch.no_grad()
def evaluate_split(
    task: Any, model: Any, loader: Any, dataset: Any, split: str, epoch: int | str, folder: Path, cuda_enabled: bool
) -> dict[str, Any] | None:
    """The metrics of any LAVIS task on one split, on all ranks, appended to ``evaluation.jsonl``; None where the task has none."""
    model.eval()
    task.before_evaluation(model=model, dataset=dataset)
    with k_test_within(task, model, dataset):
        result = task.evaluation(model, loader, cuda_enabled=cuda_enabled)
    # LAVIS's retrieval has a result on rank 0 alone; the other ranks must not miss the broadcast
    stats = None if result is None else task.after_evaluation(val_result=result, split_name=split, epoch=epoch)
    stats = broadcast_object(stats)
    if rank() == 0 and stats is not None:
        record = {k: (float(v) if isinstance(v, int | float) or hasattr(v, "item") else v) for k, v in stats.items()}
        with open(folder / "evaluation.jsonl", "a") as file:
            file.write(json.dumps({"split": split, "epoch": epoch, **record}) + "\n")
        shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in record.items()}
        logger.info("%s: %s", split, "  ".join(f"{name} {text}" for name, text in shown.items() if isinstance(text, str)))
    return stats


@contextlib.contextmanager
def k_test_within(task: Any, model: Any, dataset: Any) -> Iterator[None]:
    """Inside, ``run.k_test`` is no more than a gallery has: LAVIS's models take that for granted, ours look themselves."""
    of_lavis = getattr(getattr(type(model), "compute_sim_matrix", None), "__module__", "").startswith("lavis.")
    settings: Any = getattr(task, "cfg", None) or getattr(task, "run", None)
    wanted = getattr(settings, "k_test", None)
    if not of_lavis or wanted is None or not hasattr(dataset, "text"):
        yield
        return
    most = min(len(dataset.image), len(dataset.text))
    if wanted > most:
        logger.warning(
            "run.k_test is %d, but the gallery has %d images and %d texts: the matching head ranks %d candidates of each",
            *(wanted, len(dataset.image), len(dataset.text), most),
        )
    settings.k_test = min(wanted, most)
    try:
        yield
    finally:
        settings.k_test = wanted
