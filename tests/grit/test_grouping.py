"""The similarity chain against a naive walk written from GRIT-VLP, eq. 5."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_mafa.grit import group_by_similarity, group_sub_queues, grouping


def walk(image: Tensor, text: Tensor, start: int) -> list[int]:
    """Eq. 5 word by word: look from the current image for a text, then from the current text for an image, and so on."""
    visited, from_image = [start], True
    while len(visited) < len(image):
        anchor, others = (image[visited[-1]], text) if from_image else (text[visited[-1]], image)
        best, best_score = -1, float("-inf")
        for row in range(len(image)):
            score = float(torch.dot(anchor.double(), others[row].double()))
            if row not in visited and score > best_score:
                best, best_score = row, score
        visited.append(best)
        from_image = not from_image
    return visited


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@st.composite
def integer_queue(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Small whole numbers: sums are exact in any order and ties are frequent."""
    size, dim = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(-2, 2), min_size=2 * size * dim, max_size=2 * size * dim))
    image, text = torch.tensor(numbers, dtype=torch.float32).view(2, size, dim)
    return image, text, draw(st.integers(0, size - 1))


@settings(deadline=None)
@given(integer_queue(), st.sampled_from(["matrix", "rows"]))
def test_equals_the_walk_of_the_paper_ties_included(queue, memory):
    image, text, start = queue
    assert group_by_similarity(image, text, start, memory=memory).tolist() == walk(image, text, start)


@pytest.mark.parametrize("memory", ["matrix", "rows"])
def test_equals_the_walk_of_the_paper_on_real_features(memory):
    image, text = unit(150, 16, seed=1), unit(150, 16, seed=2)
    for start in (0, 77, 149):
        assert group_by_similarity(image, text, start, memory=memory).tolist() == walk(image, text, start)


def test_first_hop_goes_from_image_to_text():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert group_by_similarity(image, text, 0).tolist() == [0, 1, 2]  # image 0 is like text 1
    assert group_by_similarity(text, image, 0).tolist() == [0, 2, 1]  # text 0 is like image 2


