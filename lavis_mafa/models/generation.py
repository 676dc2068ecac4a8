"""How texts are written token by token: the most probable, sampled, or searched for with beams.

Releases of transformers differ in how they end and score the lines of a beam search, and from 4.50 on generate with none of LAVIS's
models. Here it is the way of 4.26, LAVIS's own release, on every one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

MOST_PROBABLE = 50  # words that are sampled from, whatever top_p: transformers' default
NEVER = -1e9


class Reader(Protocol):
    """A language model that remembers what it has read of R texts."""

    def read(self, ids: Tensor) -> Tensor:
        """LongTensor[R, T] that follow what was read -> logits [R, words] of what comes next."""

    def take(self, rows: Tensor) -> None:
        """Go on with these of the R texts, LongTensor[R']."""


@dataclass(frozen=True)
class Writing:
    """How to write: as BLIP-2's ``generate`` is asked, lengths counted without prompt and end."""

    longest: int
    end: int  # the token that ends a line, and is not part of it
    shortest: int = 0
    beams: int = 1
    lines: int = 1  # a prompt; searched for with at least as many beams, or sampled
    sampled: bool = False
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0


def write(reader: Reader, prompts: Tensor, how: Writing) -> list[list[int]]:
    """The tokens that follow each of B prompts: B x ``lines`` lists, those of a prompt one after another.

    A line of n tokens scores (sum of log p) / n ^ length_penalty; an empty one counts as one token.

    Args:
        prompts: LongTensor[B, T], padded on the left, of texts that the reader has not read.
    """
    searched = how.beams > 1 and not how.sampled
    logits = reader.read(prompts)
    rows = torch.arange(len(prompts), device=prompts.device).repeat_interleave(how.beams if searched else how.lines)
    reader.take(rows)
    return (_search if searched else _follow)(reader, prompts[rows], logits[rows], how)


def _follow(reader: Reader, texts: Tensor, logits: Tensor, how: Writing) -> list[list[int]]:
    """One line a row, of the most probable or of sampled tokens."""
    first, going = texts.shape[1], torch.ones(len(texts), dtype=torch.bool, device=texts.device)
    while True:
        scores = _adjusted(logits.float(), texts, texts.shape[1] - first, how)
        tokens = scores.softmax(dim=-1).multinomial(1)[:, 0] if how.sampled else scores.argmax(dim=-1)
        texts = torch.cat([texts, tokens.masked_fill(~going, how.end)[:, None]], dim=1)
        going = going & (tokens != how.end)
        if texts.shape[1] - first == how.longest or not going.any():
            lines = texts[:, first:].tolist()
            return [line[: line.index(how.end)] if how.end in line else line for line in lines]
        logits = reader.read(texts[:, -1:])


@dataclass
class _Lines:
    """The best lines of one prompt that have ended, as many as there are beams."""

    how: Writing
    best: list[tuple[float, list[int]]] = field(default_factory=list)
    complete: bool = False

    def add(self, score: float, line: list[int]) -> None:
        self.best.append((self.scored(score, len(line)), line))
        self.best = sorted(self.best, key=lambda one: -one[0])[: self.how.beams]

    def scored(self, score: float, length: int) -> float:
        return score / max(1, length) ** self.how.length_penalty


def _search(reader: Reader, texts: Tensor, logits: Tensor, how: Writing) -> list[list[int]]:
    """The best of the lines that ``beams`` texts a prompt lead to."""
    beams, first = how.beams, texts.shape[1]
    ended = [_Lines(how) for _ in range(len(texts) // beams)]
    sums = logits.new_full((len(ended), beams), NEVER, dtype=torch.float32)
    sums[:, 0] = 0.0  # until they differ, one of a prompt's texts speaks for all
    for length in range(how.longest):
        if length:
            logits = reader.read(texts[:, -1:])
        scores = _adjusted(logits.float().log_softmax(dim=-1), texts, length, how) + sums.view(-1, 1)
        best, places = scores.view(len(ended), -1).topk(2 * beams)
        written, rows, tokens, totals = texts[:, first:].tolist(), list[int](), list[int](), list[float]()
        for number, lines in enumerate(ended):
            chosen = list(zip(best[number].tolist(), places[number].tolist(), strict=True))
            of_prompt = [(total, number * beams + place // scores.shape[1], place % scores.shape[1]) for total, place in chosen]
            going = [one for one in of_prompt if one[2] != how.end][:beams]
            if not lines.complete:
                for total, row, token in of_prompt[:beams]:
                    if token == how.end:
                        lines.add(total, written[row])
                can_improve = len(lines.best) < beams or lines.best[-1][0] < lines.scored(chosen[0][0], length)
                lines.complete = not can_improve
            totals += [total for total, _, _ in going]
            rows += [row for _, row, _ in going]
            tokens += [token for _, _, token in going]
        index = torch.tensor(rows, device=texts.device)
        texts = torch.cat([texts[index], torch.tensor(tokens, device=texts.device)[:, None]], dim=1)
        sums = torch.tensor(totals, device=texts.device).view(len(ended), beams)
        if all(lines.complete for lines in ended):
            break
        reader.take(index)
    written = texts[:, first:].tolist()
    for number, lines in enumerate(ended):
        if not lines.complete:
            for row, total in enumerate(sums[number].tolist(), start=number * beams):
                lines.add(total, written[row])
    return [line for lines in ended for _, line in lines.best[: how.lines]]


def _adjusted(scores: Tensor, texts: Tensor, length: int, how: Writing) -> Tensor:
    """Logits or log probabilities [R, words] of what follows ``texts``, ``length`` tokens of which are written."""
    rules = LogitsProcessorList()
    if how.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    if length < how.shortest:
        scores = scores.index_fill(1, torch.tensor([how.end], device=scores.device), -torch.inf)
    if how.sampled:
        rules.append(TemperatureLogitsWarper(float(how.temperature)))
        rules.append(TopKLogitsWarper(min(MOST_PROBABLE, scores.shape[1])))
        rules.append(TopPLogitsWarper(how.top_p))
    return rules(texts, scores)
