"""``albef_nlvr_mafa``: ALBEF for statements about two images (ALBEF section 5, Figure 3b; MAFA Table 3, NLVR2), and what it shares with
text assignment: each fusion layer is there twice, once for each image."""

from __future__ import annotations

import logging
import re
from copy import deepcopy
from typing import Any, Generic

import torch
from torch import Tensor, nn

from lavis_mafa.config.data import STATEMENT
from lavis_mafa.config.schema import AlbefNlvrBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.downstream import AlbefClassifier, AlbefDownstream, Block
from lavis_mafa.models.transformer import Bert, KeysValues, Reading

logger = logging.getLogger(__name__)
LAYER = re.compile(r"^(text_encoder\.encoder\.layer\.)(\d+)(\..*)$")
SHARED = (".crossattention.self.key.", ".crossattention.self.value.")
Rows = slice | Tensor


def double_fusion_layers(bert: Bert) -> Bert:
    """Replace each fusion layer by a couple: itself, and a copy with the same module for the keys (and one for the values) of its
    cross-attention. So it stays one parameter wherever the model goes: copied, moved, loaded, in DDP, in an optimizer."""
    layers: Any = list(bert.encoder.layer)
    doubled = layers[: bert.fusion_layer]
    for first in layers[bert.fusion_layer :]:
        second = deepcopy(first)
        own, shared = second.crossattention.self, first.crossattention.self
        own.key, own.value = shared.key, shared.value
        doubled += [first, second]
    bert.encoder.layer = nn.ModuleList(doubled)
    return bert


def doubled_weights(state: dict[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """A state dict of pre-training for :func:`double_fusion_layers`: fusion layer F + i becomes F + 2i and F + 2i + 1.

    Example:
        >>> list(doubled_weights({"text_encoder.encoder.layer.2.x": torch.zeros(1), "temp": torch.zeros(1)}, fusion_layer=1))
        ['text_encoder.encoder.layer.3.x', 'text_encoder.encoder.layer.4.x', 'temp']
    """
    doubled = {}
    for name, value in state.items():
        found = LAYER.match(name)
        if found is None or (number := int(found[2])) < fusion_layer:
            doubled[name] = value
            continue
        for couple in (0, 1):
            doubled[f"{found[1]}{2 * number - fusion_layer + couple}{found[3]}"] = value
    return doubled


def _check_shared(state: dict[str, Tensor], fusion_layer: int) -> None:
    """Else the second of a couple would be taken for both, without a word; raises UserError."""
    for name, value in state.items():
        found = LAYER.match(name)
        if found is None or not found[3].startswith(SHARED) or (int(found[2]) - fusion_layer) % 2 == 0:
            continue
        first = state.get(f"{found[1]}{int(found[2]) - 1}{found[3]}")
        if first is not None and not torch.equal(value, first):
            one = int(found[2]) - 1
            raise UserError(f"{name} is not that of layer {one}, with which it is one weight: a couple shares keys and values.")


class TwoImages(AlbefDownstream[Block], Generic[Block]):
    """What the two models of two images share; ``text_encoder`` of their settings has the layers of pre-training."""

    left_out = ""  # what a start from pre-training leaves out, for the log

    def _text_encoder(self) -> Bert:
        return double_fusion_layers(super()._text_encoder())

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With couples of layers, which a checkpoint of pre-training has not.

        Raises:
            UserError: a couple does not share its keys and values.
        """
        state = super().own_weights(state)
        numbers = {int(found[2]) for name in state if (found := LAYER.match(name))}
        settings = self.settings.text_encoder
        if max(numbers, default=-1) + 1 != settings.layers:
            _check_shared(state, settings.fusion_layer)
            return state
        logger.info("Both layers of a couple start as the fusion layer of pre-training%s.", self.left_out)
        return doubled_weights(state, settings.fusion_layer)

    def read_two(self, text_encoder: Bert, texts: list[str], states: Tensor, first: Rows, second: Rows) -> Tensor:
        """[CLS] of B texts [B, width], each read with two of K images [K, N, width]: B rows ``first``, B rows ``second``.

        An image's keys and values are computed once, whatever it is read with."""
        ids, mask = self.words(texts)
        own = torch.arange(len(ids))
        reading = Reading.of(mask, self.device, own, own, len(ids))
        images: KeysValues = []
        layers: Any = text_encoder.encoder.layer[text_encoder.fusion_layer :: 2]
        for layer in layers:
            key, value = layer.crossattention.self.keys_values(states)
            images += [(key[rows], value[rows]) for rows in (first, second)]
        return text_encoder.read(ids, reading, images=images, chosen=reading.first)


class AlbefNlvrMafa(TwoImages[AlbefNlvrBlock], AlbefClassifier[AlbefNlvrBlock]):
    """Whether a sentence holds of two images (1) or not (0).

    Equal to LAVIS's ``albef_nlvr`` but for its teacher, which reads with the student's text encoder there and its own here, and whose
    weight alpha LAVIS ramps up within two epochs, ALBEF's authors and we within one.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_nlvr_mafa", "tiny")
    """

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_nlvr_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    images = ("image0", "image1")
    classes = len(STATEMENT)
    ramped = True
    left_out = ", without the text assignment (albef_ta_mafa) that ALBEF trains between the two"

    def logits(self, samples: dict[str, Any], whose: str = "") -> Tensor:
        """[B, 2]; ``whose``: ``_m`` for the teacher's."""
        visual_encoder, text_encoder, cls_head = (getattr(self, f"{part}{whose}") for part in self.taught)
        states = visual_encoder.forward_features(torch.cat([samples[name] for name in self.images]))
        texts: list[str] = samples["text_input"]
        logits: Tensor = cls_head(self.read_two(text_encoder, texts, states, slice(len(texts)), slice(len(texts), None)))
        return logits
