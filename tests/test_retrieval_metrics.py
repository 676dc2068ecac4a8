"""R@k, R-Precision and mAP@R against plain loops and against the ``eccv_caption`` package's own formulas."""

from __future__ import annotations

import pytest
import torch

from lavis_mafa.errors import UserError
from lavis_mafa.tasks import retrieval_metrics as module
from lavis_mafa.tasks.retrieval_metrics import retrieval_metrics

packages = pytest.importorskip("eccv_caption._metrics")


def ranking(row: torch.Tensor, right: torch.Tensor) -> list[int]:
    """Best first, of equal scores those that do not match."""
    return sorted(range(len(row)), key=lambda j: (-float(row[j]), bool(right[j])))


def by_loops(scores: torch.Tensor, relevant: torch.Tensor) -> dict[str, float]:
    """The definitions, one query at a time; queries without a match are left out."""
    sums = {"r1": 0.0, "r5": 0.0, "r10": 0.0, "r_precision": 0.0, "map_at_r": 0.0}
    queries = [q for q in range(len(scores)) if relevant[q].any()]
    for q in queries:
        order = ranking(scores[q], relevant[q])
        right = {j for j in range(scores.shape[1]) if relevant[q, j]}
        for k in (1, 5, 10):
            sums[f"r{k}"] += bool(right & set(order[:k]))
        size = len(right)
        sums["r_precision"] += len(right & set(order[:size])) / size
        precisions = [len(right & set(order[:r])) / r for r in range(1, size + 1) if order[r - 1] in right]
        sums["map_at_r"] += sum(precisions) / size
    return {name: 100 * total / len(queries) for name, total in sums.items()}


def example(seed: int, images: int = 12, texts: int = 30, share: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.rand(images, texts, generator=generator) < share
    i2t = torch.randn(images, texts, generator=generator) + relevant
    t2i = torch.randn(texts, images, generator=generator) + relevant.T
    if seed % 2:  # ties, as among the pairs that the matching head has not seen
        i2t, t2i = i2t.round(), t2i.round()
    return i2t, t2i, relevant


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loops(seed, share):
    i2t, t2i, relevant = example(seed, share=share)
    found = retrieval_metrics(i2t, t2i, relevant)
    for side, wanted in (("tr", by_loops(i2t, relevant)), ("ir", by_loops(t2i, relevant.T))):
        for name, value in wanted.items():
            assert found[f"{side}_{name}"] == pytest.approx(value, abs=1e-4), (side, name)
    recalls = [found[f"{side}_r{k}"] for side in ("tr", "ir") for k in (1, 5, 10)]
    assert found["agg_metrics"] == pytest.approx(sum(recalls) / 6)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_eccv_caption(seed, capsys):
    i2t, t2i, relevant = example(seed)
    found = retrieval_metrics(i2t, t2i, relevant)
    for side, scores, truth in (("tr", i2t, relevant), ("ir", t2i, relevant.T)):
        right = {q: row.nonzero().flatten().tolist() for q, row in enumerate(truth) if row.any()}
        items = {q: ranking(scores[q], truth[q]) for q in right}
        theirs = packages.compute_eccv_metrics(items, right)
        assert found[f"{side}_map_at_r"] == pytest.approx(100 * theirs["eccv_map_at_r"], abs=1e-4)
        assert found[f"{side}_r_precision"] == pytest.approx(100 * theirs["eccv_rprecision"], abs=1e-4)
        assert found[f"{side}_r_precision"] == pytest.approx(100 * packages.compute_rprecision(items, right), abs=1e-4)
        assert found[f"{side}_r1"] == pytest.approx(100 * theirs["eccv_r1"], abs=1e-4)
        for k in (5, 10):
            assert found[f"{side}_r{k}"] == pytest.approx(100 * packages.compute_r_at_k(items, right, k), abs=1e-4)


def test_a_perfect_ranking_is_100_and_the_reverse_0():
    relevant = torch.zeros(4, 40, dtype=torch.bool)
    for image in range(4):
        relevant[image, 10 * image : 10 * image + 3] = True
    perfect = retrieval_metrics(relevant.float(), relevant.float().T, relevant)
    assert all(value == pytest.approx(100) for value in perfect.values())
    worst = retrieval_metrics(-relevant.float(), -relevant.float().T, relevant)
    assert worst["tr_r10"] == worst["tr_map_at_r"] == worst["ir_r1"] == worst["ir_r_precision"] == 0


def test_a_gallery_smaller_than_k_counts_as_it_is():
    relevant = torch.eye(3, dtype=torch.bool)
    assert retrieval_metrics(torch.rand(3, 3), torch.rand(3, 3), relevant)["tr_r10"] == 100


def test_ties_do_not_depend_on_the_gallerys_order():
    i2t, t2i, relevant = example(1)
    images, texts = torch.randperm(12), torch.randperm(30)
    again = retrieval_metrics(i2t[images][:, texts], t2i[texts][:, images], relevant[images][:, texts])
    assert again == pytest.approx(retrieval_metrics(i2t, t2i, relevant))


def test_how_many_queries_are_ranked_at_once_changes_nothing(monkeypatch):
    i2t, t2i, relevant = example(1)
    wanted = retrieval_metrics(i2t, t2i, relevant)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    assert retrieval_metrics(i2t, t2i, relevant) == pytest.approx(wanted)


def test_a_model_that_tells_nothing_apart_finds_nothing(caplog):
    relevant = torch.eye(20, dtype=torch.bool)
    scores = torch.full((20, 20), 0.5)
    assert set(retrieval_metrics(scores, scores, relevant).values()) == {0.0}
    assert [record.message[:20] for record in caplog.records] == ["20 of 20 images scor", "20 of 20 texts score"]
    caplog.clear()
    scores[:19] = torch.eye(20)[:19]
    assert retrieval_metrics(scores, torch.eye(20), relevant)["tr_r1"] == pytest.approx(95)
    assert caplog.text.count("score the same") == 1 and "1 of 20 images" in caplog.text
    caplog.clear()
    retrieval_metrics(torch.rand(20, 1), torch.rand(1, 20), torch.ones(20, 1, dtype=torch.bool))
    assert not caplog.records, "one text cannot be told apart from others"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    scores, relevant = torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool)
    spoilt = scores.clone()
    spoilt[1, 2:4], spoilt[2, 0] = value, value
    with pytest.raises(UserError, match=r"3 of 15 retrieval scores are NaN or infinite, those of 2 of 3 images: image 1 .* has 2 of 5"):
        retrieval_metrics(spoilt, scores.T, relevant)
    with pytest.raises(UserError, match="no image of the evaluation set has a text that matches it"):
        retrieval_metrics(torch.rand(3, 5), torch.rand(5, 3), torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(UserError, match=r"those of 3 of 5 texts: text 0 .* has 1 of 3"):
        retrieval_metrics(scores, spoilt.T, relevant)
