"""Runs that have little or nothing to do: they finish, every loss in metrics.jsonl is finite, and the log says why, once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import doubtful
from lavis_mafa.config.schema import typed_block

pytestmark = pytest.mark.slow

NO_NEGATIVE, ONE_TEXT = "A batch has no negative", "captions of a batch are the same text"


@pytest.fixture
def train(run_yaml, tmp_path, caplog):
    """Train with these options; metrics.jsonl and the warnings of what trains."""

    def run(*options: str) -> tuple[list[dict[str, float]], list[str]]:
        caplog.clear()
        where = f"run.output_dir={tmp_path / 'output'}"
        assert main(["train", "--cfg-path", str(run_yaml), "--options", where, *options]) == 0
        [folder] = (tmp_path / "output").glob("2*")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = ("lavis_mafa.models", "lavis_mafa.models.con_d", "lavis_mafa.tasks")
        return records, [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.startswith(names)]

    return run


def rewrite(pairs: Path, **changes: object) -> None:
    """Other values in every row of the annotations."""
    path = pairs / "pairs.jsonl"
    rows = [{**json.loads(line), **changes} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(records: list[dict[str, float]], steps: int) -> None:
    assert len(records) == steps
    for record in records:
        losses = [record[name] for name in ("loss", "loss_itc", "loss_itm", "loss_mlm")]
        assert all(math.isfinite(loss) for loss in losses), record
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float)), record


@pytest.mark.parametrize("space", [1, 8])
def test_batches_of_one(train, space):
    records, said = train("run.batch_size_train=1", f"run.grit.search_space={space}")
    check(records, 40)
    assert len(said) == 1 and NO_NEGATIVE in said[0] and "run.batch_size_train" in said[0]
    assert all("itm_accuracy_negative" not in record for record in records)


def test_all_captions_equal(train, pairs):
    rewrite(pairs, caption="a square")
    records, said = train()
    check(records, 10)
    assert len([text for text in said if ONE_TEXT in text and "'a square'" in text]) == 1
    assert len(said) <= 3 and len([text for text in said if NO_NEGATIVE in text]) == 1


def test_all_of_one_image(train, pairs):
    rewrite(pairs, image="0.png", concept="red")
    records, said = train()
    check(records, 10)
    assert len(said) == 1 and NO_NEGATIVE in said[0]


@pytest.mark.parametrize("false_negatives", ["convert", "eliminate"])
def test_every_negative_is_false(train, pairs, false_negatives):
    """All images show one concept, so Con-D rightly calls every pair positive."""
    rewrite(pairs, concept="red")
    records, said = train(f"model.ecm.false_negatives={false_negatives}")
    check(records, 10)
    assert len([text for text in said if "ECM leaves a batch no negative" in text]) == 1


@pytest.mark.parametrize("sizes", [(160, 40), (160, 160), (24, 24)], ids=["below M", "below M = L", "a part of L"])
def test_fewer_samples_than_grits_queue(train, sizes):
    queue, space = sizes
    records, said = train(f"run.grit.queue_size={queue}", f"run.grit.search_space={space}")
    check(records, 10)
    assert said == []


def test_thresholds_at_the_ends(train):
    records, said = train("model.ecm.threshold=1", "run.max_steps=2")
    check(records, 2)
    assert len(said) == 1 and "no probability exceeds it" in said[0]


def test_a_con_d_that_joins_everything_is_told_at_the_start_and_in_every_epoch(train, monkeypatch):
    from lavis_mafa.models.con_d import GroundTruthDiscriminator

    monkeypatch.setattr(GroundTruthDiscriminator, "match_probability", lambda self, samples, image, text: torch.ones(len(image)))
    records, said = train()
    assert all(record["new_positive_share"] == 1.0 for record in records)
    told = [text for text in said if "new_positive_share" in text]
    assert [text[:8] for text in told] == ["epoch 0:", "epoch 1:"] and "turns 100 %" in told[0]
    assert sum("CANNOT JUDGE" in text for text in said) == 1


def test_without_itc_and_words(train):
    """MLM and ITC off: their losses are not in the records; negatives of untrained similarities, as in GRIT-VLP Table 1, are told."""
    records, said = train("model.itc.weight=0", "model.mlm.weight=0", "run.max_steps=2")
    assert all(record["loss"] == pytest.approx(record["loss_itm"]) for record in records)
    assert not any("loss_itc" in record or "loss_mlm" in record for record in records)
    assert len(said) == 1 and "model.itm.negatives: hardest and run.grit.enabled: true" in said[0]


def test_what_is_told_of_losses_that_are_off():
    def told(model: dict[str, Any], **run: Any) -> list[str]:
        block = typed_block("model", {"ecm": {"enabled": False}, **model})
        return list(doubtful(block, typed_block("run", {"grit": {"enabled": False}, **run})))

    no_itc, no_itm = {"itc": {"weight": 0}}, {"itm": {"weight": 0}}
    assert told({}) == told({"itm": {"negatives": "random"}, **no_itc}) == told(no_itm) == []
    assert len(told(no_itc)) == len(told({**no_itc, "itm": {"negatives": "random"}}, grit={"enabled": True})) == 1
    [text] = told(no_itm, valid_splits=["val"])
    assert "model.itm.weight is 0" in text
    assert told({**no_itc, **no_itm}) == []  # nobody asks the similarities
    assert told(no_itc, evaluate=True) == []
