"""What Con-D's probability says about a candidate pair (MAFA section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Connections:
    """What Con-D says about P candidate pairs. A pair is positive, ambiguous, or (neither) a true negative."""

    positive: Tensor  # BoolTensor[P]
    ambiguous: Tensor  # BoolTensor[P]


def judge_connections(match_probability: Tensor, threshold: float = 0.8, ambiguous_from: float = 0.5) -> Connections:
    """Sort candidate pairs by Con-D's match probability (MAFA, section 4.1).

    A pair above ``threshold`` becomes a new positive. One in ``(ambiguous_from, threshold]`` is too uncertain to be used as a
    negative, so its anchor falls back to its second hardest candidate. ``ambiguous_from == threshold`` switches that class off.

    Args:
        match_probability: [P], each in [0, 1].
        threshold: probability above which a hard negative is converted.
        ambiguous_from: probability above which a hard negative is no longer trusted.

    Raises:
        ValueError: a probability is NaN or outside [0, 1] (the message lists the positions), or ``ambiguous_from > threshold``.

    Example:
        >>> judge_connections(torch.tensor([0.95, 0.6, 0.1])).positive
        tensor([ True, False, False])
    """
    check_probabilities((~is_probability(match_probability)).long())
    return sorted_connections(match_probability, threshold, ambiguous_from)


def sorted_connections(match_probability: Tensor, threshold: float, ambiguous_from: float) -> Connections:
    """The same, with probabilities that somebody else looks at: no device is waited for. ValueError for thresholds alone."""
    if ambiguous_from > threshold:
        raise ValueError(f"ambiguous_from is {ambiguous_from}, but must not exceed threshold ({threshold})")
    positive = match_probability > threshold
    return Connections(positive=positive, ambiguous=(match_probability > ambiguous_from) & ~positive)


def is_probability(values: Tensor) -> Tensor:
    """-> BoolTensor of the same shape, False for NaN."""
    return (values >= 0) & (values <= 1)


def check_probabilities(wrong: Tensor) -> None:
    """LongTensor[P], 1 where a pair's probability is none: raise ValueError that says where."""
    if not bool((wrong == 0).all()):
        positions = torch.nonzero(wrong).flatten().tolist()
        raise ValueError(f"match probabilities must be in [0, 1]; wrong at positions {positions}")
