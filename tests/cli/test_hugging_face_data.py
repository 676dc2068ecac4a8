"""What Hugging Face's own `datasets` writes is read without it: saved folders, splits, image folders and the hub's Parquet."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lavis_mafa.cli.main import main
from lavis_mafa.config.data import AnnotationFile, files_of
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.stored import image_source
from lavis_mafa.errors import UserError
from shard_files import caption, jpeg, write_files

COUNT = 8
NAMES = {"image": "file_name", "caption": "text"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The same pairs in every layout."""
    folder = tmp_path_factory.mktemp("hugging_face")
    write_files(folder, COUNT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "home/datasets"))
        import datasets

        datasets.disable_progress_bars()
        texts = [caption(number) for number in range(COUNT)]
        kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        content = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(COUNT)]
        of_bytes = datasets.Dataset.from_dict({"image": content, "caption": texts}, features=kinds)
        of_bytes.save_to_disk(folder / "whole")
        of_bytes.save_to_disk(folder / "shards", num_shards=3)
        of_bytes.select(range(COUNT)[::-1]).save_to_disk(folder / "reversed")
        datasets.DatasetDict({"train": of_bytes, "val": of_bytes.select(range(2))}).save_to_disk(folder / "splits")
        of_bytes.to_parquet(folder / "bytes.parquet")
        paths = [str(folder / f"images/{number:09}.jpg") for number in range(COUNT)]
        of_paths = datasets.Dataset.from_dict({"image": paths, "caption": texts}, features=kinds)
        of_paths.save_to_disk(folder / "of_paths")
        of_paths.to_parquet(folder / "paths.parquet")
        rows = [{"file_name": os.path.basename(path), "text": text} for path, text in zip(paths, texts, strict=True)]
        (folder / "images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = datasets.load_dataset("imagefolder", data_dir=str(folder / "images"), split="train", cache_dir=str(folder / "home"))
        read.save_to_disk(folder / "image_folder")
    return folder


def pairs(*files: AnnotationFile, root: Path) -> list[tuple[bytes, str]]:
    table = read_annotations(files)
    return [(image_source(root, table, row).read_bytes(), *table["caption"][row].as_py()) for row in range(len(table))]


WANTED = [(jpeg(number), caption(number)) for number in range(COUNT)]


@pytest.mark.parametrize("layout", ["whole", "shards", "reversed", "splits/train", "of_paths", "image_folder"])
def test_a_saved_folder_is_read_as_it_is(saved, layout):
    columns = {"caption": "text"} if layout == "image_folder" else {}
    found = pairs(*(AnnotationFile(file, None, columns) for file in files_of(saved / layout, "storage")), root=saved)
    assert (found[::-1] if layout == "reversed" else found) == WANTED


def test_an_image_folder_is_annotations_of_other_names(saved, tmp_path):
    (file,) = files_of(saved / "images", "storage")
    assert pairs(AnnotationFile(file, None, NAMES), root=saved / "images") == WANTED
    flags = ["--image", "file_name", "--caption", "text", "--images", str(saved / "images")]
    assert main(["pack", str(saved / "images"), *flags, "--output", str(tmp_path / "a.arrow")]) == 0
    assert pairs(AnnotationFile(tmp_path / "a.arrow"), root=tmp_path) == WANTED


@pytest.mark.parametrize("layout", ["shards", "bytes.parquet"])
def test_any_of_them_is_packed(saved, tmp_path, layout):
    assert main(["pack", str(saved / layout), "--output", str(tmp_path / "a.arrow")]) == 0
    assert pairs(AnnotationFile(tmp_path / "a.arrow"), root=tmp_path) == WANTED


def test_what_is_no_list_of_images_says_what_to_do(saved, tmp_path, capsys):
    with pytest.raises(UserError, match=r"holds several splits, as .* saves them; name one: .*/splits/train, .*/splits/val\."):
        files_of(saved / "splits", "storage")
    with pytest.raises(UserError, match=r"allowed: text. Image bytes are packed first: lavis-mafa pack .*bytes.parquet --output"):
        read_annotations([saved / "bytes.parquet"])
    assert main(["pack", str(saved / "paths.parquet"), "--output", str(tmp_path / "a.arrow")]) == 2
    assert "the tables hold paths of images, without bytes" in capsys.readouterr().err and not (tmp_path / "a.arrow").exists()


def test_training_reads_a_saved_folder(saved, tmp_path, run_of):
    (tmp_path / "run.yaml").write_text(run_of(saved))
    storage, images = (f"datasets.grit_pairs.build_info.{key}.storage" for key in ("annotations.train", "images"))
    found = []
    assert main(["pack", str(saved / "splits/train"), "--output", str(tmp_path / "a.arrow")]) == 0
    for number, given in enumerate((saved / "splits/train", tmp_path / "a.arrow")):
        options = [f"{storage}={given}", f"{images}=null", f"run.output_dir={tmp_path}/{number}", "run.max_steps=2"]
        options += ["model.ecm.enabled=false", "model.discriminator=null"]
        assert main(["train", "--cfg-path", str(tmp_path / "run.yaml"), "--options", *options]) == 0
        (run,) = (tmp_path / str(number)).glob("2*")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([[line[name] for name in sorted(line) if "loss" in name] for line in lines])
    assert found[0] == found[1] and any(map(any, found[0]))
