from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"image": "dog.png", "caption": ["A dog", "A pet"], "concept": "dog"},
    {"image": "cat.png", "caption": "A cat", "concept": "cat"},
    {"image": "dog.png", "caption": "A puppy", "concept": "dog"},
    {"image": "cat.png", "caption": ["A pet", "A cat"], "concept": "cat"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog", "cat"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "a.json").write_text(json.dumps(rows))


def pairs(folder: Path, cls: type = ImageTextPairs, **options: Any) -> Any:
    return cls(pil_to_tensor, str.lower, folder, [folder / "a.json"], **options)


def test_sample_and_batch(folder: Path) -> None:
    data = pairs(folder)
    assert len(data) == 4
    assert data.image_path(1) == folder / "cat.png"
    assert data.captions(0) == ["A dog", "A pet"]
    sample = data[1]
    assert (sample["text_input"], sample["index"], sample["image_key"]) == ("a cat", 1, 1)
    assert sample["concept"] == data.truth.concept_id("cat")
    # The caption as written, before processing.
    assert sample["text_key"] == data.truth.text_key("A cat") >= 0
    batch = data.collater([data[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 4, 4)
    assert batch["text_input"][2] == "a puppy"
    for name in ("index", "image_key", "concept", "text_key"):
        assert batch[name].dtype == torch.int64
    assert batch["image_key"].tolist() == data.image_keys.tolist() == [0, 1, 0, 1]
    assert data.concepts.tolist() == batch["concept"].tolist()


def test_without_concepts_there_is_no_truth(folder: Path) -> None:
    write(folder, [{"image": "dog.png", "caption": "a dog"}])
    data = pairs(folder)
    assert data.truth is None and data.concepts is None
    assert set(data[0]) == {"image", "text_input", "index", "image_key"}
    assert "concept" not in pairs(folder, truth=GroundTruth.from_pairs([("a dog", "dog")]))[0]


def test_captions_are_drawn_by_pythons_random(folder: Path) -> None:
    data = pairs(folder)
    random.seed(0)
    assert {data[0]["text_input"] for _ in range(20)} == {"a dog", "a pet"}
    random.seed(3)
    first = [data[0]["text_input"] for _ in range(9)]
    random.seed(3)
    assert [data[0]["text_input"] for _ in range(9)] == first
    state = random.getstate()
    data[1]
    assert random.getstate() == state


def test_select_and_absolute_paths(folder: Path) -> None:
    write(folder, [{"image": str(folder / "dog.png"), "caption": "a dog"}, *ROWS])
    data = pairs(folder, select=lambda table: table[:1], allow_absolute_paths=True)
    assert len(data) == 1
    assert data[0]["image"].shape == (3, 4, 4)


def test_construction_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        ImageTextPairs(pil_to_tensor, str, folder / "nowhere", [folder / "a.json"])
    write(folder, [{"image": "gone.png", "caption": "a dog"}])
    with pytest.raises(UserError, match=r"row 1: no image at .*gone.png"):
        pairs(folder)


def test_unreadable_images_are_left_to_the_runner(folder: Path) -> None:
    write(folder, [*ROWS, {"image": "gone.png", "caption": "a"}, {"image": "torn.png", "caption": "a"}])
    (folder / "torn.png").write_bytes(b"no image")
    data = pairs(folder)
    for index in (4, 5):
        with pytest.raises(OSError):
            data[index]


def test_transparent_is_white(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[0, 0] = (255, 0, 0, 255)
    Image.fromarray(array).save(tmp_path / "rgba.png")
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("L", (4, 4), 7).save(tmp_path / "l.png")
    image = load_rgb(tmp_path / "rgba.png")
    assert image.mode == "RGB"
    assert [image.getpixel((0, 0)), image.getpixel((1, 1))] == [(255, 0, 0), (255, 255, 255)]
    assert load_rgb(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_rgb(tmp_path / "l.png").getpixel((0, 0)) == (7, 7, 7)


def test_gallery(folder: Path) -> None:
    data = pairs(folder, RetrievalPairs)
    assert data.image == [str(folder / "dog.png"), str(folder / "cat.png")]
    assert data.raw_text == ["A dog", "A pet", "A cat", "A puppy"]
    assert data.text == ["a dog", "a pet", "a cat", "a puppy"]
    assert data.img2txt == {0: [0, 1, 3], 1: [2, 1]}
    assert data.txt2img == {0: [0], 1: [0, 1], 2: [1], 3: [0]}
    assert data.relevant.tolist() == [[True, True, False, True], [False, True, True, False]]
    assert len(data) == 2
    batch = data.collater([data[0], data[1]])
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["index"].tolist() == [0, 1]


def test_gallery_knows_more_than_its_own_pairs_with_a_truth(folder: Path) -> None:
    truth = GroundTruth.from_pairs([("A dog", "dog"), ("A cat", "cat"), ("A cat", "dog")])
    data = pairs(folder, RetrievalPairs, truth=truth)
    # "A cat" holds for the dog by the truth; "A pet", unknown to it, for its own images.
    assert data.relevant.tolist() == [[True, True, True, True], [False, True, True, False]]
    assert data.text_keys.tolist() == [truth.text_key("A dog"), -1, truth.text_key("A cat"), -1]


def test_what_is_written_for_an_image_of_two_concepts_is_right_for_it(folder: Path) -> None:
    write(folder, [{"image": "dog.png", "caption": f"A {name}", "concept": name} for name in ("dog", "cat")])
    assert pairs(folder, RetrievalPairs).relevant.tolist() == [[True, True]]


def test_a_torn_image_is_an_error(tmp_path: Path) -> None:
    """LAVIS sets PIL's switch that would fill the rest with grey."""
    import io

    import lavis  # noqa: F401
    from PIL import Image

    from lavis_mafa.datasets.images import load_rgb

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, format="PNG")
    torn = tmp_path / "torn.png"
    torn.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(OSError, match="truncated"):
        load_rgb(torn)


def test_one_missing_image_at_the_beginning_is_a_bad_sample_and_ten_are_a_wrong_folder(folder: Path) -> None:
    gone = [{"image": "gone.png", "caption": "a dog"}] * 9
    write(folder, [*gone, *ROWS])
    assert len(pairs(folder)) == 13
    write(folder, [*gone, *gone[:1], *ROWS])
    with pytest.raises(UserError, match=r"row 1: no image at .*gone.png"):
        pairs(folder)
    write(folder, [gone[0], *ROWS])
    with pytest.raises(UserError, match="row 1"):  # evaluation replaces nothing
        pairs(folder, RetrievalPairs)
