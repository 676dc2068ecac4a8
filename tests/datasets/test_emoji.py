from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.datasets.builders import BUILDERS, GritEmojiBuilder, GritPairsBuilder
from lavis_mafa.datasets.emoji import build, build_emoji, drawings, load_emoji_truth
from lavis_mafa.datasets.emoji.build import draw_captions
from lavis_mafa.datasets.emoji.drawings import ARTISTS, code_of, find_drawings
from lavis_mafa.datasets.emoji.texts import Concept, family_of, plain
from lavis_mafa.errors import UserError
from lavis_mafa.processors import PROCESSORS


@pytest.fixture(scope="module", autouse=True)
def processors() -> None:
    registry.mapping["processor_name_mapping"].update(PROCESSORS)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def code(row: dict[str, Any]) -> str:
    return Path(row["image"]).stem


def test_counts_and_files_agree(emoji: Path) -> None:
    summary = json.loads((emoji / "summary.json").read_text())
    assert summary["concepts"] > 1700
    files: set[str] = set()
    for split in ("train", "seen", "unseen"):
        rows = rows_of(emoji, split)
        assert len(rows) == sum(summary["images"][split].values())
        assert len({row["image_id"] for row in rows}) == len(rows)
        assert not files & {row["image"] for row in rows}
        files |= {row["image"] for row in rows}
    assert files == {str(path.relative_to(emoji)) for path in emoji.glob("images/*/*.png")}
    with Image.open(emoji / rows_of(emoji, "train")[0]["image"]) as image:
        assert (image.mode, image.size) == ("RGB", (24, 24))
    card = (emoji / "README.md").read_text()
    assert all(artist.licence in card and artist.attribution in card for artist in ARTISTS)
    assert (emoji / "sheet.png").stat().st_size > 10_000


def test_splits(emoji: Path) -> None:
    train, seen, unseen = (rows_of(emoji, name) for name in ("train", "seen", "unseen"))
    families = {family_of(code(row)) for row in train}
    assert not families & {family_of(code(row)) for row in unseen}
    codes = {code(row) for row in train}
    assert {code(row) for row in seen} <= codes
    assert len({code(row) for row in seen}) == len(seen)
    assert len(seen) == round(0.3 * len(codes))
    assert 0.07 < len({code(row) for row in unseen}) / 1805 < 0.13
    # All drawings of an unseen concept are held out.
    drawn = find_drawings()
    assert len(unseen) == sum(len(drawn[c]) for c in {code(row) for row in unseen})


def test_captions_are_true_and_kinds_are_as_stated(emoji: Path) -> None:
    truth = load_emoji_truth(emoji)
    for name in ("train", "train_captions", "seen", "unseen"):
        rows = rows_of(emoji, name)
        pairs = [(row["concept"], text) for row in rows for text in ([row["caption"]] if name == "train" else row["caption"])]
        concepts = torch.tensor([truth.concept_id(concept) for concept, _ in pairs])
        keys = torch.tensor([truth.text_key(text) for _, text in pairs])
        assert truth.matches(concepts, keys).all()
        kinds = [truth.text_kind(int(key)) for key in keys]
        if name in ("seen", "unseen"):
            assert set(kinds) == {"name", "alias"}
        else:
            # Concepts without an alias or a keyword leave more room for names.
            assert 0.5 < kinds.count("name") / len(kinds) < 0.7
            assert 0.03 < kinds.count("group") / len(kinds) < 0.1
    assert {len(row["caption"]) for row in rows_of(emoji, "train_captions")} == {8}
    assert [r["image"] for r in rows_of(emoji, "train")] == [r["image"] for r in rows_of(emoji, "train_captions")]


