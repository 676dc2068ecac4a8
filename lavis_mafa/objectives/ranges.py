"""Between what values a tensor lies: the first thing to look at where a loss is not finite."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def value_range(*tensors: Tensor) -> Tensor:
    """The least and the greatest value of tensors of any shape, NaN if one is NaN; nothing is copied to the host.

    Returns:
        Tensor[2] in fp32.

    Example:
        >>> value_range(torch.tensor([[0.5, -1.0]]), torch.tensor(3.0))
        tensor([-1.,  3.])
    """
    ends = torch.stack([torch.stack(torch.aminmax(tensor.float())) for tensor in tensors])
    return torch.stack([ends[:, 0].amin(), ends[:, 1].amax()])
