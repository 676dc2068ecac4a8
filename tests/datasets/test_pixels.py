"""Images that travel as bytes: the model gets what it would without, and whoever computes with images gets floats."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from lavis.processors.blip_processors import BlipImageTrainProcessor
from PIL import Image
from torch.utils.data import DataLoader

from lavis_mafa.datasets.images import Box, ImageError, load_rgb
from lavis_mafa.datasets.indexed import IndexedDataset, seeded
from lavis_mafa.datasets.pairs import ImageTextPairs
from lavis_mafa.datasets.pixels import Bytes
from lavis_mafa.processors import AlbefCaptionProcessor, AlbefImageEvalProcessor, AlbefImageTrainProcessor

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("pixels")
    draw = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path / f"{number}.png")
    rows = ",\n".join(f'{{"image": "{n}.png", "image_id": {n}, "caption": "a dog {n}"}}' for n in range(6))
    (path / "rows.json").write_text(f"[{rows}]")
    return path


def pairs(folder: Path, process: Any = None, kind: Any = ImageTextPairs) -> Any:
    process = process or AlbefImageTrainProcessor(SIDE)
    return kind(process, AlbefCaptionProcessor(), str(folder), [str(folder / "rows.json")])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("scale", [{}, {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}])
def test_a_batch_of_bytes_becomes_the_batch_of_floats_to_the_bit(folder: Path, scale: dict[str, Any], workers: int) -> None:
    given = ConcatDataset([pairs(folder, AlbefImageTrainProcessor(SIDE, **scale), kind) for kind in (ImageTextPairs, CaptionDataset)])
    floats, of_bytes = IndexedDataset(given), IndexedDataset(given, bytes_if_possible=True)
    for data in (floats, of_bytes):
        data.set_epoch(3)
    expected, sent = (next(iter(DataLoader(d, 12, collate_fn=d.collate, num_workers=workers))) for d in (floats, of_bytes))
    assert sent["image"].dtype == torch.uint8 and sent["image"].shape == (12, 3, SIDE, SIDE)
    finished = of_bytes.normalised(sent)
    assert torch.equal(finished["image"], expected["image"]) and floats.normalised(expected) is expected
    assert {key: value for key, value in finished.items() if key != "image"}.keys() == expected.keys() - {"image"}
    assert torch.equal(finished["index"], expected["index"]) and finished["text_input"] == expected["text_input"]
    assert given[0]["image"].dtype == given[6]["image"].dtype == torch.float32, "whoever has the data set itself sees no difference"


class Doubled(AlbefImageTrainProcessor):
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return 2 * super().__call__(image)


class Mixed(ImageTextPairs):
    """Somebody's own: computes with images."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        other = super().__getitem__((index + 1) % len(self))["image"]
        return {**super().__getitem__(index), "image": 0.5 * other}


@pytest.mark.parametrize(
    "parts",
    [
        [(BlipImageTrainProcessor(SIDE), ImageTextPairs)],
        [(AlbefImageEvalProcessor(SIDE), ImageTextPairs)],
        [(Doubled(SIDE), ImageTextPairs)],
        [(None, Mixed)],
        [(None, ImageTextPairs), (BlipImageTrainProcessor(SIDE), CaptionDataset)],
        [(None, ImageTextPairs), (AlbefImageTrainProcessor(SIDE, std=(1, 1, 1)), ImageTextPairs)],
    ],
)
def test_where_that_is_not_certain_images_stay_floats(folder: Path, parts: list[Any]) -> None:
    given = ConcatDataset([pairs(folder, *part) for part in parts])
    data = IndexedDataset(given, bytes_if_possible=True)
    batch = data.collate(data.__getitems__(range(len(data))))
    assert data.dataset is given and batch["image"].dtype == torch.float32 and data.normalised(batch) is batch


def jpeg(path: Path, size: tuple[int, int] = (400, 300), mode: str = "RGB", orientation: int = 1, **options: Any) -> Path:
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    picture = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x * y))], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).convert(mode).save(path, "JPEG", exif=exif, quality=95, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "mode"), [((400, 304), "RGB"), ((400, 304), "L"), ((403, 301), "RGB"), ((397, 305), "CMYK")])
def test_a_large_jpeg_is_decoded_no_larger_than_its_crop_needs(tmp_path: Path, orientation: int, size: Any, mode: str) -> None:
    path = jpeg(tmp_path / "x.jpg", size, mode, orientation, progressive=orientation % 2 == 0)
    whole = load_rgb(path)
    drawn: list[tuple[int, int]] = []

    def crop(found: tuple[int, int]) -> Box:
        drawn.append(found)
        return 21, 33, 21 + 207, 33 + 250

    expected = whole.crop((21, 33, 21 + 207, 33 + 250))
    assert np.array_equal(load_rgb(path, crop, 104), expected), "the crop is not twice as large, so nothing is spared"
    for side, factor in ((103, 2), (52, 2), (51, 4), (20, 8), (1, 8)):
        found = load_rgb(path, crop, side)
        assert abs(found.width - 207 / factor) <= 1 and abs(found.height - 250 / factor) <= 1 and found.mode == "RGB"
        assert min(found.size) >= side
        difference = np.asarray(found.resize((20, 20))).astype(int) - np.asarray(expected.resize((20, 20)))
        # what does not divide by 8 is filled up at its right and lower edge, so that turned it lies up to a pixel beside
        assert np.abs(difference).mean() < (2.5 if size == (400, 304) else 10)
    assert set(drawn) == {whole.size}, "upright, as it was before"


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_of_other_files_the_crop_is_cut_out(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    load_rgb(jpeg(tmp_path / "x.jpg")).save(tmp_path / name, exif=exif)
    whole = load_rgb(tmp_path / name)
    assert whole.size == (300, 400)
    assert np.array_equal(load_rgb(tmp_path / name, lambda size: (9, 8, *size), 4), whole.crop((9, 8, 300, 400)))


def test_a_torn_jpeg_is_refused_at_any_size(tmp_path: Path) -> None:
    path = jpeg(tmp_path / "x.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    for side in (400, 100, 1):
        with pytest.raises(ImageError, match=r"x\.jpg.*truncated"):
            load_rgb(path, lambda size: (0, 0, *size), side)


def test_reading_a_file_draws_what_processing_its_image_does(tmp_path: Path) -> None:
    """So that a sample is what it was, as long as its crop is not far larger than what becomes of it."""
    process = Bytes(AlbefImageTrainProcessor(200))
    path = jpeg(tmp_path / "x.jpg")
    for index in range(10):
        with seeded(0, 0, index):
            expected = process(load_rgb(path)), random.random(), np.random.rand(), torch.rand(())
        with seeded(0, 0, index):
            found = process.read(path), random.random(), np.random.rand(), torch.rand(())
        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def test_it_can_be_sent_to_a_worker_that_was_spawned(folder: Path) -> None:
    data = IndexedDataset(pairs(folder), bytes_if_possible=True)
    sent = io.BytesIO()
    pickle.dump((data.dataset, data._normalise), sent)
    dataset, normalise = pickle.loads(sent.getvalue())
    with seeded(0, 0, 0):
        found = normalise(dataset[0]["image"])
    with seeded(0, 0, 0):
        assert torch.equal(found, pairs(folder)[0]["image"])
