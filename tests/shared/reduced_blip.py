"""blip_mafa and LAVIS's own BLIP at a size for a CPU, with the same parts, so that tests can compare them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from lavis.common.utils import get_abs_path
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
from omegaconf import OmegaConf
from torch import nn
from transformers import BertConfig

import reduced
from lavis_mafa.config.schema import BlipBlock, typed_block
from lavis_mafa.models.blip import BlipMafa
from lavis_mafa.models.encoders import MINILM, build_blip_tokenizer

batch, Gallery, SIZE, DIM, CAPTIONS = reduced.batch, reduced.Gallery, reduced.SIZE, reduced.DIM, reduced.CAPTIONS

TEXT = {"init": None, "width": reduced.WIDTH, "layers": 2, "heads": reduced.HEADS, "dropout": 0.0}
SIZES: dict[str, Any] = {**reduced.SIZES, "arch": "blip_mafa", "text_encoder": TEXT}


def block(**changes: Any) -> BlipBlock:
    """``model:`` of a YAML at the reduced size."""
    settings: BlipBlock = typed_block("model", OmegaConf.merge(OmegaConf.create(SIZES), OmegaConf.create(changes)))
    return settings


def ours(seed: int = 0, **changes: Any) -> BlipMafa:
    torch.manual_seed(seed)
    model = BlipMafa(block(**changes))
    reduced.spread(model)
    if model.settings.itc.momentum_distillation is not None:
        model._copy_to_momentum_model()
    return model.eval()


def _text_config(name: str) -> BertConfig:
    config = BertConfig.from_json_file(get_abs_path(f"configs/models/{name}.json"))
    config.update(
        {
            "hidden_size": TEXT["width"],
            "intermediate_size": 4 * TEXT["width"],
            "num_hidden_layers": TEXT["layers"],
            "num_attention_heads": TEXT["heads"],
            "encoder_width": reduced.WIDTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    )
    return config


def _encoder(config: str = "med_config") -> XBertEncoder:
    return XBertEncoder(config=_text_config(config), add_pooling_layer=False)


class Offline:
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_blip_tokenizer(MINILM)


class OfflinePretrain(Offline, BlipPretrain):
    pass


class OfflineRetrieval(Offline, BlipRetrieval):
    pass


class OfflineItm(Offline, BlipITM):
    pass


class OfflineCaption(Offline, BlipCaption):
    pass


def spread(model: nn.Module) -> Any:
    """LAVIS's teacher keeps its small weights, so that it differs from the student."""
    reduced.spread(model)
    return model.eval()


def lavis_pretrain(seed: int = 1, queue_size: int = 8, momentum: float = 0.9) -> BlipPretrain:
    torch.manual_seed(seed)
    text = _encoder("bert_config"), XBertLMHeadDecoder(config=_text_config("bert_config"))
    with contextlib.redirect_stdout(io.StringIO()):
        model = OfflinePretrain(
            reduced._image_encoder(), *text, queue_size=queue_size, embed_dim=DIM, momentum=momentum, max_txt_len=30
        )
    return spread(model)


def lavis_retrieval(seed: int = 1) -> BlipRetrieval:
    torch.manual_seed(seed)
    return spread(OfflineRetrieval(reduced._image_encoder(), _encoder(), queue_size=8, embed_dim=DIM))


def lavis_itm(seed: int = 1, image_size: int = SIZE) -> BlipITM:
    torch.manual_seed(seed)
    return spread(OfflineItm(reduced._image_encoder(image_size), _encoder(), embed_dim=DIM))


def lavis_caption(seed: int = 1) -> BlipCaption:
    torch.manual_seed(seed)
    decoder = XBertLMHeadDecoder(config=_text_config("med_config"))
    return spread(OfflineCaption(reduced._image_encoder(), decoder, prompt=""))
