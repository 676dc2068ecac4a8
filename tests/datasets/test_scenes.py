from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.datasets.builders import GritScenesBuilder
from lavis_mafa.datasets.emoji.drawings import ARTISTS, find_drawings
from lavis_mafa.datasets.scenes import build
from lavis_mafa.datasets.scenes.build import build_scenes
from lavis_mafa.datasets.scenes.concepts import NOUNS
from lavis_mafa.datasets.scenes.views import VIEWS
from lavis_mafa.datasets.scenes.world import COLOURS, World, draw_scene, tell
from lavis_mafa.errors import UserError
from lavis_mafa.processors import PROCESSORS

Row = dict[str, Any]
SPLITS = ("train", "val", "test", "unseen")
# few sorts, so that texts come back
FULL = World(10, 4, (1, 4), 48, 2, (1, 3), relations=0.5, counts=0.7, plates=0.6, grounds=0.4, wrong=0.25)
SMALL = World(6, 2, size=24)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of a world that has everything."""
    folder = tmp_path_factory.mktemp("scenes") / "full"
    build_scenes(folder, FULL, train=120, test=60, progress=False)
    return folder


def rows(folder: Path, name: str) -> list[Row]:
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def of_each_split(folder: Path, view: str) -> list[Row]:
    return [row for split in SPLITS for row in rows(folder, f"{view}_{split}")]


@pytest.fixture(scope="module")
def pictures(full: Path) -> dict[str, Row]:
    """Path of a picture -> its row."""
    return {row["image"]: row for split in SPLITS for row in rows(full, split)}


# --- the truth, once more, from boxes alone ------------------------------------------------------------------------------

NAMES = {noun.name for noun in NOUNS}
SINGULAR = {noun.plural: noun.name for noun in NOUNS}


def middle(box: Row) -> tuple[float, float]:
    return (box["left"] + box["right"]) / 2, (box["top"] + box["bottom"]) / 2


def is_at(place: str, one: Row, other: Row) -> bool:
    (x, y), (a, b) = middle(one), middle(other)
    across, down = abs(x - a), abs(y - b)
    plain = across > max(down, FULL.size / 5) if place.endswith(" of") else down > max(across, FULL.size / 5)
    return plain and further(place, one, other)


def further(place: str, one: Row, other: Row) -> bool:
    (x, y), (a, b) = middle(one), middle(other)
    return {"left of": x < a, "right of": x > a, "above": y < b, "below": y > b}[place]


def naive_facts(boxes: list[Row]) -> set[str]:
    names = [box["thing"] for box in boxes]
    plural = {noun.name: noun.plural for noun in NOUNS}
    numbers = {2: "two", 3: "three", 4: "four"}
    facts = {*names} | {f"{numbers[names.count(name)]} {plural[name]}" for name in names if names.count(name) > 1}
    facts |= {f"{box['thing']} on {box['plate']}" for box in boxes if box["plate"]}
    for i, one in enumerate(boxes):
        for j, other in enumerate(boxes):
            facts |= {f"{one['thing']} {p} {other['thing']}" for p in ("left of", "above") if i != j and is_at(p, one, other)}
    return facts


def claims(caption: str) -> set[str]:
    """What an English reader takes from a caption."""
    text, _, ground = caption.partition(" in front of ")
    facts = {re.fullmatch(r"an? (\w+ ground)", ground)[1]} if ground else set()
    if place := re.fullmatch(r"an? (\w+) (left of|right of|above|below) an? (\w+)", text):
        one, where, other = place.groups()
        if where in ("right of", "below"):
            one, where, other = other, {"right of": "left of", "below": "above"}[where], one
        return facts | {one, other, f"{one} {where} {other}"}
    for phrase in re.split(", | and ", text):
        if several := re.fullmatch(r"(two|three|four) (\w+)", phrase):
            facts |= {phrase, SINGULAR[several[2]]}
        else:
            article, name, plate = re.fullmatch(r"(an?) (\w+)( on \w+)?", phrase).groups()
            assert (article == "an") == (name[0] in "aeio" or name == "umbrella")
            facts |= {name} | ({name + plate} if plate else set())
    return facts


def test_facts_follow_from_boxes(pictures: dict[str, Row], full: Path) -> None:
    for row in pictures.values():
        (ground,) = [fact for fact in row["facts"] if fact.endswith(" ground")]
        assert {*row["facts"]} == naive_facts(row["boxes"]) | {ground}
        with Image.open(full / row["image"]) as image:  # around clutter and things there is ground nearly everywhere
            colours = Counter(map(tuple, np.asarray(image).reshape(-1, 3)))
        assert colours[COLOURS[ground.removesuffix(" ground")]] > 50
        assert all(
            0 <= box["left"] < box["right"] <= FULL.size and 0 <= box["top"] < box["bottom"] <= FULL.size for box in row["boxes"]
        )


def test_captions_claim_what_they_say_and_hold_except_the_wrong_ones(full: Path) -> None:
    for name in (*SPLITS, "curated"):
        for row in rows(full, name):
            for caption, facts in zip(row["caption"], row["caption_facts"], strict=True):
                assert {*facts} == claims(caption)
                assert ({*facts} <= {*row["facts"]}) != row["wrong"], caption
    wrong = {name: sum(row["wrong"] for row in rows(full, name)) for name in (*SPLITS, "curated")}
    assert wrong == {"train": 0.25 * 120, "val": 0, "test": 0, "unseen": 0, "curated": 0}
    assert [row["image"] for row in rows(full, "curated")] == [row["image"] for row in rows(full, "train")]
    said = " ".join(caption for name in (*SPLITS, "curated") for row in rows(full, name) for caption in row["caption"])
    for words in (" left of ", " right of ", " above ", " below ", " on ", " in front of ", ", ", " and ", "two "):
        assert words in said


def test_splits_hold_out_an_artist_and_concepts(full: Path) -> None:
    summary = json.loads((full / "summary.json").read_text())
    known, unseen = set(summary["concepts"]), set(summary["unseen"])
    assert (len(known), len(unseen), len(known | unseen)) == (10, 4, 14)
    seen: dict[str, dict[str, set[str]]] = {}
    for split in SPLITS:
        boxes = [box for row in rows(full, split) for box in row["boxes"]]
        seen[split] = {key: {box[key] for box in boxes} for key in ("thing", "artist")}
    assert seen["test"]["artist"] == {"twemoji"}
    for split in ("train", "val", "unseen"):
        assert seen[split]["artist"] == {"noto", "openmoji"}
    for split in ("train", "val", "test"):
        assert seen[split]["thing"] <= known
    assert unseen <= seen["unseen"]["thing"] <= known | unseen
    assert all(len(files) == len(ARTISTS) for code, files in find_drawings().items() if code in {noun.code for noun in NOUNS})


# --- views ---------------------------------------------------------------------------------------------------------------


def visible(row: Row, card: Row | None = None) -> set[str]:
    def inside(box: Row, card: Row) -> bool:
        return all(card[a] <= box[a] and box[b] <= card[b] for a, b in (("left", "right"), ("top", "bottom")))

    return {box["thing"] for box in row["boxes"] if card is None or not inside(box, card)}


def thing_of(sentence: str, before: str) -> str | None:
    found = re.fullmatch(f"{before} an? (\\w+)[?]?", sentence)
    return found and found[1]


def answers(question: str, row: Row) -> list[str]:
    """Everything that may be said, in boxes' terms."""
    boxes = row["boxes"]
    names = [box["thing"] for box in boxes]
    if question == "what colour is the ground?":
        return [fact.split()[0] for fact in row["facts"] if fact.endswith(" ground")]
    if question == "how many things are there?":
        return [str(len(boxes))]
    if found := re.fullmatch(r"how many (\w+) are there\?", question):
        return [str(names.count(SINGULAR[found[1]]))]
    if name := thing_of(question, "is there"):
        return ["yes" if name in names else "no"]
    if found := re.fullmatch(r"what colour is the (\w+) on\?", question):
        assert names.count(found[1]) == 1
        return [box["plate"] for box in boxes if box["thing"] == found[1]]
    place, name = re.fullmatch(r"what is (left of|right of|above|below) the (\w+)\?", question).groups()
    (mark,) = [box for box in boxes if box["thing"] == name]
    assert all(is_at(place, box, mark) for box in boxes if further(place, box, mark))
    return [box["thing"] for box in boxes if further(place, box, mark)]


