from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from torch.utils.data import DataLoader

from lavis_mafa.common.caption_metrics import caption_metrics
from lavis_mafa.common.errors import UserError
from lavis_mafa.tasks.generating import as_id
from lavis_mafa.tasks.mafa_captioning import MafaCaptioningTask

TEXTS = ["a dog runs on the grass", "two cats sleep on a bed", "a man rides a bike"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "result"))
    return tmp_path / "result"


def run_block(**changes: Any) -> SimpleNamespace:
    settings = {"num_beams": 3, "max_len": 30, "min_len": 8, "length_penalty": 1.0, "caption_references": None}
    return SimpleNamespace(**{**settings, "caption_metrics": ["bleu", "cider"], **changes})


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.tensor([float(index)]), **self.ids(index)}

    def ids(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class Gallery(Images):
    """As our evaluation sets look."""

    raw_text = TEXTS
    img2txt = {0: [0], 1: [1], 2: [2]}

    def ids(self, index: int) -> dict[str, Any]:
        return {"index": index, "image_id": index}


class OfLavis(Images):
    """As LAVIS's evaluation sets look: ids by a rule of their own, and captions in the annotations."""

    annotation: list[dict[str, Any]] = [{"image": f"val_{n}.jpg", "caption": [text, "x"]} for n, text in enumerate(TEXTS)]

    def ids(self, index: int) -> dict[str, Any]:
        return {"image_id": f"00000000{9 - index}", "instance_id": str(index)}


class NoCapsTest(OfLavis):
    annotation = [{"image": f"{n}.jpg", "img_id": n} for n in range(3)]


class Model:
    """Says the right caption, and remembers what it was asked."""

    def generate(self, samples: dict[str, Any], length_penalty: float = 0.0, **asked: Any) -> list[str]:
        self.asked = {**asked, "length_penalty": length_penalty}
        return [f" {TEXTS[int(n)]}\n" for n in samples["image"]]


class ModelWithoutPenalty(Model):
    def generate(self, samples: dict[str, Any], num_beams: int, max_length: int, **others: Any) -> list[str]:  # type: ignore[override]
        return super().generate(samples, **others)


def evaluate(dataset: Any, model: Any, run: Any = None) -> Any:
    task = MafaCaptioningTask(run or run_block())
    result = task.evaluation(model, DataLoader(dataset, batch_size=2), cuda_enabled=False)
    return task.after_evaluation(val_result=result, split_name="val", epoch=4)


@pytest.mark.parametrize(("dataset", "ids"), [(Gallery(), [0, 1, 2]), (OfLavis(), [9, 8, 7])])
def test_captions_are_written_and_scored_by_the_data_sets_own(results: Path, dataset: Any, ids: list[int]) -> None:
    model = Model()
    metrics = evaluate(dataset, model)
    assert metrics["bleu_4"] == pytest.approx(100)
    assert metrics["agg_metrics"] == metrics["cider"] + metrics["bleu_4"]
    written = json.loads((results / "val_epoch4.json").read_text())
    assert written == [{"image_id": image, "caption": text} for image, text in zip(ids, TEXTS, strict=True)]
    expected = {"num_beams": 3, "max_length": 30, "min_length": 8, "length_penalty": 1.0, "use_nucleus_sampling": False}
    assert model.asked == expected


def test_references_from_a_file_with_domains(results: Path, tmp_path: Path) -> None:
    file = tmp_path / "references.json"
    images = [{"id": 9, "domain": "in-domain"}, {"id": 8, "domain": "out-domain"}, {"id": 7, "domain": "out-domain"}, {"id": 1}]
    annotations = [{"image_id": image["id"], "caption": text} for image, text in zip(images, reversed(TEXTS), strict=False)]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    metrics = evaluate(NoCapsTest(), Model(), run_block(caption_references=str(file)))
    references: dict[Any, list[str]] = {9: [TEXTS[2]], 8: [TEXTS[1]], 7: [TEXTS[0]]}
    expected = caption_metrics(references, {9: TEXTS[0], 8: TEXTS[1], 7: TEXTS[2]}, ["bleu", "cider"])
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["out_domain_bleu_1"] > metrics["in_domain_bleu_1"]


def test_without_references_there_is_the_file_alone(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert evaluate(NoCapsTest(), Model()) is None
    assert len(json.loads((results / "val_epoch4.json").read_text())) == 3
    assert caplog.text.count("no metrics") == 1


def test_a_penalty_the_model_does_not_know_is_named(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(Gallery(), ModelWithoutPenalty())
    assert "length_penalty" not in caplog.text
    evaluate(Gallery(), ModelWithoutPenalty(), run_block(length_penalty=-1.0))
    assert "run.length_penalty is -1.0" in caplog.text


def test_mistakes_are_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 'blue'"):
        MafaCaptioningTask(run_block(caption_metrics=["blue"]))
    with pytest.raises(UserError, match="there is no file"):
        MafaCaptioningTask(run_block(caption_references=str(tmp_path / "gone.json")))


def test_ids_as_plain_python() -> None:
    assert [as_id(value) for value in (torch.tensor(5), "000391", "n01_5", 7)] == [5, 391, "n01_5", 7]
