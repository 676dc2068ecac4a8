"""Image paths stay below the image folder, unless the configuration says otherwise."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.datasets.annotations import leaves_folder, read_annotations, shown
from lavis_mafa.datasets.builders import GritPairsBuilder, GritVqaBuilder
from lavis_mafa.errors import UserError

INSIDE = ["a.png", "a/b.png", "./a.png", "a..b/..c.png", "...", "a/.../b.png", "ab:c.png", "a~b.png", "..a", "~/a.png"]
OUTSIDE = ["/a.png", "../a.png", "a/../b.png", "a/..", "..", "a\\..\\b.png", "\\\\host\\a.png", "C:\\a.png", "c:/a.png"]


def test_inside_and_outside() -> None:
    images = pa.chunked_array([INSIDE, OUTSIDE, [None]], pa.string())
    assert leaves_folder(images).to_pylist() == [False] * len(INSIDE) + [True] * len(OUTSIDE) + [None]


def test_a_path_is_shown_in_one_line() -> None:
    assert [shown(path) for path in ("a b.png", "猫.png", "a\nb.png")] == ["a b.png", "猫.png", r"'a\nb.png'"]


def write(path: Path, images: list[str]) -> Path:
    rows = [{"image": image, "caption": "a dog", "question": "what?", "answer": "dog"} for image in images]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("image", OUTSIDE)
def test_file_and_row_are_named_in_the_second_file_too(tmp_path: Path, image: str) -> None:
    first, second = write(tmp_path / "a.jsonl", INSIDE), write(tmp_path / "b.jsonl", ["a.png", image, image])
    assert read_annotations([first]).num_rows == len(INSIDE)
    with pytest.raises(UserError) as error:
        read_annotations([first, second])
    assert str(error.value).startswith(f"{second}, row 2: image is {image!r}")
    assert "build_info.images.allow_absolute_paths is true" in str(error.value)
    assert read_annotations([first, second], allow_absolute_paths=True).num_rows == len(INSIDE) + 3


@pytest.mark.parametrize(("builder", "split"), [(GritPairsBuilder, "train"), (GritPairsBuilder, "val"), (GritVqaBuilder, "test")])
def test_the_builders_refuse_and_allow(tmp_path: Path, builder, split: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    file = write(tmp_path / "a.jsonl", [str(tmp_path / "a.png"), "../a.png"])

    def build(**images):
        default = next(iter(OmegaConf.load(builder.default_config_path()).datasets.values()))
        info = {"annotations": {split: {"storage": str(file)}}, "images": {"storage": str(tmp_path / "images"), **images}}
        return builder(OmegaConf.merge(default, {"build_info": info})).build_datasets()[split]

    with pytest.raises(UserError, match="row 1: image is '/"):
        build()
    data = build(allow_absolute_paths=True)
    assert all(data[index]["image"].ndim == 3 for index in range(len(data)))
    with pytest.raises(UserError, match="images.allow_absolute_paths is 'maybe'; allowed: true, false"):
        build(allow_absolute_paths="maybe")
    with pytest.raises(UserError, match="Did you mean 'allow_absolute_paths'?"):
        build(allow_absolute_path=True)


def test_five_million_paths_take_seconds() -> None:
    """A tenth of them here."""
    images = pa.chunked_array([pa.array([f"part{number % 97}/{number:09d}.jpg" for number in range(500_000)])])
    begun = time.perf_counter()
    assert not any(leaves_folder(images).unique().to_pylist())
    assert time.perf_counter() - begun < 2
