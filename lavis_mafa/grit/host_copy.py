"""Bring a batch of features to the CPU without making the training step wait for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class HostCopy:
    """CPU copies that may still be on their way; ``wait()`` returns them when they have arrived."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> tuple[Tensor, ...]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def copy_to_host(*tensors: Tensor) -> HostCopy:
    """Copy tensors to CPU memory of their own: floating ones as fp32, integer ones as int64.

    From a CUDA device the copies go to pinned memory and this returns at once; they must not be read before ``wait()``. From
    any other device the copies are complete on return (``arrived`` is None).

    Example:
        >>> copy_to_host(torch.tensor([1.5], dtype=torch.bfloat16)).wait()[0].dtype
        torch.float32
    """
    copies: list[Tensor] = []
    gpu: torch.device | None = None
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else torch.long
        if tensor.is_cuda:
            gpu = tensor.device
            pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
            copies.append(pinned.copy_(tensor.detach().to(dtype), non_blocking=True))
        else:
            copies.append(tensor.detach().to("cpu", dtype, copy=True))
    # Recorded on the stream that did the copies: a plain non_blocking copy gives no sign of its arrival.
    arrived = torch.cuda.current_stream(gpu).record_event() if gpu is not None else None
    return HostCopy(tuple(copies), arrived)
