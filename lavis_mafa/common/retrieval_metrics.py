"""Retrieval metrics for galleries where many pairs match (ECCV Caption, Chun et al. 2022): R@k, R-Precision, mAP@R, in per cent."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lavis_mafa.common.errors import UserError

logger = logging.getLogger(__name__)
AT_ONCE = 500  # queries, bounds memory


def retrieval_metrics(scores_i2t: Tensor, scores_t2i: Tensor, relevant: Tensor) -> dict[str, float]:
    """Text retrieval (``tr_``, query = image) and image retrieval (``ir_``).

    Of equal scores the wrong ones come first, so that a model that tells nothing apart finds nothing, in whatever order the
    gallery is.

    Args:
        scores_i2t: [I, T], higher is better.
        scores_t2i: [T, I].
        relevant: BoolTensor[I, T], which pairs match. A query without a match is left out.

    Returns:
        r1, r5, r10, r_precision, map_at_r per direction, and ``agg_metrics``, the mean of the six recalls.

    Raises:
        UserError: a score is NaN or infinite, or nothing matches.
    """
    if not bool(relevant.any()):
        raise UserError("no image of the evaluation set has a text that matches it: there is nothing to find.")
    results: dict[str, float] = {}
    for side, query, scores, right in (("tr", "image", scores_i2t, relevant), ("ir", "text", scores_t2i, relevant.T)):
        check_scores(scores, query)
        equal = int((scores == scores[:, :1]).all(dim=1).sum())
        if equal and scores.shape[1] > 1:
            logger.warning(
                "%d of %d %ss score the same with the whole gallery; of equal scores wrong ones count first.", equal, len(scores), query
            )
        results |= {f"{side}_{name}": value for name, value in _one_direction(scores, right).items()}
    recalls = [v for k, v in results.items() if k.split("_")[1] in ("r1", "r5", "r10")]
    results["agg_metrics"] = sum(recalls) / len(recalls)
    return results


def check_scores(scores: Tensor, query: str, what: str = "scores") -> None:
    """Every score is a finite number.

    Args:
        scores: [queries, gallery]. query: what a row stands for, ``image`` or ``text``. what: the scores' name.

    Raises:
        UserError: how many are not, and of which query the first is.
    """
    bad = (~torch.isfinite(scores)).sum(dim=1)
    queries = bad.nonzero().flatten().tolist()
    if queries:
        first = queries[0]
        raise UserError(
            f"{int(bad.sum())} of {scores.numel()} retrieval {what} are NaN or infinite, those of {len(queries)} of {len(scores)} "
            f"{query}s: {query} {first} (from 0) has {int(bad[first])} of {scores.shape[1]}. The model's weights are broken, or too "
            "large for run.precision."
        )


def best_first(scores: Tensor, relevant: Tensor) -> Tensor:
    """The gallery in each query's order, highest scores first, of equal ones those that do not match: [Q, G] -> LongTensor[Q, G]."""
    wrong_first = relevant.byte().argsort(dim=1, stable=True)
    return wrong_first.gather(1, scores.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True))


def _one_direction(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    asked = relevant.any(dim=1)
    parts = [_of_queries(some, right) for some, right in zip(scores[asked].split(AT_ONCE), relevant[asked].split(AT_ONCE), strict=True)]
    return {name: 100 * float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}


def _of_queries(scores: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """Each query's own figures, [Q]."""
    hits = relevant.gather(1, best_first(scores, relevant)).float()
    count = relevant.sum(dim=1)
    place = torch.arange(1, hits.shape[1] + 1)
    within = (place[None, :] <= count[:, None]).float()  # the first R places, R = number of matches
    precision = hits.cumsum(dim=1) / place
    return {
        **{f"r{k}": hits[:, :k].amax(dim=1) for k in (1, 5, 10)},
        "r_precision": (hits * within).sum(dim=1) / count,
        "map_at_r": (hits * precision * within).sum(dim=1) / count,
    }
