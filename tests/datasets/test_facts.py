"""``facts`` and ``caption_facts``: every format tells the same truth, what does not fit is one message, galleries go by the truth."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_mafa.datasets import formats
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.facts import FACTS
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.errors import UserError

Row = dict[str, Any]


def write(path: Path, rows: Sequence[Row]) -> Path:
    """In the form that the ending asks for; lists in a cell as JSON writes them."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])
    return path


def told(path: Path) -> list[tuple[Any, Any, Any]]:
    """Per row captions, facts and claims as sets."""

    def as_set(facts: list[str] | None) -> set[str] | None:
        return None if facts is None else set(facts)

    table = read_annotations([path])
    assert [table.schema.field(name).type for name in FACTS] == list(FACTS.values())
    return [
        (row["caption"], as_set(row["facts"]), None if row["caption_facts"] is None else [as_set(one) for one in row["caption_facts"]])
        for row in table.to_pylist()
    ]


NAMES = st.lists(st.sampled_from(["dog", "red dog", 'a "big" dog, really', "ü", "1"]), max_size=3)


@st.composite
def annotations(draw: st.DrawFn, several: bool) -> list[Row]:
    """Rows of one truth: each caption and each image tells it the same way each time, or not at all."""
    claims = {text: draw(NAMES) for text in ("one", "two", "three")}
    has = {image: draw(NAMES) for image in ("a.png", "b.png")}
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        image, texts = draw(st.sampled_from([*has])), draw(st.lists(st.sampled_from([*claims]), min_size=1, max_size=3))
        unknown = draw(st.integers(0, 5))
        facts = None if unknown == 0 else draw(st.permutations(has[image] * 2))
        listed: Any = [None if unknown == 1 and not place else claims[text][::-1] for place, text in enumerate(texts)]
        caption: Any = texts if several else texts[0]
        listed = None if unknown == 2 else listed if several else listed[0]
        rows.append({"image": image, "caption": caption, "facts": facts, "caption_facts": listed})
    return rows


def expected(rows: Sequence[Row]) -> list[tuple[Any, Any, Any]]:
    found = []
    for row in rows:
        several = isinstance(row["caption"], list)
        claims = row["caption_facts"] if several else [row["caption_facts"]]
        facts = None if row["facts"] is None else set(row["facts"])
        texts = row["caption"] if several else [row["caption"]]
        found.append((texts, facts, None if claims is None else [None if one is None else set(one) for one in claims]))
    return found


@pytest.mark.parametrize("several", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_format_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, several: bool) -> None:
    monkeypatch.setattr(formats, "ROWS_AT_ONCE", 2)
    rows = data.draw(annotations(several))
    there = [any(row[name] is not None for row in rows) for name in ("facts", "caption_facts")]
    endings = [".json", ".jsonl", ".parquet"] if several else [".json", ".jsonl", ".parquet", ".csv", ".tsv"]
    for ending in endings:
        file = write(tmp_path / f"a{ending}", rows)
        if all(there):
            assert [(texts, has, _known(claims)) for texts, has, claims in told(file)] == [
                (texts, has, _known(claims)) for texts, has, claims in expected(rows)
            ]
        elif not any(there):
            assert not {*FACTS} & {*read_annotations([file]).column_names}
        else:
            with pytest.raises(UserError, match="has values, but '.*' has none; allowed: both, or neither"):
                read_annotations([file])


def _known(claims: list[set[str] | None] | None) -> list[set[str] | None] | None:
    """A row without a list and one of unknown ones say the same."""
    return None if claims is None or not any(one is not None for one in claims) else claims


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_one_caption_and_several_may_be_mixed(tmp_path: Path, ending: str) -> None:
    rows = [
        {"image": "a", "caption": "one", "facts": ["x"], "caption_facts": ["x"]},
        {"image": "b", "caption": ["two", "three"], "facts": [], "caption_facts": [["y", "x"], []]},
        {"image": "c", "caption": "four"},
    ]
    for order in (rows, rows[::-1]):
        read = {texts[0]: (has, claims) for texts, has, claims in told(write(tmp_path / f"a{ending}", order))}
        assert read == {"one": ({"x"}, [{"x"}]), "two": (set(), [{"x", "y"}, set()]), "four": (None, None)}


