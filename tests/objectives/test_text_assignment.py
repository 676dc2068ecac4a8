"""Text assignment against the loop of the paper's authors, and what it draws against the probabilities that it should."""

from __future__ import annotations

import pytest
import torch

from lavis_mafa.objectives import assign_texts
from lavis_mafa.objectives.mining import sampling_scores

SIMILARITY = torch.tensor([[1.0, 0.1, 0.0, -0.1], [0.1, 1.0, 0.2, 0.05], [0.0, 0.2, 1.0, 0.15], [-0.1, 0.05, 0.15, 1.0]])


@pytest.mark.parametrize("seed", range(5))
def test_images_and_labels_are_those_of_the_loop(seed):
    torch.manual_seed(seed)
    assigned = assign_texts(SIMILARITY)
    torch.manual_seed(seed)
    scores = sampling_scores(SIMILARITY, 0.07, "sampled")
    labels = torch.randint(3, (4,))
    for text, label in enumerate(labels.tolist()):
        other, another = sorted((j for j in range(4) if j != text), key=lambda j: -scores[text, j])[:2]
        first, second = {0: (text, other), 1: (other, text), 2: (other, another)}[label]
        assert (assigned.first[text], assigned.second[text], assigned.label[text]) == (first, second, label)


def test_others_are_drawn_by_their_similarity_and_labels_evenly():
    torch.manual_seed(0)
    rounds = 4000
    drawn = [assign_texts(SIMILARITY) for _ in range(rounds)]
    first, second, label = (torch.stack([getattr(a, name) for a in drawn]) for name in ("first", "second", "label"))
    other = torch.where(label == 0, second, first)  # the one that is drawn first
    expected = (SIMILARITY / 0.07).fill_diagonal_(float("-inf")).softmax(dim=1)
    for text in range(4):
        torch.testing.assert_close(other[:, text].bincount(minlength=4) / rounds, expected[text], atol=0.03, rtol=0)
        torch.testing.assert_close(label[:, text].bincount() / rounds, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    neither = label == 2
    own = torch.arange(4).expand_as(label)
    assert ((first != second) & ((first == own) == (label == 0)) & ((second == own) == (label == 1))).all()
    # the second of two others: without replacement
    left = expected[0].clone()
    chances = sum(left[j] * left / (1 - left[j]) * (torch.arange(4) != j) for j in (1, 2, 3))
    torch.testing.assert_close(second[neither[:, 0], 0].bincount(minlength=4) / neither[:, 0].sum(), chances, atol=0.04, rtol=0)


def test_two_images_are_too_few():
    with pytest.raises(ValueError, match="at least three images"):
        assign_texts(torch.eye(2))