def test_truth_by_a_set_and_by_example(emoji: Path) -> None:
    rows = pyarrow.parquet.read_table(emoji / "truth.parquet").to_pylist()
    known = {(row["text"], row["concept"]) for row in rows}
    assert len(known) == len(rows)
    truth = load_emoji_truth(emoji)
    rng = random.Random(1)
    asked = [(rng.choice(rows)["text"], rng.choice(rows)["concept"]) for _ in range(2000)] + sorted(known)[:2000]
    concepts = torch.tensor([truth.concept_id(concept) for _, concept in asked])
    keys = torch.tensor([truth.text_key(text) for text, _ in asked])
    assert truth.matches(concepts, keys).tolist() == [pair in known for pair in asked]

    assert ("person running", "woman running") in known
    assert ("woman running", "person running") not in known
    assert ("bride with veil", "man with veil") not in known
    assert ("person with veil", "man with veil") in known
    assert ("norway", "bouvet island") in known
    assert ("something to do with dog", "dog face") in known  # its alias "dog" is a keyword of others
    assert ("dog", "cat face") not in known
    # "dog" is exact: what merely has to do with dogs does not match it.
    assert {concept for text, concept in known if text == "dog"} == {"dog", "dog face"}


def test_same_seed_same_files_and_a_build_is_reused(emoji: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()  # empty is fine
    build_emoji(again, size=24, progress=False)
    for file in emoji.iterdir():
        if file.is_file():
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    before = (again / "summary.json").stat().st_mtime_ns
    assert build_emoji(again, size=24).concepts > 1700
    assert (again / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="size 24 instead of 32"):
        build_emoji(again, size=32)


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        build_emoji(tmp_path)
    with pytest.raises(UserError, match="size is 8"):
        build_emoji(tmp_path / "new", size=8)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(build, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        build_emoji(tmp_path / "new", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "resvg_py" else find(name, *rest))
    with pytest.raises(UserError, match=r"resvg-py is not installed.*pip install lavis-mafa\[quickstart\]"):
        build_emoji(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_only_free_artwork_without_placeholders_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, content in (("Goog", b"1"), ("Twtr", b"2"), ("Appl", b"3"), ("Sams", b"4")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("U+1F436", "U+1F436-U+1F3FB", "U+2764-U+FE0F"):
            (tmp_path / "data" / folder / f"{name}.png").write_bytes(content)
        (tmp_path / "data" / folder / "U+1F431.png").write_bytes(b"same")
    (tmp_path / "openmoji" / "svg").mkdir(parents=True)
    (tmp_path / "openmoji" / "svg" / "1F431.svg").write_bytes(b"svg")
    monkeypatch.setattr(drawings, "package_folder", lambda name: tmp_path)
    found = find_drawings()
    assert set(found) == {"1F436", "2764"}
    assert {file.parent.name for file in found["1F436"].values()} == {"Goog", "Twtr"}


def test_same_pictures_joins_flags_only(tmp_path: Path) -> None:
    def drawn(name: str, content: str) -> Path:
        file = tmp_path / name
        file.write_text(content)
        return file

    norway, bouvet, svalbard, france = "1F1F3-1F1F4", "1F1E7-1F1FB", "1F1F8-1F1EF", "1F1EB-1F1F7"
    found = {
        norway: {"noto": drawn("n1", "no"), "twemoji": drawn("t1", "no-t")},
        bouvet: {"noto": drawn("n2", "no"), "twemoji": drawn("t2", "bv-t")},
        svalbard: {"noto": drawn("n3", "sj"), "twemoji": drawn("t3", "no-t")},
        france: {"noto": drawn("n4", "fr"), "twemoji": drawn("t4", "no")},
        "1F9D1": {"noto": drawn("n5", "man")},
        "1F468": {"noto": drawn("n6", "man")},
    }
    assert drawings.same_pictures(found) == [{norway, bouvet, svalbard}]


def test_families_and_texts() -> None:
    assert code_of("U+2764-U+FE0F-U+200D-U+1F525") == "2764-200D-1F525"
    assert family_of("1F468-200D-1F469-200D-1F466") == "1F46A"
    assert family_of("1F469-200D-2764-200D-1F48B-200D-1F468") == "1F48F"
    assert family_of("1F3C3-200D-2640") == family_of("1F3C3") == "1F3C3"
    assert family_of("1F1EB-1F1F7") == "1F1EB-1F1F7"
    assert family_of("2640") == "2640"
    assert plain(":Côte_d’Ivoire:") == "côte d'ivoire"
    assert plain(":keycap_#:") == "keycap number sign"
    assert plain("🚓\xa0cop") == "cop"


def test_draws_follow_the_weights() -> None:
    concept = Concept("1", "n", "1", {"name": ["n"], "alias": ["a"], "keyword": ["k"], "group": ["g"]})
    drawn = draw_captions(concept, 20_000, random.Random(0))
    shares = {kind: drawn.count(kind) / len(drawn) for kind in "nakg"}
    assert shares == pytest.approx({"n": 0.5, "a": 0.2, "k": 0.25, "g": 0.05}, abs=0.02)
    concept.texts["alias"], concept.texts["keyword"] = [], []
    assert set(draw_captions(concept, 100, random.Random(0))) == {"n", "g"}


def config(builder: Any, **build_info: Any) -> Any:
    default = OmegaConf.load(builder.default_config_path()).datasets
    (block,) = default.values()
    return OmegaConf.merge(block, {"build_info": build_info})


def test_emoji_builder(emoji: Path) -> None:
    data = GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), captions="drawn")).build_datasets()
    assert {split: len(part) for split, part in data.items()} == {
        "train": len(rows_of(emoji, "train")),
        "val": len(rows_of(emoji, "seen")),
        "test": len(rows_of(emoji, "unseen")),
    }
    assert data["train"].truth is data["val"].truth is data["test"].truth
    assert data["train"][0]["image"].shape == (3, 64, 64)
    relevant = data["val"].relevant
    own = sum(len(texts) for texts in data["val"].img2txt.values())
    assert relevant.sum() >= own

    curated = GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), captions="curated")).build_datasets()["train"]
    assert len(set(zip(curated.image_keys.tolist(), curated.concepts.tolist(), strict=True))) == len(set(curated.image_keys.tolist()))

    small = GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), max_concepts=100)).build_datasets()
    concepts = set(small["train"].table["concept"].to_pylist()) | set(small["test"].table["concept"].to_pylist())
    assert len(concepts) == len(small["train"].truth.concepts) == 100
    assert all(len(captions) == 1 for captions in small["train"].table["caption"].to_pylist())


