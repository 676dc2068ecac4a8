"""Retrieval scores as ALBEF computes them: ITC picks the top k, the matching head re-ranks those (ALBEF section 5)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.common.distributed import is_distributed, rank, world_size

NOT_RANKED = -100.0  # LAVIS's score of a pair outside the top k


class RetrievalModel(Protocol):
    """What scoring asks of a model."""

    device: Any

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Captions -> what matching needs of each text ([B, T, ...], padded with 0), and features [B, d]."""
        ...

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> token states [B, N, width], and features [B, d] or [B, queries, d]."""
        ...

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """P images and P texts -> logits [P, 2]; column 1 is "matches"."""
        ...


@torch.no_grad()
def score_matrices(model: RetrievalModel, data_loader: Any, top_k: int, pairs_at_once: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every image with every text and back; ranks share the rows.

    Args:
        model: in eval mode.
        data_loader: batches with ``image``; its dataset has ``text`` (list of captions) and one row per image.
        top_k: how many candidates per query the matching head sees; at most the gallery.
        pairs_at_once: pairs per matching pass, bounds memory.

    Returns:
        float32 [I, T] and [T, I]: ITM logit + cosine inside the top k, -100 outside.
    """
    texts = list(data_loader.dataset.text)
    parts = [model.text_rows(texts[start : start + 256]) for start in range(0, len(texts), 256)]
    text = tuple(_stack(column) for column in zip(*(rows for rows, _ in parts), strict=True))
    text_features = torch.cat([features for _, features in parts])
    images, image_features = torch.empty(0), list[Tensor]()
    for samples in data_loader:
        states, features = model.image_rows(samples["image"].to(model.device))
        done = sum(len(part) for part in image_features)
        if done == 0:  # in main memory and once: token states of a whole gallery fit no GPU
            images = torch.empty(len(data_loader.dataset.image), *states.shape[1:], dtype=states.dtype)
        images[done : done + len(states)] = states.cpu()
        image_features.append(features)
    similarity = best_query(torch.cat(image_features), text_features)

    def matching(image_index: Tensor, text_index: Tensor) -> Tensor:
        scores = [torch.empty(0, device=similarity.device)]  # a rank has no row where there are fewer rows than ranks
        for start in range(0, len(image_index), pairs_at_once):
            rows, columns = image_index[start : start + pairs_at_once], text_index[start : start + pairs_at_once]
            logits = model.match_rows(images[rows.cpu()].to(model.device), tuple(part[columns] for part in text))
            scores.append(logits[:, 1].float())
        return torch.cat(scores)

    image_to_text = _rank_rows(similarity, top_k, matching)
    text_to_image = _rank_rows(similarity.T, top_k, lambda text, image: matching(image, text))
    return image_to_text.cpu().numpy(), text_to_image.cpu().numpy()


def best_query(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosines of I images and T texts, of BLIP-2's several features an image the largest: [I, (Q,) d], [T, d] -> [I, T]."""
    with torch.autocast(image_features.device.type, enabled=False):
        if image_features.dim() == 2:
            return image_features @ text_features.T
        rows = [(queries @ text_features.T).amax(dim=1) for queries in image_features.split(64)]  # [64, Q, T] at once
    return torch.cat(rows)


def _stack(parts: tuple[Tensor, ...]) -> Tensor:
    """Texts of all batches, padded to the longest: [B, T, ...] each -> [all, T, ...]."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1])) for part in parts])


def _rank_rows(similarity: Tensor, top_k: int, matching: Any) -> Tensor:
    top_k = min(top_k, similarity.shape[1])
    scores = torch.zeros_like(similarity)
    mine = torch.arange(rank(), len(similarity), world_size(), device=similarity.device)
    best, columns = similarity[mine].topk(top_k, dim=1)
    logits = matching(mine.repeat_interleave(top_k), columns.flatten())
    scores[mine] = torch.full_like(scores[mine], NOT_RANKED).scatter(1, columns, logits.view_as(best) + best)
    if is_distributed():
        dist.all_reduce(scores)  # rows of other ranks are 0 here
    return scores