@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 1)], ids=["list", "large", "fixed"])
@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=["text", "large", "names"]
)
def test_lists_of_any_kind_in_parquet(tmp_path: Path, make: Any, text: pa.DataType) -> None:
    columns = {
        "image": pa.array(["a", "b"]),
        "caption": pa.array([["one"], ["two"]]),
        "facts": pa.array([["x"], ["z"]], make(text)),
        "caption_facts": pa.array([[["x"]], [["y"]]], make(make(text))),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert told(tmp_path / "a.parquet") == [(["one"], {"x"}, [{"x"}]), (["two"], {"z"}, [{"y"}])]


def test_the_example_of_the_page_means_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    lines, cells = re.findall(r"```\n(.*?)```", page[page.index("### Which image truly") :], re.DOTALL)[:2]
    (tmp_path / "a.jsonl").write_text(lines)
    table = read_annotations([tmp_path / "a.jsonl"])
    truth = GroundTruth.from_table(table)
    assert truth is not None
    texts = torch.tensor([truth.text_key(text) for text in ("a dog", "a red dog", "a dog and a cat", "a pet", "a cat")])
    right = truth.matrix(truth.images(table), texts)
    assert [(column.nonzero()[:, 0] + 1).tolist() for column in right.T] == [[1, 2], [1, 2], [2], [1, 2, 3], []]
    assert texts[-1] == -1 and truth.images(table)[-1] == -1
    (tmp_path / "b.csv").write_text(cells)
    assert told(tmp_path / "b.csv") == told(tmp_path / "a.jsonl")[:1]


# --- what does not fit -------------------------------------------------------------------------------------------------------

GOOD: Row = {"image": "a.png", "caption": "a dog", "facts": ["dog"], "caption_facts": ["dog"]}
SEVERAL: Row = {"image": "a.png", "caption": ["a dog", "a cat"], "facts": ["dog"], "caption_facts": [["dog"], ["cat"]]}
WRONG: list[tuple[list[Row], str]] = [
    ([GOOD, {**GOOD, "facts": "dog"}], "row 2: 'facts' is \"dog\"; allowed: a list of texts."),
    ([GOOD, {**GOOD, "facts": ["dog", 3]}], "row 2: 'facts' is [\"dog\", 3]; allowed: a list of texts."),
    ([GOOD, {**GOOD, "facts": ["dog", None]}], "row 2: 'facts' "),
    ([GOOD, {**GOOD, "facts": {"dog": True}}], "row 2: 'facts' is {\"dog\": true}; allowed: a list of texts."),
    ([GOOD, {**GOOD, "caption_facts": [["dog"]]}], "row 2: 'caption_facts' is [[\"dog\"]]; allowed: a list of texts."),
    (
        [SEVERAL, {**SEVERAL, "caption_facts": ["dog", "cat"]}],
        'row 2: \'caption_facts\' is ["dog", "cat"]; allowed: for each caption a',
    ),
    ([SEVERAL, {**SEVERAL, "caption_facts": "dog"}], "row 2: 'caption_facts' is \"dog\"; allowed: for each caption a list of texts."),
    ([SEVERAL, {**SEVERAL, "caption_facts": [["dog"], [3]]}], "row 2: 'caption_facts' is [3]; allowed: a list of texts."),
    ([GOOD, {**GOOD, "facts": ["dog", " "]}], 'row 2: \'facts\' holds an empty fact in ["dog", " "]; allowed: texts.'),
    ([SEVERAL, {**SEVERAL, "caption_facts": [["dog"], [""]]}], "row 2: 'caption_facts' holds an empty fact in [\"\"]; allowed: texts."),
    ([SEVERAL, {**SEVERAL, "caption_facts": [["dog"]]}], "row 2: 'caption_facts' has 1 lists for 2 captions; allowed: one for each."),
    ([SEVERAL, {**SEVERAL, "caption_facts": []}], "row 2: 'caption_facts' has 0 lists for 2 captions; allowed: one for each."),
    (
        [SEVERAL, {**GOOD, "image": "b.png", "caption": "a cat", "caption_facts": ["red", "cat"]}],
        'row 2: \'caption_facts\' of caption \'a cat\' are ["cat", "red"], but ["cat"] in ',
    ),
    ([GOOD, {**GOOD, "facts": ["dog", "cat"]}], 'row 2: \'facts\' of image \'a.png\' are ["cat", "dog"], but ["dog"] in '),
    ([{**GOOD, "concept": "dog"}], "'concept'; allowed: one of these two forms of truth."),
    ([{**GOOD, "facts": None}], ": column 'caption_facts' has values, but 'facts' has none; allowed: both, or neither."),
    ([{"image": "a", "caption": "b", "facts": ["c"]}], ": column 'facts' has values, but 'caption_facts' has none; allowed: both"),
]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize(("rows", "message"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_one_message(tmp_path: Path, rows: list[Row], message: str, ending: str) -> None:
    file = write(tmp_path / f"a{ending}", rows)
    with pytest.raises(UserError) as error:
        read_annotations([file])
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_is_there_twice_and_half_a_character(tmp_path: Path) -> None:
    for text, message in (
        ('{"image": "a", "caption": "b", "facts": ["c"], "facts": [], "caption_facts": []}', "row 1: not valid JSON ('facts' is there"),
        (
            json.dumps({**SEVERAL, "caption_facts": [["dog"], ["\ud83d"]]}),
            'row 1: \'caption_facts\' is [["dog"], ["\\ud83d"]], with half',
        ),
    ):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(UserError) as error:
            read_annotations([tmp_path / "a.jsonl"])
        assert message in str(error.value)


@pytest.mark.parametrize(
    "cell", ["dog", "['dog']", '{"dog": 1}', '["dog", 3]', '["dog", null]', '"dog"', "3", '["\\ud83d"]', "[" * 5000]
)
def test_a_cell_that_is_no_list_is_one_message(tmp_path: Path, cell: str) -> None:
    for ending in (".csv", ".tsv"):
        rows = [{"image": "a", "caption": "b", "facts": '["c"]', "caption_facts": "[]"}] * 2
        file = write(tmp_path / f"a{ending}", [*rows, {**rows[0], "caption_facts": cell}])
        with pytest.raises(UserError) as error:
            read_annotations([file])
        assert str(error.value).startswith(f"{file}, row 3: 'caption_facts' is {cell[:60]!r}; allowed: a list of texts as JSON")


def test_wrong_types_of_parquet(tmp_path: Path) -> None:
    for changes, message in (
        ({"facts": "dog"}, "column 'facts' holds string; allowed: a list of texts."),
        ({"facts": [1]}, "column 'facts' holds list<.*int64>; allowed: a list of texts."),
        ({"caption_facts": [["dog"]]}, "column 'caption_facts' holds list<.*list<.*string>>; allowed: a list of texts."),
        ({"caption": ["a dog"]}, "column 'caption_facts' holds list<.*string>; allowed: for each caption a list of texts."),
    ):
        with pytest.raises(UserError, match=message):
            read_annotations([write(tmp_path / "a.parquet", [{**GOOD, **changes}])])
    with pytest.raises(UserError, match=r"row 1: 'facts' holds an empty fact in \[null\]"):
        read_annotations([write(tmp_path / "a.parquet", [{**GOOD, "facts": ["x"], "image": "b"}, {**GOOD, "facts": [None]}][::-1])])


def test_files_that_are_read_together_tell_one_truth(tmp_path: Path) -> None:
    first, plain = write(tmp_path / "a.jsonl", [GOOD]), write(tmp_path / "b.csv", [{"image": "b.png", "caption": "a dog"}])
    table = read_annotations([plain, first, plain])
    assert table["facts"].to_pylist() == [None, ["dog"], None] and table["caption_facts"].to_pylist() == [None, [["dog"]], None]
    truth = GroundTruth.from_table(table)
    assert truth is not None and truth.images(table).tolist() == [-1, 0, -1] and truth.text_key("a dog") == 0
    other = write(tmp_path / "c.parquet", [{**GOOD, "image": "c.png"}, {**GOOD, "image": "d.png", "caption_facts": ["cat"]}])
    message = f"{other}, row 2: 'caption_facts' of caption 'a dog' are [\"cat\"], but [\"dog\"] in {first}, row 1; allowed: the same in"
    with pytest.raises(UserError, match=re.escape(message)):
        read_annotations([plain, first, other])
    concept = write(tmp_path / "d.jsonl", [{"image": "d.png", "caption": "a dog", "concept": "dog"}])
    with pytest.raises(UserError, match=re.escape(f"{first} tells 'facts', and {concept} 'concept'; allowed: one of these two")):
        read_annotations([concept, first])


# --- data sets ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def opened(cls: type, folder: Path, rows: Sequence[Row], name: str = "rows.jsonl") -> Any:
    return cls(lambda image: torch.zeros(1), str.lower, folder, [write(folder / name, rows)])


GALLERY: list[Row] = [
    {"image": "a.png", "caption": ["a dog", "a red dog"], "facts": ["dog", "red"], "caption_facts": [["dog"], ["red", "dog"]]},
    {
        "image": "b.png",
        "caption": ["a cat", "a thing"],
        "facts": ["dog"],
        "caption_facts": [["cat"], None],
    },  # a wrong caption, an unknown one
    {"image": "c.png", "caption": ["a dog", "a bird"], "facts": None, "caption_facts": [["dog"], ["bird"]]},
]


def test_in_a_gallery_the_facts_decide_and_own_pairs_where_nobody_knows(folder: Path) -> None:
    data = opened(RetrievalPairs, folder, GALLERY)
    assert data.raw_text == ["a dog", "a red dog", "a cat", "a thing", "a bird"]
    assert data.relevant.int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert data.img2txt == {0: [0, 1], 1: [2, 3], 2: [0, 4]}, "what is written for it stays"


def test_a_gallery_without_a_single_match_is_one_message(folder: Path) -> None:
    wrong = [{**GOOD, "image": f"{name}.png", "facts": [name]} for name in "abc"]
    with pytest.raises(UserError) as error:
        opened(RetrievalPairs, folder, wrong)
    assert str(error.value).startswith(f"{folder / 'rows.jsonl'}: by 'facts' and 'caption_facts' no caption is right for any image")
    assert len(opened(ImageTextPairs, folder, wrong)) == 3
    assert int(opened(RetrievalPairs, folder, [*wrong[1:], {**GOOD, "facts": ["dog", "x"]}]).relevant.sum()) == 1


def test_samples_carry_what_the_truth_is_asked_by(folder: Path) -> None:
    data = opened(ImageTextPairs, folder, GALLERY)
    batch = [data[index] for index in range(3)]
    assert [sample["concept"] for sample in batch] == data.concepts.tolist() and data.concepts.tolist()[2] == -1
    assert batch[0]["text_key"] == data.truth.text_key("a dog") or batch[0]["text_key"] == data.truth.text_key("a red dog")


def test_joined_splits_tell_one_truth(folder: Path) -> None:
    train = opened(ImageTextPairs, folder, GALLERY[:1])

    def joined(rows: list[Row]) -> Any:
        val = opened(RetrievalPairs, folder, rows, "val.jsonl")
        return with_training_splits({"own": {"train": train, "val": val}}, ["train", "val"])["own"]["train"]

    pairs = joined(GALLERY[1:])
    texts = torch.tensor([pairs.truth.text_key(text) for text in ("a dog", "a red dog", "a cat", "a thing")])
    assert pairs.truth.matrix(pairs.concepts, texts).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    other = [{**GOOD, "image": "b.png"}, {"image": "b.png", "caption": "a red dog", "facts": ["dog"], "caption_facts": []}]
    message = (
        "datasets.own, split 'val', row 2: 'caption_facts' of caption 'a red dog' are [], but [\"dog\", \"red\"] in datasets.own, split"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        joined(other)
    with pytest.raises(UserError, match="datasets.own, split 'train' tells 'facts', and datasets.own, split 'val' 'concept'"):
        joined([{"image": "b.png", "caption": "a cat", "concept": "cat"}])
