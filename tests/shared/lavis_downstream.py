"""LAVIS's own downstream classes at the reduced size, without what their ``from_config`` would download."""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.albef_models.albef_classification import AlbefClassification
from lavis.models.albef_models.albef_nlvr import AlbefNLVR
from lavis.models.albef_models.albef_vqa import AlbefVQA
from lavis.models.blip_models.blip_classification import BlipClassification
from lavis.models.blip_models.blip_nlvr import BlipNLVR
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.blip_models.nlvr_encoder import BertModel as TwoImageBert
from lavis.models.med import BertLMHeadModel, BertModel, XBertEncoder, XBertLMHeadDecoder

import reduced
import reduced_blip

FUSION = 6  # LAVIS's albef_vqa and albef_nlvr have no other: 6 text layers, 6 or 12 that look at images


def offline(model: type, kind: Any) -> Any:
    """The class with a tokenizer that is there."""
    return type(model.__name__, (model,), {"init_tokenizer": kind.init_tokenizer})


def spread(build: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = build()
    reduced.spread(model)
    if hasattr(model, "cls_head_m"):
        model.copy_params()
    return model.eval()


def _config(layers: int, fusion: int) -> Any:
    config = reduced._text_config()
    config.update({"num_hidden_layers": layers, "fusion_layer": fusion})
    return config


def albef_classification(seed: int = 1) -> Any:
    text = XBertEncoder(config=reduced._text_config(), add_pooling_layer=False)
    return spread(
        lambda: offline(AlbefClassification, reduced.OfflineRetrieval)(reduced._image_encoder(), text, 3, max_txt_len=30), seed
    )


def albef_vqa(seed: int = 1) -> Any:
    def build() -> Any:
        text = XBertEncoder(config=_config(2 * FUSION, FUSION), add_pooling_layer=False)
        decoder = BertLMHeadModel(config=_config(FUSION, 0))
        return offline(AlbefVQA, reduced.OfflineRetrieval)(reduced._image_encoder(), text, decoder, max_txt_len=30)

    return spread(build, seed)


def albef_nlvr(seed: int = 1) -> Any:
    def build() -> Any:
        text = BertModel(config=_config(3 * FUSION, FUSION), add_pooling_layer=False)
        return offline(AlbefNLVR, reduced.OfflineRetrieval)(reduced._image_encoder(), text, 2, max_txt_len=30)

    return spread(build, seed)


def blip_vqa(seed: int = 1) -> Any:
    def build() -> Any:
        decoder = XBertLMHeadDecoder(config=reduced_blip._text_config("med_config"))
        return offline(BlipVQA, reduced_blip.Offline)(reduced._image_encoder(), reduced_blip._encoder(), decoder)

    return spread(build, seed)


def blip_classification(seed: int = 1) -> Any:
    return spread(lambda: offline(BlipClassification, reduced_blip.Offline)(reduced._image_encoder(), reduced_blip._encoder(), 3), seed)


def blip_nlvr(seed: int = 1) -> Any:
    def build() -> Any:
        text = TwoImageBert(config=reduced_blip._text_config("med_config"), add_pooling_layer=False)
        return offline(BlipNLVR, reduced_blip.Offline)(reduced._image_encoder(), text, 2)

    return spread(build, seed)
