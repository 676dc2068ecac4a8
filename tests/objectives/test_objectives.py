"""Every objective against its naive loop, in fp32 and bf16, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from lavis_mafa.objectives import (
    Connections,
    candidate_pairs,
    consistency_loss,
    distilled_targets,
    enqueue,
    itc_loss,
    itc_targets,
    itm_loss,
    itm_pairs,
    judge_connections,
    language_modelling_loss,
    mask_tokens,
    masked_lm_loss,
    mine_hard_negatives,
    ramp_up,
    sampling_scores,
    update_teacher,
    value_range,
)
from lavis_mafa.objectives.itm import itm_accuracy

DTYPES = [torch.float32, torch.bfloat16]  # of what comes in; losses are fp32 in any case, so that they are as exact


def random_batch(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sims = [(torch.rand(rows, columns, generator=generator) * 2 - 1).to(dtype) for _ in range(2)]
    known = torch.eye(rows, columns, dtype=torch.bool) | (torch.rand(rows, columns, generator=generator) < 0.2)
    return sims[0], sims[1], known


# --- mining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 7), extra=st.integers(0, 4), seed=st.integers(0, 999))
def test_hard_negatives_equal_the_loop(dtype, rows, extra, seed):
    i2t, t2i, known = random_batch(rows, rows + extra, seed, dtype)
    own = torch.eye(*known.shape, dtype=torch.bool)
    mined = mine_hard_negatives(i2t, t2i, known & ~own)  # the own pair is masked whether the caller says so or not
    expected = oracles.hard_negatives(i2t.tolist(), t2i.tolist(), (known | own).tolist())
    assert mined.text_for_image.tolist() == expected["text"]
    assert mined.text_for_image_2nd.tolist() == expected["text_2nd"]
    assert mined.image_for_text.tolist() == expected["image"]
    assert mined.image_for_text_2nd.tolist() == expected["image_2nd"]


def test_one_sample_has_no_candidate():
    mined = mine_hard_negatives(torch.ones(1, 1), torch.ones(1, 1))
    assert [mined.text_for_image.item(), mined.image_for_text_2nd.item()] == [-1, -1]


def test_two_samples_have_no_second_candidate():
    mined = mine_hard_negatives(torch.rand(2, 2), torch.rand(2, 2))
    assert mined.text_for_image.tolist() == [1, 0]
    assert mined.text_for_image_2nd.tolist() == [-1, -1]


def test_the_own_pair_is_never_mined_however_dominant():
    """With a softmax at temperature 0.001 every other candidate underflows to 0 and the own pair is picked."""
    sims = torch.eye(4) * 2 - 1
    mined = mine_hard_negatives(sims, sims)
    own = torch.arange(4)
    assert not (mined.text_for_image == own).any() and not (mined.image_for_text == own).any()


def test_ties_go_to_the_lowest_index():
    assert mine_hard_negatives(torch.zeros(3, 3), torch.zeros(3, 3)).text_for_image.tolist() == [1, 0, 0]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="K >= B"):
        mine_hard_negatives(torch.rand(3, 2), torch.rand(3, 2))
    with pytest.raises(ValueError, match="known_positive"):
        mine_hard_negatives(torch.rand(2, 2), torch.rand(2, 2), torch.ones(3, 3, dtype=torch.bool))


def test_sampled_negatives_follow_the_softmax():
    torch.manual_seed(0)
    sim = torch.tensor([[9.0, 0.3, 0.1, 0.2]]).expand(4, 4).clone()
    draws = torch.stack([mine_hard_negatives(sampling_scores(sim, 0.1, "sampled"), sim).text_for_image[0] for _ in range(4000)])
    expected = oracles.softmax([3.0, 1.0, 2.0])
    for candidate, probability in zip((1, 2, 3), expected, strict=True):
        assert abs((draws == candidate).float().mean().item() - probability) < 0.03


def test_random_negatives_are_uniform():
    torch.manual_seed(0)
    sim = torch.eye(4)
    draws = torch.stack([mine_hard_negatives(sampling_scores(sim, 0.1, "random"), sim).text_for_image[0] for _ in range(3000)])
    for candidate in (1, 2, 3):
        assert abs((draws == candidate).float().mean().item() - 1 / 3) < 0.03


def test_an_unknown_way_to_choose_negatives_is_refused():
    with pytest.raises(ValueError, match="hardest, sampled, random"):
        sampling_scores(torch.rand(2, 2), 0.1, "hard")


# --- verdicts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_verdicts_are_a_partition(probabilities, one, other):
    low, high = sorted((one, other))
    p = torch.tensor(probabilities, dtype=torch.float64)
    verdicts = judge_connections(p, threshold=high, ambiguous_from=low)
    for value, positive, ambiguous in zip(p.tolist(), verdicts.positive.tolist(), verdicts.ambiguous.tolist(), strict=True):
        assert positive == (value > high)
        assert ambiguous == (low < value <= high)


def test_both_edges_belong_to_the_lower_class():
    verdicts = judge_connections(torch.tensor([0.5, 0.8], dtype=torch.float64))
    assert verdicts.positive.tolist() == [False, False]
    assert verdicts.ambiguous.tolist() == [False, True]


def test_equal_thresholds_leave_no_ambiguous_class():
    assert not judge_connections(torch.rand(100), threshold=0.5, ambiguous_from=0.5).ambiguous.any()


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1])
def test_what_is_no_probability_is_refused_by_position(value):
    with pytest.raises(ValueError, match=r"\[1\]"):
        judge_connections(torch.tensor([0.1, value]))


def test_crossed_thresholds_are_refused():
    with pytest.raises(ValueError, match="ambiguous_from is 0.9"):
        judge_connections(torch.rand(2), threshold=0.8, ambiguous_from=0.9)


# --- ITC --------------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 6), extra=st.integers(0, 3), seed=st.integers(0, 999), smoothing=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_targets_equal_the_loop_and_sum_to_one(rows, extra, seed, smoothing):
    generator = torch.Generator().manual_seed(seed)
    _, _, known = random_batch(rows, rows + extra, seed)
    new = torch.randint(rows + extra, (rows,), generator=generator)
    found = torch.rand(rows, generator=generator) < 0.5
    targets = itc_targets(known, new, found, smoothing)
    assert torch.allclose(targets.sum(dim=1), torch.ones(rows))
    for b in range(rows):
        expected = oracles.itc_target_row(known[b].tolist(), int(new[b]), bool(found[b]), smoothing)
        assert targets[b].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_new_positive_takes_half_of_the_own_one():
    targets = itc_targets(torch.eye(3, dtype=torch.bool), torch.tensor([2, 0, 0]), torch.tensor([True, False, False]))
    assert targets[0].tolist() == [0.5, 0.0, 0.5]


def test_smoothing_does_not_fall_on_excluded_pairs():
    excluded = torch.tensor([[False, True, False], [False, False, False]])
    known = torch.eye(2, 3, dtype=torch.bool)
    targets = itc_targets(known, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool), 0.5, excluded)
    assert targets[0].tolist() == [0.75, 0.0, 0.25]


def test_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="smoothing is 1.5"):
        itc_targets(torch.eye(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool), 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), extra=st.integers(0, 3), seed=st.integers(0, 99))
def test_itc_equals_the_loop(dtype, rows, extra, seed):
    i2t, t2i, known = random_batch(rows, rows + extra, seed, dtype)
    targets = itc_targets(known, torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool), 0.3)
    loss = itc_loss(i2t / 0.07, t2i / 0.07, targets, targets)
    expected = oracles.itc((i2t / 0.07).tolist(), (t2i / 0.07).tolist(), targets.tolist(), targets.tolist())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_pair_that_takes_no_part_has_no_gradient_and_makes_no_nan():
    logits = torch.randn(2, 3, requires_grad=True)
    masked = logits.masked_fill(torch.tensor([[False, True, False], [False, False, False]]), float("-inf"))
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    loss = itc_loss(masked, masked, targets, targets)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and logits.grad[0, 1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_consistency_equals_the_loop(dtype, rows, seed):
    i2t, t2i, _ = random_batch(rows, rows, seed, dtype)
    expected = oracles.consistency((i2t * 5).tolist(), (t2i * 5).tolist())
    assert consistency_loss(i2t * 5, t2i * 5).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_consistency_is_zero_where_both_directions_agree():
    logits = torch.randn(4, 4)
    assert consistency_loss(logits, logits).item() == pytest.approx(0.0, abs=1e-6)


def test_consistency_moves_only_the_student_side():
    """sg: the target of each KL carries no gradient, so swapping the roles mirrors the gradients."""
    a, b = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    consistency_loss(a, b).backward()
    p, q = a.detach().softmax(1), b.detach().softmax(1)
    assert torch.allclose(a.grad, (p - q) / 3 / 2, atol=1e-6)
    assert torch.allclose(b.grad, (q - p) / 3 / 2, atol=1e-6)


# --- ITM --------------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    extra=st.integers(0, 3),
    seed=st.integers(0, 999),
    convert=st.booleans(),
    resample=st.booleans(),
)
def test_itm_pairs_and_loss_equal_the_loop(rows, extra, seed, convert, resample):
    i2t, t2i, known = random_batch(rows, rows + extra, seed)
    probability = torch.rand(2 * rows, generator=torch.Generator().manual_seed(seed))
    mined = mine_hard_negatives(i2t, t2i, known)
    pairs = itm_pairs(mined, judge_connections(probability), "convert" if convert else "eliminate", resample)
    found = oracles.hard_negatives(i2t.tolist(), t2i.tolist(), known.tolist())
    expected = oracles.itm_rows(found, probability.tolist(), 0.8, 0.5, convert, resample)
    kept = [
        (i, t, y)
        for i, t, y, w in zip(
            pairs.image_index.tolist(), pairs.text_index.tolist(), pairs.label.tolist(), pairs.weight.tolist(), strict=True
        )
        if w > 0
    ]
    assert kept == expected
    assert len(pairs.label) == 3 * rows  # static shapes
    logits = torch.randn(3 * rows, 2, generator=torch.Generator().manual_seed(seed))
    wanted = oracles.cross_entropy(logits[pairs.weight > 0].tolist(), [y for _, _, y in expected])
    assert itm_loss(logits, pairs).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("verdict", [None, "positive", "ambiguous"])
@pytest.mark.parametrize("false_negatives", ["convert", "eliminate"])
def test_an_anchor_without_candidate_gives_no_pair_whatever_con_d_says_of_it(verdict, false_negatives):
    yes = torch.ones(2, dtype=torch.bool)
    verdicts = None if verdict is None else Connections(yes if verdict == "positive" else ~yes, yes if verdict == "ambiguous" else ~yes)
    pairs = itm_pairs(mine_hard_negatives(torch.ones(1, 1), torch.ones(1, 1)), verdicts, false_negatives)
    assert pairs.weight.tolist() == [1.0, 0.0, 0.0]
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0], [3.0, 0.0]])
    assert itm_loss(logits, pairs).item() == pytest.approx(oracles.cross_entropy([[0.0, 1.0]], [1]))
    right, wrong = itm_accuracy(logits, pairs)
    assert right == 1 and wrong.isnan()


def test_candidates_are_listed_as_text_for_image_then_image_for_text():
    mined = mine_hard_negatives(torch.tensor([[1.0, 0.5], [0.1, 1.0]]), torch.tensor([[1.0, 0.2], [0.3, 1.0]]))
    pairs = candidate_pairs(mined)
    assert list(zip(pairs.image_index.tolist(), pairs.text_index.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 0), (0, 1)]


# --- masked LM --------------------------------------------------------------------------------------------------------

SPECIAL, MASK, VOCABULARY = (0, 101, 102), 103, 1000


@given(st.floats(0, 1), st.integers(0, 99))
def test_masking_spares_special_tokens_and_keeps_the_answer(probability, seed):
    torch.manual_seed(seed)
    ids = torch.randint(200, VOCABULARY, (4, 9))
    ids[:, 0], ids[:, 6], ids[:, 7:] = 101, 102, 0
    masked, labels = mask_tokens(ids, probability, MASK, VOCABULARY, SPECIAL)
    special = torch.isin(ids, torch.tensor(SPECIAL))
    assert (masked[special] == ids[special]).all() and (labels[special] == -100).all()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (masked[labels == -100] == ids[labels == -100]).all()


def test_masking_follows_its_shares():
    torch.manual_seed(0)
    ids = torch.full((200, 500), 500)
    masked, labels = mask_tokens(ids, 0.5, MASK, VOCABULARY, SPECIAL)
    chosen = labels != -100
    assert chosen.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (masked[chosen] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (masked[chosen] == 500).float().mean().item() == pytest.approx(0.1, abs=0.01)
    random = masked[chosen & (masked != MASK) & (masked != 500)]  # of the whole vocabulary, each alike: about 5 times
    counts = random.bincount(minlength=VOCABULARY)
    assert len(counts) == VOCABULARY and (counts > 0).sum() > 0.97 * VOCABULARY and counts.max() < 25


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lm_equals_the_loop(dtype):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    teacher = torch.randn(7, 11, generator=torch.Generator().manual_seed(2)).to(dtype)
    labels = torch.randint(11, (7,), generator=torch.Generator().manual_seed(3))
    plain = oracles.cross_entropy(logits.tolist(), labels.tolist())
    assert masked_lm_loss(logits, labels).item() == pytest.approx(plain, rel=1e-5)
    soft = 0.0
    for row, guide in zip(logits.tolist(), teacher.tolist(), strict=True):
        student, target = oracles.softmax(row), oracles.softmax(guide)
        soft += -sum(t * math.log(s) for s, t in zip(student, target, strict=True)) / 7
    assert masked_lm_loss(logits, labels, teacher, 0.4).item() == pytest.approx(0.6 * plain + 0.4 * soft, rel=1e-5)


def test_no_masked_token_is_a_zero_loss_with_a_graph():
    hidden = torch.randn(0, 5)
    layer = torch.nn.Linear(5, 11)
    loss = masked_lm_loss(layer(hidden), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and (layer.weight.grad == 0).all()


# --- momentum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_modelling_equals_the_loop_and_lavis(smoothing):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 4, generator=generator)
    ids = torch.tensor([[1, 5, 6, 0, 0], [1, 7, 0, 0, 0], [1, 2, 3, 4, 5]])
    head = torch.nn.Linear(4, 9)

    def row(state):
        return head(torch.tensor(state)).tolist()

    followed = ids[:, 1:] != 0
    found = language_modelling_loss(states[:, :-1][followed], ids[:, 1:][followed], head, label_smoothing=smoothing)
    assert float(found) == pytest.approx(oracles.language_modelling(states.tolist(), ids.tolist(), row, 0, smoothing), abs=1e-5)
    # the form LAVIS has: logits everywhere, padding ignored
    logits, labels = head(states)[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100).flatten()
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_teacher_moves_by_one_minus_momentum():
    student, teacher = [torch.ones(3)], [torch.zeros(3)]
    update_teacher(student, teacher, 0.75)
    assert teacher[0].tolist() == [0.25] * 3


def test_distilled_targets_equal_the_loop():
    targets, logits = torch.eye(3), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    mixed = distilled_targets(targets, logits, 0.4)
    for b in range(3):
        soft = oracles.softmax(logits[b].tolist())
        assert mixed[b].tolist() == pytest.approx([0.6 * y + 0.4 * p for y, p in zip(targets[b].tolist(), soft, strict=True)], rel=1e-5)


def test_ramp_up_ends_with_the_first_epoch():
    assert [ramp_up(0.4, e, s, 10) for e, s in ((0, 0), (0, 5), (1, 0), (3, 7))] == pytest.approx([0.0, 0.2, 0.4, 0.4])


def test_the_queue_is_a_ring():
    queue, position = torch.zeros(2, 5), torch.tensor([3])
    enqueue(queue, position, torch.arange(1.0, 7.0).view(3, 2))
    assert queue[0].tolist() == [5.0, 0.0, 0.0, 1.0, 3.0]


# --- what is not finite, and what is not there -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_itc_does_not_hide_what_is_not_finite(value):
    logits, targets = torch.randn(3, 3), torch.eye(3)
    spoilt = logits.clone()
    spoilt[1, 2] = value  # where the target is 0
    assert itc_loss(spoilt, logits, targets, targets).isnan()
    assert itc_loss(logits, logits, targets, distilled_targets(targets, spoilt, 0.4)).isnan()
    assert itc_loss(spoilt, logits, distilled_targets(targets, spoilt, 0.4), targets).isnan()


def test_a_queue_keeps_its_old_columns_where_nothing_is_taken():
    queue, position = torch.arange(10.0).view(2, 5).clone(), torch.tensor([4])
    features = torch.tensor([[-1.0, -2.0], [float("nan"), 0.0], [-5.0, -6.0]])
    enqueue(queue, position, features, taken=features.isfinite().all(dim=1))
    assert queue.tolist() == [[0.0, -5.0, 2.0, 3.0, -1.0], [5.0, -6.0, 7.0, 8.0, -2.0]]  # columns 4, 0 (kept), 1
    keys = torch.arange(5)[None].clone()
    enqueue(keys, position, torch.tensor([70, 80, 90]), taken=torch.tensor([True, False, True]))
    assert keys.tolist() == [[0, 90, 2, 3, 70]]


def test_no_token_to_predict_is_no_loss_but_a_graph():
    head = torch.nn.Linear(4, 10)
    states = torch.randn(0, 4, requires_grad=True)
    loss = language_modelling_loss(states, torch.zeros(0, dtype=torch.long), head)
    loss.backward()
    assert loss == 0 and states.grad is not None and (head.weight.grad == 0).all()


def test_value_range_against_plain_python():
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(5, dtype=torch.bfloat16)]
    values = [float(v) for tensor in tensors for v in tensor.flatten()]
    assert value_range(*tensors).tolist() == [min(values), max(values)]
