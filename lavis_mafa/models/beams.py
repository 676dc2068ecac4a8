"""Beam search whose ``length_penalty`` counts what was generated. transformers 4.26 counts the prompt and its padding too."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.beam_search import BeamHypotheses


class GeneratedLengths:
    """Mixin, before a transformers model that generates: a line of n generated tokens scores (sum of log p) / n ^ length_penalty.

    So does BLIP-2's reference, which gives the prompt as embeddings. The end token does not count; an empty line counts as one token.
    """

    def beam_search(self, input_ids: Tensor, beam_scorer: Any, *args: Any, **kwargs: Any) -> Any:
        beam_scorer._beam_hyps = [_Lines(given, before=input_ids.shape[1]) for given in beam_scorer._beam_hyps]
        return super().beam_search(input_ids, beam_scorer, *args, **kwargs)  # type: ignore[misc]


class _Lines(BeamHypotheses):
    """The finished lines of one sample, ``before`` tokens of each given."""

    def __init__(self, like: BeamHypotheses, before: int) -> None:
        super().__init__(like.num_beams, like.length_penalty, like.early_stopping)
        self.before = before

    def add(self, hyp: Tensor, sum_logprobs: float, beam_indices: Tensor | None = None) -> None:
        # the base class divides by its whole length to the same power
        scale = len(hyp) / max(1, len(hyp) - self.before)
        super().add(hyp, sum_logprobs * scale**self.length_penalty, beam_indices)

    def is_done(self, best_sum_logprobs: float, cur_len: int) -> bool:
        return super().is_done(best_sum_logprobs, max(1, cur_len - self.before))
