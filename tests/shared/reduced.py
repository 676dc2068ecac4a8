"""albef_mafa and LAVIS's own ALBEF at a size for a CPU, with the same parts, so that tests can compare them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lavis.common.utils import get_abs_path
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.med import BertForMaskedLM, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import OmegaConf
from torch import nn
from transformers import BertConfig

from lavis_mafa.config.schema import AlbefBlock, typed_block
from lavis_mafa.models.albef import AlbefMafa
from lavis_mafa.models.encoders import MINILM, build_tokenizer
from lavis_mafa.models.language_teacher import LanguageTeacher, untrained_teacher

WIDTH, DEPTH, HEADS, LAYERS, FUSION, DIM, SIZE, PATCH = 32, 2, 2, 3, 1, 16, 32, 8
SIZES: dict[str, Any] = {
    "arch": "albef_mafa",
    "model_type": "tiny",
    "tokenizer": MINILM,
    "max_text_length": 30,
    "embed_dim": DIM,
    "image_encoder": {"init": None, "image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS},
    "text_encoder": {"init": None, "width": WIDTH, "layers": LAYERS, "fusion_layer": FUSION, "heads": HEADS, "dropout": 0.0},
    "ecm": {"enabled": False},
    "itc": {"smoothing": 0.0},
}
CAPTIONS = ["a red dog", "two birds on the roof of an old house near the sea", "a blue car in the rain", "the small cat sleeps"]


def block(**changes: Any) -> AlbefBlock:
    """``model:`` of a YAML at the reduced size."""
    settings: AlbefBlock = typed_block("model", OmegaConf.merge(OmegaConf.create(SIZES), OmegaConf.create(changes)))
    return settings


def ours(seed: int = 0, **changes: Any) -> AlbefMafa:
    torch.manual_seed(seed)
    model = AlbefMafa(block(**changes))
    spread(model)
    return model.eval()


def language_teacher(words: int) -> LanguageTeacher:
    """One whose predictions differ."""
    torch.manual_seed(9)
    teacher = untrained_teacher(words, WIDTH, layers=1, heads=HEADS)
    spread(teacher.network)
    return teacher


def spread(model: nn.Module) -> None:
    """Initial weights are so small that everything looks alike; tests want differences."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "_m." not in name:
                parameter.mul_(4.0)
    if isinstance(model, AlbefMafa) and model.settings.itc.momentum_distillation is not None:
        model._copy_to_momentum_model()


def _image_encoder(image_size: int = SIZE) -> VisionTransformerEncoder:
    encoder = VisionTransformerEncoder(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    encoder.vision_width = WIDTH
    return encoder


def _text_config() -> BertConfig:
    config = BertConfig.from_json_file(get_abs_path("configs/models/med_config_albef.json"))
    config.update(
        {
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "fusion_layer": FUSION,
            "encoder_width": WIDTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    )
    return config


class OfflineRetrieval(AlbefRetrieval):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_tokenizer(MINILM)


class OfflinePretrain(AlbefPretrain):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_tokenizer(MINILM)


def lavis_retrieval(seed: int = 1, image_size: int = SIZE) -> AlbefRetrieval:
    torch.manual_seed(seed)
    text = XBertEncoder(config=_text_config(), add_pooling_layer=False)
    model = OfflineRetrieval(_image_encoder(image_size), text, queue_size=8, embed_dim=DIM, max_txt_len=30)
    spread(model)
    return model.eval()


def lavis_pretrain(seed: int = 1, queue_size: int = 8, momentum: float = 0.0) -> AlbefPretrain:
    torch.manual_seed(seed)
    text = BertForMaskedLM(_text_config())
    text.cls.predictions.decoder.weight = text.bert.embeddings.word_embeddings.weight  # as from_pretrained ties them
    model = OfflinePretrain(_image_encoder(), text, queue_size=queue_size, embed_dim=DIM, momentum=momentum, max_txt_len=30)
    spread(model)
    return model.eval()


def batch(count: int = 4, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(count, 3, SIZE, SIZE, generator=generator), "text_input": CAPTIONS[:count], **more}


class Gallery:
    """A retrieval set as a loader: one batch, five texts."""

    def __init__(self) -> None:
        self.samples = batch(4)
        self.dataset = self
        self.text = [*CAPTIONS, "a red car and a blue dog"]
        self.image = ["0", "1", "2", "3"]

    def __iter__(self) -> Any:
        yield {"image": self.samples["image"][:3]}
        yield {"image": self.samples["image"][3:]}
