"""Where a model that saw no box looks for what a text names, and which box that is (ALBEF section 6.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.datasets.boxes import Box
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading, named_images
from lavis_mafa.objectives.soft_mask import word_cam

PAIRS_AT_ONCE = {"itm": 128, "itc": 32}  # the ViT's attention is of all patches to all

# --- maps -------------------------------------------------------------------------------------------------------------


def expression_maps(
    model: Any, image: Tensor, texts: list[str], image_index: Tensor, heat: str = "itm", layer: int | None = None
) -> Tensor:
    """Where P texts look, each in its own of K images.

    Args:
        model: of ALBEF's or BLIP's kind, in eval mode.
        image: [K, 3, H, W]. image_index: LongTensor[P] on the host.
        heat: ``itm``: the matching logit; ``itc``: the cosine.
        layer: of ``itm``; see :func:`lavis_mafa.models.soft_masks.word_maps`.

    Returns:
        [P, patches] on the host, nowhere negative.

    Raises:
        UserError: there is no such layer.
    """
    image = image.to(model.device)
    with torch.no_grad():
        tokens = model.image_rows(image)[0] if heat == "itm" else None
        rows, features = model.text_rows(texts)
    maps = []
    for part in torch.arange(len(texts)).split(PAIRS_AT_ONCE[heat]):
        if tokens is not None:
            maps.append(itm_maps(model, tokens, rows, image_index[part], part, layer).cpu())
        else:
            maps.append(itc_maps(model, image, features, image_index[part], part).cpu())
    return torch.cat(maps)


def itm_maps(
    model: Any, image_tokens: Tensor, texts: tuple[Tensor, ...], image_index: Tensor, text_index: Tensor, layer: int | None = None
) -> Tensor:
    """Where P of B texts look in K images for the matching logit: the mean map of all tokens but the last, [SEP].

    Args: as ``match_rows`` takes them, with indices on the host; ``layer``: see :func:`lavis_mafa.models.soft_masks.word_maps`.

    Returns:
        [P, patches], nowhere negative.
    """
    image_tokens, image_index = named_images(image_tokens, image_index)
    reading = Reading.of(texts[-1], image_tokens.device, text_index, image_index, len(image_tokens))
    assert reading.layout is not None, "indices on the host"
    with torch.no_grad():
        images = model.keys_values(image_tokens)
    maps = word_maps(model, images, texts, reading, layer)
    return torch.stack([words[:-1].mean(dim=0) for words in maps.split(reading.layout.lengths)])


def itc_maps(model: Any, image: Tensor, text_features: Tensor, image_index: Tensor, text_index: Tensor) -> Tensor:
    """Where the class token of the image encoder's last block looks for P cosines of K images and B texts.

    Args:
        image: [K, 3, H, W]. text_features: [B, d]. image_index, text_index: LongTensor[P].

    Returns:
        [P, patches], nowhere negative.
    """
    last, given = model.visual_encoder.blocks[-1], list[Tensor]()
    handle = last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        with torch.no_grad():
            model.image_states(image)
    finally:
        handle.remove()
    states = given[0].index_select(0, image_index.to(image.device)).requires_grad_()  # so that a frozen model has maps too
    texts = text_features.index_select(0, text_index.to(text_features.device))
    last.attn.save_attention = True
    try:
        with torch.enable_grad():
            features = model.image_features(model.visual_encoder.norm(last(states)))
            attention = last.attn.attention_map
            (gradient,) = torch.autograd.grad((features * texts).sum(), attention)
    finally:
        last.attn.save_attention, last.attn.attention_map = False, None
    return word_cam(attention.detach()[:, :, :1], gradient[:, :, :1])[:, 0, 1:]


# --- boxes ------------------------------------------------------------------------------------------------------------


def heat_of(cam: Tensor, width: int, height: int) -> Tensor:
    """A map over square patches, [patches], at its image's size, [height, width]: bicubic, as ALBEF's code has it."""
    side = math.isqrt(len(cam))
    grid = cam.float().view(1, 1, side, side)
    return F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def box_scores(heat: Tensor, boxes: Sequence[Box], area_power: float = 0.5) -> Tensor:
    """How hot each of n boxes is: the map's sum in it by its area to that power; [height, width] -> [n].

    A box between pixels sums those that its truncated corners hold, as ALBEF's code does.

    Example:
        >>> box_scores(torch.ones(4, 4), [(0, 0, 2, 2), (0, 0, 4, 4)])
        tensor([2., 4.])
    """
    sums = [heat[int(top) : int(bottom), int(left) : int(right)].sum() for left, top, right, bottom in boxes]
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    return torch.stack(sums) / torch.tensor(areas, device=heat.device) ** area_power


def hottest_box(heat: Tensor, boxes: Sequence[Box], area_power: float = 0.5) -> Box | None:
    """Of several boxes the one with the greatest score; None where none is above 0, or there is none."""
    if not boxes:
        return None
    scores = box_scores(heat, boxes, area_power)
    best = int(scores.argmax())
    return boxes[best] if scores[best] > 0 else None
