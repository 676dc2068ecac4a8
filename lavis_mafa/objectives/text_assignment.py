"""Text assignment: to which of two images a text belongs (ALBEF section 5, the pre-training before NLVR2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_mafa.objectives.mining import sampling_scores

TEMPERATURE = 0.07  # of the similarities by which other images are drawn
FIRST, SECOND, NEITHER = range(3)


@dataclass(frozen=True)
class Assignment:
    """For each of B texts two different images of the batch, and which of them is its own."""

    first: Tensor  # LongTensor[B]
    second: Tensor  # LongTensor[B]
    label: Tensor  # LongTensor[B], 0: the first, 1: the second, 2: neither


def assign_texts(similarity: Tensor, temperature: float = TEMPERATURE) -> Assignment:
    """Draw two images for each text, and a label uniformly: its own is the first of them, the second, or neither.

    Other images j are drawn without replacement with probabilities ``softmax_j(similarity[b, j] / temperature)``, j != b: the more
    one looks like text b's own, the more often.

    Args:
        similarity: [B, B] cosines of the images' features.

    Raises:
        ValueError: fewer than three images, of which two others cannot be drawn.

    Example:
        >>> assigned = assign_texts(torch.eye(4))
        >>> own = torch.stack([assigned.first, assigned.second, torch.arange(4)])[assigned.label, torch.arange(4)]
        >>> own.tolist()
        [0, 1, 2, 3]
    """
    count = len(similarity)
    if count < 3:
        raise ValueError(f"similarity is {list(similarity.shape)}; needed: at least three images, of which two others are drawn.")
    own = torch.arange(count, device=similarity.device)
    scores = sampling_scores(similarity, temperature, "sampled").fill_diagonal_(float("-inf"))
    other, another = scores.topk(2, dim=1).indices.unbind(dim=1)
    label = torch.randint(3, (count,), device=similarity.device)
    first = torch.where(label == FIRST, own, other)
    second = torch.where(label == SECOND, own, torch.where(label == FIRST, other, another))
    return Assignment(first, second, label)
