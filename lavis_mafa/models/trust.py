"""Can this Con-D judge at all? Three medians of its match probability, and the one rule for when they say that it cannot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
# the largest share of false negatives that a paper counts: 31.7 % (MAFA Table 9, ALBEF 14M on 4M-Clean in GRIT batches, p > 0.5)
UNHEARD_OF = 1 / 3
# on the emoji a Con-D of minutes has a mean difference of 0.07 (ALBEF) or 0.27 (BLIP-2), initial weights one below 0.001
MARGIN = 0.02
NEARLY_OWN, BETTER = 0.9, 1.5


@dataclass(frozen=True)
class Medians:
    """Con-D's median match probability of own pairs, of images with some other text, and of hardest negatives; None of nothing.

    ``lift`` says, where the truth is known, how many times as precise as guessing Con-D is on the hardest negatives.
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
        """A word of caution where Con-D is of use, but its hardest negatives come close: nine tenths of the way up to own pairs."""
        if self.own is None or self.hardest is None or self.why_not():
            return None
        floor = 0.0 if self.shuffled is None else self.shuffled
        if self.hardest < floor + NEARLY_OWN * (self.own - floor):
            return None
        return f"Con-D hardly tells hardest negatives ({self.hardest:.3f}) from own pairs ({self.own:.3f}): look before you believe it."

    def __str__(self) -> str:
        shown = {"own pairs": self.own, "shuffled": self.shuffled, "hardest negatives": self.hardest}
        return ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in shown.items())

    def as_json(self) -> dict[str, Any]:
        return {"own": self.own, "shuffled": self.shuffled, "hardest": self.hardest, "lift": self.lift}


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
        self.counts += torch.bincount((probability * self.BINS).long().clamp(max=self.BINS - 1), minlength=self.BINS)

    def merge(self, other: Histogram) -> None:
        """Add what another rank saw."""
        self.counts += other.counts

    def median(self) -> float | None:
        """The middle of the bin that holds the lower median."""
        below, total = self.counts.cumsum(0), int(self.counts.sum())
        if total == 0:
            return None
        return (int(torch.searchsorted(below, (total + 1) // 2)) + 0.5) / self.BINS


class ShareWatch:
    """Warns in each epoch whose share of new positives is one that no paper reaches: a Con-D that says yes to everything.

    Args:
        steps_per_epoch: an epoch's mean is looked at from its 50th step on, or at its end.
    """

    STEPS = 50
    RIGHT = 0.9  # where the truth is known and Con-D agrees with it, the data are so, and there is nothing to warn of

    def __init__(self, steps_per_epoch: int) -> None:
        self.enough = min(self.STEPS, steps_per_epoch)
        self.epoch, self.step, self.told = -1, 0, False
        self.share = 0.0  # times steps

    def look(self, record: dict[str, Any]) -> None:
        """A record of ``metrics.jsonl``: averages over the steps since the one before it, and over ranks."""
        if "new_positive_share" not in record:
            return
        if record["epoch"] != self.epoch:
            self.epoch, self.step, self.told, self.share = record["epoch"], 0, False, 0.0
        self.share += record["new_positive_share"] * (record["step"] - self.step)
        self.step = record["step"]
        mean, precision = self.share / max(self.step, 1), record.get("con_d_precision")
        if self.told or self.step < self.enough or mean <= UNHEARD_OF or (precision is not None and precision >= self.RIGHT):
            return
        self.told = True
        logger.warning(
            "epoch %d: Con-D turns %.0f %% of the hardest negatives into positives (new_positive_share). No paper counts more than "
            "31.7 %% false negatives among them (MAFA Table 9), and those at a lower threshold. Does Con-D say yes to everything, or "
            "do captions fit nearly every image?%s Look before you believe it: lavis-mafa report RUN shows what it joined.",
            self.epoch,
            100 * mean,
            "" if precision is None else f" By the known truth {precision:.0%} of them do match.",
        )
