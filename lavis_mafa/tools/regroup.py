"""Tar shards whose runs of B pairs are GRIT groups: for streams, which are read once and have no previous epoch to group by."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from torch import Tensor

from lavis_mafa.config.schema import Grit
from lavis_mafa.datasets.shards import Sample
from lavis_mafa.datasets.stored import StoredImage
from lavis_mafa.errors import UserError
from lavis_mafa.files import built_folder
from lavis_mafa.runners.loading import GritFeed
from lavis_mafa.tools.candidates import LARGEST_MATRIX
from lavis_mafa.tools.features import Features

QUEUES = 10  # search spaces of a queue, as in the paper: 48,000 pairs in parts of 4,800
PAIRS_OF_A_SHARD = 10_000  # as img2dataset writes them
ROWS_AT_ONCE = 4096
ORDER = "order.parquet"


def grouped_order(features: Features, batch_size: int, search_space: int, seed: int, progress: Callable[[int], object]) -> Tensor:
    """The order of training's second epoch, had its first one given these features: IntTensor[N].

    Args:
        batch_size: B; every B pairs from the beginning are one group, but for the last N mod B.
        search_space: M, pairs among which the most similar one comes next.

    Raises:
        UserError: fewer pairs than a batch, or a batch larger than the search space.
    """
    count = len(features.image)
    memory = "matrix" if search_space <= LARGEST_MATRIX else "rows"
    grit = Grit(queue_size=QUEUES * search_space, search_space=search_space, memory=memory)
    try:
        feed = GritFeed(grit, count, batch_size, 0, 1, seed)
    except ValueError as error:
        raise UserError(f"--batch-size is {batch_size}: {error}.") from error
    for rows in feed.sampler.order.split(ROWS_AT_ONCE):
        feed.collect(rows, *features.rows(rows.long()))
        progress(len(rows))
    feed.end_epoch(0)
    return feed.sampler.order


def write_shards(
    samples: Sequence[tuple[Path, Sample]], order: Tensor, folder: Path, batch_size: int, progress: Callable[[int], object]
) -> int:
    """Write all members of the samples in this order, as ``00000.tar`` and so on, each but the last of whole batches.

    Keys are places in the order; ``order.parquet`` tells for each which sample it was. The folder is complete, or it is not there.

    Args:
        samples: of N pairs the shard and the members.

    Returns:
        The number of shards.

    Raises:
        OSError: a shard cannot be read, or was cut off since it was looked at.
    """
    each = max(PAIRS_OF_A_SHARD // batch_size, 1) * batch_size
    with built_folder(folder) as partial:
        for number, rows in enumerate(order.split(each)):
            with tarfile.TarFile(partial / f"{number:05}.tar", "w") as archive:
                for place, row in enumerate(rows.tolist(), number * each):
                    shard, members = samples[row]
                    for kind, member in members.items():
                        written = tarfile.TarInfo(f"{place:09}.{kind}")
                        written.size = member.size
                        content = StoredImage(f"{shard}/{member.name}", str(shard), member.offset, member.size).read_bytes()
                        archive.addfile(written, io.BytesIO(content))
                    progress(1)
        keys = [f"{place // each:05}.tar/{place:09}" for place in range(len(order))]
        sources = [f"{shard}/{next(iter(members.values())).name}" for shard, members in (samples[row] for row in order.tolist())]
        pyarrow.parquet.write_table(pa.table({"key": keys, "source": sources, "row": order.numpy()}), partial / ORDER)
    return number + 1
