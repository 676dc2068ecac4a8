"""LAVIS's own data sets with the annotations that people give them: the right images and texts, or one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset  # noqa: F401 - fills the registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.datasets.indexed import image_keys
from lavis_mafa.datasets.lavis_rows import check_rows, explained
from lavis_mafa.errors import UserError

ROWS = [{"image": f"{n % 2}.png", "caption": f"text {n}", "image_id": n % 2} for n in range(4)]


def build(folder: Path, name: str, content: Any, split: str = "train") -> Any:
    for number in range(2):
        Image.new("RGB", (8, 8), "red").save(folder / f"{number}.png")
    file = folder / "a.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    block = {
        "data_type": "images",
        "build_info": {"annotations": {split: {"url": str(file), "storage": str(file)}}, "images": {"storage": str(folder)}},
        "vis_processor": {mode: {"name": "blip_image_eval", "image_size": 8} for mode in ("train", "eval")},
        "text_processor": {mode: {"name": "blip_caption"} for mode in ("train", "eval")},
    }
    config = OmegaConf.create({name: block})
    with explained(config):
        data = registry.get_builder_class(name)(config[name]).build()
    check_rows({name: data})
    return data[split]


def changed(row: int, **values: Any) -> list[dict[str, Any]]:
    rows = [{**one, **(values if n == row else {})} for n, one in enumerate(ROWS)]
    return [{key: value for key, value in one.items() if value != "ABSENT"} for one in rows]


@pytest.mark.parametrize("name", ["vg_caption", "coco_caption"])
@pytest.mark.parametrize(
    "ids", [[None] * 4, ["", "", "nan", None], [0, 1, None, 1], [0.0, 1.0, float("nan"), 1.0], [2**64, 1, 2**64, 1]]
)
def test_rows_of_one_path_are_one_image_whatever_their_ids(tmp_path: Path, name: str, ids: list[Any]) -> None:
    data = build(tmp_path, name, [{**row, "image_id": one} for row, one in zip(ROWS, ids, strict=True)])
    assert image_keys(data).tolist() == [0, 1, 0, 1]


def test_ids_may_be_missing_where_lavis_does_not_ask_for_them(tmp_path: Path) -> None:
    assert image_keys(build(tmp_path, "vg_caption", changed(2, image_id="ABSENT"))).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("coco_caption", changed(2, image_id="ABSENT"), "a.json, row 3: image_id is missing"),
        ("coco_caption", changed(2, image_id=[1]), r"a.json, row 3: image_id is \[1\]; allowed: text or a whole number"),
        ("vg_caption", changed(2, image_id=[1]), r"row 3 of its annotations: image_id is \[1\]; allowed: text or a whole number"),
        ("vg_caption", changed(2, image_id={"a": 1}), "row 3 of its annotations: image_id is"),
        ("vg_caption", changed(3, image_id=0), "row 4 .*: image_id '0' is that of '1.png' here, but of '0.png' in row 1"),
        ("vg_caption", [ROWS[0], None], "a.json, row 2: None is not an object"),
        ("vg_caption", {"annotations": ROWS}, "a.json holds {'annotations'.*; allowed: a list of objects"),
        ("vg_caption", "[{", "a.json: not valid JSON"),
        ("vg_caption", changed(1, image="ABSENT"), "split 'train', row 2 of its annotations: image is missing; allowed: a text"),
        ("vg_caption", [{"file": "0.png", "caption": "a"}], "row 1 of its annotations: image is missing"),
        ("vg_caption", changed(1, caption=["a", "b"]), r"row 2 of its annotations: caption is \['a', 'b'\]; allowed: a text"),
        ("vg_caption", changed(1, caption=None), "row 2 of its annotations: caption is missing"),
        ("coco_retrieval", [{"image": "0.png", "caption": "a dog"}], "row 1 .*: caption is 'a dog'; allowed: a list of texts"),
        ("coco_retrieval", [{"image": "0.png", "caption": ["a", None]}], "row 1: caption is .*; allowed: a text, in a gallery"),
        ("coco_retrieval", [{"image": "0.png", "caption": ["a"]}, {"image": "1.png"}], "a.json, row 2: caption is missing"),
    ],
)
def test_what_a_row_lacks_is_one_message(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        image_keys(build(tmp_path, name, content, "val" if name == "coco_retrieval" else "train"))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_downloaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text("[]")
    files = {split: {"storage": [str(tmp_path / f"{name}.json")]} for split, name in (("train", "here"), ("val", "gone"))}
    config = OmegaConf.create({"coco_caption": {"build_info": {"annotations": files}}})
    message = "coco_caption.build_info.annotations.val.storage: .*gone.json is not there, and cannot be downloaded here .no name"
    with pytest.raises(UserError, match=message), explained(config):
        raise URLError("no name")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyError, match="of the program"), explained(OmegaConf.create({"vg_caption": {}})):
        raise KeyError("of the program")
