"""The report's counts against plain loops."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.tools.gallery import VERDICTS, distinct_candidates
from lavis_mafa.tools.quickstart import batch_false_negatives, own_text_keys, score_con_d
from lavis_mafa.tools.report import truth_table

CONCEPTS = ["dog", "cat", "dog", "fox"]
CAPTIONS = ["dog", "pet", "pet", "fox"]
DESCRIBES = {"dog": {"dog"}, "pet": {"dog", "cat"}, "fox": {"fox"}}


TRUTH = GroundTruth.from_pairs([(t, c) for t, cs in DESCRIBES.items() for c in sorted(cs)], {"dog": "name", "pet": "keyword"})


class Data:
    truth = TRUTH
    concepts = torch.tensor([TRUTH.concept_id(c) for c in CONCEPTS])

    def __len__(self) -> int:
        return len(CONCEPTS)

    def captions(self, row: int) -> list[str]:
        return [CAPTIONS[row]]


def matches(image: int, text: int) -> bool:
    return CONCEPTS[image] in DESCRIBES[CAPTIONS[text]]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3]])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_in_batch_false_negatives_equal_the_loop(order, size):
    data = Data()
    batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    total = sum(matches(i, t) for rows in batches for i in rows for t in rows if i != t)
    count = batch_false_negatives(torch.tensor(order), size, data, own_text_keys(data))
    assert count["per_batch"] == total / len(batches)
    assert count["share"] == pytest.approx(total / len(batches) / (size * (size - 1)))


def table(pairs, verdicts):
    return pa.table({"image": [i for i, _ in pairs], "text": [t for _, t in pairs], "verdict": pa.array(verdicts)})


def test_precision_and_recall_equal_the_loop():
    pairs = [(0, 1), (1, 0), (2, 0), (3, 1), (1, 2), (0, 3)]
    verdicts = ["positive", "positive", "negative", "ambiguous", "positive", "negative"]
    truth = [matches(i, t) for i, t in pairs]
    said = [v == "positive" for v in verdicts]
    both = sum(a and b for a, b in zip(truth, said, strict=True))
    data = Data()
    score = score_con_d(table(pairs, verdicts), data, own_text_keys(data))
    assert (score["precision"], score["recall"]) == (both / sum(said), both / sum(truth))
    assert score["true_share"] == sum(truth) / len(truth)


def test_nothing_found_has_no_precision():
    data = Data()
    assert math.isnan(score_con_d(table([(1, 0)], ["negative"]), data, own_text_keys(data))["precision"])


def test_the_page_counts_each_pair_once_and_by_sighting():
    """Two definitions beside each other, each equal to its loop; a pair's last sighting is its verdict."""
    rng = random.Random(0)
    sightings = [
        (epoch, rng.choice(["text for image", "image for text"]), rng.randrange(4), rng.randrange(4), rng.choice(VERDICTS))
        for epoch in range(60)
    ]
    last = {(direction, i, t): verdict for _, direction, i, t, verdict in sightings}
    columns = dict(zip(("epoch", "direction", "image", "text", "verdict"), map(list, zip(*sightings, strict=True)), strict=True))
    table = pa.table({**columns, "step": [0] * 60, "probability": [0.5] * 60})
    run, rows = (
        SimpleNamespace(name="mafa", connections=table, metrics=[], mined=None),
        SimpleNamespace(matches=lambda i, t: list(map(matches, i, t))),
    )
    found = truth_table([run], [distinct_candidates(0, table, rows)])
    expected = {
        "each pair once": [(matches(i, t), verdict == "positive") for (_, i, t), verdict in last.items()],
        "every sighting": [(matches(i, t), verdict == "positive") for _, _, i, t, verdict in sightings],
    }
    assert [row[1] for row in found.rows] == [*expected]
    for row, judged in zip(found.rows, expected.values(), strict=True):
        true, said, both = (sum(map(f, judged)) for f in (lambda j: j[0], lambda j: j[1], all))
        assert row[2:] == [str(len(judged)), f"{true / len(judged):.1%}", str(said), f"{both / said:.1%}", f"{both / true:.1%}"]
    assert truth_table([run], [[]]) is None
