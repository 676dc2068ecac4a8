"""What transformers' generation, and LAVIS's methods, ask of our Q-Former."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.beam_search import BeamHypotheses
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lavis_mafa.models.qformer import QueryBert, together
from lavis_mafa.models.transformer import BertWithHead, Grid, KeysValues, Reading


class GeneratedLengths:
    """Mixin, before a transformers model that generates: a line of n generated tokens scores (sum of log p) / n ^ length_penalty.

    transformers 4.26 counts the prompt and its padding too; BLIP-2's reference, which gives the prompt as embeddings, does not. The end
    token does not count; an empty line counts as one token.
    """

    @staticmethod
    def _expand_inputs_for_generation(
        expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """A row a beam or sample. Which of the other inputs transformers repeats depends on its version: here it is all."""
        assert input_ids is not None
        of_row = {name: value for name, value in given.items() if isinstance(value, Tensor) and len(value) == len(input_ids)}
        repeated = {name: value.repeat_interleave(expand_size, dim=0) for name, value in of_row.items() if name != "cache_position"}
        return input_ids.repeat_interleave(expand_size, dim=0), {**given, **repeated}

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


class LavisBert(QueryBert):
    """Called as LAVIS calls its own."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPast:
        """Queries alone, a text alone, or both together; images [B, N, width] have no padding.

        ``last_hidden_state``: [B, Q, width], or [B, T, width] of texts alone. Of queries and text together LAVIS reads the queries'.
        """
        images = None if encoder_hidden_states is None else self.keys_values(encoder_hidden_states)
        if input_ids is None:
            assert query_embeds is not None and images is not None, "queries without an image"
            return BaseModelOutputWithPast(self.look(query_embeds, images)[0])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        every = torch.arange(len(input_ids), device=input_ids.device)
        if query_embeds is None:
            states = self.read(input_ids, Reading.padded(mask.bool(), every)).view(*input_ids.shape, -1)
        else:
            assert images is not None, "queries without an image"
            reading = together(mask.bool(), query_embeds.shape[1], input_ids.device, every, every)
            states = self.match(query_embeds, input_ids, reading, images)
        return BaseModelOutputWithPast(states)


class SpeakingQFormer(GeneratedLengths, GenerationMixin, BertWithHead):
    """A Q-Former with its head, whose beam search does not count [DEC]."""

    main_input_name = "input_ids"
    _supports_cache_class = False  # asked by transformers 4.36 and later
    bert: LavisBert

    def __init__(self, words: int, width: int, *sizes: Any) -> None:
        super().__init__(LavisBert(words, width, *sizes))
        self.config = BertConfig(vocab_size=words, hidden_size=width)
        self.generation_config = GenerationConfig.from_model_config(self.config)

    @property
    def device(self) -> torch.device:
        return self.bert.embeddings.LayerNorm.weight.device

    def can_generate(self) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KeysValues | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Words LongTensor[B, T] that follow images' queries, or ``past_key_values`` -> logits [B, T, words]."""
        bert, (count, width) = self.bert, input_ids.shape
        before = past_key_values or bert.look(query_embeds, bert.keys_values(encoder_hidden_states))[1]
        done = before[0][0].shape[1] - query_embeds.shape[1]
        positions = torch.arange(done, done + width, device=input_ids.device).repeat(count)
        states, after = bert.follow(bert.embeddings(input_ids.flatten(), positions), Grid(count, width), before)
        return CausalLMOutputWithPast(logits=self.cls(states).view(count, width, -1), past_key_values=after)

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values: KeysValues | None = None, **kwargs: Any) -> Any:
        return {**kwargs, "input_ids": input_ids if past_key_values is None else input_ids[:, -1:], "past_key_values": past_key_values}

    def _reorder_cache(self, past: KeysValues, beams: Tensor) -> KeysValues:
        return [(keys.index_select(0, beams), values.index_select(0, beams)) for keys, values in past]
