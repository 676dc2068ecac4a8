"""Holding a run against ground truth: how many negatives are false, and how right Con-D is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor


def own_text_keys(dataset: Any) -> Tensor:
    """LongTensor[N]: the truth's key of each row's caption, for data with one caption a row."""
    return torch.tensor([dataset.truth.text_key(dataset.captions(i)[0]) for i in range(len(dataset))])


@dataclass(frozen=True)
class BatchCount:
    """False negatives among all off-diagonal pairs of the batches of an order."""

    per_batch: float
    share: float


def batch_false_negatives(order: Tensor, batch_size: int, dataset: Any, text_keys: Tensor) -> BatchCount:
    """Count, for each whole batch of ``order`` (LongTensor[N]), the pairs of different rows that truly match."""
    batches = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    total = 0
    for rows in batches:
        match = dataset.truth.matrix(dataset.concepts[rows], text_keys[rows])
        total += int(match.sum() - match.diagonal().sum())
    pairs = batch_size * (batch_size - 1)
    return BatchCount(total / len(batches), total / len(batches) / pairs)


@dataclass(frozen=True)
class ConDScore:
    """Con-D's verdict "positive" against the truth, over recorded candidate pairs."""

    pairs: int
    true_share: float  # of all candidates: what guessing "positive" every time would reach as precision
    precision: float
    recall: float


def score_con_d(connections: pa.Table, dataset: Any, text_keys: Tensor, kinds: tuple[str, ...] | None = None) -> ConDScore:
    """Precision and recall of the recorded verdicts.

    Args:
        connections: as ``read_connections`` gives it.
        dataset: the training data, with truth.
        text_keys: of its rows.
        kinds: only candidates whose text is of these kinds (``name``, ``alias``, ``keyword``, ``group``).
    """
    match, positive, text = true_matches(connections, dataset, text_keys), _is_positive(connections), _column(connections, "text")
    if kinds is not None:
        chosen = torch.tensor([dataset.truth.text_kind(int(text_keys[t])) in kinds for t in text])
        match, positive = match[chosen], positive[chosen]
    both = (match & positive).sum().item()
    return ConDScore(
        pairs=len(match),
        true_share=_ratio(match.sum().item(), len(match)),
        precision=_ratio(both, positive.sum().item()),
        recall=_ratio(both, match.sum().item()),
    )


def true_matches(connections: pa.Table, dataset: Any, text_keys: Tensor) -> Tensor:
    """BoolTensor[R]: does the image of each recorded pair truly match its text."""
    image, text = _column(connections, "image"), _column(connections, "text")
    return dataset.truth.matches(dataset.concepts[image], text_keys[text])


def _is_positive(connections: pa.Table) -> Tensor:
    return torch.tensor([v == "positive" for v in connections["verdict"].to_pylist()])


def _column(connections: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(connections[name].to_numpy().copy())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
