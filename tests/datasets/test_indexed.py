"""The training set as GRIT sees it: seeds per sample, image keys, and what stands in for a sample that cannot be read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.processors.blip_processors import BlipCaptionProcessor
from PIL import Image, PngImagePlugin
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from lavis_mafa.datasets.indexed import BadSample, IndexedDataset, image_keys, seeded
from lavis_mafa.errors import EmptyCaption


class Draws(Dataset):
    """Every sample is what the three generators give; samples in ``bad`` cannot be read."""

    def __init__(self, size: int = 8, bad: dict[int, Exception] | None = None) -> None:
        self.size, self.bad = size, bad or {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if index in self.bad:
            raise self.bad[index]
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"image": torch.tensor(drawn, dtype=torch.float64), "text_input": f"text {index}"}

    def collater(self, samples: list[dict]) -> dict:
        return default_collate(samples)


def by_index(dataset: IndexedDataset, order: list[int], workers: int = 0) -> dict[int, list[float]]:
    loader = DataLoader(dataset, batch_size=3, sampler=order, num_workers=workers, collate_fn=dataset.collate)
    return {int(i): image.tolist() for batch in loader for i, image in zip(batch["index"], batch["image"], strict=True)}


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    dataset = IndexedDataset(Draws(), seed=3)
    first = by_index(dataset, list(range(8)))
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert by_index(dataset, [5, 2, 7, 0, 1, 6, 3, 4]) == first
    assert by_index(dataset, list(range(8)), workers=2) == first
    assert len({tuple(drawn) for drawn in first.values()}) == 8
    dataset.set_epoch(1)
    other_epoch = by_index(dataset, list(range(8)))
    other_seed = by_index(IndexedDataset(Draws(), seed=4), list(range(8)))
    for index in range(8):
        assert first[index] != other_epoch[index] and first[index] != other_seed[index]


def test_seeding_a_sample_leaves_the_generators_as_they_were():
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = [draw(), draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    found = [draw()]
    with seeded(0, 0, 0):
        draw()
    with pytest.raises(ValueError), seeded(0, 0, 1):
        draw()
        raise ValueError
    assert [*found, draw()] == expected


class Keyed(Draws):
    def __init__(self, keys: list[int]) -> None:
        super().__init__(len(keys))
        self.image_keys = torch.tensor(keys)


class LikeLavis(Draws):
    def __init__(self, annotation: list[dict]) -> None:
        super().__init__(len(annotation))
        self.annotation = annotation


def test_keys_come_from_the_data_set_from_lavis_annotations_or_are_all_different():
    assert image_keys(Keyed([4, 4, 2])).tolist() == [4, 4, 2]
    by_id = LikeLavis([{"image_id": n} for n in ("x", "y", "x")])
    assert image_keys(by_id).tolist() == [0, 1, 0]
    by_path = LikeLavis([{"image": n, "image_id": i} for n, i in (("a.jpg", 1), ("a.jpg", None), ("b.jpg", ""))])
    assert image_keys(by_path).tolist() == [0, 0, 1]
    assert image_keys(Draws(3)).tolist() == [0, 1, 2]


def test_keys_of_concatenated_data_sets_never_collide():
    """Naively: rows share a key exactly when they are in the same data set and share it there."""
    parts = [[0, 0, 1], [0, 1, 1, 5], [2]]
    joined = ConcatDataset([ConcatDataset([Keyed(parts[0]), Keyed(parts[1])]), Keyed(parts[2])])
    keys = image_keys(joined).tolist()
    rows = [(number, key) for number, part in enumerate(parts) for key in part]
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            assert (keys[i] == keys[j]) == (one == other)


def test_a_bad_sample_is_replaced_by_the_next_of_its_batch_and_reported():
    dataset = IndexedDataset(Draws(bad={1: OSError("gone"), 2: EmptyCaption("no word"), 5: OSError("torn")}))
    samples = dataset.__getitems__([0, 1, 2, 3, 4, 5])
    assert [s["index"] for s in samples] == [0, 3, 3, 3, 4, 0]
    batch = dataset.collate(samples)
    assert batch["bad_samples"] == [
        {"index": 1, "reason": "OSError: gone"},
        {"index": 2, "reason": "EmptyCaption: no word"},
        {"index": 5, "reason": "OSError: torn"},
    ]
    assert batch["index"].tolist() == [0, 3, 3, 3, 4, 0] and len(batch["image"]) == len(batch["text_input"]) == 6


def test_a_data_set_that_is_all_bad_says_so_and_holds_nothing_else():
    dataset = IndexedDataset(Draws(2, bad={0: OSError("gone"), 1: OSError("gone too")}))
    samples = dataset.__getitems__([0, 1])
    assert all(isinstance(s, BadSample) for s in samples)
    expected = [{"index": 0, "reason": "OSError: gone"}, {"index": 1, "reason": "OSError: gone too"}]
    assert dataset.collate(samples) == {"bad_samples": expected}


def test_an_error_of_the_program_is_not_a_bad_sample():
    dataset = IndexedDataset(Draws(bad={0: KeyError("a bug")}))
    with pytest.raises(KeyError):
        dataset.__getitems__([0, 1])


def test_a_batch_has_the_data_sets_keys_and_ours():
    dataset = IndexedDataset(Keyed([0, 1, 1, 7]))
    batch = dataset.collate(dataset.__getitems__([3, 1]))
    assert set(batch) == {"image", "text_input", "index", "image_key"}
    assert batch["index"].tolist() == [3, 1] and batch["image_key"].tolist() == [7, 1]
    assert batch["index"].dtype == batch["image_key"].dtype == torch.long
    assert batch["text_input"] == ["text 3", "text 1"]


def test_a_bad_sample_names_its_image_where_the_data_set_does():
    class Named(Draws):
        def image_path(self, index: int) -> str:
            return f"/images/{index}.png"

    class OfLavis(LikeLavis):
        vis_root = "/lavis"

    gone = {1: OSError("gone")}
    named, lavis, silent = Named(3, gone), OfLavis([{"image": "a.jpg"}, {"image": "b.jpg"}]), Draws(2, gone)
    lavis.bad = gone
    data = IndexedDataset(ConcatDataset([named, ConcatDataset([lavis, silent])]))
    bad = [sample["bad_samples"][0] for sample in data.__getitems__([0, 1, 4, 6])[1:]]
    assert [(sample["index"], sample.get("image")) for sample in bad] == [(1, "/images/1.png"), (4, "/lavis/b.jpg"), (6, None)]


def test_a_batch_that_is_bad_altogether_takes_the_rows_that_follow():
    """GRIT serves first what it has not seen, so bad samples come together."""

    class Rows(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index in (3, 4, 5):
                raise OSError(f"row {index} is torn")
            return {"value": index}

        def collater(self, samples):
            return default_collate(samples)

    data = IndexedDataset(Rows())
    batch = data.collate(data.__getitems__([3, 5, 4]))
    assert batch["index"].tolist() == [6, 6, 6] and [b["index"] for b in batch["bad_samples"]] == [3, 5, 4]


class OfLavis(Dataset):
    """Opens images and cleans captions as LAVIS's data sets do."""

    def __init__(self, folder: Path, rows: list[tuple[str, str]], prompt: str = "") -> None:
        self.annotation = [{"image": image, "caption": caption} for image, caption in rows]
        self.vis_root, self.text_processor = str(folder), BlipCaptionProcessor(prompt=prompt)

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict:
        row = self.annotation[index]
        image = Image.open(f"{self.vis_root}/{row['image']}").convert("RGB")
        return {"image": image.size, "text_input": self.text_processor(row["caption"])}


