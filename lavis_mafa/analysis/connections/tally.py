"""What a count adds up over blocks and ranks: false negatives by threshold and, against a known truth, how right Con-D is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.models.sanity import Histogram

SIDES = ("image", "text")  # whose negatives: with respect to images, with respect to texts
BINS = 10


def _long(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


@dataclass
class Tally:
    """Sums of one way to sample. K thresholds; [2] and [2, K] have a row for each of ``SIDES``."""

    thresholds: tuple[float, ...]
    negatives: Tensor = field(default_factory=lambda: _long(2))  # anchors that have a hardest negative
    lonely: Tensor = field(default_factory=lambda: _long(2))  # anchors that have none
    false: Tensor = field(init=False)  # [2, K], of which Con-D says p > threshold
    true: Tensor = field(default_factory=lambda: _long(2))  # of which the truth says that they match
    both: Tensor = field(init=False)  # [2, K]
    asked: Tensor = field(default_factory=lambda: _long(2))  # negatives of which the truth says whether they match
    said: Tensor = field(init=False)  # [2, K], of which Con-D says p > threshold
    judged: Tensor = field(default_factory=lambda: _long(BINS))  # by probability, in bins of equal width
    judged_true: Tensor = field(default_factory=lambda: _long(BINS))
    judged_sum: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    squared_error: float = 0.0
    scores: Histogram = field(default_factory=Histogram)  # of the hardest negatives

    def __post_init__(self) -> None:
        self.false, self.both, self.said = (_long(2, len(self.thresholds)) for _ in range(3))

    def add(self, probability: Tensor, exists: Tensor, true: Tensor | None = None, known: Tensor | None = None) -> None:
        """Take in 2n candidates: n of image anchors, then n of text anchors.

        Args:
            probability: [2n] of Con-D.
            exists: BoolTensor[2n].
            true: BoolTensor[2n], where there is a truth.
            known: BoolTensor[2n], of which pairs it says anything (``GroundTruth.knows``); by default of all.
        """
        exists = exists.view(2, -1)
        above = probability.view(2, -1, 1) > torch.tensor(self.thresholds, dtype=probability.dtype)
        above = above & exists[..., None]
        self.negatives += exists.sum(dim=1)
        self.lonely += (~exists).sum(dim=1)
        self.false += above.sum(dim=1)
        self.scores.add(probability[exists.flatten()])
        if true is None:
            return
        known = exists if known is None else exists & known.view(2, -1)
        match = true.view(2, -1) & known
        self.asked += known.sum(dim=1)
        self.said += (above & known[..., None]).sum(dim=1)
        self.true += match.sum(dim=1)
        self.both += (above & match[..., None]).sum(dim=1)
        asked, right = probability[known.flatten()].double(), match[known].double()
        place = (asked * BINS).long().clamp(max=BINS - 1)
        self.judged += torch.bincount(place, minlength=BINS)
        self.judged_true += torch.bincount(place, weights=right, minlength=BINS).long()
        self.judged_sum += torch.bincount(place, weights=asked, minlength=BINS)
        self.squared_error += float(((asked - right) ** 2).sum())

    def merge(self, other: Tally) -> None:
        """Add what another rank found."""
        for name in ("negatives", "lonely", "false", "true", "both", "asked", "said", "judged", "judged_true", "judged_sum"):
            getattr(self, name).add_(getattr(other, name))
        self.squared_error += other.squared_error
        self.scores.merge(other.scores)

    def counts(self, correction: float = 1.0) -> list[dict[str, Any]]:
        """Per threshold: count and share of false negatives for each side, times ``correction``."""
        rows = []
        for k, threshold in enumerate(self.thresholds):
            row: dict[str, Any] = {"threshold": threshold}
            for side, name in enumerate(SIDES):
                found = int(self.false[side, k]) * correction
                row[f"wrt_{name}"] = found
                row[f"wrt_{name}_share"] = ratio(found, int(self.negatives[side]))
            rows.append(row)
        return rows

    def against_truth(self) -> dict[str, Any]:
        """How many hardest negatives truly match, and how well Con-D says so: precision, recall, calibration."""
        total, true = int(self.asked.sum()), int(self.true.sum())
        said, both = self.said.sum(dim=0).tolist(), self.both.sum(dim=0).tolist()
        filled = self.judged > 0
        gap = (self.judged_sum - self.judged_true.double()).abs()[filled].sum().item()
        return {
            "true": {name: int(self.true[side]) for side, name in enumerate(SIDES)},
            "true_share": ratio(true, total),
            "thresholds": [
                {"threshold": t, "precision": ratio(b, s), "recall": ratio(b, true)}
                for t, s, b in zip(self.thresholds, said, both, strict=True)
            ],
            "calibration_error": ratio(gap, total),
            "brier": ratio(self.squared_error, total),
            "calibration": [
                {
                    "from": k / BINS,
                    "pairs": int(self.judged[k]),
                    "mean_probability": ratio(float(self.judged_sum[k]), int(self.judged[k])),
                    "true_share": ratio(int(self.judged_true[k]), int(self.judged[k])),
                }
                for k in range(BINS)
            ],
        }


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``; None of nothing, which JSON can say."""
    return part / whole if whole else None
