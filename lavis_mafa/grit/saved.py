"""Reading a saved state that may be anything: from a torn run, another version, or somebody else's hands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.grit.indices import first_occurrences


def saved_value(state: Any, name: str) -> Any:
    """``state[name]``.

    Raises:
        ValueError: ``state`` is no mapping, or has no such entry.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the saved state is a {type(state).__name__}, but must be a dictionary with {name!r}.")
    if name not in state:
        raise ValueError(f"the saved state has no {name!r}.")
    return state[name]


def saved_number(state: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """A whole number between ``least`` and ``most``, both included.

    Raises:
        ValueError: it is missing, no whole number, or out of these bounds.

    Example:
        >>> saved_number({"epoch": 3}, "epoch")
        3
    """
    value = saved_value(state, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"the saved {name} is {_shown(value)}, but must be a whole number, {allowed}.")
    return value


def saved_tensor(state: Any, name: str, dtype: torch.dtype, dims: int) -> Tensor:
    """A plain tensor of that type and number of dimensions, with all of its values in memory.

    A stored tensor can be a view that repeats one number a billion times; copying it would fill the memory. A contiguous one is
    never larger than its file.

    Raises:
        ValueError: it is missing, no such tensor, or not finite.

    Example:
        >>> saved_tensor({"order": torch.tensor([1, 0])}, "order", torch.long, dims=1)
        tensor([1, 0])
    """
    value = saved_value(state, name)
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    if not plain or value.dtype != dtype or value.dim() != dims or not value.is_contiguous():
        raise ValueError(f"the saved {name} is {_shown(value)}, but must be a tensor of {dtype} with {dims} dimensions.")
    if dtype.is_floating_point and not bool(value.isfinite().all()):
        raise ValueError(f"the saved {name} is not finite everywhere.")
    tensor: Tensor = value
    return tensor


def saved_rows(state: Mapping[str, Any], queues_grouped: int, queue_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``finished``, ``index``, ``image_features`` and ``text_features`` of a saved queue of L = ``queue_size``.

    Raises:
        ValueError: one is missing or malformed, or they do not fit each other.
    """
    finished, index = (saved_tensor(state, name, torch.long, dims=1) for name in ("finished", "index"))
    image, text = (saved_tensor(state, f"{side}_features", torch.float32, dims=2) for side in ("image", "text"))
    if image.shape != text.shape or len(image) != len(index):
        shapes = [list(rows.shape) for rows in (index, image, text)]
        raise ValueError("the saved index, image_features and text_features are {}, {} and {}, which do not fit.".format(*shapes))
    # a queue is grouped the moment it is full
    if len(finished) != queues_grouped * queue_size or len(index) >= queue_size:
        raise ValueError(
            f"the saved queue has {len(finished)} grouped and {len(index)} waiting samples, which is not what {queues_grouped} "
            f"grouped queues of {queue_size} and a part of one give."
        )
    collected = torch.cat([finished, index])
    if len(collected) and int(collected.min()) < 0:
        raise ValueError(f"the saved queue holds index {int(collected.min())}, but must hold positions in the data set.")
    if not bool(first_occurrences(collected).all()):
        raise ValueError("the saved queue holds an index twice.")
    return finished, index, image, text


def _shown(value: Any) -> str:
    """A tensor by its type and shape; anything else as Python writes it, cut where it is long."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
