"""ViLTA's language teacher: a frozen BERT with its own head that reads texts alone (ViLTA section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from lavis_mafa.config.checkpoints import check_kind_on_hub, check_same_words, from_hub
from lavis_mafa.models.encoders import build_tokenizer, read_bert
from lavis_mafa.models.transformer import Bert, BertWithHead, Reading, Tokens
from lavis_mafa.weights import load_exactly

KEY = "model.language_teacher.init"
WHAT = "a folder with a BERT, its language-modelling head and its vocab.txt"


@dataclass
class LanguageTeacher:
    """What a language model expects at each place of a text.

    It holds a module but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    network: BertWithHead  # in eval mode, without gradients
    unknown: int = 0  # what it reads for a word that a model has added to BERT's

    @torch.no_grad()
    def read(self, ids: Tensor, reading: Reading, chosen: Tokens | None = None) -> Tensor:
        """LongTensor[B, T] of all texts -> states [S, width] of those that are read, or of the tokens ``chosen``."""
        device = reading.positions.device
        if self.network.cls.predictions.bias.device != device:
            self.network.to(device)
        ids = ids.masked_fill(ids >= self.network.bert.embeddings.word_embeddings.num_embeddings, self.unknown)
        states: Tensor = self.network.bert.read(ids, reading, chosen=chosen)
        return states

    def states(self, ids: Tensor, mask: Tensor, reading: Reading) -> Tensor:
        """All of B texts: [B, T] on the host -> [B, T, width], 0 after each text's last word."""
        states = reading.tokens.texts.spread(self.read(ids, reading))
        return F.pad(states, (0, 0, 0, mask.shape[1] - states.shape[1]))

    @torch.no_grad()
    def predict(self, states: Tensor) -> Tensor:
        """[N, width] -> logits [N, words]. The head is the dear part: it runs where somebody asks."""
        logits: Tensor = self.network.cls(states)
        return logits


def build_language_teacher(init: str, tokenizer: Any) -> LanguageTeacher:
    """The teacher that ``model.language_teacher.init`` names: a hub name or a local folder.

    Raises:
        UserError: there is none, it is no BERT or has no head, or its vocabulary is not the one of ``tokenizer``, whose added words
            ([DEC], [ENC]) it need not have.
    """
    own = build_tokenizer(init, KEY)
    check_same_words(init, list(own.vocab), list(tokenizer.vocab))
    config = from_hub(AutoConfig.from_pretrained, init, KEY, WHAT)
    check_kind_on_hub(init, KEY, WHAT, "bert")
    teacher = untrained_teacher(len(own.vocab), config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    with torch.random.fork_rng(devices=[]):  # transformers draws the weights that it then reads
        state = read_bert(init, teacher.network.state_dict(), 0, KEY, may_miss=())
    load_exactly(teacher.network, state, f"{KEY}: {init}")
    return replace(teacher, unknown=own.unk_token_id)


def untrained_teacher(words: int, width: int, layers: int, heads: int) -> LanguageTeacher:
    """One of these sizes with first weights."""
    with torch.random.fork_rng(devices=[]):  # training draws the same with and without a teacher
        network = BertWithHead(Bert(words, width, layers, heads, image_width=0, fusion_layer=layers))
    return LanguageTeacher(network.eval().requires_grad_(False))
