"""Phases 2 and 3 of GRIT for the rows of one queue (GRIT-VLP, section 4.1): shuffle, cut into sub-queues, order each."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_mafa.grit.grouping import Memory, group_by_similarity, group_sub_queues
from lavis_mafa.grit.seeding import seeded_generator

Rows = tuple[Tensor, Tensor, Tensor]  # index [n], image features [n, d], text features [n, d]


def shuffle_and_group(rows: list[Rows], search_space: int, shuffle: bool, seed: tuple[int, int, int], memory: Memory) -> Tensor:
    """Turn collected rows into a grouped order.

    Args:
        rows: pieces of one queue in the order they were collected, n rows in all, at least one piece.
        search_space: M. The rows are cut into groups of M; when M does not divide n, the last one is shorter.
        shuffle: phase 2; without it the groups are cut from the rows as they came.
        seed: (seed, epoch, number of the queue in the epoch), of the shuffle and of each group's start.
        memory: see ``group_by_similarity``.

    Returns:
        LongTensor[n] of data-set indices.

    Raises:
        ValueError: a feature is NaN or infinite; the message names the data-set indices.
    """
    index, image, text = (torch.cat(column) for column in zip(*rows, strict=True))
    bad = ~(image.isfinite().all(dim=1) & text.isfinite().all(dim=1))
    if bool(bad.any()):
        named = ", ".join(map(str, index[bad][:10].tolist()))
        raise ValueError(f"GRIT cannot group {int(bad.sum())} samples with non-finite features; data-set indices: {named}.")
    generator = seeded_generator("grit queue", *seed)
    count, dim = image.shape
    if shuffle:
        shuffled = torch.randperm(count, generator=generator)
        index, image, text = index[shuffled], image[shuffled], text[shuffled]
    queues, rest = divmod(count, search_space)
    whole = queues * search_space
    # Uniform over all rows of a group, the last included.
    start = torch.randint(search_space, (queues,), generator=generator)
    cut = (queues, search_space, dim)
    order = group_sub_queues(image[:whole].view(cut), text[:whole].view(cut), start, memory=memory)
    parts = [index[:whole].view(queues, search_space).gather(1, order).flatten()]
    if rest:
        first = int(torch.randint(rest, (), generator=generator))
        parts.append(index[whole:][group_by_similarity(image[whole:], text[whole:], first, memory=memory)])
    return torch.cat(parts)


def check_sizes(queue_size: int, search_space: int) -> None:
    """Raise ValueError unless a queue of L = ``queue_size`` can be cut into groups of M = ``search_space``."""
    if search_space < 1:
        raise ValueError(f"search_space is {search_space}, but must be at least 1.")
    if search_space > queue_size:
        raise ValueError(f"search_space is {search_space}, but must not exceed queue_size ({queue_size}); nearest: {queue_size}.")
    if queue_size % search_space:
        small = [number for number in range(1, int(queue_size**0.5) + 1) if queue_size % number == 0]
        divisors = small + [queue_size // number for number in small]
        nearest = min(divisors, key=lambda number: (abs(number - search_space), number))
        raise ValueError(f"search_space is {search_space}, but must divide queue_size ({queue_size}); nearest: {nearest}.")
