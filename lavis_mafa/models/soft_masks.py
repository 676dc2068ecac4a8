"""Softly masked images: of each text one word says which patches, the matching score's Grad-CAM how much (SoftMask section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.errors import UserError
from lavis_mafa.models.synthetic_texts import has_content, tokens_of
from lavis_mafa.models.transformer import KeysValues, Reading, on_device
from lavis_mafa.objectives import ExtraPairs
from lavis_mafa.objectives.soft_mask import soft_mask, word_cam
from lavis_mafa.objectives.synthetic_negatives import choose_place


def told_of(tokenizer: Any) -> Tensor:
    """BoolTensor[words]: what may be seen in a picture, words and their pieces alike: letters and digits, and no function word."""
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([has_content(word.removeprefix("##")) for word in words], device="cpu")


def middle(layers: int) -> int:
    """The cross-attention layer whose maps are taken where none is named: the 3rd of 6, as ALBEF's grounding takes it."""
    return (layers + 1) // 2


def looking_layers(model: Any) -> list[Any]:
    """The cross-attentions of ALBEF's fusion layers, and of all layers of BLIP's text encoder."""
    bert = getattr(model.text_encoder, "bert", model.text_encoder)
    return [layer.crossattention.self for layer in bert.encoder.layer[bert.fusion_layer :]]


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
    layers = looking_layers(model)
    number = middle(len(layers)) if layer is None else layer
    if len(layers) < 2:
        raise UserError(
            "the model has one layer that looks at images, and from the last one no word's own map reaches the score; needed: two."
        )
    if not 1 <= number < len(layers):
        raise UserError(
            f"the layer is {number}; allowed: 1 or more, and below {len(layers)}, the number of layers that look at images."
        )
    cross = layers[number - 1]
    cross.save_attention = True
    try:
        if by == "attention":
            with torch.no_grad():
                model.fuse(images, texts[0], reading, layers=number)
            cam = cross.attention_map.float().mean(dim=1)
        else:
            with torch.enable_grad():
                # so that a frozen model has maps too
                given = [(key.detach().requires_grad_(), value.detach()) for key, value in images]
                states = model.fuse(given, texts[0].detach(), reading, reading.first)
                score, attention = model.itm_head(states)[:, 1].sum(), cross.attention_map
                (gradient,) = torch.autograd.grad(score, attention)
            cam = word_cam(attention.detach(), gradient)
    finally:
        cross.save_attention, cross.attention_map = False, None
    collected: Tensor = reading.tokens.images.collect(cam)[:, 1:]  # type: ignore[union-attr]
    return collected


@dataclass(frozen=True)
class SoftMasks:
    """Of each of B images what is kept of its tokens, where one word of its own text has masked it."""

    kept: Tensor  # [B, N] in [0, 1]; 1 of the first token, which stands for the whole image
    exists: Tensor  # [B] 1, or 0 where a text has no word to mask by

    def pairs(self, candidates: int) -> ExtraPairs:
        """Of masked image K + b with text b: they match."""
        own = torch.arange(len(self.kept), device=self.kept.device)
        return ExtraPairs(own + candidates, own, torch.ones_like(own), self.exists)

    def keys_values(self, model: Any, images: KeysValues) -> KeysValues:
        """Of the B masked images from those of the B images. They are linear in the tokens, so nothing is multiplied again."""

        def masked(given: Tensor, bias: Tensor) -> Tensor:
            return (bias + self.kept[:, :, None] * (given - bias)).to(given.dtype)

        layers = zip(looking_layers(model), images, strict=True)
        return [(masked(key, layer.key.bias), masked(value, layer.value.bias)) for layer, (key, value) in layers]


def soft_masks(model: Any, images: KeysValues, texts: Tensor, ids: Tensor, mask: Tensor) -> SoftMasks:
    """What ``model.itm.soft_mask`` makes of a batch.

    Args:
        images: keys and values of B images. texts: [B, T, ...] as matching reads them. ids, mask: [B, T] on the host.
    """
    how, device = model.settings.itm.soft_mask, images[0][0].device
    place, every = choose_place(model.told[ids]), torch.arange(len(ids))
    maps = word_maps(model, images, (texts, mask), Reading.of(mask, device, every, every, len(ids)), how.layer, how.by)
    word = on_device(tokens_of(mask, place.clamp_min(0)), device)
    kept = 1 - soft_mask(maps.index_select(0, word), how.share)
    return SoftMasks(F.pad(kept, (1, 0), value=1.0), on_device((place >= 0).float(), device))
