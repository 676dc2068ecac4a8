"""Reading samples by number for a pass in which each sample counts once: what cannot be read is left out, not replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_mafa.datasets.indexed import BadSample, IndexedDataset
from lavis_mafa.grit import seeded_generator


class ReadableRows(IndexedDataset):
    """As :class:`IndexedDataset`, except that a batch becomes smaller by its unreadable samples and lists them."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._try(index) for index in indices]

    def collate(self, samples: list[Any]) -> Any:
        """A batch, or nothing but ``bad_samples`` where nothing could be read."""
        bad = [dict(s) for s in samples if isinstance(s, BadSample)]
        readable = [s for s in samples if not isinstance(s, BadSample)]
        return {**(super().collate(readable) if readable else {}), "bad_samples": bad}


def shuffled(count: int, seed: int, at_most: int | None = None) -> Tensor:
    """LongTensor: a random order of ``count`` samples, or the first ``at_most`` of it, which are a fair part of the data."""
    return torch.randperm(count, generator=seeded_generator("offline pass", seed))[:at_most]


def read_batches(rows: ReadableRows, blocks: Sequence[Tensor], batch_size: int, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the block, batch) for each block in turn, no batch across two blocks; workers read ahead."""
    batches = [(number, part.tolist()) for number, block in enumerate(blocks) for part in block.split(batch_size)]
    loader = DataLoader(
        rows,
        batch_sampler=[part for _, part in batches],
        num_workers=workers,
        collate_fn=rows.collate,
        generator=torch.Generator(),
    )
    for (number, _), batch in zip(batches, loader, strict=True):
        yield number, batch
