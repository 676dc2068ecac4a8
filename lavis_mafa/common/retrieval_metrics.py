"""Retrieval metrics for galleries where many pairs match (ECCV Caption, Chun et al. 2022): R@k, R-Precision, mAP@R, in per cent."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_metrics(scores_i2t: Tensor, scores_t2i: Tensor, relevant: Tensor) -> dict[str, float]:
    """Text retrieval (``tr_``, query = image) and image retrieval (``ir_``).

    Args:
        scores_i2t: [I, T], higher is better.
        scores_t2i: [T, I].
        relevant: BoolTensor[I, T], which pairs match. A query without a match is left out.

    Returns:
        r1, r5, r10, r_precision, map_at_r per direction, and ``agg_metrics``, the mean of the six recalls.
    """
    results = {f"tr_{k}": v for k, v in _one_direction(scores_i2t, relevant).items()}
    results |= {f"ir_{k}": v for k, v in _one_direction(scores_t2i, relevant.T).items()}
    recalls = [v for k, v in results.items() if k.split("_")[1] in ("r1", "r5", "r10")]
    results["agg_metrics"] = sum(recalls) / len(recalls)
    return results


def _one_direction(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    asked = relevant.any(dim=1)
    scores, relevant = scores[asked], relevant[asked]
    # a stable sort: equal scores keep gallery order on every machine
    hits = relevant.gather(1, scores.argsort(dim=1, descending=True, stable=True)).float()
    count = relevant.sum(dim=1)
    place = torch.arange(1, hits.shape[1] + 1)
    within = (place[None, :] <= count[:, None]).float()  # the first R places, R = number of matches
    precision = hits.cumsum(dim=1) / place
    return {
        **{f"r{k}": 100 * float(hits[:, :k].amax(dim=1).mean()) for k in (1, 5, 10)},
        "r_precision": 100 * float(((hits * within).sum(dim=1) / count).mean()),
        "map_at_r": 100 * float(((hits * precision * within).sum(dim=1) / count).mean()),
    }
