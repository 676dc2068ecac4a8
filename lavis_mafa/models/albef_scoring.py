"""Retrieval scores as ALBEF computes them: ITC picks the top k, the matching head re-ranks those (ALBEF section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lavis_mafa.common.distributed import is_distributed, rank, world_size
from lavis_mafa.models.albef_pairs import fuse

if TYPE_CHECKING:
    from lavis_mafa.models.albef_mafa import AlbefMafa

NOT_RANKED = -100.0  # LAVIS's score of a pair outside the top k


@torch.no_grad()
def score_matrices(model: AlbefMafa, data_loader: Any, top_k: int, pairs_at_once: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every image with every text and back; ranks share the rows.

    Args:
        model: in eval mode.
        data_loader: batches with ``image``; its dataset has ``text`` (list of captions) and one row per image.
        top_k: how many candidates per query the matching head sees; at most the gallery.
        pairs_at_once: pairs per fusion pass, bounds memory.

    Returns:
        float32 [I, T] and [T, I]: ITM logit + cosine inside the top k, -100 outside.
    """
    texts = list(data_loader.dataset.text)
    text_states, text_masks, text_features = [], [], []
    width = 0
    for start in range(0, len(texts), 256):
        ids, mask = model.tokenize(texts[start : start + 256])
        states = model.text_encoder.bert(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state
        text_states.append(states)
        text_masks.append(mask)
        text_features.append(model.text_feature(states))
        width = max(width, ids.shape[1])
    text_embeds = torch.cat([torch.nn.functional.pad(s, (0, 0, 0, width - s.shape[1])) for s in text_states])
    text_mask = torch.cat([torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in text_masks])
    image_states, image_features = [], []
    for samples in data_loader:
        states = model.visual_encoder.forward_features(samples["image"].to(model.device))
        image_features.append(model.image_feature(states))
        image_states.append(states.cpu())  # token states of a whole gallery do not fit a GPU
    image_embeds = torch.cat(image_states)
    similarity = torch.cat(image_features) @ torch.cat(text_features).T

    def matching(image_index: Tensor, text_index: Tensor) -> Tensor:
        scores = []
        for start in range(0, len(image_index), pairs_at_once):
            rows, columns = image_index[start : start + pairs_at_once], text_index[start : start + pairs_at_once]
            images = image_embeds[rows.cpu()].to(model.device)
            states = fuse(model.text_encoder.bert, text_embeds[columns], text_mask[columns], images)
            scores.append(model.itm_head(states[:, 0])[:, 1].float())
        return torch.cat(scores)

    image_to_text = _rank_rows(similarity, top_k, matching)
    text_to_image = _rank_rows(similarity.T, top_k, lambda text, image: matching(image, text))
    return image_to_text.cpu().numpy(), text_to_image.cpu().numpy()


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
