"""Writing token by token, against all lines there can be of a language model of four words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis_mafa.models.generation import Writing, write

WORDS, END = 4, 3
PROMPTS = torch.tensor([[0, 1], [2, 2], [1, 0]])


class Memory:
    """Its logits are random numbers that all it has read decides."""

    def __init__(self) -> None:
        self.texts = torch.zeros(len(PROMPTS), 0, dtype=torch.long)

    def read(self, ids: Tensor) -> Tensor:
        self.texts = torch.cat([self.texts, ids], dim=1)
        return torch.stack([logits(text) for text in self.texts.tolist()])

    def take(self, rows: Tensor) -> None:
        self.texts = self.texts[rows]


def logits(text: list[int]) -> Tensor:
    return 2 * torch.randn(WORDS, generator=torch.Generator().manual_seed(hash(tuple(text)) % 2**31))


def written(**how: Any) -> list[list[int]]:
    return write(Memory(), PROMPTS, Writing(**{"longest": 4, "end": END, **how}))


def every_line(prompt: list[int], longest: int, shortest: int) -> list[tuple[float, list[int]]]:
    """(log probability, line) of each line that ends, or is as long as may be."""
    lines = []
    for length in range(longest + 1):
        for words in itertools.product(range(END), repeat=length):
            total, text = 0.0, list(prompt)
            for place, token in enumerate([*words, END] if length < longest else words):
                scores = logits(text).log_softmax(dim=0)
                if place < shortest:
                    scores[END] = -torch.inf
                total, text = total + float(scores[token]), [*text, token]
            if total > -torch.inf:
                lines.append((total, list(words)))
    return lines


@pytest.mark.parametrize(("penalty", "shortest"), [(0.0, 0), (1.0, 0), (-1.0, 2), (2.0, 1)])
def test_enough_beams_find_the_best_lines(penalty, shortest):
    found = written(beams=81, lines=3, longest=3, shortest=shortest, length_penalty=penalty)
    for number, prompt in enumerate(PROMPTS.tolist()):
        lines = every_line(prompt, 3, shortest)
        best = sorted(lines, key=lambda line: -line[0] / max(1, len(line[1])) ** penalty)[:3]
        assert found[3 * number : 3 * number + 3] == [line for _, line in best]


def test_one_beam_writes_the_most_probable_words():
    for line, prompt in zip(written(longest=6, repetition_penalty=1.3), PROMPTS.tolist(), strict=True):
        text = list(prompt)
        for _ in range(6):
            scores = logits(text)
            for word in set(text):
                scores[word] = scores[word] / 1.3 if scores[word] > 0 else scores[word] * 1.3
            text.append(int(scores.argmax()))
            if text[-1] == END:
                break
        assert line == [word for word in text[len(prompt) :] if word != END]


def test_sampled_words_are_among_the_most_probable():
    torch.manual_seed(0)
    lines = written(sampled=True, lines=50, top_p=0.6, temperature=0.8, shortest=1)
    assert len(lines) == 150 and len({tuple(line) for line in lines}) > 3
    for number, line in enumerate(lines):
        text = PROMPTS[number // 50].tolist()
        assert 1 <= len(line) <= 4
        for place, word in enumerate([*line, END] if len(line) < 4 else line):
            scores = logits(text) / 0.8
            if place == 0:
                scores[END] = -torch.inf
            likely, order = scores.softmax(dim=0).sort(descending=True)
            rank = order.tolist().index(word)
            assert likely[:rank].sum() < 0.6
            text.append(word)