def test_what_pil_raises_of_a_file_and_captions_without_a_word_are_bad_samples_of_lavis_too(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("description", "x" * (17 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "text.png", pnginfo=text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [("a.png", "a dog"), ("text.png", "a dog"), ("a.png", ""), ("a.png", "...")]
    data = IndexedDataset(ConcatDataset([OfLavis(tmp_path, rows), OfLavis(tmp_path, rows, prompt="a photo of ")]))
    samples = data.__getitems__(list(range(8)))
    bad = [sample for each in samples for sample in each.get("bad_samples", [])]
    assert [sample["index"] for sample in bad] == [1, 2, 3, 5, 6, 7]
    assert [sample["reason"].split(":")[0] for sample in bad[:3]] == ["ValueError", "EmptyCaption", "EmptyCaption"]


def test_a_single_word_that_is_all_output_says_something():
    class Split(Draws):
        def __getitem__(self, index: int) -> dict:
            return {"text_input": "", "text_output": "dog" if index else "..."}

    first, second = IndexedDataset(Split(2)).__getitems__([0, 1])
    assert first["bad_samples"][0]["index"] == 0 and "bad_samples" not in second


def test_the_second_view_is_the_image_drawn_anew():
    """The first is what it would be without, and both depend on seed, epoch and index alone."""

    class Views:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict:
            return {"image": torch.rand(2), "text_input": f"caption {random.randrange(10**9)}"}

    one, two = IndexedDataset(Views(), seed=3), IndexedDataset(Views(), seed=3, two_views=True)
    for index in (2, 0, 1):
        alone, both = one[index], two[index]
        second = both.pop("image_second_view")
        assert torch.equal(alone.pop("image"), both.pop("image")) and alone == both
        assert torch.equal(second, two[index]["image_second_view"]) and not torch.equal(second, two[index]["image"])
