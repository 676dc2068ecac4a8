"""``albef_vqa_mafa``: ALBEF answers questions (ALBEF section 5, VQA2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutput
from torch import Tensor

from lavis_mafa.config.schema import AlbefVqaBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.downstream import NOW, AlbefDownstream
from lavis_mafa.models.encoders import tokenize
from lavis_mafa.models.step import check_lengths, check_samples, checked_answers
from lavis_mafa.models.transformer import POSITIONS, Bert, BertWithHead, Reading, lengths_of, on_device
from lavis_mafa.objectives import answer_loss, ramp_up, rank_answers

logger = logging.getLogger(__name__)
CANDIDATES = 128  # answers that are scored as a whole (ALBEF section 5)
WORDS_AT_ONCE = 2048  # whose logits are in memory while answers are scored


class AlbefVqaMafa(AlbefDownstream[AlbefVqaBlock]):
    """Answers to questions about images, by a decoder over the states of the question that the fusion layers read with its image.

    The decoder has as many layers as there are fusion layers, and starts as these: self-attention becomes causal, cross-attention looks
    at the question in place of the image. Its loss is :func:`lavis_mafa.objectives.answer_loss`. With ``momentum_distillation`` it is
    that of LAVIS's ``albef_vqa`` without label smoothing, alpha ramped up within the first epoch.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_vqa_mafa", "tiny")
        >>> samples = {"image": torch.zeros(1, 3, 48, 48), "text_input": ["what is left of the dog?"]}
        >>> model.predict_answers(samples, answer_list=["cat"])
        ['cat']
    """

    heads = ("text_decoder",)
    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_vqa_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    text_decoder: Any

    def __init__(self, settings: AlbefVqaBlock) -> None:
        super().__init__(settings)
        text = settings.text_encoder
        layers = text.layers - text.fusion_layer
        bert = Bert(len(self.tokenizer), text.width, layers, text.heads, image_width=text.width, dropout=text.dropout)
        self.text_decoder = BertWithHead(bert)
        self._ranked: tuple[list[str], Tensor, Tensor] = ([], torch.empty(0), torch.empty(0))
        self._add_teacher()

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a decoder made of the fusion layers, where a checkpoint of pre-training has none."""
        if not any(name.startswith("text_decoder.") for name in state):
            logger.info("text_decoder starts as the fusion layers: the checkpoint is of pre-training.")
            state = {**state, **decoder_of(state, self.settings.text_encoder.fusion_layer)}
        return super().own_weights(state)

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, samples: dict[str, Any]) -> AlbefOutput:
        """The loss of samples as LAVIS's VQA sets have them.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` (B questions), ``answer`` (A texts), ``n_answers`` LongTensor[B] (default:
                one each) and ``weight`` [A] (default: 1).

        Raises:
            UserError: samples that do not go together.
        """
        samples = self._checked(samples)
        answers, weights, question_of = checked_answers(samples)
        ids, mask = self.answer_words(answers)
        answer_of = [answer for answer, length in enumerate(lengths_of(mask)) for _ in range(length - 1)]
        weights = on_device(weights, self.device).index_select(0, on_device(answer_of, self.device))
        logits, words = self.logits(samples, ids, mask, question_of)
        teacher, alpha = None, 0.0
        if (distillation := self.settings.momentum_distillation) is not None:
            alpha = ramp_up(distillation.alpha, *(samples.get(name, default) for name, default in NOW))
            with torch.no_grad():
                self._move_teacher(samples)
                teacher, _ = self.logits(samples, ids, mask, question_of, "_m")
        return AlbefOutput(loss=answer_loss(logits, words, weights, len(samples["text_input"]), teacher, alpha))

    def logits(self, samples: dict[str, Any], ids: Tensor, mask: Tensor, question_of: Tensor, whose: str = "") -> tuple[Tensor, Tensor]:
        """[N, V] of all answers' words but their first, and LongTensor[N], which they are; ``whose``: ``_m`` for the teacher's."""
        decoder = getattr(self, f"text_decoder{whose}")
        states, words = self._followed(decoder, *self.question_states(samples, whose), ids, mask, question_of)
        return decoder.cls(states), words

    def question_states(self, samples: dict[str, Any], whose: str = "") -> tuple[Tensor, Tensor]:
        """[B, T, width] of the questions, each read with its image, and BoolTensor[B, T] on the host, where there is a word."""
        visual_encoder, text_encoder = (getattr(self, f"{part}{whose}") for part in ("visual_encoder", "text_encoder"))
        ids, mask = self.words(samples["text_input"])
        pairs = torch.arange(len(ids))
        reading = Reading.of(mask, self.device, pairs, pairs, len(ids))
        images = text_encoder.keys_values(visual_encoder.forward_features(samples["image"]))
        return reading.tokens.texts.spread(text_encoder.read(ids, reading, images=images)), mask

    def answer_words(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [A, T] on the host, from [CLS] to [SEP]."""
        return tokenize(self.tokenizer, list(answers), POSITIONS)

    def _followed(
        self, decoder: Any, questions: Tensor, seen: Tensor, ids: Tensor, mask: Tensor, question_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[N, width] states that another word of their answer follows, and LongTensor[N] these words."""
        reading = Reading.of(mask, self.device, torch.arange(len(ids)), question_of, len(questions)).over(seen)
        states = decoder.bert.read(ids, reading, images=decoder.bert.keys_values(questions), causal=True)
        followed = reading.followed()
        return states.index_select(0, followed), reading.take(ids).index_select(0, followed + 1)

    # --- answers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 1,
        inference_method: str = "rank",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = CANDIDATES,
        answer_list: Sequence[str] | None = None,
        **_: Any,
    ) -> list[str]:
        """B answers: of ``answer_list`` the likeliest, or free ones, word by word (``inference_method: generate``), each the likeliest.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` (B questions).
            num_beams: 1, where answers are generated; min_len, max_len: their words.
            num_ans_candidates: how many of the list are scored as a whole, see :func:`lavis_mafa.objectives.rank_answers`; all, where
                it is shorter.

        Raises:
            UserError: no list to rank, another ``inference_method``, or beams.
        """
        samples = self._checked(samples)
        if inference_method == "generate":
            check_lengths(min_len, max_len, num_beams)
            if num_beams != 1:
                raise UserError(f"num_beams is {num_beams}, but albef_vqa_mafa generates without beams; allowed: 1.")
            return self._generated(samples, min_len, max_len)
        if inference_method != "rank" or not answer_list:
            raise UserError(
                f"inference_method is {inference_method!r} and answer_list {answer_list!r:.60}; allowed: 'rank' with a list of "
                "texts, or 'generate'."
            )
        answers = list(answer_list)
        return [answers[best] for best in self._ranks(samples, answers, min(num_ans_candidates, len(answers))).tolist()]

    def _ranks(self, samples: dict[str, Any], answers: list[str], candidates: int) -> Tensor:
        if self._ranked[0] != answers:  # the same for all batches: cut into words once
            self._ranked = answers, *self.answer_words(answers)
        _, ids, mask = self._ranked
        questions, seen = self.question_states(samples)

        def log_likelihood(which: Tensor) -> Tensor:
            chosen = which.flatten().cpu()
            question_of = torch.arange(len(which)).repeat_interleave(candidates)
            its_mask = mask[chosen]
            states, words = self._followed(self.text_decoder, questions, seen, ids[chosen], its_mask, question_of)
            parts = zip(states.split(WORDS_AT_ONCE), words.split(WORDS_AT_ONCE), strict=True)
            log_p = torch.cat([self._log_p(*part) for part in parts])
            answer_of = [answer for answer, length in enumerate(lengths_of(its_mask)) for _ in range(length - 1)]
            return log_p.new_zeros(len(chosen)).index_add_(0, on_device(answer_of, self.device), log_p).view_as(which)

        first = self._next_logits(questions, seen, ids[:1, :1].expand(len(questions), 1))
        return rank_answers(first, on_device(ids[:, 1], self.device), candidates, log_likelihood)

    def _log_p(self, states: Tensor, words: Tensor) -> Tensor:
        """[N, width], LongTensor[N] -> [N]"""
        return -F.cross_entropy(self.text_decoder.cls(states).float(), words, reduction="none")

    def _next_logits(self, questions: Tensor, seen: Tensor, ids: Tensor) -> Tensor:
        """[B, V] of the word that follows LongTensor[B, n] on the host."""
        every = torch.arange(len(ids))
        reading = Reading.of(torch.ones_like(ids, dtype=torch.bool), self.device, every, every, len(ids)).over(seen)
        bert = self.text_decoder.bert
        states = bert.read(ids, reading, images=bert.keys_values(questions), causal=True)
        logits: Tensor = self.text_decoder.cls(states.view(*ids.shape, -1)[:, -1])
        return logits

    def _generated(self, samples: dict[str, Any], min_len: int, max_len: int) -> list[str]:
        questions, seen = self.question_states(samples)
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = torch.full((len(questions), 1), start, dtype=torch.long)
        done = torch.zeros(len(ids), dtype=torch.bool)
        while ids.shape[1] <= max_len and not done.all():
            logits = self._next_logits(questions, seen, ids)
            if ids.shape[1] <= min_len:
                logits[:, end] = float("-inf")
            words = logits.argmax(dim=1).cpu().masked_fill(done, end)
            ids, done = torch.cat([ids, words[:, None]], dim=1), done | (words == end)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _checked(self, samples: dict[str, Any]) -> dict[str, Any]:
        samples = check_samples(samples, self.settings.image_encoder.image_size, "image", "text_input")
        return {**samples, "image": samples["image"].to(self.device)}


def decoder_of(state: dict[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """What a decoder starts with, of a checkpoint of pre-training: embeddings, fusion layers and head."""
    encoder, decoder = "text_encoder.bert.encoder.layer.", "text_decoder.bert.encoder.layer."
    found = {}
    for name, value in state.items():
        if name.startswith(("text_encoder.bert.embeddings.", "text_encoder.cls.")):
            found[name.replace("text_encoder.", "text_decoder.", 1)] = value
        elif name.startswith(encoder):
            number, _, rest = name.removeprefix(encoder).partition(".")
            if int(number) >= fusion_layer:
                found[f"{decoder}{int(number) - fusion_layer}.{rest}"] = value
    return found
