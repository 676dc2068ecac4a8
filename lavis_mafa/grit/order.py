"""From what the ranks grouped to one global order for the next epoch (GRIT-VLP, section 4.1, phase 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_mafa.grit.indices import first_occurrences
from lavis_mafa.grit.seeding import seeded_generator


def next_epoch_order(
    grouped: list[Tensor],
    dataset_size: int,
    block: int,
    batch_shuffle: bool,
    generator_seed: int,
    global_batch: int | None = None,
) -> Tensor:
    """Make the next epoch's order of the whole data set from what the ranks grouped (GRIT-VLP, section 4.1, phase 4).

    The ranks' lists are joined in rank order to G. An index met twice keeps its first place. Each list is cut into blocks from
    its own beginning, and the samples of an incomplete block (the end of a list whose length is no multiple of ``block``, or a
    block that lost a duplicate) move to the end of G, so that an odd list never shifts the blocks of the ranks after it.

    The k samples that no rank grouped (the tail an incomplete last batch dropped, unreadable images) come first, shuffled:
    ``missing + G[k:] + G[:k]``. Blocks keep their alignment, missing samples are served before all others, and those they
    displace form the new tail. When more are missing than grouped, G is rotated only as far as alignment needs.

    Phase 4 then permutes whole blocks, with one seed for all ranks. It stays within the steps that are served; what lies
    behind the last whole global batch stays there, so that no shuffle can drop a sample twice in a row.

    Args:
        grouped: one LongTensor per rank, from ``GritQueue.finish_epoch``; with ``batch_scope: global``, one list in all.
        dataset_size: N.
        block: samples that were grouped to be one batch: ``GritSampler.block``.
        batch_shuffle: phase 4 (GRIT-VLP's Table 4 without it: ``False``).
        generator_seed: equal on all ranks, another one each epoch.
        global_batch: W * B, samples per step over all ranks (``GritSampler.global_batch``); ``block`` when not given.

    Returns:
        LongTensor[N], a permutation of ``range(N)``.

    Raises:
        ValueError: an index lies outside the data set, or ``block`` does not divide ``global_batch``.

    Example:
        >>> next_epoch_order([torch.tensor([2, 0, 3, 1])], dataset_size=5, block=2, batch_shuffle=False, generator_seed=0)
        tensor([4, 0, 3, 1, 2])
    """
    global_batch = block if global_batch is None else global_batch
    if block < 1 or global_batch % block:
        raise ValueError(f"block is {block}, but must be at least 1 and divide global_batch ({global_batch}).")
    ordered = _join_ranks([indices.to("cpu", torch.long) for indices in grouped], dataset_size, block)
    generator = seeded_generator("grit order", generator_seed)

    is_missing = torch.ones(dataset_size, dtype=torch.bool)
    is_missing[ordered] = False
    missing = is_missing.nonzero().squeeze(1)
    # Neighbours in a data file are often captions of one image: in file order they would fill whole batches.
    missing = missing[torch.randperm(len(missing), generator=generator)]
    displaced = len(missing) if len(missing) <= len(ordered) else min(len(missing) % block, len(ordered))
    order = torch.cat([missing, ordered[displaced:], ordered[:displaced]])

    if batch_shuffle:
        blocks = dataset_size // global_batch * global_batch // block
        shuffled = torch.randperm(blocks, generator=generator)
        order[: blocks * block] = order[: blocks * block].view(blocks, block)[shuffled].flatten()
    return order


def _join_ranks(grouped: list[Tensor], dataset_size: int, block: int) -> Tensor:
    """The ranks' lists joined, each index once, whole blocks before the samples of broken ones."""
    joined = torch.cat([torch.empty(0, dtype=torch.long), *grouped])
    outside = joined[(joined < 0) | (joined >= dataset_size)]
    if len(outside):
        raise ValueError(f"the grouped order holds index {int(outside[0])}, but the data set has {dataset_size} samples.")
    block_of, blocks = [torch.empty(0, dtype=torch.long)], 0
    for indices in grouped:
        block_of.append(torch.arange(len(indices)) // block + blocks)
        blocks += -(-len(indices) // block)
    kept = first_occurrences(joined)
    joined, places = joined[kept], torch.cat(block_of)[kept]
    whole = (torch.bincount(places, minlength=blocks) == block)[places]
    return torch.cat([joined[whole], joined[~whole]])
