"""Answering questions as ALBEF does (section 5): answers are learned word by word, and told by ranking a list of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def answer_loss(
    logits: Tensor, words: Tensor, weights: Tensor, questions: int, teacher_logits: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """``1/B sum_b sum_a w_ba * sum_t -log p(a_t | a_<t, question, image)``: each answer by the share of the people who gave it.

    With a teacher, its predictions are ``alpha`` of each word's target (ALBEF section 3.4). Labels are not smoothed.

    Args:
        logits: [N, V] of all answers' words. words: LongTensor[N] which they are. weights: [N] of the answer that each belongs to.
        questions: B.
        teacher_logits: [N, V] of the momentum model, or None.

    Returns:
        Tensor[]; without a word 0 with a graph.

    Example:
        >>> import torch
        >>> loss = answer_loss(torch.zeros(3, 4), torch.tensor([1, 2, 0]), torch.tensor([1.0, 0.5, 0.5]), questions=2)
        >>> round(loss.item(), 3)  # log 4, and half of it twice, of two questions
        1.386
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    losses = F.nll_loss(log_p, words, reduction="none")
    if teacher_logits is not None:
        losses = (1 - alpha) * losses - alpha * (F.softmax(teacher_logits.float(), dim=1) * log_p).sum(dim=1)
    return (weights * losses).sum() / questions


def rank_answers(first_logits: Tensor, first_words: Tensor, candidates: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The likeliest of A answers to each of B questions. Those whose first word is likeliest are scored as a whole.

    With ``candidates = A`` it is the likeliest of all. Of answers with one first word, any may be left out at the border.

    Args:
        first_logits: [B, V] of the first word of an answer.
        first_words: LongTensor[A], of the answers.
        candidates: k, how many are scored; 1 to A.
        score: LongTensor[B, k], answers to each question -> [B, k] their log-likelihoods.

    Returns:
        LongTensor[B]

    Raises:
        ValueError: ``candidates`` is outside 1 to A.

    Example:
        >>> import torch
        >>> likelihood = torch.tensor([[-3.0, -1.0, -2.0]])
        >>> rank_answers(torch.tensor([[0.5, 0.1, 0.4]]), torch.tensor([0, 1, 2]), 2, lambda which: likelihood.gather(1, which))
        tensor([2])
    """
    if not 1 <= candidates <= len(first_words):
        raise ValueError(f"candidates is {candidates}; needed: 1 to {len(first_words)}, the number of answers")
    chosen = first_logits.float().index_select(1, first_words).topk(candidates, dim=1).indices
    best: Tensor = score(chosen).argmax(dim=1, keepdim=True)
    return chosen.gather(1, best).squeeze(1)
