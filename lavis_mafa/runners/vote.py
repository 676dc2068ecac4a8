"""What all ranks must know at the same step: that one was asked to stop, could not save, or met a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lavis_mafa.distributed import host_group


class Vote:
    """One small all-reduce per optimizer step, on the host: no rank acts alone, and no GPU waits for it.

    Args:
        stop: the number of the signal that asked this rank to stop, else 0.
        failed: could this rank's last checkpoint not be written?

    Attributes:
        stop, failed: the same of any rank, as of the last vote; of several signals the largest number.
    """

    def __init__(self, stop: Callable[[], int], failed: Callable[[], bool]) -> None:
        self._own_stop, self._own_failed = stop, failed
        self._group = host_group()
        self.stop, self.failed = 0, False

    def __call__(self, bad: bool) -> bool:
        """Every rank tells whether its step is bad; True on all of them when any is."""
        flags = torch.tensor([self._own_stop(), self._own_failed(), bad], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        self.stop, self.failed = int(flags[0]), bool(flags[1])
        return bool(flags[2])
