"""The pass of `lavis-mafa mine`: every anchor's hardest negative in its GRIT batch, with Con-D's probability (MAFA section G.8).

One Parquet file a block, written whole, is the unit of resuming and of sharing the work among ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lavis_mafa.analysis.connections.blocks import Block, Encoder, encoded_blocks
from lavis_mafa.analysis.connections.candidates import batches_of, grouped_order, hardest_negatives, match_probabilities, shuffled_pairs
from lavis_mafa.analysis.connections.reading import ReadableRows
from lavis_mafa.analysis.connections.source_rows import SourceRows
from lavis_mafa.distributed import rank, world_size

DIRECTIONS = ("text for image", "image for text")
NOBODY = -1  # in place of a candidate that an anchor does not have


def mine_blocks(
    encoder: Encoder,
    rows: ReadableRows,
    source: SourceRows,
    blocks: list[tuple[int, Tensor]],
    folder: Path,
    batch_size: int,
    seed: int = 0,
    encode_batch: int = 64,
    workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write ``block_N.parquet`` for this rank's share of the blocks that have none yet.

    Args:
        encoder: Con-D.
        rows: the data.
        source: its annotations.
        blocks: (number, rows) of M samples each.
        folder: for the files.
        batch_size: B, from which a hardest negative is taken.
        seed: of GRIT's random starts.
        encode_batch: of the encoders.
        workers: that read images.
        progress: told how many samples were taken.
    """
    open_blocks = [item for item in blocks if not part_path(folder, item[0]).exists()]
    mine = open_blocks[rank() :: world_size()]
    for block in encoded_blocks(encoder, rows, mine, encode_batch, workers, progress):
        write_parquet(judged(encoder, block, source, batch_size, seed), part_path(folder, block.number))


def judged(encoder: Encoder, block: Block, source: SourceRows, batch_size: int, seed: int) -> pa.Table:
    """A row an anchor: its candidate, Con-D's probability for it and for the anchor's own pair.

    Columns: ``block``, ``direction``, ``image`` and ``text`` (data set rows, -1 for none), ``caption`` of the text as it was written,
    ``similarity`` (cosine), ``probability``, ``own_probability``, ``shuffled_probability`` (of an anchor image with the text of the
    block's next sample; null for anchor texts, and where that is the same image or text). What could not be read is listed in the
    metadata.
    """
    count, own = len(block), torch.arange(len(block))
    order = grouped_order(block, max(count, 1), seed)
    found = hardest_negatives(block, batches_of(order, batch_size))
    other_image, other_text = shuffled_pairs(block)
    images, texts = torch.cat([found.image, own, other_image]), torch.cat([found.text, own, other_text])
    probability, own_probability, other = match_probabilities(encoder, block, images, texts).split([2 * count, count, len(other_image)])
    shuffled = torch.full((2 * count,), float("nan")).index_copy(0, other_image, other)
    anchor_of_text, here = torch.arange(2 * count) >= count, found.exists
    image = torch.where(here | ~anchor_of_text, block.index[found.image], NOBODY)
    text = torch.where(here | anchor_of_text, block.index[found.text], NOBODY)
    captions = [source.caption(index, read) for index, read in zip(block.index.tolist(), block.captions, strict=True)]
    nothing = torch.full_like(probability, float("nan"))
    table = pa.table(
        {
            "block": pa.array([block.number] * 2 * count, pa.int32()),
            "direction": pa.array([DIRECTIONS[0]] * count + [DIRECTIONS[1]] * count, pa.string()),
            "image": pa.array(image.numpy(), pa.int64()),
            "text": pa.array(text.numpy(), pa.int64()),
            "caption": pa.array([captions[t] if row >= 0 else None for t, row in zip(found.text.tolist(), text.tolist(), strict=True)]),
            "similarity": pa.array(torch.where(here, found.similarity, nothing).numpy(), pa.float32()),
            "probability": pa.array(torch.where(here, probability, nothing).numpy(), pa.float32()),
            "own_probability": pa.array(own_probability.repeat(2).numpy(), pa.float32()),
            "shuffled_probability": pa.array(shuffled.numpy(), pa.float32(), from_pandas=True),
        }
    )
    return table.replace_schema_metadata({"bad_samples": json.dumps(block.bad_samples)})


def part_path(folder: Path, number: int) -> Path:
    """Where a block's candidates are."""
    return folder / f"block_{number:06}.parquet"


def read_parts(folder: Path, blocks: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """All blocks' candidates in the order of the blocks, and all samples that could not be read."""
    tables = [pq.read_table(part_path(folder, number)) for number in range(blocks)]
    bad = [sample for table in tables for sample in json.loads(table.schema.metadata[b"bad_samples"])]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]), bad


def write_parquet(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part)
    os.replace(part, path)
