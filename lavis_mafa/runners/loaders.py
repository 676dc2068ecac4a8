"""Data loaders of a run: GRIT's order for training, plain order for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lavis_mafa.config.schema import Grit, RunBlock
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.distributed import rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.runners.grit_feed import GritFeed
from lavis_mafa.signals import patient_worker


def train_loader(dataset: Any, batch_size: int, grit: Grit | None, settings: RunBlock, pin: bool) -> tuple[DataLoader, GritFeed]:
    """The training loader and the feed that orders it.

    Raises:
        UserError: a stream, or fewer samples than one global batch.
    """
    if isinstance(dataset, tuple | list | IterableDataset):
        raise UserError("run.runner runner_mafa trains on map-style data sets; use LAVIS's runner_iter for webdataset streams.")
    indexed = IndexedDataset(dataset, settings.seed)
    try:
        feed = GritFeed(grit, len(indexed), batch_size, rank(), world_size(), settings.seed)
    except ValueError as error:
        raise UserError(f"run.batch_size_train is {batch_size}: {error}") from error
    loader = DataLoader(
        indexed,
        batch_size=batch_size,
        sampler=feed.sampler,
        num_workers=settings.num_workers,
        pin_memory=pin,
        collate_fn=indexed.collate,
        drop_last=True,
        worker_init_fn=patient_worker,
        persistent_workers=settings.num_workers > 0,
        generator=torch.Generator(),  # else each pass over a loader draws from the generator of dropout and masking
    )
    return loader, feed


def eval_loader(dataset: Any, batch_size: int, collate: Any, settings: RunBlock, pin: bool, shared: bool) -> DataLoader:
    """A loader in data set order; ``shared`` gives each rank a part, as LAVIS's ``use_dist_eval_sampler`` asks."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, shuffle=False) if shared else None,
        num_workers=settings.num_workers,
        pin_memory=pin,
        collate_fn=collate,
        worker_init_fn=patient_worker,
        generator=torch.Generator(),
    )
