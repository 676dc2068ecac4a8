"""How many hardest negatives are false ones (MAFA section 3, Tables 1 and 9, Figures 2 and 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.analysis.connections.blocks import Block, Encoder, encoded_blocks
from lavis_mafa.analysis.connections.candidates import batches_of, grouped_order, hardest_negatives, match_probabilities
from lavis_mafa.analysis.connections.reading import ReadableRows
from lavis_mafa.analysis.connections.tally import Tally
from lavis_mafa.common.distributed import gather_objects, rank, world_size


@dataclass(frozen=True)
class Sampling:
    """How batches are made: random (``search_space`` None), or GRIT's from groups of M = ``search_space``."""

    batch_size: int
    search_space: int | None = None

    @property
    def name(self) -> str:
        return "random" if self.search_space is None else "GRIT"


@dataclass(frozen=True)
class Count:
    """What was found: a tally for each way to sample, samples that were read, and why others were not."""

    tallies: dict[Sampling, Tally]
    samples: int
    unreadable: Counter[str]
    truth_known: bool


def samplings(batch_sizes: Sequence[int], search_spaces: Sequence[int]) -> list[Sampling]:
    """Random and GRIT batches of every size, GRIT for every M."""
    sizes, spaces = sorted(set(batch_sizes)), sorted(set(search_spaces))
    return [*(Sampling(b) for b in sizes), *(Sampling(b, m) for m in spaces for b in sizes)]


def blocks_of(order: Tensor, size: int) -> list[tuple[int, Tensor]]:
    """(number, rows) of the blocks of an order."""
    return list(enumerate(order.split(size)))


def count_false_negatives(
    encoder: Encoder,
    rows: ReadableRows,
    order: Tensor,
    ways: Sequence[Sampling],
    thresholds: Sequence[float],
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Count:
    """Go through the data once and count for every way to sample: each anchor's hardest negative in its batch, if p > threshold.

    Blocks have the size of the largest M. Their samples are shuffled, so random batches are cut from a block as it is. All ways'
    candidates of a block are scored together, each distinct pair once. Ranks share the blocks.

    Args:
        encoder: Con-D.
        rows: the data.
        order: LongTensor, shuffled rows to visit.
        ways: see ``samplings``.
        thresholds: of Con-D's probability.
        seed: of GRIT's random starts.
        batch_size: of the encoders.
        workers: that read images.
        progress: told how many samples were taken.
    """
    size = max(way.search_space or way.batch_size for way in ways)
    tallies = {way: Tally(tuple(thresholds)) for way in ways}
    unreadable: Counter[str] = Counter()
    truth = getattr(rows.dataset, "truth", None)
    samples, known = 0, truth is not None
    for block in encoded_blocks(encoder, rows, blocks_of(order, size)[rank() :: world_size()], batch_size, workers, progress):
        samples += len(block)
        unreadable.update(reason_of(bad) for bad in block.bad_samples)
        known = known and (bool(block.truth) or not len(block))
        _count_block(encoder, block, tallies, truth if block.truth else None, seed)
    for other, (others, more, bad, theirs) in enumerate(gather_objects((tallies, samples, unreadable, known))):
        if other == rank():
            continue
        for way, tally in others.items():
            tallies[way].merge(tally)
        samples, known = samples + more, known and theirs
        unreadable.update(bad)
    return Count(tallies, samples, unreadable, known)


def _count_block(encoder: Encoder, block: Block, tallies: dict[Sampling, Tally], truth: Any, seed: int) -> None:
    orders: dict[int | None, Tensor] = {None: torch.arange(len(block))}
    found = []
    for way in tallies:
        if way.search_space not in orders:
            orders[way.search_space] = grouped_order(block, way.search_space or len(block), seed)
        found.append(hardest_negatives(block, batches_of(orders[way.search_space], way.batch_size, way.search_space)))
    image, text = torch.cat([c.image for c in found]), torch.cat([c.text for c in found])
    probability = match_probabilities(encoder, block, image, text)
    for tally, one, scores in zip(tallies.values(), found, probability.split([len(c) for c in found]), strict=True):
        pairs = (block.truth["concept"][one.image], block.truth["text_key"][one.text]) if truth is not None else None
        tally.add(scores, one.exists, *((truth.matches(*pairs), truth.knows(*pairs)) if pairs else ()))


def reason_of(bad: dict[str, Any]) -> str:
    """Why a sample could not be read, without its path: ``UnidentifiedImageError``."""
    return str(bad["reason"]).split(":")[0]
