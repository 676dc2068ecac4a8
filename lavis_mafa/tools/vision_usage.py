"""How much a model uses the image when it predicts words (GRIT-VLP section 5.6: usage of vision, UoV)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.datasets.indexed import seeded
from lavis_mafa.errors import UserError
from lavis_mafa.models.transformer import Reading, on_device
from lavis_mafa.objectives import mask_tokens
from lavis_mafa.objectives.lm import IGNORED

TOP = (1, 5)


@dataclass
class Usage:
    """Predicted words, and how many of them were right, by the image's presence and by top-k."""

    words: int = 0
    right: Tensor | None = None  # LongTensor[2, 2]: with and without the image, top 1 and top 5

    def add(self, with_image: Tensor, without: Tensor, words: Tensor) -> None:
        """Logits [N, V] of both passes, and LongTensor[N] what is to be predicted."""
        counts = torch.stack([_right(with_image, words), _right(without, words)])
        self.right = counts if self.right is None else self.right + counts
        self.words += len(words)

    def metrics(self) -> dict[str, float]:
        """``accuracy@k``, ``accuracy_without_image@k`` and their difference ``uov@k``.

        Raises:
            UserError: no word was to be predicted.
        """
        if self.words == 0 or self.right is None:
            raise UserError("no word was predicted; raise --max-samples, --passes or --mask-probability.")
        named: dict[str, float] = {}
        for k, seen, blind in zip(TOP, *(self.right.double() / self.words).tolist(), strict=True):
            named |= {f"accuracy@{k}": seen, f"accuracy_without_image@{k}": blind, f"uov@{k}": seen - blind}
        return named


def _right(logits: Tensor, words: Tensor) -> Tensor:
    found = logits.topk(max(TOP), dim=1).indices == words[:, None]
    return torch.stack([found[:, :k].any(dim=1).sum() for k in TOP]).cpu()


@torch.no_grad()
def masked_usage(
    model: Any, batches: Iterable[dict[str, Any]], probabilities: list[float], passes: int, seed: int
) -> dict[float, Usage]:
    """UoV of masked language modelling (``albef_mafa``), as GRIT-VLP measures it: the same words masked in both passes.

    Words are chosen and replaced as in training (80 % [MASK], 10 % random, 10 % kept), by a generator of (seed, pass, index) for
    each caption: a caption's masks depend neither on its batch nor on the device, and a larger probability masks more of the same.

    Args:
        batches: with ``image``, ``text_input`` and ``index``.
        probabilities: to mask with, one result each (GRIT-VLP Fig. 4).
        passes: how often each caption is masked anew.
    """
    usage = {probability: Usage() for probability in probabilities}
    for samples in batches:
        pairs = model.encode(model.inputs(samples)).pairs
        blind, own = without_image(pairs), torch.arange(len(pairs.text_ids))
        reading = Reading.of(pairs.text_mask, model.device, own, own, len(own))
        for probability in probabilities:
            for number in range(passes):
                ids, labels = _mask(model.tokenizer, pairs, samples["index"], probability, (seed, number))
                flat = labels.flatten().index_select(0, reading.rows)
                places = torch.nonzero(flat != IGNORED).flatten()
                words, chosen = reading.take(ids), reading.tokens_at(places)
                seen, unseen = (model.predict(model.text_encoder, words, reading, p.keys_values, chosen) for p in (pairs, blind))
                usage[probability].add(seen, unseen, on_device(flat.index_select(0, places), model.device))
    return usage


@torch.no_grad()
def next_word_usage(model: Any, batches: Iterable[dict[str, Any]]) -> Usage:
    """The same of language modelling (``blip_mafa``, ``blip2_mafa``): each token given those before it, with and without the image.

    GRIT-VLP defines UoV for masked words alone; this is its analogue. Every token but the first is predicted, so nothing is drawn.
    """
    usage = Usage()
    head = model.Qformer.cls if hasattr(model, "Qformer") else model.text_decoder.cls
    for samples in batches:
        pairs = model.encode(model.inputs(samples)).pairs
        words = on_device(pairs.text_ids[:, 1:][pairs.text_mask[:, 1:]], model.device)
        usage.add(_head_output(head, pairs), _head_output(head, without_image(pairs)), words)
    return usage


def without_image(pairs: Any) -> Any:
    """The same texts, every image's token states replaced by zeros.

    GRIT-VLP does not say what "without image input" is. With zeros every cross-attention adds the same constant whatever the
    image, so nothing of it is left, and all weights stay in use: dropping cross-attention would be another network. BLIP-2's
    queries look at the zeros, and the language model reads what they kept.
    """
    return replace(pairs, image_embeds=torch.zeros_like(pairs.image_embeds))


def _head_output(head: Any, pairs: Any) -> Tensor:
    """The logits [N, V] that the training loss is computed from, of all tokens that are predicted."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    try:
        own = torch.arange(len(pairs.text_ids))
        pairs.lm_loss(own, own)
    finally:
        handle.remove()
    return seen[0]


def _mask(tokenizer: Any, pairs: Any, index: Tensor, probability: float, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    ids = pairs.text_ids
    labels, special = torch.full_like(ids, IGNORED), [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    masked = ids.clone()
    for row, length in enumerate(pairs.text_mask.sum(dim=1).tolist()):
        with seeded(*seed, int(index[row])):
            masked[row, :length], labels[row, :length] = (
                t[0] for t in mask_tokens(ids[row : row + 1, :length], probability, tokenizer.mask_token_id, len(tokenizer), special)
            )
    return masked, labels


def format_usage(rows: dict[str, dict[str, float]]) -> str:
    """A line a setting: accuracy with and without the image, and their difference, in percent."""
    heads = [f"{what}@{k}" for k in TOP for what in ("with", "without", "UoV")]
    lines = [f"{'accuracy (%)':24}" + "".join(f"{head:>11}" for head in heads)]
    keys = [f"{what}@{k}" for k in TOP for what in ("accuracy", "accuracy_without_image", "uov")]
    return "\n".join(lines + [f"{name:24}" + "".join(f"{100 * row[key]:11.2f}" for key in keys) for name, row in rows.items()])
