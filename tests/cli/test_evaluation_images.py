"""Images that evaluation could not use are found before the first step, all of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import Subset

from lavis_mafa.cli.main import main
from lavis_mafa.datasets.pairs import ImageQuestions
from lavis_mafa.errors import UserError
from lavis_mafa.runners import loading
from lavis_mafa.runners.loading import check_evaluation_images, one_row_an_image, unreadable


@pytest.fixture
def val(pairs):
    """Images 0 to 11 as ``val``, of which 3 to 10 are no images."""
    rows = (pairs / "pairs.jsonl").read_text().splitlines()[:12]
    (pairs / "val.jsonl").write_text("\n".join(json.dumps({**json.loads(row), "image": f"v{n}.png"}) for n, row in enumerate(rows)))
    for number in range(12):
        image = (pairs / f"images/{number}.png").read_bytes()
        (pairs / f"images/v{number}.png").write_bytes(image[:-30] if 3 <= number <= 10 else image)
    (pairs / "images/v5.png").unlink()
    return f"datasets.grit_pairs.build_info.annotations.val.storage={pairs}/val.jsonl"


@pytest.mark.parametrize("key", ["run.valid_splits", "run.test_splits"])
def test_bad_images_are_listed_before_anything_is_trained(run_yaml, refused, val, tmp_path, key):
    said = refused("train", "--cfg-path", run_yaml, "--options", f"{key}=[val]", val)
    (run,) = (tmp_path / "output").glob("2*")
    assert "8 of the images to evaluate cannot be used" in said and "(and 3 more, all in " in said
    assert all(f"v{number}.png" in said for number in (3, 4, 5, 6, 7)) and "No such file or directory" in said
    listed = [json.loads(line) for line in (run / "bad_evaluation_images.jsonl").open()]
    assert [line["image"].rsplit("/", 1)[1] for line in listed] == [f"v{number}.png" for number in range(3, 11)]
    assert not (run / "metrics.jsonl").exists() and not list(run.glob("*.pth"))


def test_what_is_not_evaluated_is_not_read(run_yaml, val):
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.max_steps=1", val]) == 0


def test_workers_find_the_same_and_ranks_share_the_images(pairs, monkeypatch):
    monkeypatch.setattr(loading, "FEW", 3)
    (pairs / "images/7.png").write_text("no image")
    table = pa.table({"image": [f"{n // 2}.png" for n in range(40)], "question": ["what?"] * 40, "answer": [["a"]] * 40})
    dataset = ImageQuestions(lambda image: torch.zeros(1), str, pairs / "images", table)
    assert one_row_an_image(dataset) == list(range(0, 40, 2))
    before = torch.get_rng_state()
    alone = [unreadable(dataset, "val", workers) for workers in (0, 2)]
    assert torch.equal(torch.get_rng_state(), before), "the run that follows draws the same numbers"
    assert alone[0] == alone[1] and [image["image"] for image in alone[0]] == [f"{pairs}/images/7.png"]
    assert unreadable(Subset(dataset, [3, 15]), "val", 0) == alone[0], "of a part of the data too"
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        assert len(unreadable(dataset, "val", 0)) == (rank == 1)


def test_a_data_set_that_does_not_tell_its_files_is_read_row_by_row():
    rows = []

    class Rows(list):
        def __getitem__(self, row: int) -> dict:
            rows.append(row)
            if row == 1:
                raise OSError("torn")
            return {}

    assert unreadable(Rows([0, 1, 2]), "val", 0) == [{"image": None, "reason": "torn"}] and rows == [0, 1, 2]
    assert unreadable(SimpleNamespace(), "val", 0) == []


def test_a_torn_image_of_lavis_sets_is_told_and_an_error_of_the_program_raised(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS's modules set it
    (pairs / "images/1.png").write_bytes((pairs / "images/1.png").read_bytes()[:-30])

    class Opened(list):
        def __getitem__(self, row: int) -> torch.Tensor:
            return torch.tensor(list(Image.open(pairs / f"images/{row}.png").convert("RGB").getdata()))

    (torn,) = unreadable(Opened([0, 1, 2]), "val", 0)
    assert "truncated" in torn["reason"]
    with pytest.raises(UserError, match="^1 of the images to evaluate cannot be used"):  # one split, though it is named twice
        check_evaluation_images({"val": Opened([0, 1, 2])}, ["val", "val"], 0, tmp_path)

    class Broken(list):
        def __getitem__(self, row: int) -> int:
            raise ValueError("not of a file")

    with pytest.raises(ValueError, match="not of a file"):
        unreadable(Broken([0]), "val", 0)
