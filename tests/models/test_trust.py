"""The rule for a Con-D that cannot judge, and the medians it is made of."""

from __future__ import annotations

import logging

import pytest
import torch

from lavis_mafa.models.sanity import ShareWatch
from lavis_mafa.objectives.trust import Histogram, Medians, median


@pytest.mark.parametrize(
    ("own", "shuffled", "hardest", "reason"),
    [
        (0.9, 0.01, 0.3, None),
        (0.9, 0.01, 0.8, None),  # many false negatives, and yet fewer than half
        (0.3, 0.01, 0.05, None),  # low, but apart
        (0.558, 0.171, 0.594, "hardest negatives (median 0.594) score like own pairs (0.558)"),
        (0.382, 0.028, 0.365, None),  # the quickstart's: weak, of use, and cautioned of
        (0.5, 0.5, 0.5, "own pairs (median 0.500) score hardly better than shuffled ones (0.500)"),
        (0.1, 0.9, 0.1, "hardly better"),
        (0.52, 0.505, 0.3, "hardly better"),
        (0.9, None, 0.9, "score like own pairs"),  # every sample is of one image
        (0.9, 0.1, None, None),  # no negative at all
        (None, None, None, None),
    ],
)
def test_the_rule(own, shuffled, hardest, reason):
    said = Medians(own, shuffled, hardest).why_not()
    assert said is None if reason is None else reason in said


def test_where_the_truth_is_known_con_d_is_measured():
    assert Medians(0.38, 0.03, 0.42, lift=2.7).why_not() is None and "hardly tell " in (
        Medians(0.38, 0.03, 0.42, lift=2.7).doubt() or ""
    )
    assert "like own pairs" in (Medians(0.38, 0.03, 0.42, lift=1.1).why_not() or "")
    assert "hardly better" in (Medians(0.5, 0.5, 0.5, lift=2.7).why_not() or "")


def test_the_rule_holds_in_between():
    """Monotone: a harder negative never makes Con-D better, and at the own pairs' median it is always refused."""
    for own, shuffled in torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).tolist():
        refused = [Medians(own, shuffled, h / 50).why_not() is not None for h in range(51)]
        assert refused == sorted(refused)
        assert Medians(own, shuffled, own).why_not() is not None
        cautions = [Medians(own, shuffled, h / 50).doubt() is not None for h in range(51)]
        assert not any(no and careful for no, careful in zip(refused, cautions, strict=True))
        if own - shuffled > 0.02:
            near = [h / 50 for h in range(51) if shuffled + 0.9 * (own - shuffled) <= h / 50 < own]
            assert [h / 50 for h, careful in enumerate(cautions) if careful] == near
        assert (Medians(own, shuffled, shuffled).why_not() is None) == (own - shuffled > 0.02)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_a_histograms_median_is_the_median(count):
    generator = torch.Generator().manual_seed(count)
    first, second = torch.rand(2, count, generator=generator) ** 3
    one, other = Histogram(), Histogram()
    one.add(torch.cat([first, torch.tensor([float("nan")])]))
    other.add(second)
    assert one.median() == pytest.approx(float(first.median()), abs=1e-4)
    one.merge(other)
    assert one.median() == pytest.approx(float(torch.cat([first, second]).median()), abs=1e-4)
    assert median(torch.cat([first, torch.tensor([float("nan")])])) == pytest.approx(float(first.double().quantile(0.5)))


def test_a_median_of_nothing_is_none():
    assert Histogram().median() is None and median(torch.tensor([float("nan")])) is None
    ends = Histogram()
    ends.add(torch.ones(3))
    assert ends.median() == pytest.approx(1.0, abs=1e-4)


def test_a_share_that_no_paper_reaches_is_told_once_an_epoch(caplog):
    """By the mean of an epoch's steps, so that one batch is not enough."""
    watch = ShareWatch(steps_per_epoch=100)
    with caplog.at_level(logging.WARNING):
        for epoch, step, share in [(0, 49, 0.9), (1, 10, 0.9), (1, 60, 0.15), (1, 100, 0.3), (2, 40, 0.1), (2, 80, 0.7), (2, 90, 0.9)]:
            watch.look({"epoch": epoch, "step": step, "new_positive_share": share})
        watch.look({"epoch": 3, "step": 100, "loss": 1.0})
        watch.look({"epoch": 4, "step": 100, "new_positive_share": 0.9, "con_d_precision": 0.123})
        watch.look({"epoch": 5, "step": 100, "new_positive_share": 0.9, "con_d_precision": 0.95})
        ShareWatch(steps_per_epoch=5).look({"epoch": 6, "step": 5, "new_positive_share": 0.34})
        watch.look({"epoch": 7, "step": 100, "new_positive_share": 0.9, "con_d_precision": 0.89})
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == ["epoch 2", "epoch 4", "epoch 6", "epoch 7"]
    assert "turns 40 % of the hardest" in said[0] and "31.7 %" in said[0] and "truth" not in said[0] and "truth 12%" in said[1]
