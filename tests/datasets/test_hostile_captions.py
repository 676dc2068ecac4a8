"""Captions that hold nothing, ten thousand words, other scripts and control characters."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from lavis.processors.blip_processors import BlipCaptionProcessor
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lavis_mafa.datasets.annotations import SHOWN, clean_caption, read_annotations
from lavis_mafa.datasets.indexed import REASON, IndexedDataset
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.errors import EmptyCaption, UserError
from lavis_mafa.processors import AlbefCaptionProcessor

PROCESSORS = [AlbefCaptionProcessor(), AlbefCaptionProcessor(prompt="a photo of "), BlipCaptionProcessor(prompt="a photo of ")]
NOTHING = ["...", "?!", "—", "。、！", "«»", "\x00\x01", "\u200b\u200d", "\u00a0", "-" * 50_000]
SOMETHING = ["dog", "ein Hündchen läuft", "一只狗在沙滩上", "कुत्ता", "كلب على الشاطئ", "🐶", "5 €", "a\x00dog", "e\u0301", "<person>"]


@pytest.mark.parametrize("process", PROCESSORS, ids=["albef", "albef with prompt", "blip with prompt"])
def test_what_says_something(process) -> None:
    for caption in SOMETHING:
        assert clean_caption(process, caption) == process(caption)
    for caption in [*NOTHING, None]:
        with pytest.raises(EmptyCaption) as empty:
            clean_caption(process, caption)
        assert len(str(empty.value)) < 8 * SHOWN


def test_ten_thousand_words_are_cut_at_once() -> None:
    caption = " ".join(f"word{number}" for number in range(10_000))
    begun = time.perf_counter()
    for process in PROCESSORS:
        assert len(clean_caption(process, caption).split()) <= 53
    assert time.perf_counter() - begun < 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, captions: list, name: str = "a.jsonl") -> Path:
    rows = [{"image": "a.png", "caption": caption} for caption in captions]
    text = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("caption", [None, [None], ["a dog", None], [], "", [" "]])
def test_null_and_empty_captions_are_named_by_their_row(folder: Path, name: str, caption) -> None:
    path = write(folder, ["a dog", ["a cat"] if isinstance(caption, list) else "a cat", caption], name)
    with pytest.raises(UserError) as error:
        read_annotations([path])
    assert str(error.value).startswith(f"{path}, row 3: the caption is empty or null")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_character_is_named_by_its_row(folder: Path, name: str) -> None:
    path = write(folder, ["a dog", "a \ud83d dog"], name)
    with pytest.raises(UserError, match=r"row 2: 'caption' is .*\\ud83d.* half of a character"):
        read_annotations([path])


def test_a_caption_without_a_word_is_a_bad_sample(folder: Path) -> None:
    path = write(folder, ["a dog", "!" * 50_000, "一只狗", "word " * 10_000, "nul \x00 and \x07 bell"])
    data = IndexedDataset(ImageTextPairs(pil_to_tensor, AlbefCaptionProcessor(), folder, [path]))
    batch = data.collate(data.__getitems__([0, 1, 2, 3, 4]))
    assert batch["image"].shape == (5, 3, 8, 8) and batch["text_input"][1:3] == ["一只狗"] * 2
    (bad,) = batch["bad_samples"]
    assert bad["index"] == 1 and bad["image"] == str(folder / "a.png")
    assert bad["reason"].startswith("EmptyCaption: The caption '!!!") and bad["reason"].endswith("holds no word.")
    assert len(bad["reason"]) < REASON


def test_evaluation_names_it_instead(folder: Path) -> None:
    path = write(folder, ["a dog", "?!"])
    with pytest.raises(UserError, match=r"a.jsonl: The caption '\?!' holds no word. Evaluation replaces nothing"):
        RetrievalPairs(pil_to_tensor, AlbefCaptionProcessor(), folder, [path])
