"""How far a judge of pairs can be trusted: what it says of own pairs, of shuffled ones and of the hardest negatives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# the largest share of false negatives that a paper counts: 31.7 % (MAFA Table 9, ALBEF 14M on 4M-Clean in GRIT batches, p > 0.5)
UNHEARD_OF = 1 / 3
# on the emoji a Con-D of minutes has a mean difference of 0.07 (ALBEF) or 0.27 (BLIP-2), initial weights one below 0.001
MARGIN = 0.02
NEARLY_OWN, BETTER = 0.9, 1.5
STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Medians:
    """Con-D's median match probability of own pairs, of images with some other text, and of hardest negatives; None of nothing.

    ``lift``: where the truth is known, how many times as precise as guessing Con-D is on the hardest negatives.
    """

    own: float | None
    shuffled: float | None
    hardest: float | None
    lift: float | None = None

    def why_not(self) -> str | None:
        """Why nothing that this Con-D decides can be trusted, or None where it can.

        - Own pairs must score above shuffled ones by more than 0.02: initial weights score everything alike.
        - The hardest negatives must score below own pairs. Else Con-D says yes to whatever is similar, or more than half of the
          hardest negatives do match, which no data of the papers come near. Where the truth is known, being half as precise again as
          guessing is enough.

        Example:
            >>> Medians(own=0.9, shuffled=0.01, hardest=0.3).why_not() is None
            True
            >>> Medians(own=0.558, shuffled=0.171, hardest=0.594).why_not()
            'hardest negatives (median 0.594) score like own pairs (0.558)'
        """
        if self.own is None:
            return None
        if self.shuffled is not None and self.own - self.shuffled <= MARGIN:
            return f"own pairs (median {self.own:.3f}) score hardly better than shuffled ones ({self.shuffled:.3f})"
        if self.hardest is not None and self.hardest >= self.own and (self.lift is None or self.lift < BETTER):
            return f"hardest negatives (median {self.hardest:.3f}) score like own pairs ({self.own:.3f})"
        return None

    def doubt(self) -> str | None:
        """A caution where Con-D is of use, but its hardest negatives come close: nine tenths of the way up to own pairs."""
        if self.own is None or self.hardest is None or self.why_not():
            return None
        floor = 0.0 if self.shuffled is None else self.shuffled
        if self.hardest < floor + NEARLY_OWN * (self.own - floor):
            return None
        found = f"hardest negatives ({self.hardest:.3f}) from own pairs ({self.own:.3f})"
        return f"The scores hardly tell {found}: look before you believe it."

    def __str__(self) -> str:
        shown = {"own pairs": self.own, "shuffled": self.shuffled, "hardest negatives": self.hardest}
        return ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in shown.items())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def median(scores: Tensor) -> float | None:
    """Of what is finite; None of nothing."""
    scores = scores[scores.isfinite()]
    return float(scores.double().quantile(0.5)) if len(scores) else None


class Histogram:
    """Probabilities of any number of pairs in little memory: their median to 0.0001."""

    BINS = 10_000

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.long)

    def add(self, probability: Tensor) -> None:
        """[n] in [0, 1]; what is NaN is left out."""
        probability = probability[probability.isfinite()].double()
        self.counts += torch.bincount((probability * self.BINS).long().clamp(0, self.BINS - 1), minlength=self.BINS)

    def merge(self, other: Histogram) -> None:
        """Add what another rank saw."""
        self.counts += other.counts

    def median(self) -> float | None:
        """The middle of the bin that holds the lower median."""
        below, total = self.counts.cumsum(0), int(self.counts.sum())
        if total == 0:
            return None
        return (int(torch.searchsorted(below, (total + 1) // 2)) + 0.5) / self.BINS


def is_sane(difference: Tensor) -> bool:
    """[n] own minus shuffled probability: is the mean clearly above 0?

    Example:
        >>> is_sane(torch.tensor([0.9, 0.7, 0.8])), is_sane(torch.tensor([0.9, -0.9, 0.3]))
        (True, False)
    """
    error = difference.std(correction=0) / len(difference) ** 0.5
    return bool(difference.mean() > max(MARGIN, STANDARD_ERRORS * float(error)))
