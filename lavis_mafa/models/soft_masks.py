"""Softly masked images: of each text one word says which patches, the matching score's Grad-CAM how much (SoftMask section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lavis_mafa.errors import UserError
from lavis_mafa.models.synthetic_texts import FUNCTION_WORDS
from lavis_mafa.models.transformer import KeysValues, Reading, on_device
from lavis_mafa.objectives.soft_mask import soft_mask, word_cam
from lavis_mafa.objectives.synthetic_negatives import choose_place


def told_of(tokenizer: Any) -> Tensor:
    """BoolTensor[words]: what may be seen in a picture, words and their pieces alike: letters and digits, and no function word."""
    words = [word.removeprefix("##") for word in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    return torch.tensor([word.isalnum() and word.lower() not in FUNCTION_WORDS for word in words], device="cpu")


def middle(layers: int) -> int:
    """The cross-attention layer whose maps are taken where none is named: the 3rd of 6, as ALBEF's grounding takes it."""
    return (layers + 1) // 2


def word_maps(
    model: Any, images: KeysValues, texts: tuple[Tensor, ...], reading: Reading, layer: int | None = None, by: str = "grad_cam"
) -> Tensor:
    """Where each token of texts that are read with images looks: -> [S, N - 1] over the patches, in fp32, without gradient.

    Parameters keep the gradients that they have. What comes in is read as it is, so nothing flows back into it.

    Args:
        model: of ALBEF's or BLIP's kind. texts: what matching needs of them, the mask last.
        images: keys and values of each cross-attention layer. reading: of the pairs.
        layer: of the cross-attention layers, counted from 1; None: the :func:`middle` one. From the last one nothing but the first
            token's state reaches the score, so that the maps of all others are 0.
        by: ``grad_cam`` of the matching score, or the ``attention`` itself.

    Raises:
        UserError: there is no such layer.
    """
    bert = model.text_encoder.bert if hasattr(model.text_encoder, "bert") else model.text_encoder
    layers: nn.ModuleList = bert.encoder.layer[bert.fusion_layer :]
    number = middle(len(layers)) if layer is None else layer
    if not 1 <= number < len(layers):
        raise UserError(f"the layer is {number}; allowed: 1 to {len(layers) - 1}, of {len(layers)} layers that look at images.")
    cross: Any = layers[number - 1]
    cross = cross.crossattention.self
    cross.save_attention = True
    try:
        with torch.enable_grad():
            given = [(key.detach().requires_grad_(), value.detach()) for key, value in images]  # so that a frozen model has maps too
            states = model.fuse(given, texts[0].detach(), reading, reading.first)
            score = model.itm_head(states)[:, 1].sum()
            attention = cross.attention_map
            if by == "grad_cam":
                (gradient,) = torch.autograd.grad(score, attention)
                cam = word_cam(attention.detach(), gradient)
            else:
                cam = attention.detach().float().mean(dim=1)
    finally:
        cross.save_attention, cross.attention_map = False, None
    collected: Tensor = reading.tokens.images.collect(cam)[:, 1:]  # type: ignore[union-attr]
    return collected


def softly_masked(
    model: Any, image_tokens: Tensor, texts: tuple[Tensor, ...], ids: Tensor, settings: Any, told: Tensor
) -> tuple[Tensor, Tensor]:
    """Each of B images once more, masked by where one word of its own text looks.

    Args:
        image_tokens: [B, N, width], the first token for the whole image, which no mask touches.
        texts: their texts, as matching reads them. ids: LongTensor[B, T] on the host.
        settings: ``model.itm.soft_mask``. told: of :func:`told_of`.

    Returns:
        [B, N, width], whose gradient reaches ``image_tokens``; Tensor[B], 0 where a text has no word to mask by, else 1.
    """
    mask, device = texts[-1], image_tokens.device
    place = choose_place(told[ids])
    lengths = mask.sum(dim=1)
    token = lengths.cumsum(dim=0) - lengths + place.clamp_min(0)  # among all S
    every = torch.arange(len(ids))
    reading = Reading.of(mask, device, every, every, len(ids))
    with torch.no_grad():
        images = model.keys_values(image_tokens)
    maps = word_maps(model, images, texts, reading, settings.layer, settings.by)
    kept = 1 - soft_mask(maps.index_select(0, on_device(token, device)), settings.share)
    first, patches = image_tokens[:, :1], image_tokens[:, 1:]
    masked = torch.cat([first, patches * kept[:, :, None].to(patches.dtype)], dim=1)
    return masked, on_device((place >= 0).float(), device)
