"""How many hardest negatives are false ones (MAFA section 3, Tables 1 and 9, Figures 2 and 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.analysis.connections.blocks import Block, Encoder, encoded_blocks
from lavis_mafa.analysis.connections.candidates import (
    SAME_IMAGE,
    Known,
    batches_of,
    grouped_order,
    hardest_negatives,
    match_probabilities,
    shuffled_pairs,
)
from lavis_mafa.analysis.connections.reading import ReadableRows
from lavis_mafa.analysis.connections.tally import Tally, ratio
from lavis_mafa.distributed import gather_objects, rank, world_size
from lavis_mafa.models.sanity import Histogram, Medians

ENOUGH = 20_000  # own and shuffled pairs of a rank: a median needs no more


@dataclass(frozen=True)
class Sampling:
    """How batches are made: random (``search_space`` None), or GRIT's from groups of M = ``search_space``."""

    batch_size: int
    search_space: int | None = None

    @property
    def name(self) -> str:
        return "random" if self.search_space is None else "GRIT"


@dataclass
class Count:
    """What was found: a tally for each way to sample, samples that were read, and why others were not."""

    tallies: dict[Sampling, Tally]
    samples: int
    unreadable: Counter[str]
    truth_known: bool
    own: Histogram  # Con-D's probabilities of own pairs, and of images with some other text
    shuffled: Histogram

    def medians(self, way: Sampling) -> Medians:
        """What Con-D says of own pairs, shuffled ones, and the hardest negatives of one way to sample."""
        tally = self.tallies[way]
        truth = tally.against_truth() if self.truth_known else None
        lift = None if truth is None else ratio(truth["thresholds"][0]["precision"] or 0.0, truth["true_share"] or 0.0)
        return Medians(self.own.median(), self.shuffled.median(), tally.scores.median(), lift)


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
    known: Known = SAME_IMAGE,
    look: Callable[[Count], object] = lambda _: None,
) -> Count:
    """Go through the data once and count for every way to sample: each anchor's hardest negative in its batch, if p > threshold.

    Blocks have the size of the largest M. Their samples are shuffled, so random batches are cut from a block as it is. All ways'
    candidates of a block are scored together, each distinct pair once. Ranks share the blocks. Beside them Con-D is asked about the own
    pairs and shuffled pairs of the first 20,000 samples of each rank.

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
        known: what is no negative.
        look: given what was found in the first block of each rank, so that a hopeless pass can end there; on all ranks.
    """
    size = max(way.search_space or way.batch_size for way in ways)
    truth = getattr(rows.dataset, "truth", None)
    found = Count({way: Tally(tuple(thresholds)) for way in ways}, 0, Counter(), truth is not None, Histogram(), Histogram())
    mine = blocks_of(order, size)[rank() :: world_size()]
    for number, block in enumerate(encoded_blocks(encoder, rows, mine, batch_size, workers, progress)):
        found.samples += len(block)
        found.unreadable.update(reason_of(bad) for bad in block.bad_samples)
        found.truth_known = found.truth_known and (bool(block.truth) or not len(block))
        _count_block(encoder, block, found, truth if block.truth else None, seed, known)
        if number == 0:
            look(_of_all_ranks(found))
    if not mine:
        look(_of_all_ranks(found))
    return _of_all_ranks(found)


def _of_all_ranks(own: Count) -> Count:
    parts = gather_objects(own)
    total = Count(
        {way: Tally(tally.thresholds) for way, tally in own.tallies.items()},
        sum(part.samples for part in parts),
        sum((part.unreadable for part in parts), Counter()),
        all(part.truth_known for part in parts),
        Histogram(),
        Histogram(),
    )
    for part in parts:
        for way, tally in part.tallies.items():
            total.tallies[way].merge(tally)
        total.own.merge(part.own)
        total.shuffled.merge(part.shuffled)
    return total


def _count_block(encoder: Encoder, block: Block, count: Count, truth: Any, seed: int, known: Known) -> None:
    orders: dict[int | None, Tensor] = {None: torch.arange(len(block))}
    found, tallies = [], count.tallies
    for way in tallies:
        if way.search_space not in orders:
            orders[way.search_space] = grouped_order(block, way.search_space or len(block), seed)
        found.append(hardest_negatives(block, batches_of(orders[way.search_space], way.batch_size, way.search_space), known))
    own = torch.arange(len(block) if int(count.own.counts.sum()) < ENOUGH else 0)
    other_image, other_text = shuffled_pairs(block) if len(own) else (own, own)
    image = torch.cat([*(c.image for c in found), own, other_image])
    text = torch.cat([*(c.text for c in found), own, other_text])
    parts = match_probabilities(encoder, block, image, text).split([*(len(c) for c in found), len(own), len(other_image)])
    count.own.add(parts[-2])
    count.shuffled.add(parts[-1])
    for tally, one, scores in zip(tallies.values(), found, parts[:-2], strict=True):
        pairs = (block.truth["concept"][one.image], block.truth["text_key"][one.text]) if truth is not None else None
        tally.add(scores, one.exists, *((truth.matches(*pairs), truth.knows(*pairs)) if pairs else ()))


def reason_of(bad: dict[str, Any]) -> str:
    """Why a sample could not be read, without its path: ``UnidentifiedImageError``."""
    return str(bad["reason"]).split(":")[0]
