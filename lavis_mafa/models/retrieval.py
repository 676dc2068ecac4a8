"""Retrieval scores: ITC picks the top k, the matching head re-ranks those (ALBEF section 5), alone or with the cosine added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_mafa.distributed import is_distributed, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.objectives.mining import best_query
from lavis_mafa.progress import Bar

TEXTS_AT_ONCE = 256
NOT_RANKED = -100.0  # LAVIS's score of a pair outside the top k


class RetrievalModel(Protocol):
    """What scoring asks of a model; see :class:`lavis_mafa.models.base.MafaModel`."""

    @property
    def device(self) -> Any: ...

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, ...], Tensor]: ...

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]: ...

    def match_rows(self, image_tokens: Tensor, texts: tuple[Tensor, ...], image_index: Tensor, text_index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of I images and T texts in both directions, on the CPU: as asked for, and ITC's cosines alone."""

    rank_by: str
    i2t: Tensor  # [I, T]
    t2i: Tensor  # [T, I]
    cosine: Tensor  # [I, T]


@torch.no_grad()
def retrieval_scores(model: RetrievalModel, data_loader: Any, top_k: int, rank_by: str, pairs_at_once: int = 512) -> RetrievalScores:
    """Scores of every image with every text and back; ranks share the rows.

    Args:
        model: in eval mode.
        data_loader: batches with ``image``; its dataset has ``text`` (list of captions) and one row per image.
        top_k: how many candidates per query the matching head sees; at most the gallery. ``itc`` has no use for it.
        rank_by: ``itm``: the matching logit (ALBEF section 5, MAFA section F); ``itm+itc``: logit + cosine, as LAVIS's code does;
            ``itc``: the cosine, for all pairs.
        pairs_at_once: pairs per matching pass, bounds memory.

    Returns:
        the score inside the top k and -100 outside, or less where a query's own scores are as low: nothing outside comes first.
        UserError where a score is not finite, or there is nothing to score.
    """
    texts = list(data_loader.dataset.text)
    if not texts or not len(data_loader.dataset.image):
        raise UserError(
            f"there are {len(data_loader.dataset.image)} images and {len(texts)} texts to score; needed: at least one of each."
        )
    starts = Bar(range(0, len(texts), TEXTS_AT_ONCE), desc="texts", unit="batch")
    parts = [model.text_rows(texts[start : start + TEXTS_AT_ONCE]) for start in starts]
    text = tuple(joined_texts(column) for column in zip(*(rows for rows, _ in parts), strict=True))
    text_features = torch.cat([features for _, features in parts])
    images, image_features = torch.empty(0), list[Tensor]()
    for samples in Bar(data_loader, desc="images", unit="batch"):
        states, features = model.image_rows(samples["image"].to(model.device))
        done = sum(len(part) for part in image_features)
        if done == 0 and rank_by != "itc":  # in main memory and once: token states of a whole gallery fit no GPU
            images = torch.empty(len(data_loader.dataset.image), *states.shape[1:], dtype=states.dtype)
        if rank_by != "itc":
            images[done : done + len(states)] = states.cpu()
        image_features.append(features)
    similarity = best_query(torch.cat(image_features), text_features)
    check_scores(similarity, "image", "cosines")  # a NaN would be among the top k of every query
    if rank_by == "itc":
        cosine = similarity.cpu()
        return RetrievalScores(rank_by, cosine, cosine.T, cosine)

    def matching(image_index: Tensor, text_index: Tensor, queries: str) -> Tensor:
        scores = [torch.empty(0, device=similarity.device)]  # a rank has no row where there are fewer rows than ranks
        for start in Bar(range(0, len(image_index), pairs_at_once), desc=f"matching of {queries}", unit="batch"):
            rows, which = image_index[start : start + pairs_at_once].cpu().unique(return_inverse=True)
            columns = text_index[start : start + pairs_at_once].cpu()
            logits = model.match_rows(images[rows].to(model.device), text, which, columns)
            scores.append(logits[:, 1].float())
        return torch.cat(scores)

    image_to_text = _rank_rows(similarity, top_k, rank_by, lambda image, text: matching(image, text, "images"))
    text_to_image = _rank_rows(similarity.T, top_k, rank_by, lambda text, image: matching(image, text, "texts"))
    check_scores(image_to_text, "image")
    check_scores(text_to_image, "text")
    return RetrievalScores(rank_by, image_to_text.cpu(), text_to_image.cpu(), similarity.cpu())


def without_autocast(head: nn.Linear, states: Tensor) -> Tensor:
    """Matching logits in the precision of the head's weights: the eight bits of bf16 would make ties of a query's best candidates."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype))


def check_scores(scores: Tensor, query: str, what: str = "scores") -> None:
    """Raise UserError if a score [queries, gallery] is NaN or infinite; ``query`` is what a row stands for."""
    bad = (~torch.isfinite(scores)).sum(dim=1)
    queries = bad.nonzero().flatten().tolist()
    if queries:
        first = queries[0]
        raise UserError(
            f"{int(bad.sum())} of {scores.numel()} retrieval {what} are NaN or infinite, those of {len(queries)} of {len(scores)} "
            f"{query}s: {query} {first} (from 0) has {int(bad[first])} of {scores.shape[1]}. The model's weights are broken, or too "
            "large for run.precision."
        )


def joined_texts(parts: tuple[Tensor, ...]) -> Tensor:
    """Texts of all batches, padded with 0 to the longest: [B, T, ...] each -> [all, T, ...]."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1])) for part in parts])


def _rank_rows(similarity: Tensor, top_k: int, rank_by: str, matching: Any) -> Tensor:
    top_k = min(top_k, similarity.shape[1])
    scores = torch.zeros_like(similarity)
    mine = torch.arange(rank(), len(similarity), world_size(), device=similarity.device)
    best, columns = similarity[mine].topk(top_k, dim=1)
    inside = matching(mine.repeat_interleave(top_k), columns.flatten()).view_as(best)
    if rank_by == "itm+itc":
        inside = inside + best
    outside = (inside.amin(dim=1, keepdim=True) - 1).clamp(max=NOT_RANKED)  # below every candidate, whatever these score
    scores[mine] = outside.expand(-1, scores.shape[1]).scatter(1, columns, inside)
    if is_distributed():
        dist.all_reduce(scores)  # rows of other ranks are 0 here
    return scores
