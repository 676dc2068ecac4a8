"""GRIT in a running training: who collects, who groups, and which order the next epoch gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lavis_mafa.config.schema import Grit
from lavis_mafa.distributed import gather_in_rank_order, gather_objects
from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order

logger = logging.getLogger(__name__)


class GritFeed:
    """The sampler of the training set and, with GRIT, the queue that makes its next order (GRIT-VLP section 4.1).

    ``batch_scope: local``: each rank groups what it saw. ``global``: features are gathered in rank order and every rank groups the
    same queue, so that the order does not depend on the number of ranks.
    """

    def __init__(self, grit: Grit | None, dataset_size: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.grit = grit if grit is not None and grit.enabled else None
        self.seed = seed
        scope = grit.batch_scope if grit is not None else "local"
        self.sampler = GritSampler(dataset_size, batch_size, rank, world_size, scope, seed)
        if self.grit is not None and self.sampler.block > self.grit.search_space:
            raise ValueError(
                f"a grouped batch has {self.sampler.block} samples, more than run.grit.search_space ({self.grit.search_space})"
            )
        self.queue = None
        if grit is not None and grit.enabled:
            if dataset_size < grit.search_space:
                logger.warning(
                    "the data set has %d samples, fewer than run.grit.search_space (%d): GRIT groups all of them in one search space",
                    *(dataset_size, grit.search_space),
                )
            queue_seed = seed if scope == "global" else seed + rank
            self.queue = GritQueue(
                grit.queue_size,
                grit.search_space,
                grit.example_shuffle,
                queue_seed,
                memory=grit.memory,  # type: ignore[arg-type]
            )

    def begin_epoch(self, epoch: int) -> None:
        """Serve the order made for this epoch, or a random one."""
        self.sampler.set_epoch(epoch)

    def collect(self, index: Tensor, image_features: Tensor, text_features: Tensor) -> None:
        """Phase 1: remember a batch's features, [B], [B, d], [B, d]."""
        if self.queue is None or self.grit is None:
            return
        if self.grit.batch_scope == "global":
            index = gather_in_rank_order(index)
            image_features, text_features = gather_in_rank_order(image_features), gather_in_rank_order(text_features)
        # the features of a step that was not applied may be anything, but its samples must be in the next order too
        self.queue.collect(index, _finite(image_features), _finite(text_features))

    def end_epoch(self, epoch: int) -> None:
        """Phases 2-4: the next epoch's order, the same on all ranks."""
        if self.queue is not None and self.grit is not None and self.grit.collect == "training":
            self.sampler.set_order(self._next_order(epoch + 1), epoch + 1, grouped=True)

    def separate_pass(self, epoch: int, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """GRIT-VLP Table 4's naive variant: a reshuffled pass without training, grouped for this very epoch."""
        for index, image_features, text_features in batches:
            self.collect(index, image_features, text_features)
        self.sampler.set_order(self._next_order(epoch), epoch, grouped=True)

    def _next_order(self, epoch: int) -> Tensor:
        assert self.queue is not None and self.grit is not None
        grouped = self.queue.finish_epoch()
        lists = [grouped] if self.grit.batch_scope == "global" else gather_objects(grouped)
        sampler, shuffle = self.sampler, self.grit.batch_shuffle
        seed = self.seed * 100_003 + epoch
        return next_epoch_order(lists, sampler.dataset_size, sampler.block, shuffle, seed, sampler.global_batch)

    def snapshot(self, step: int) -> Callable[[], dict[str, Any]]:
        """Everything a resumed run needs to serve the same samples after ``step`` steps of the current epoch; the function that is
        returned may be called by another thread, and waits there for a queue that is being grouped."""
        sampler, queue = self.sampler.state_dict(step), None if self.queue is None else self.queue.snapshot()
        return lambda: {"sampler": sampler, "queue": None if queue is None else queue()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        if self.queue is not None and state["queue"] is not None:
            self.queue.load_state_dict(state["queue"])


def _finite(features: Tensor) -> Tensor:
    return features.detach().nan_to_num(0.0, 0.0, 0.0)