def test_ties_go_to_the_lowest_row():
    ones = torch.ones(7, 3)
    assert group_by_similarity(ones, ones, 4).tolist() == [4, 0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("memory", ["matrix", "rows"])
@pytest.mark.parametrize("temperature", [1.0, 0.001])
def test_no_sample_is_lost_or_repeated_where_a_softmax_would_underflow(memory, temperature):
    # Tight clusters: softmax(similarity / 0.001) is exactly 0 outside the own cluster, as if every other sample were visited.
    centres = unit(12, 32, seed=3)
    cluster = torch.arange(240) % 12
    image, text = centres[cluster] + 0.01 * unit(240, 32, seed=4), centres[cluster] + 0.01 * unit(240, 32, seed=5)
    assert (torch.softmax(image @ text.T / 0.001, dim=1) == 0).any()
    order = group_by_similarity(image / temperature, text, 17, memory=memory)
    assert order[0] == 17
    assert order.sort().values.tolist() == list(range(240))


@pytest.mark.parametrize("memory", ["matrix", "rows"])
def test_batched_equals_single(memory, monkeypatch):
    image, text, start = unit(5, 61, 8, seed=6), unit(5, 61, 8, seed=7), torch.tensor([0, 60, 3, 3, 9])
    single = [group_by_similarity(image[q], text[q], int(start[q])) for q in range(5)]
    assert torch.equal(group_sub_queues(image, text, start, memory=memory), torch.stack(single))
    monkeypatch.setattr(grouping, "MATRIX_BUDGET", 2 * 2 * 61 * 61)  # two sub-queues at a time, the last alone
    assert torch.equal(group_sub_queues(image, text, start, memory=memory), torch.stack(single))


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 300])
def test_rows_equals_matrix_through_every_shrinking(size, monkeypatch):
    monkeypatch.setattr(grouping, "SMALLEST_TO_SHRINK", 4)
    image, text = unit(size, 16, seed=8), unit(size, 16, seed=9)
    for start in {0, size // 2, size - 1}:
        rows = group_by_similarity(image, text, start, memory="rows")
        assert torch.equal(rows, group_by_similarity(image, text, start, memory="matrix"))


def test_rows_equals_matrix_beyond_the_first_shrinking():
    size = 2 * grouping.SMALLEST_TO_SHRINK + 1
    image, text = unit(size, 32, seed=10), unit(size, 32, seed=11)
    assert torch.equal(group_by_similarity(image, text, 5, memory="rows"), group_by_similarity(image, text, 5))


@pytest.mark.parametrize("memory", ["matrix", "rows"])
def test_empty_and_single(memory):
    assert group_by_similarity(torch.empty(0, 4), torch.empty(0, 4), memory=memory).tolist() == []
    assert group_by_similarity(torch.ones(1, 4), torch.ones(1, 4), memory=memory).tolist() == [0]
    assert group_sub_queues(torch.empty(0, 3, 4), torch.empty(0, 3, 4), torch.empty(0).long(), memory=memory).shape == (0, 3)
    assert group_sub_queues(torch.empty(2, 0, 4), torch.empty(2, 0, 4), torch.zeros(2).long(), memory=memory).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_fp32(dtype):
    image, text = unit(80, 16, seed=12).to(dtype), unit(80, 16, seed=13).to(dtype)
    expected = group_by_similarity(image.float(), text.float(), 3)
    assert expected.dtype == torch.long
    assert torch.equal(group_by_similarity(image, text, 3), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_by_similarity(image, text, 3), expected)


def test_features_with_gradients_are_accepted_and_left_alone():
    image = unit(9, 4).requires_grad_()
    before = image.detach().clone()
    assert not group_by_similarity(image, image, 0).requires_grad
    assert torch.equal(image.detach(), before)


def test_non_finite_features_are_named():
    image, text = unit(6, 4), unit(6, 4)
    image[2, 1], image[5, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"image_features is not finite in 2 of its rows: 2, 5\."):
        group_by_similarity(image, text)
    with pytest.raises(ValueError, match=r"text_features is not finite in 2 of its rows: \(1, 2\), \(1, 5\)\."):
        group_sub_queues(torch.stack([text, text]), torch.stack([text, image]), torch.tensor([0, 0]))


@pytest.mark.parametrize("value", [1e20, 1.4e19], ids=["a product", "the sum of two"])
def test_overflowing_similarities_are_refused(value):
    with pytest.raises(ValueError, match="too large for fp32"):
        group_by_similarity(torch.full((3, 2), value), torch.full((3, 2), -value))


@pytest.mark.parametrize("start", [-1, 6])
def test_start_must_be_a_row(start):
    with pytest.raises(ValueError, match=f"start is {start}, but must be a row .* < 6"):
        group_by_similarity(unit(6, 4), unit(6, 4), start)
    with pytest.raises(ValueError, match="each must be a row of its sub-queue"):
        group_sub_queues(unit(2, 6, 4), unit(2, 6, 4), torch.tensor([0, start]))


def test_shapes_and_ways_are_checked():
    with pytest.raises(ValueError, match=r"image_features is \[6, 4\] and text_features is \[5, 4\]"):
        group_by_similarity(unit(6, 4), unit(5, 4))
    with pytest.raises(ValueError, match=r"one \[Q, M, d\]"):
        group_sub_queues(unit(6, 4), unit(6, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"one row number per sub-queue: \[2\]"):
        group_sub_queues(unit(2, 6, 4), unit(2, 6, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="floating dtype"):
        group_by_similarity(torch.ones(2, 2).long(), torch.ones(2, 2).long())
    with pytest.raises(ValueError, match="'matrix' or 'rows'"):
        group_by_similarity(unit(6, 4), unit(6, 4), memory="disk")  # type: ignore[arg-type]
