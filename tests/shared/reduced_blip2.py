"""blip2_mafa and LAVIS's own BLIP-2 stage 1 at a size for a CPU, with the same parts, so that tests can compare them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import BertConfig

from lavis_mafa.config.schema import Blip2Block, typed_block
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.encoders import build_blip2_tokenizer

WIDTH, DEPTH, HEADS, RATIO, SIZE, PATCH = 32, 2, 2, 4.3637, 28, 7
VOCABULARY = str(Path(__file__).with_name("vocabulary.txt"))  # a few words, and what BERT always has
QUERY_WIDTH, LAYERS, QUERIES, EVERY, DIM, LENGTH = 48, 3, 3, 2, 16, 20
SIZES: dict[str, Any] = {
    "arch": "blip2_mafa",
    "model_type": "tiny",
    "tokenizer": VOCABULARY,
    "max_text_length": LENGTH,
    "embed_dim": DIM,
    "image_encoder": {
        "init": None,
        "image_size": SIZE,
        "patch_size": PATCH,
        "width": WIDTH,
        "depth": DEPTH,
        "heads": HEADS,
        "mlp_ratio": RATIO,
        "freeze": True,
        "precision": "fp32",
    },
    "qformer": {
        "init": None,
        "width": QUERY_WIDTH,
        "layers": LAYERS,
        "heads": HEADS,
        "queries": QUERIES,
        "cross_attention_every": EVERY,
        "dropout": 0.0,
    },
    "ecm": {"enabled": False},
    "itc": {"smoothing": 0.0},
}
CAPTIONS = [
    "a red dog",
    "two birds on the roof of an old house near the sea",
    "a blue car in the rain",
    "the small cat sleeps",
    "snow on a boat",
]


def block(**changes: Any) -> Blip2Block:
    """``model:`` of a YAML at the reduced size."""
    settings: Blip2Block = typed_block("model", OmegaConf.merge(OmegaConf.create(SIZES), OmegaConf.create(changes)))
    return settings


def ours(seed: int = 3, **changes: Any) -> Blip2Mafa:
    torch.manual_seed(seed)
    model = Blip2Mafa(block(**changes))
    spread(model)
    return model.eval()


def spread(model: nn.Module) -> None:
    """Initial weights are so small that everything looks alike; tests want differences."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)


class Offline:
    """What LAVIS's __init__ would download, at the reduced size. Vocabulary and head grow by [DEC] in that __init__."""

    tokenizer: Any

    def init_tokenizer(self) -> Any:
        return build_blip2_tokenizer(VOCABULARY)

    def init_vision_encoder(self, _: str, image_size: int, *__: Any) -> tuple[nn.Module, nn.Module]:
        encoder = VisionTransformer(
            img_size=image_size,
            patch_size=PATCH,
            use_mean_pooling=False,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=RATIO,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        return encoder, LayerNorm(WIDTH)

    def init_Qformer(self, queries: int, vision_width: int, every: int = 2) -> tuple[nn.Module, nn.Parameter]:  # noqa: N802
        words = self.tokenizer.vocab_size  # without [DEC]
        return lavis_qformer(words, QUERY_WIDTH, LAYERS, HEADS, vision_width, every), nn.Parameter(
            0.02 * torch.randn(1, queries, QUERY_WIDTH)
        )


def lavis_qformer(
    words: int, width: int, layers: int, heads: int, image_width: int, every: int = 2, queries: int = QUERIES
) -> BertLMHeadModel:
    """LAVIS's own, without dropout."""
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        add_cross_attention=True,
    )
    config.encoder_width, config.cross_attention_freq, config.query_length = image_width, every, queries
    return BertLMHeadModel(config)


class OfflineStage1(Offline, Blip2Qformer):
    pass


class OfflineMatching(Offline, Blip2ITM):
    pass


def lavis_stage_1(seed: int = 1, kind: type = OfflineStage1, image_size: int = SIZE, freeze: bool = True) -> Any:
    torch.manual_seed(seed)
    model = kind(
        img_size=image_size,
        vit_precision="fp32",
        freeze_vit=freeze,
        num_query_token=QUERIES,
        cross_attention_freq=EVERY,
        embed_dim=DIM,
        max_txt_len=LENGTH,
    )
    spread(model)
    return model.eval()


def lavis_matching(seed: int = 1, image_size: int = SIZE) -> Any:
    return lavis_stage_1(seed, OfflineMatching, image_size)


def same_as(theirs: nn.Module, **changes: Any) -> Blip2Mafa:
    """Ours with the weights of LAVIS's."""
    mine = ours(7, **changes)
    mine.load_state_dict(theirs.state_dict())
    return mine


def in_lavis(mine: Blip2Mafa) -> Any:
    """LAVIS's with the weights of ours."""
    theirs = lavis_stage_1()
    theirs.load_state_dict(mine.state_dict())
    return theirs


def save(model: nn.Module, path: Path, without: str | tuple[str, ...] = (), **changes: Tensor) -> Path:
    """A checkpoint as LAVIS writes it; ``without`` says how names begin that it leaves out."""
    state = {**copy.deepcopy(model.state_dict()), **changes}
    torch.save({"model": {name: value for name, value in state.items() if not name.startswith(without)}}, path)
    return path


def batch(count: int = 4, seed: int = 0, size: int = SIZE, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(count, 3, size, size, generator=generator), "text_input": CAPTIONS[:count], **more}


class Gallery:
    """A retrieval set as a loader: two batches, five texts."""

    def __init__(self) -> None:
        self.samples = batch(4)
        self.dataset = self
        self.text = CAPTIONS
        self.image = ["0", "1", "2", "3"]

    def __iter__(self) -> Any:
        yield {"image": self.samples["image"][:3]}
        yield {"image": self.samples["image"][3:]}