def test_a_question_has_the_one_answer_that_is_right(full: Path, pictures: dict[str, Row]) -> None:
    kinds: Counter[str] = Counter()
    per_text: dict[str, Counter[str]] = defaultdict(Counter)
    for row in of_each_split(full, "questions"):
        assert answers(row["question"], pictures[row["image"]]) == row["answer"]
        kinds[" ".join(word for word in row["question"].split() if word.strip("?") not in NAMES | set(SINGULAR))] += 1
    for split in SPLITS:
        questions = rows(full, f"questions_{split}")
        assert [row["question_id"] for row in questions] == list(range(len(questions)))
        for row in questions:
            per_text[split + row["question"]][row["answer"][0]] += 1
    assert len(kinds) >= 9  # four places, plates, numbers of things and of sorts, grounds, is there
    closed = [told for text, told in per_text.items() if "is there a" in text]
    assert closed and all(told["yes"] == told["no"] for told in closed)


def meant(text: str, boxes: list[Row]) -> list[Row]:
    """The things that an expression may mean; in doubt more."""
    if found := re.fullmatch(r"the (\w+) (left of|right of|above|below) the (\w+)", text):
        name, place, other = found.groups()
        (mark,) = [box for box in boxes if box["thing"] == other]
        return [box for box in boxes if box["thing"] == name and further(place, box, mark)]
    *side, name = text.removeprefix("the ").partition(" on ")[0].split()
    same = [box for box in boxes if box["thing"] == name]
    if side:
        assert len(same) == 2
        at = f"{side[0]} of"
        return [one for one in same if any(is_at(at, one, other) for other in same)]
    return [box for box in same if " on " not in text or text.endswith(f" on {box['plate']}")]


