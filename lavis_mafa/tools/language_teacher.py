"""A small BERT trained on captions alone: ViLTA's language teacher where none can be downloaded, or none has the tokenizer's words.

It has BERT's words, without what BLIP and BLIP-2 add to them ([DEC], [ENC]), and so serves all three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from lavis_mafa.datasets.annotations import clean_caption
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import EmptyCaption, UserError
from lavis_mafa.files import built_folder
from lavis_mafa.models.encoders import build_tokenizer, tokenize
from lavis_mafa.objectives.lm import IGNORED, mask_tokens, masked_lm_loss
from lavis_mafa.progress import Bar
from lavis_mafa.tools.training_data import read_annotated

MASKED = 0.15  # share of words that BERT masks
HELD_OUT = 20  # one in so many captions is not trained on


@dataclass(frozen=True)
class Recipe:
    """Sizes of a teacher, and how it is trained: AdamW, the rate rising for a while and then falling to 0."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


def read_captions(name: str, options: list[str]) -> tuple[list[str], Any]:
    """The captions that a YAML trains on, each once and as its text processor gives it, and its ``model`` block."""
    from lavis_mafa.runners import job

    config, cfg = job.prepare(name, [*options, "run.device=cuda"], files=False, device=False)
    from lavis.common.registry import registry

    captions: dict[str, None] = {}
    for dataset, block in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)(block)
        builder.build_processors()
        found, process = read_annotated(dataset, block), builder.text_processors["train"]
        distinct = [] if found is None else pc.unique(pc.list_flatten(found.table["caption"])).to_pylist()
        for caption in Bar(distinct, desc=f"captions of {dataset}", unit="caption", delay=1):
            with contextlib.suppress(EmptyCaption):  # training replaces such a sample, and `check-data` counts them
                captions[clean_caption(process, caption)] = None
    if len(captions) < 2:
        raise UserError(f"{name} has {len(captions)} captions; a language teacher needs at least 2.")
    return list(captions), config.model


def train_teacher(captions: Sequence[str], tokenizer: Any, max_length: int, recipe: Recipe) -> tuple[BertForMaskedLM, float]:
    """A BERT, and the share of masked words that it guesses right in captions that it was not trained on."""
    torch.manual_seed(recipe.seed)
    order = torch.randperm(len(captions)).tolist()
    held_out, trained = order[: max(1, len(order) // HELD_OUT)], order[max(1, len(order) // HELD_OUT) :]
    sizes = {"hidden_size": recipe.width, "intermediate_size": 4 * recipe.width}
    sizes |= {"num_hidden_layers": recipe.layers, "num_attention_heads": recipe.heads, "vocab_size": len(tokenizer)}
    model = BertForMaskedLM(BertConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).train()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    for _ in Bar(range(recipe.steps), desc="teacher", unit="step"):
        some = torch.randint(len(trained), (recipe.batch_size,)).tolist()
        logits, labels = _guess(model, [captions[trained[number]] for number in some], tokenizer, max_length)
        optimizer.zero_grad()
        masked_lm_loss(logits, labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), _share_guessed(model, [captions[number] for number in held_out], tokenizer, max_length, recipe.batch_size)


@torch.no_grad()
def _share_guessed(model: BertForMaskedLM, captions: list[str], tokenizer: Any, max_length: int, batch_size: int) -> float:
    right = asked = 0
    for start in Bar(range(0, len(captions), batch_size), desc="captions held out", unit="batch", delay=1):
        logits, labels = _guess(model, captions[start : start + batch_size], tokenizer, max_length)
        right, asked = right + int((logits.argmax(dim=1) == labels).sum()), asked + len(labels)
    return right / max(1, asked)


def _guess(model: BertForMaskedLM, captions: list[str], tokenizer: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Captions with some words masked -> logits [N, words] of these words, and LongTensor[N] what they were."""
    ids, mask = tokenize(tokenizer, captions, max_length)
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    masked, labels = mask_tokens(ids, MASKED, tokenizer.mask_token_id, len(tokenizer), special)
    states = model.bert(masked, attention_mask=mask.long()).last_hidden_state
    chosen = labels != IGNORED
    return model.cls(states[chosen]), labels[chosen]


def make_teacher(name: str, options: list[str], folder: Path, recipe: Recipe) -> tuple[int, float]:
    """Train on the captions of a YAML and write a folder for ``model.language_teacher.init``, whole or not at all.

    Returns:
        How many captions there are, and the share of masked words that it guesses right in those held out.
    """
    if recipe.width % recipe.heads:
        raise UserError(f"--width is {recipe.width}, but must be a multiple of --heads ({recipe.heads}).")
    captions, model = read_captions(name, options)
    if "tokenizer" not in model:
        raise UserError(f"model.arch is {model.arch}, which has no tokenizer of BERT's, and asks no language teacher.")
    tokenizer = build_tokenizer(model.tokenizer)
    teacher, share = train_teacher(captions, tokenizer, model.max_text_length, recipe)
    with built_folder(folder) as partial:
        teacher.save_pretrained(partial)
        tokenizer.save_vocabulary(str(partial))
    return len(captions), share
