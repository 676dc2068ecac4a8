"""ECCV Caption's metrics from score matrices: COCO's ids, and what is said when they cannot be had."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lavis_mafa.errors import UserError
from lavis_mafa.tasks.retrieval_metrics import CocoGallery, coco_gallery, eccv_metrics, eccv_truth, retrieval_metrics

pytestmark = pytest.mark.slow

pytest.importorskip("eccv_caption")
IMAGES = [391895, 60623, 483108]


def caption_id(image: int, number: int) -> int:
    return 10 * image + number


def text(image: int, number: int) -> str:
    return f"Scene {image}, seen by writer {number}. "


@pytest.fixture
def truth():
    """The package with a small COCO: three images of two captions; image 0 also matches the first caption of image 1."""
    truth = eccv_truth()
    i2t = {image: [caption_id(image, 1), caption_id(image, 0)] for image in IMAGES}
    t2i = {caption_id(image, n): [image] for image in IMAGES for n in (0, 1)}
    truth.coco_gts = {"i2t": i2t, "t2i": t2i}
    more = {**i2t, IMAGES[0]: [*i2t[IMAGES[0]], caption_id(IMAGES[1], 0)]}
    back = {**t2i, caption_id(IMAGES[1], 0): [IMAGES[1], IMAGES[0]]}
    truth.eccv_gts = {"i2t": more, "t2i": {c: back[c] for c in list(back)[:4]}}
    truth.cxc_gts = {"i2t": more, "t2i": back}
    return truth


@pytest.fixture
def dataset():
    """What LAVIS's coco_retrieval gives: captions in another order than COCO's, and one more than the package knows."""
    captions = [[text(image, 1).strip(), text(image, 0)] for image in IMAGES]
    captions[2].append("a sixth caption, which nobody annotated")
    return SimpleNamespace(
        image=[f"val2014/COCO_val2014_{image:012d}.jpg" for image in IMAGES],
        annotation=[{"caption": c} for c in captions],
        text=[c for of_image in captions for c in of_image],
        img2txt={0: [0, 1], 1: [2, 3], 2: [4, 5, 6]},
    )


@pytest.fixture
def captions(tmp_path) -> Path:
    rows = [{"id": caption_id(image, n), "image_id": image, "caption": text(image, n)} for image in IMAGES for n in (0, 1)]
    rows.append({"id": 1, "image_id": 2, "caption": "of the training split"})
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"annotations": rows}))
    return path


def test_ids_are_found_by_image_and_text(dataset, captions, truth):
    gallery = coco_gallery(dataset, captions, truth)
    assert gallery.image_id == IMAGES
    columns = dict(zip(gallery.caption_id, gallery.text.tolist(), strict=True))
    assert columns == {caption_id(image, n): 2 * i + 1 - n for i, image in enumerate(IMAGES) for n in (0, 1)}


def test_our_own_retrieval_set_serves_as_well(dataset, captions, truth):
    """There, equal captions are one text: both ids point to its column."""
    rows = json.loads(captions.read_text())
    rows["annotations"][1]["caption"] = text(IMAGES[0], 0).upper()
    captions.write_text(json.dumps(rows))
    raw = [text(IMAGES[0], 0), *(text(image, n) for image in IMAGES[1:] for n in (0, 1))]
    own = SimpleNamespace(image=dataset.image, raw_text=raw, img2txt={0: [0], 1: [1, 2], 2: [3, 4]})
    assert coco_gallery(own, captions, truth).text.tolist() == [0, 0, 1, 2, 3, 4]


def test_metrics_are_those_of_the_same_truth_as_a_matrix(dataset, captions, truth, capsys):
    generator = torch.Generator().manual_seed(1)
    i2t, t2i = torch.randn(3, 7, generator=generator), torch.randn(7, 3, generator=generator)
    gallery = coco_gallery(dataset, captions, truth)
    found = eccv_metrics(i2t, t2i, gallery, truth)
    relevant = torch.zeros(3, 6, dtype=torch.bool)
    column = {c: j for j, c in enumerate(gallery.caption_id)}
    for image, texts in truth.cxc_gts["i2t"].items():
        relevant[IMAGES.index(image), [column[c] for c in texts]] = True
    wanted = retrieval_metrics(i2t[:, gallery.text], t2i[gallery.text], relevant)
    assert found["tr_eccv_map_at_r"] == pytest.approx(wanted["tr_map_at_r"], abs=1e-4)
    assert found["tr_eccv_r_precision"] == pytest.approx(wanted["tr_r_precision"], abs=1e-4)
    assert found["tr_eccv_r1"] == pytest.approx(wanted["tr_r1"], abs=1e-4)
    for k in (1, 5, 10):
        assert found[f"tr_cxc_r{k}"] == pytest.approx(wanted[f"tr_r{k}"], abs=1e-4)
        assert found[f"ir_cxc_r{k}"] == pytest.approx(wanted[f"ir_r{k}"], abs=1e-4)
    asked = [column[c] for c in truth.eccv_gts["t2i"]]  # ECCV Caption asks for some captions only
    some = retrieval_metrics(i2t[:, gallery.text][:, asked], t2i[gallery.text][asked], relevant[:, asked])
    assert found["ir_eccv_map_at_r"] == pytest.approx(some["ir_map_at_r"], abs=1e-4)
    assert capsys.readouterr().err == ""


def test_the_packages_own_annotations_work_offline():
    """Those of 5,000 images and 25,000 captions, 500 of them ranked, with a ranking that is perfect for COCO's own pairs."""
    truth = eccv_truth()
    assert (len(truth.coco_gts["i2t"]), len(truth.coco_gts["t2i"])) == (5000, 25000)
    images = [*truth.eccv_gts["i2t"]][:500]
    place = {image: i for i, image in enumerate(images)}
    texts = [caption for caption, (image, *_) in truth.coco_gts["t2i"].items() if image in place]
    known = truth.eccv_gts, truth.cxc_gts
    truth.eccv_gts, truth.cxc_gts = ({"i2t": _of(k["i2t"], place), "t2i": _of(k["t2i"], {*texts})} for k in known)
    own = torch.tensor([place[truth.coco_gts["t2i"][c][0]] for c in texts])
    i2t = torch.zeros(len(images), len(texts))
    i2t[own, torch.arange(len(texts))] = 1.0
    found = eccv_metrics(i2t, i2t.T.contiguous(), CocoGallery(images, texts, torch.arange(len(texts))), truth)
    assert found["tr_cxc_r1"] > 95 and found["ir_cxc_r1"] > 95
    assert found["tr_eccv_map_at_r"] < 50  # five right captions first, but ECCV Caption knows 18 on average