def test_an_expression_holds_for_its_box_alone(full: Path, pictures: dict[str, Row]) -> None:
    found = of_each_split(full, "grounding")
    for row in found:
        boxes = pictures[row["image"]]["boxes"]
        corners = [{key: box[key] for key in row["box"]} for box in boxes]
        assert row["boxes"] == corners
        assert [{key: box[key] for key in row["box"]} for box in meant(row["text"], boxes)] == [row["box"]]
    texts = " ".join(row["text"] for row in found)
    for words in (" on ", " left of ", " below ", "the left ", "the right "):
        assert words in texts


def test_entailment_follows_from_what_is_to_be_seen(full: Path, pictures: dict[str, Row]) -> None:
    by_id = {row["image_id"]: row for row in pictures.values()}
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    hidden = cards = 0
    for split in SPLITS:
        for row in rows(full, f"entailment_{split}"):
            name, scene = thing_of(row["sentence"], "there is"), by_id[row["scene"]]
            assert name is not None
            seen = visible(scene, row["card"])
            assert row["label"] == ("entailment" if name in seen else "neutral" if row["card"] else "contradiction")
            assert len(visible(scene)) - len(seen) <= (row["card"] is not None)
            labels[split + name][row["label"]] += 1
            hidden += row["label"] == "neutral" and name in visible(scene)
            cards += row["card"] is not None and row["label"] == "entailment"
            with Image.open(full / row["image"]) as image, Image.open(full / scene["image"]) as plain:
                if row["card"] is None:
                    assert row["image"] == scene["image"]
                else:  # the picture differs in the card alone, which is of one colour but for its edge
                    same = (np.asarray(image) == np.asarray(plain)).all(-1)
                    left, top, right, bottom = row["card"].values()
                    card = np.asarray(image)[top:bottom, left:right]
                    same[top:bottom, left:right] = True
                    assert same.all() and len(np.unique(card[1:-1, 1:-1].reshape(-1, 3), axis=0)) == 1
    assert hidden > 5 and cards > 5
    assert all(len(set(told.values())) == 1 and len(told) == 3 for told in labels.values())


SIDES: dict[str, Callable[[bool, bool], bool]] = {
    "the left picture has": lambda left, right: left,
    "the right picture has": lambda left, right: right,
    "both pictures have": lambda left, right: left and right,
    "exactly one picture has": lambda left, right: left != right,
}


def test_statements_are_true_as_labelled_and_neither_text_nor_pictures_tell(full: Path, pictures: dict[str, Row]) -> None:
    kinds: set[str] = set()
    for split in SPLITS:
        by_text, by_pictures = defaultdict[str, Counter[bool]](Counter), defaultdict[tuple[str, ...], Counter[bool]](Counter)
        for row in rows(full, f"statements_{split}"):
            left, right = (pictures[image] for image in row["images"])
            assert row["images"][0] != row["images"][1]
            if row["sentence"].endswith("has more things"):
                more = len(left["boxes"]) - len(right["boxes"])
                assert more and row["label"] == ((more > 0) == ("left" in row["sentence"]))
                kinds.add(row["sentence"])
            else:
                kind = next(words for words in SIDES if row["sentence"].startswith(words))
                name = thing_of(row["sentence"], kind)
                assert row["label"] == SIDES[kind](name in visible(left), name in visible(right))
                kinds.add(kind)
            by_text[row["sentence"]][row["label"]] += 1
            by_pictures[tuple(row["images"])][row["label"]] += 1
        assert all(told[True] == told[False] for told in (*by_text.values(), *by_pictures.values()))
    assert len(kinds) == 6


# --- worlds --------------------------------------------------------------------------------------------------------------