def test_pairs_builder(emoji: Path) -> None:
    annotations = {"train": {"storage": [str(emoji / "train.jsonl")]}, "val": {"storage": str(emoji / "seen.jsonl")}}
    images = {"storage": str(emoji)}
    data = GritPairsBuilder(config(GritPairsBuilder, annotations=annotations, images=images, max_images=12)).build_datasets()
    assert set(data) == {"train", "val"}
    assert len(data["train"]) == 12
    assert data["train"].truth is not None
    assert data["train"][0]["image"].shape == (3, 256, 256)


@pytest.mark.parametrize(
    ("name", "build_info", "message"),
    [
        ("grit_pairs", {}, "annotations.train.storage is not set"),
        ("grit_pairs", {"annotations": {"train": {"storage": "a.json"}}}, "images.storage is not set"),
        ("grit_pairs", {"annotations": {"trian": {"storage": "a.json"}}}, "annotations.trian is not a key.*Did you mean 'train'?"),
        ("grit_pairs", {"max_image": 3}, "max_image is not a key.*Did you mean 'max_images'?"),
        (
            "grit_pairs",
            {"annotations": {"train": {"storage": "a"}}, "images": {"storage": "."}, "max_images": 0},
            "max_images is 0; allowed",
        ),
        ("grit_emoji", {"captions": "fixd"}, "captions is 'fixd'; allowed: fixed, drawn, curated. Did you mean 'fixed'?"),
        ("grit_emoji", {"root": "/nowhere"}, "lavis-mafa build-emoji /nowhere"),
        ("grit_emoji", {"max_concepts": "all"}, "max_concepts is 'all'; allowed"),
    ],
)
def test_builder_mistakes(name: str, build_info: dict[str, Any], message: str) -> None:
    builder = BUILDERS[name]
    with pytest.raises(UserError, match=message):
        builder(config(builder, **build_info)).build_datasets()


def test_too_few_concepts_and_a_missing_processor(emoji: Path) -> None:
    with pytest.raises(UserError, match="max_concepts is 1, which leaves a split without images"):
        GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), max_concepts=1)).build_datasets()
    block = config(GritEmojiBuilder, root=str(emoji))
    block.vis_processor.eval = None
    with pytest.raises(UserError, match="vis_processor.eval is missing"):
        GritEmojiBuilder(block).build_datasets()
