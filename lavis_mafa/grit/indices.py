"""Which occurrences of a data-set index are its first: in one tensor, or since an epoch began."""

from __future__ import annotations

import torch
from torch import Tensor


def first_occurrences(index: Tensor) -> Tensor:
    """Mark where each value of ``index`` appears for the first time.

    Args:
        index: LongTensor[n].

    Returns:
        BoolTensor[n].

    Example:
        >>> first_occurrences(torch.tensor([4, 7, 4, 4]))
        tensor([ True,  True, False, False])
    """
    values, positions = torch.sort(index, stable=True)
    starts_run = torch.ones_like(values, dtype=torch.bool)
    starts_run[1:] = values[1:] != values[:-1]
    return torch.zeros_like(starts_run).index_fill_(0, positions[starts_run], True)


class SeenIndices:
    """The indices met so far, at one byte per sample of the data set (a Python set takes about 90).

    Example:
        >>> seen = SeenIndices()
        >>> seen.add(torch.tensor([2, 5, 2])), seen.add(torch.tensor([5, 6]))
        (tensor([ True,  True, False]), tensor([False,  True]))
    """

    def __init__(self) -> None:
        self._seen = torch.zeros(0, dtype=torch.bool)

    def add(self, index: Tensor) -> Tensor:
        """Take in LongTensor[n] and return BoolTensor[n]: which of them are met for the first time.

        Raises:
            ValueError: an index is negative.
        """
        if not len(index):
            return torch.zeros(0, dtype=torch.bool)
        if int(index.min()) < 0:
            raise ValueError(f"index {int(index.min())} is negative, but must be a position in the data set.")
        short = int(index.max()) + 1 - len(self._seen)
        if short > 0:  # at least doubling, so that growing costs O(1) per sample over an epoch
            self._seen = torch.cat([self._seen, self._seen.new_zeros(max(short, len(self._seen)))])
        new = first_occurrences(index) & ~self._seen[index]
        self._seen[index] = True
        return new