ranges = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted).map(tuple)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    things = draw(ranges)
    named = tuple(min(count, things[1]) for count in draw(ranges))
    shares = {name: draw(st.sampled_from((0.0, 0.5, 1.0))) for name in ("relations", "counts", "plates", "grounds")}
    shares["relations"] *= named[1] > 1
    shares["counts"] *= things[1] > 1
    concepts = draw(st.integers(things[1] + 1, 103))
    return World(concepts, 104 - concepts, things, draw(st.integers(24, 300)), draw(st.integers(0, 3)), named, **shares)


@settings(max_examples=60, deadline=None)
@given(world=worlds(), seed=st.integers(0, 100))
def test_every_world_speaks_english_of_its_vocabulary(world: World, seed: int) -> None:
    rng, words = random.Random(seed), set(build.vocabulary())
    scenes = [draw_scene(world, NOUNS[: world.concepts], ["noto"], rng) for _ in range(8)]
    for scene in scenes:
        assert world.things[0] <= len(scene.things) <= world.things[1]
        for one in scene.things:
            assert all(0 <= low < high <= world.size for low, high in (one.box[::2], one.box[1::2]))
            assert (
                sum(
                    one.box[0] < t.box[2] and t.box[0] < one.box[2] and one.box[1] < t.box[3] and t.box[1] < one.box[3]
                    for t in scene.things
                )
                == 1
            )
        for caption in (tell(scene, world, rng), tell(scene, world, rng, (2, world.things[1]))):
            assert set(re.findall(r"\w+|\S", caption.text)) <= words
            assert claims(caption.text) == set(caption.facts) <= scene.facts
    for make, schema in VIEWS.values():
        for row in make("val", scenes, rng):
            assert list(row) == schema.names
            for text in (row.get("question", ""), row.get("text", ""), row.get("sentence", ""), *row.get("answer", [])):
                assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789 ?")  # the rest is spelled


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"things": (3, 2)}, "things is 3 2; allowed"),
        ({"things": (0, 2)}, "things is 0 2; allowed"),
        ({"things": (2, 5)}, "things is 2 5; allowed: .* from 1 to 4"),
        ({"named": (2, 1)}, "named is 2 1; allowed"),
        ({"named": (1, 5)}, "named is 1 5; allowed: .* from 1 to 4"),
        ({"concepts": 4}, "concepts is 4; allowed: at least 5"),
        ({"concepts": 100}, r"concepts \(100\) and unseen \(12\) are 112; there are 104"),
        ({"unseen": 0}, "unseen is 0; allowed"),
        ({"size": 23}, "size is 23; allowed: 24 to 512"),
        ({"clutter": -1}, "clutter is -1; allowed"),
        ({"wrong": 1.01}, "wrong is 1.01; allowed: a share from 0 to 1"),
        ({"plates": float("nan")}, "plates is nan; allowed: a share from 0 to 1"),
        ({"relations": 0.5, "named": (1, 1)}, "relations is 0.5, but"),
        ({"counts": 0.5, "things": (1, 1), "named": (1, 1)}, "counts is 0.5, but"),
    ],
)
def test_impossible_worlds(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World(**wrong)


# --- files ---------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_same_seed_same_bytes_and_a_build_is_reused(tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    again.mkdir()  # empty is fine
    summary = build_scenes(first, SMALL, train=12, test=8, progress=False)
    build_scenes(again, SMALL, train=12, test=8, progress=False)
    build_scenes(other, SMALL, train=12, test=8, seed=1, progress=False)
    same, new = contents(first), contents(other)
    assert same == contents(again)
    assert all(same[name] != new[name] for name in same if name.endswith(".parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]
    before = (first / "summary.json").stat().st_mtime_ns
    assert build_scenes(first, SMALL, train=12, test=8, progress=False) == summary
    assert (first / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds scenes with size 24 instead of 48, train 12 instead of 14, seed 0 instead of 3; choose"):
        build_scenes(first, World(6, 2), train=14, test=8, seed=3)
    assert contents(first) == same


def test_a_view_draws_from_a_stream_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a further one changes no pictures, captions, facts and rows of others."""
    build_scenes(tmp_path / "all", SMALL, train=8, test=4, progress=False)
    monkeypatch.setattr(build, "VIEWS", {view: made for view, made in VIEWS.items() if view != "entailment"})
    monkeypatch.setattr(build, "write_sheet", lambda *_: None)
    build_scenes(tmp_path / "without", SMALL, train=8, test=4, progress=False)
    everything, without = contents(tmp_path / "all"), contents(tmp_path / "without")
    assert {name for name in without if without[name] != everything[name]} == {"summary.json", "README.md"}


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        build_scenes(tmp_path, SMALL)
    for name, text in (("list", "[1]"), ("emoji", '{"images": {}, "concepts": 3}'), ("torn", '{"world": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text)
        with pytest.raises(UserError, match="holds something else"):
            build_scenes(tmp_path / name, SMALL)

    painted = []

    def fail(*scene: Any) -> Image.Image:
        painted.append(scene)
        if len(painted) > 5:
            raise KeyboardInterrupt
        return Image.new("RGB", (24, 24))

    monkeypatch.setattr(build, "paint", fail)
    with pytest.raises(KeyboardInterrupt):
        build_scenes(tmp_path / "new", SMALL, train=8, test=4, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "list", "mine.txt", "torn"]


def test_too_few_images_or_no_wrong_caption(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test is 1; allowed: 2 or more images"):
        build_scenes(tmp_path / "new", SMALL, train=8, test=1)
    # two scenes of one thing each: where both are the same, no caption is wrong
    for seed in range(20):
        folder = tmp_path / str(seed)
        try:
            build_scenes(folder, World(2, 1, (1, 1), 24, named=(1, 1), wrong=1.0), train=2, test=2, seed=seed, progress=False)
        except UserError as error:
            assert "wrong is 1.0, but the captions of other scenes are true here too" in str(error) and not folder.exists()
            return
    raise AssertionError("two scenes that differ, twenty times")


def test_card_and_sheet(full: Path) -> None:
    summary = json.loads((full / "summary.json").read_text())
    assert summary["images"] == {"train": 120, "val": 60, "test": 60, "unseen": 60}
    card = (full / "README.md").read_text()
    assert all(artist.licence in card and artist.attribution in card for artist in ARTISTS)
    for view, (_, schema) in VIEWS.items():
        assert summary["views"][view] == {split: len(rows(full, f"{view}_{split}")) for split in SPLITS}
        assert all(f"`{name}`" in card for name in (view, *schema.names))
    assert "30 training captions are wrong" in card and not re.search(r"[{}]", card)
    with Image.open(full / "sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 2000
    named = {row["image"] for split in SPLITS for view in (split, f"entailment_{split}") for row in rows(full, view)}
    assert named == {str(path.relative_to(full)) for path in full.glob("images/*/*.png")}


# --- the builder -----------------------------------------------------------------------------------------------------------


def config(**build_info: Any) -> Any:
    default = OmegaConf.load(GritScenesBuilder.default_config_path()).datasets.grit_scenes
    return OmegaConf.merge(default, {"build_info": build_info})


def test_builder(scenes: Path) -> None:
    registry.mapping["processor_name_mapping"].update(PROCESSORS)
    data = GritScenesBuilder(config(root=str(scenes), max_images=50)).build_datasets()
    assert {split: len(part) for split, part in data.items()} == {"train": 50, "val": 24, "test": 24, "unseen": 24}
    facts, claimed = ([{*row["facts"]} for row in rows(scenes, "val")], {})
    for row in rows(scenes, "val"):
        claimed |= dict(zip(row["caption"], map(set, row["caption_facts"]), strict=True))
    assert data["val"].relevant.tolist() == [[claimed[text] <= has for text in data["val"].raw_text] for has in facts]
    assert data["train"][0]["image"].shape == (3, 48, 48) and len(data["train"].captions(0)) == 1
    curated = GritScenesBuilder(config(root=str(scenes), captions="curated")).build_datasets()["train"]
    assert len(curated) == 64 and len(curated.captions(0)) == build.CURATED

    asked = GritScenesBuilder(config(root=str(scenes), view="questions")).build_datasets()
    assert len(asked["train"]) == 64
    for split in SPLITS[1:]:
        table = rows(scenes, f"questions_{split}")
        paths = [asked[split].image_path(row) for row in range(len(table))]
        assert paths == [scenes / row["image"] for row in table]
        assert [asked[split].questions, asked[split].answers, asked[split].question_ids] == [
            [row[key] for row in table] for key in ("question", "answer", "question_id")
        ]
    assert asked["unseen"][0]["image"].shape == (3, 48, 48)


@pytest.mark.parametrize("view", ["pairs", "questions"])
def test_builder_without_scenes(tmp_path: Path, view: str) -> None:
    with pytest.raises(UserError, match="holds no scenes; build them once with: lavis-mafa build-scenes"):
        GritScenesBuilder(config(root=str(tmp_path), view=view)).build_datasets()
    with pytest.raises(UserError, match="view is 'question'; allowed: pairs, questions. Did you mean 'questions'?"):
        GritScenesBuilder(config(root=str(tmp_path), view="question")).build_datasets()
