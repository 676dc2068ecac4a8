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

from lavis_mafa.errors import UserError
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.tasks.caption_metrics import caption_metrics
from lavis_mafa.tasks.captioning import MafaCaptioningTask, own_id
from lavis_mafa.tasks.task import as_id, known_ids

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


def test_lengths_are_those_of_what_is_generated() -> None:
    """LAVIS's Q-Former counts the token that begins a line."""
    for model, more in ((Model(), 0), (Blip2Mafa.__new__(Blip2Mafa), 1)):
        asked = MafaCaptioningTask(run_block())._settings(model)
        assert (asked["max_length"], asked["min_length"]) == (30 + more, 8 + more)


def test_mistakes_are_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 'blue'"):
        MafaCaptioningTask(run_block(caption_metrics=["blue"]))
    with pytest.raises(UserError, match="there is no file"):
        MafaCaptioningTask(run_block(caption_references=str(tmp_path / "gone.json")))


def test_ids_as_plain_python() -> None:
    assert [as_id(value) for value in (torch.tensor(5), "000391", "n01_5", 7, 2**70)] == [5, "000391", "n01_5", 7, 2**70]
    assert json.dumps([as_id(value) for value in (torch.tensor(7.0), 7.0, 7.5)]) == "[7, 7, 7.5]"


class Listed(OfLavis):
    """LAVIS's COCO layout: the id is the file's name without an end, and without the letters of ``.jpg`` around it."""

    def __init__(self, *rows: tuple[str, Any, int]) -> None:
        self.annotation = [{"image": image, "caption": caption} for image, caption, _ in rows]
        self.says = [text for _, _, text in rows]

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.annotation[index]["image"].split("/")[-1].strip(".jpg").split("_")[-1]
        return {"image": torch.tensor([float(self.says[index])]), "image_id": name, "instance_id": str(index)}


def test_images_whose_ids_are_the_same_are_not_lost(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    """dog.jpg and do.jpg are both "do" to LAVIS, 7.jpg and 007.jpg both the number 7."""
    names = ["dog.jpg", "a/do.jpg", "7.jpg", "COCO_007.jpg", "8.jpg"]
    data = Listed(*((name, [TEXTS[n % 3]], n % 3) for n, name in enumerate(names)))
    metrics = evaluate(data, Model())
    assert metrics["bleu_4"] == pytest.approx(100)
    written = json.loads((results / "val_epoch4.json").read_text())
    assert written == [{"image_id": i, "caption": TEXTS[n % 3]} for n, i in enumerate([*names[:4], 8])]
    assert "4 images have an image_id that another has too, the first is 'do'" in caplog.text


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_all_rows_of_an_image_are_its_references(results: Path, order: list[int]) -> None:
    """As a file of one row a caption has them, a caption as a text or a list."""
    rows = [("dog.jpg", TEXTS[0], 0), ("dog.jpg", ["x y z", "p q"], 0), ("cat.jpg", [TEXTS[1]], 1), ("cat.jpg", TEXTS[2], 1)]
    metrics = evaluate(Listed(*(rows[n] for n in order)), Model())
    expected = caption_metrics({1: [TEXTS[0], "x y z", "p q"], 2: [TEXTS[1], TEXTS[2]]}, {1: TEXTS[0], 2: TEXTS[1]}, ["bleu", "cider"])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert len(json.loads((results / "val_epoch4.json").read_text())) == 2


@pytest.mark.parametrize("ids", [["007", "7", "x"], [2**70, 2**70 + 1, 5], ["a/1", "a/2", "3"]])
def test_ids_stay_what_they_are(results: Path, tmp_path: Path, ids: list[Any]) -> None:
    """In the result file, and where a file of references has numbers in their place or texts."""

    class Own(Gallery):
        def ids(self, index: int) -> dict[str, Any]:
            return {"index": index, "image_id": ids[index]}

    def as_lists(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    for kind in (str, lambda name: int(name) if str(name).isdecimal() and str(int(name)) == str(name) else name):
        images = [{"id": kind(name), "domain": "in-domain"} for name in ids]  # type: ignore[operator]
        annotations = [{"image_id": image["id"], "caption": text} for image, text in zip(images, TEXTS, strict=True)]
        (tmp_path / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        task = MafaCaptioningTask(run_block(caption_references=str(tmp_path / "references.json")))
        loader: Any = DataLoader(Own(), batch_size=2, collate_fn=as_lists)
        found = task.evaluation(Model(), loader, cuda_enabled=False)
        metrics = task.after_evaluation(found or {}, "val", 0)
        assert metrics is not None and metrics["bleu_4"] == metrics["in_domain_bleu_4"] == pytest.approx(100)
    written = json.loads((results / "val_epoch0.json").read_text())
    assert [row["image_id"] for row in written] == ids


def test_ids_of_annotations_stay_and_those_of_file_names_are_numbers() -> None:
    for annotation, wanted in (
        ({"image_id": "007"}, "007"),
        ({"img_id": "007"}, "007"),
        ({"image": "007.jpg"}, 7),
        ({"image_id": 7}, 7),
    ):
        assert own_id(SimpleNamespace(annotation=[annotation]), 0, "007") == wanted
    assert own_id(SimpleNamespace(), 0, "007") == "007"


def test_an_id_is_looked_up_as_it_is_then_as_a_text_then_as_a_number() -> None:
    known: dict[Any, str] = {"007": "a", 7: "b", "8": "c", 9: "d", 10: "e", "x": "f"}
    assert known_ids(["007", 7, 8, "0009", "10", "010"], known) == {"007": "a", 7: "b", 8: "c", "0009": "d", "10": "e", "x": "f"}
    assert known_ids(["7"], known)["7"] == "b" and known_ids(["11", "xy"], known) == known
    assert known_ids(["09", "009"], known) == known, "which of them is meant?"
    assert known_ids(["11", 11], {"11": "a"}) == {"11": "a"}, "11 has none"


def test_rows_of_several_ranks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the sampler gave out twice counts once, equal ids of different rows do not, and the order is the rows'."""
    from lavis_mafa.tasks import task as module

    parts: list[Any] = [{0: "a", 2: "c"}, {1: "b", 0: "a"}]
    monkeypatch.setattr(module, "gather_objects", lambda made: parts)
    assert list(module.joined_on_rank_0({}).items()) == [(0, "a"), (1, "b"), (2, "c")]  # type: ignore[union-attr]
    monkeypatch.setattr(module, "rank", lambda: 1)
    assert module.joined_on_rank_0({}) is None
