"""The loop of ``runner_mafa``: epochs, steps, what is collected for GRIT, logged, recorded and saved on the way."""

from __future__ import annotations

import signal
from typing import Any

import torch
from lavis.datasets.data_utils import prepare_sample
from torch import Tensor

from lavis_mafa import signals as interrupt
from lavis_mafa.distributed import barrier, rank, world_size
from lavis_mafa.errors import WorkerLost
from lavis_mafa.models.sanity import ShareWatch
from lavis_mafa.runners.connection_record import ConnectionRecord
from lavis_mafa.runners.metrics_log import MetricsLog
from lavis_mafa.runners.nonfinite import NonFinite
from lavis_mafa.runners.patient_loader import patient
from lavis_mafa.runners.saving import Saving
from lavis_mafa.runners.stepping import Stepper, autocast
from lavis_mafa.runners.vote import Vote
from lavis_mafa.runners.watchdog import marked


class TrainingLoop(Saving):
    """Methods of the runner that train; it has RunnerBase's properties beside it."""

    train_loader: Any
    bad_samples: Any
    lr_scheduler: Any
    log: MetricsLog
    log_freq: int
    max_epoch: int
    resume_ckpt_path: str | None
    cuda_enabled: bool
    valid_splits: Any
    vote: Vote
    nonfinite: NonFinite
    lost_worker: str = ""  # what is known of a data loader worker that was killed
    share_watch: ShareWatch
    _validate: Any

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    def _train_epochs(self) -> None:
        model = self.model  # before the optimizer looks at its parameters
        total = self.max_epoch * self.steps_per_epoch
        total = min(total, self.settings.max_steps or total)
        samples = self.settings.batch_size_train * world_size()
        self.log = MetricsLog(self.output_dir if rank() == 0 else None, self.steps_per_epoch, samples, total)
        self.share_watch = ShareWatch(self.steps_per_epoch)
        try:
            if self.resume_ckpt_path is not None:
                self._load_checkpoint(self.resume_ckpt_path)
            limit = self.settings.record_connections
            record = ConnectionRecord(self.output_dir / "connections", rank(), limit, self.steps_per_epoch, self.start_step)
            self.vote = Vote(self._asked_to_stop, lambda: self.checkpoints.failed)
            self.nonfinite = NonFinite(self.output_dir / f"nonfinite.rank{rank()}.jsonl", self.settings.max_nonfinite_steps)
            if self.resume_ckpt_path is not None:
                # it was saved before it was evaluated, which may draw random numbers
                if self.start_step == 0:
                    self._validate(self.start_epoch - 1)
                elif self.start_epoch * self.steps_per_epoch + self.start_step >= total:
                    self._validate(self.start_epoch, whole=False)
            for epoch in range(self.start_epoch, self.max_epoch):
                if epoch * self.steps_per_epoch + self.start_step >= total:
                    break
                model.train()
                with interrupt.postponed():
                    finished = self._train_epoch(epoch, record, total)
                    record.write(epoch)
                    self._save_epoch(epoch, finished, total)
                self._validate(epoch, whole=finished)
                if not finished:
                    break
                self.start_step = 0
                barrier()
            self.checkpoints.wait()
        finally:
            self.log.close()

    def _asked_to_stop(self) -> int:
        return interrupt.asked() or (signal.SIGCHLD if self.lost_worker else 0)

    def _on_lost_worker(self, death: str) -> None:
        self.lost_worker = death

    def _train_epoch(self, epoch: int, record: ConnectionRecord, total: int) -> bool:
        """Train one epoch from ``start_step`` on; False when ``max_steps`` or a signal ended it early, after ``start_step``."""
        assert self.feed is not None
        settings, loader = self.settings, self.train_loader
        stepper = Stepper(self.task, self.model, self.optimizer, self.scaler, settings, self.device, self.vote)
        loader.dataset.set_epoch(epoch)
        self.feed.begin_epoch(epoch)
        if settings.grit.enabled and settings.grit.collect == "separate" and self.start_step == 0 and self.feed.queue is not None:
            self.feed.separate_pass(epoch, self._feature_pass())
        self.log.restart_clock()
        steps = self.steps_per_epoch
        batches = patient(loader, self.start_step, self._on_lost_worker)
        for step, samples in enumerate(marked(batches, epoch, self.start_step), start=self.start_step):
            samples = self._prepare(samples, epoch, step)
            self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            output = stepper(samples, step, steps)
            norm = {} if stepper.gradient_norm is None else {"gradient_norm": stepper.gradient_norm}
            self.log.add({**losses_and_figures(output), **norm})
            self.log.skipped += stepper.applied is False
            self.nonfinite.add(epoch, step, samples, output, stepper.applied, stepper.gradient_norm)
            if output.get("image_features") is not None and settings.grit.collect == "training":
                self.feed.collect(samples["index"], output["image_features"], output["text_features"])
            record.add(epoch, step, output.get("verdicts"))
            if self.vote.failed:
                self.checkpoints.wait()  # raises, on all ranks
            done, global_step = step + 1, epoch * steps + step + 1
            # gradients of half an accumulation window are in no checkpoint: save and stop between windows
            whole = done % settings.accum_grad_iters == 0 and done < steps
            ends = global_step >= total and whole
            if done % self.log_freq == 0 or done == steps or ends:
                self._flush(epoch, done)
            if whole and (ends or self.vote.stop):
                self.start_step = done
                return False
            if whole and settings.save_every_steps is not None and done % settings.save_every_steps == 0:
                self.save(f"{epoch}_{done}", epoch, step=done, next_epoch=epoch)
        self.feed.end_epoch(epoch)
        return True

    def _save_epoch(self, epoch: int, finished: bool, total: int) -> None:
        """Save what an epoch, or the part of it that was trained, has come to: before validating, which may take long.

        Raises:
            Stopped: a signal asked for the end, and everything is saved.
            WorkerLost: a data loader worker was killed, here or on another rank, and everything is saved.
        """
        if not finished:
            name = f"{epoch}_{self.start_step}"
            self.save(name, epoch, step=self.start_step, next_epoch=epoch)
        else:
            name = f"{epoch}"
            last = (epoch + 1) * self.steps_per_epoch >= total
            regular = (epoch + 1) % self.settings.save_every_epochs == 0
            if regular or last or self.valid_splits or self.vote.stop:
                self.save(name, epoch, step=0, next_epoch=epoch + 1)
        if self.vote.stop:
            self.checkpoints.wait()
            at = f"epoch {epoch}" + ("" if finished else f", step {self.start_step}")
            done = f"stopped after {at}; saved as {self.checkpoints.path(name)}. Go on with run.resume_ckpt_path=auto (--resume auto)."
            done = done if rank() == 0 else ""
            if self.vote.stop == signal.SIGCHLD:
                raise WorkerLost(self.lost_worker, done)
            raise interrupt.Stopped(done, self.vote.stop)

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
        if rank() == 0:
            self.share_watch.look(record)

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


def losses_and_figures(output: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss and figure of a step, by name."""
    figures = {name: value for name, value in output.items() if name.startswith("loss") and isinstance(value, Tensor)}
    return {**figures, **(output.get("metrics") or {})}