def _of(known: dict[int, list[int]], asked: Collection[int]) -> dict[int, list[int]]:
    return {query: ids for query, ids in known.items() if query in asked}


def test_wrong_files_are_one_message(dataset, captions, truth, tmp_path):
    with pytest.raises(UserError, match="run.coco_captions is .*cannot be read"):
        coco_gallery(dataset, tmp_path / "none.json", truth)
    for content in ("not json", "[1]", '{"images": []}', '{"annotations": [{"id": 1}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="not COCO's captions_val2014.json"):
            coco_gallery(dataset, tmp_path / "bad.json", truth)
    with pytest.raises(UserError, match="25000 of the 25000 captions of ECCV Caption are not"):
        coco_gallery(dataset, captions)  # the package's whole COCO
    dataset.annotation[0]["caption"][0] = "another caption"
    with pytest.raises(UserError, match="1 captions are not among those of the test split"):
        coco_gallery(dataset, captions, truth)
    dataset.image[0] = "flickr/nothing.jpg"
    with pytest.raises(UserError, match="not one of COCO's"):
        coco_gallery(dataset, captions, truth)


def test_the_task_adds_them_on_the_test_split_only(dataset, captions, truth, monkeypatch, tmp_path):
    from lavis.common.registry import registry
    from lavis.tasks.base_task import BaseTask

    from lavis_mafa.config.schema import RunBlock
    from lavis_mafa.tasks import retrieval_metrics as eccv
    from lavis_mafa.tasks.pretrain import MafaPretrainTask

    monkeypatch.setattr(eccv, "eccv_truth", lambda: truth)
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: {"coco_retrieval": {"test": dataset}})
    task = MafaPretrainTask(RunBlock(coco_captions=str(captions), evaluate=True))
    task.build_datasets(SimpleNamespace(model_cfg={}, datasets_cfg={}))
    scores = torch.randn(3, 7).numpy()
    result = {"i2t": scores, "t2i": scores.T.copy(), "relevant": torch.ones(3, 7, dtype=torch.bool), "dataset": dataset}
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path))
    assert "tr_eccv_map_at_r" in task.after_evaluation(result, split_name="test", epoch=0)
    assert "tr_eccv_map_at_r" not in task.after_evaluation(result, split_name="val", epoch=0)
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: {"coco_caption": {"train": []}})
    with pytest.raises(UserError, match="no test split"):
        task.build_datasets(SimpleNamespace(model_cfg={}, datasets_cfg={}))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(UserError, match=r"pip install lavis-mafa\[coco\]"):
        eccv_truth()
