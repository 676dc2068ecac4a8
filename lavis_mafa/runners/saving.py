"""Saving a run whole and going on from what was saved."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.distributed import broadcast_object, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.grit.saved import saved_tensor, saved_value
from lavis_mafa.runners.agreement import data_difference, data_record
from lavis_mafa.runners.background import host_copy
from lavis_mafa.runners.bad_samples import BadSamples
from lavis_mafa.runners.checkpoints import CheckpointFolder, RankState, load_model, model_state, read_resumable
from lavis_mafa.runners.grit_feed import GritFeed
from lavis_mafa.runners.metrics_log import MetricsLog
from lavis_mafa.runners.random_states import random_state, restore_random_state
from lavis_mafa.runners.resuming import say_what_differs
from lavis_mafa.runners.state_checks import check_optimizer, check_progress, check_rank_state
from lavis_mafa.runners.watchdog import mark
from lavis_mafa.weights import damage, read_checkpoint

logger = logging.getLogger(__name__)
HYPER_PARAMETERS = ("betas", "eps", "weight_decay")  # of the settings; the learning rate is the scheduler's


class Saving:
    """Methods of the runner that write and read checkpoints."""

    settings: RunBlock
    task: Any
    config: Any
    device: Any
    model: Any
    optimizer: Any
    scaler: Any
    unwrap_dist_model: Any
    output_dir: Path
    checkpoints: CheckpointFolder
    bad_samples: BadSamples
    feed: GritFeed | None
    log: MetricsLog
    train_loader: Any
    start_epoch: int
    start_step: int
    best_metric: float
    best_epoch: int | None

    @functools.cached_property
    def data_record(self) -> list[dict[str, Any]]:
        """What there is to train on, by content: an order of rows means nothing for other rows."""
        return data_record(self.train_loader.dataset.dataset)

    def save(self, name: str, epoch: int, step: int, next_epoch: int, with_state: bool = True) -> None:
        """Save everything a resumed run needs; ``step`` steps of ``next_epoch`` are done. Written beside the training."""
        mark(f"saving {name}")
        content = None
        if rank() == 0:
            content = {
                "model": model_state(self.unwrap_dist_model(self.model)),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "config": self.config.to_dict(),
                "epoch": epoch,
                "next_epoch": next_epoch,
                "step": step,
                "best_metric": self.best_metric,
                "best_epoch": self.best_epoch,
                "world_size": world_size(),
                "data": self.data_record,
            }
        self.checkpoints.save(name, content, self._rank_state(step) if with_state else None, rank())

    def _rank_state(self, step: int) -> RankState:
        assert self.feed is not None
        feed = self.feed.snapshot(step)
        state = {"random": random_state(self.device), "log": self.log.state_dict(), "bad_samples": self.bad_samples.state_dict()}
        state = host_copy(state)
        return lambda: {"feed": feed(), **state}

    def _load_checkpoint(self, url_or_filename: str) -> None:
        content, state = read_resumable(url_or_filename, rank())
        load_model(self.unwrap_dist_model(self.model), content["model"], url_or_filename)
        _ = self.train_loader  # builds the feed
        assert self.feed is not None
        try:
            self.start_epoch, self.start_step = check_progress(content)
            check_optimizer(content["optimizer"], self.optimizer)
            if state is not None:
                self._check_data(content.get("data"), state)
                check_rank_state(state, self.feed.sampler.dataset_size, self.start_epoch, self.start_step, self.device)
                self.feed.load_state_dict(state["feed"])
                self.start_step = self.feed.sampler.start_step  # another batch size counts other steps
                self._check_ranks(content.get("world_size", world_size()))
                self.log.load_state_dict(state.get("log"), self.device)
                self.bad_samples.load_state_dict(state.get("bad_samples"))
            if self.scaler is not None and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # the last three: entries of another kind
            raise UserError(f"run.resume_ckpt_path: {url_or_filename}: {error}") from error
        own = [{name: group[name] for name in HYPER_PARAMETERS} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self.best_metric = float(content.get("best_metric", float("-inf")))
        self.best_epoch = content.get("best_epoch")
        self._take_best_along(Path(url_or_filename))
        if state is not None:
            restore_random_state(state["random"], self.device)
        logger.info("resuming %s at epoch %d, step %d", url_or_filename, self.start_epoch, self.start_step)
        say_what_differs(content.get("config"), self.config.to_dict())

    def _check_data(self, saved: Any, state: Any) -> None:
        """The order, the queue and the image keys of a checkpoint are numbers of rows."""
        if saved is None:  # written by a version that did not say
            order = saved_tensor(saved_value(saved_value(state, "feed"), "sampler"), "order", torch.long, dims=1)
            rows = sum(part["rows"] for part in self.data_record)
            different = f"the data had {len(order)} rows, now {rows}" if len(order) != rows else None
            if different is None:
                logger.warning("the checkpoint does not say what its rows held: that they are the same cannot be checked")
        else:
            different = data_difference(saved, self.data_record)
        if different is not None:
            raise ValueError(
                f"{different}; its order would be that of other rows. Go on with the data it was trained on, or start a new run, "
                "which model.pretrained may give its weights."
            )

    def _check_ranks(self, saved: int) -> None:
        scope = self.settings.grit
        if saved != world_size() and self.feed is not None and self.feed.queue is not None and scope.batch_scope == "local":
            raise ValueError(
                f"it was saved by {saved} processes and is resumed by {world_size()}, but with run.grit.batch_scope: local each holds "
                f"a part of the order; resume with {saved}."
            )

    def _take_best_along(self, resumed: Path) -> None:
        """The best checkpoint so far lies in the old run's folder; without it, or with a later one, the best starts anew."""
        if self.best_epoch is None:
            return
        best, own = resumed.with_name("checkpoint_best.pth"), self.checkpoints.path("best")
        found = False
        if rank() == 0 and best.is_file() and damage(best) is not None:
            logger.warning("%s is damaged: the best checkpoint is looked for anew", best)
        elif rank() == 0 and best.is_file():
            content = read_checkpoint(best)
            found = (content.get("best_epoch"), content.get("best_metric")) == (self.best_epoch, self.best_metric)
            if found and not (own.is_file() and own.samefile(best)):
                part = own.with_name(f".{own.name}.part")
                shutil.copyfile(best, part)
                part.replace(own)
        if not broadcast_object(found):
            self.best_metric, self.best_epoch = float("-inf"), None
