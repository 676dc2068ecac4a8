"""Softly masked images: of each text one word says which patches, the matching score's Grad-CAM how much (SoftMask section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_mafa.errors import UserError
from lavis_mafa.models.synthetic_texts import FUNCTION_WORDS, tokens_of
from lavis_mafa.models.transformer import KeysValues, Reading, on_device
from lavis_mafa.objectives import ExtraPairs
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
        raise UserError(
            f"the layer is {number}; allowed: 1 or more, and below {len(layers)}, the number of layers that look at images."
        )
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


@dataclass(frozen=True)
class SoftlyMasked:
    """Each of B images once more, masked by where one word of its own text looks; to follow the K that a host holds."""

    tokens: Tensor  # [B, N, width], whose gradient reaches the images'
    exists: Tensor  # [B] 1, or 0 where a text has no word to mask by

    def following(self, images: Tensor) -> tuple[Tensor, ExtraPairs]:
        """K images [K, N, width] -> [K + B, N, width], and the pairs of image K + b with text b, which match."""
        own = torch.arange(len(self.tokens), device=images.device)
        return torch.cat([images, self.tokens]), ExtraPairs(own + len(images), own, torch.ones_like(own), self.exists)


def softly_masked(model: Any, images: Tensor, texts: Tensor, ids: Tensor, mask: Tensor) -> SoftlyMasked:
    """What ``model.itm.soft_mask`` makes of a batch.

    Args:
        images: [B, N, width], the first token for the whole image, which no mask touches.
        texts: [B, T, ...] as matching reads them. ids, mask: [B, T] on the host.
    """
    how, device = model.settings.itm.soft_mask, images.device
    place = choose_place(model.told[ids])
    every = torch.arange(len(ids))
    reading = Reading.of(mask, device, every, every, len(ids))
    with torch.no_grad():
        keys_values = model.keys_values(images)
    maps = word_maps(model, keys_values, (texts, mask), reading, how.layer, how.by)
    word = on_device(tokens_of(mask, place.clamp_min(0)), device)
    kept = 1 - soft_mask(maps.index_select(0, word), how.share)
    patches = images[:, 1:] * kept[:, :, None].to(images.dtype)
    return SoftlyMasked(torch.cat([images[:, :1], patches], dim=1), on_device((place >= 0).float(), device))
