"""ViLTA's synthetic hard negatives: a text with one word replaced by another that would fit (ViLTA section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_place(eligible: Tensor) -> Tensor:
    """BoolTensor[B, T] -> LongTensor[B]: one of each text's eligible places, any as probable as another; -1 where there is none."""
    noise = torch.rand(eligible.shape, device=eligible.device).masked_fill(~eligible, -1.0)
    return torch.where(eligible.any(dim=1), noise.argmax(dim=1), -1)


def replacements(masked: Tensor, whole: Tensor, original: Tensor, allowed: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The words that may stand in place of one, and how probable each is: ``p_n = p_m / q``, normalised.

    p_m is high for words that fit the rest of the text, and q, of a model that has seen the word, for the word and its synonyms. The
    quotient is unbounded (of a word with q = 1e-12 it wins), so that only the ``top_k`` words by p_m come into question.

    Args:
        masked: [B, V] logits of a language model at the place, whose word is masked (p_m).
        whole: [B, V] the same where it sees the word (q).
        original: LongTensor[B] the word, which is never drawn.
        allowed: BoolTensor[V] words that may be drawn, at least ``top_k`` + 1 of them.
        top_k: how many of them come into question.

    Returns:
        words LongTensor[B, top_k]; probabilities [B, top_k] in fp32.

    Example:
        >>> fits, allowed = torch.tensor([[0.0, 3.0, 2.0, 1.0]]), torch.tensor([False, True, True, True])
        >>> words, probability = replacements(fits, torch.zeros(1, 4), torch.tensor([1]), allowed, top_k=2)
        >>> words.tolist(), probability.argmax().item()
        ([[2, 3]], 0)
    """
    fits, known = F.log_softmax(masked.float(), dim=1), F.log_softmax(whole.float(), dim=1)
    open_to = allowed.expand_as(fits).scatter(1, original[:, None], False)
    best, words = fits.masked_fill(~open_to, float("-inf")).topk(top_k, dim=1)
    return words, F.softmax(best - known.gather(1, words), dim=1)


def draw(words: Tensor, probability: Tensor) -> Tensor:
    """[B, k] each -> LongTensor[B], one word of each row. Of probabilities that are NaN it draws any, and raises nothing."""
    first = (probability / torch.empty_like(probability).exponential_()).argmax(dim=1, keepdim=True)
    return words.gather(1, first).flatten()
