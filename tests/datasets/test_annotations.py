from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annotation_files import write
from lavis_mafa.datasets import formats as annotation_formats
from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.formats import SAME_IMAGE
from lavis_mafa.datasets.ids import MISSING
from lavis_mafa.errors import UserError

ROWS = [
    {"image": "a.png", "caption": "a dog, running", "image_id": "7", "concept": "dog"},
    {"image": "b.png", "caption": 'a "small" cat', "image_id": "8", "concept": "cat"},
    {"image": "a.png", "caption": "ein Hündchen\nläuft", "image_id": "7", "concept": "dog"},
]


FORMATS = [".json", ".jsonl", ".csv", ".tsv", ".parquet"]
WITH_LISTS = [".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "width": 3} for row in ROWS]
    table = read_annotations([write(tmp_path / f"a{suffix}", rows)])
    assert table.column_names == ["image", "caption", "image_id", "concept"]
    assert table.schema.field("caption").type == pa.list_(pa.string())
    assert table.to_pylist() == [{**row, "caption": [row["caption"]]} for row in ROWS]


@pytest.mark.parametrize("suffix", WITH_LISTS)
def test_lists_of_captions_and_numbers_as_ids(tmp_path: Path, suffix: str) -> None:
    rows = [{"image": "a.png", "caption": ["one", "two"], "image_id": 1}, {"image": "b.png", "caption": ["three"], "image_id": 2}]
    table = read_annotations([write(tmp_path / f"a{suffix}", rows)])
    assert table["caption"].to_pylist() == [["one", "two"], ["three"]]
    assert table["image_id"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_texts_and_lists_may_be_mixed(tmp_path: Path, suffix: str) -> None:
    rows = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "caption": ["two", "three"], "image_id": 5}]
    table = read_annotations([write(tmp_path / f"a{suffix}", rows)])
    assert table["caption"].to_pylist() == [["one"], ["two", "three"]]
    assert table["image_id"].to_pylist() == [None, "5"]


def test_files_are_joined_and_absent_columns_are_empty(tmp_path: Path) -> None:
    plain = [{key: row[key] for key in ("image", "caption")} for row in ROWS]
    table = read_annotations([write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.csv", plain)])
    assert table["concept"].to_pylist() == ["dog", "cat", "dog", None, None, None]
    # The path says what is one image, in whatever file and with or without an id.
    assert image_keys(table).tolist() == [0, 1, 0, 0, 1, 0]


def test_an_optional_column_that_no_row_has_is_not_there(tmp_path: Path) -> None:
    assert read_annotations([write(tmp_path / "a.jsonl", [{"image": "a", "caption": "b"}])]).column_names == ["image", "caption"]


def test_large_and_dictionary_columns_of_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {"image": pa.array(["a", "b"]).dictionary_encode(), "caption": pa.array([["x"], ["y", "z"]], pa.large_list(pa.large_string()))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_annotations([tmp_path / "a.parquet"])["caption"].to_pylist() == [["x"], ["y", "z"]]
    categories = table["caption"].cast(pa.list_(pa.dictionary(pa.int32(), pa.string())))  # as Polars writes them
    pyarrow.parquet.write_table(table.set_column(1, "caption", categories), tmp_path / "b.parquet")
    assert read_annotations([tmp_path / "b.parquet"])["caption"].to_pylist() == [["x"], ["y", "z"]]


# without what is refused: blank ones, words for a missing value, printed lists
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r["), min_size=1).filter(lambda text: text.strip() not in MISSING)
RECORD = st.fixed_dictionaries({"image": TEXT, "caption": st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3))})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(RECORD, min_size=1, max_size=9), block=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_json_lists_in_blocks_read_as_json_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], block: int, indent: int | None
) -> None:
    monkeypatch.setattr(annotation_formats, "CHARACTERS_AT_ONCE", block)
    monkeypatch.setattr(annotation_formats, "ROWS_AT_ONCE", 2)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows, indent=indent))
    expected = [[row["caption"]] if isinstance(row["caption"], str) else row["caption"] for row in rows]
    table = read_annotations([file], allow_absolute_paths=True)
    assert table["caption"].to_pylist() == expected
    assert table["image"].to_pylist() == [row["image"] for row in rows]


@given(paths=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=20), cut=st.integers(0, 20), grouped=st.booleans())
def test_image_keys_against_a_loop(paths: list[str], cut: int, grouped: bool) -> None:
    groups = [path.replace("c", "a") for path in paths]
    table = pa.table({"image": paths, **({SAME_IMAGE: groups} if grouped else {})})
    table = pa.concat_tables([table[:cut], table[cut:]])
    first: dict[str, int] = {}
    expected = [first.setdefault(key, len(first)) for key in (groups if grouped else paths)]
    keys = image_keys(table)
    assert keys.dtype == torch.int64
    assert keys.tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"image": "a", "captoin": "b"}', "no column 'caption'; its columns are image, captoin. Did you mean 'captoin'?"),
        ("a.json", '[{"img": "a", "caption": "b"}]', "no column 'image'"),
        ("a.csv", "image,text\na,b\n", "no column 'caption'; its columns are image, text."),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n{"image": "a", "caption": " "}', "row 2: the caption is empty"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n{"image": "a"}', "row 2: the caption is empty"),
        ("a.json", '[{"image": "a", "caption": ["b", ""]}]', "row 1: the caption is empty"),
        ("a.json", '[{"image": "a", "caption": ["b"]}, {"image": "a", "caption": []}]', "row 2: the caption is empty"),
        ("a.csv", "image,caption\na,b\na,\n", "row 2: the caption is empty"),
        ("a.tsv", "image\tcaption\n\tb\n", "row 1: 'image' is empty"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n{"image": 5, "caption": "b"}', "row 2: 'image' is 5; allowed: text."),
        ("a.jsonl", '{"image": "a", "caption": {"en": "b"}}', 'row 1: \'caption\' is {"en": "b"}'),
        ("a.json", '[{"image": "a", "caption": ["b", 3]}]', "row 1: 'caption' is [\"b\", 3]"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n{"image": ', "row 2: not valid JSON"),
        ("a.json", '[{"image": "a", "caption": "b"}, {"image": ', "row 2: not valid JSON"),
        ("a.json", '[{"image": "a", "caption": "b"}, 7]', "row 2: 7 is not an object"),
        ("a.json", '{"annotations": []}', "allowed: a JSON list of objects"),
        ("a.jsonl", '{"image": "a", "caption": ' + "[" * 200_000 + "]" * 200_000 + "}", "row 1: not valid JSON (nested too deeply)"),
        ("a.json", '[{"image": "a", "caption": ' + "[" * 200_000 + "]" * 200_000 + "}]", "row 1: not valid JSON (nested too deeply)"),
        ("a.json", '[{"image": "a", "caption": ' + "[" * 950 + "]" * 950 + "}]", "row 1: "),
        ("a.jsonl", '{"image": "a", "caption": "b", "x": ' + "7" * 5_000 + "}", "row 1: not valid JSON (Exceeds the limit"),
        ("a.json", '[{"image": "a", "caption": "b", "x": ' + "7" * 5_000 + "}]", "row 1: not valid JSON (Exceeds the limit"),
        ("a.json", '[{"image": "a", "caption": "b"}]\n[{"image"', "'[{\"image\"' after the end of the list"),
        (
            "a.jsonl",
            '{"image": "a", "caption": "b"}\n{"image": "a", "caption": "b", "caption": "c"}',
            "row 2: not valid JSON ('caption'",
        ),
        ("a.json", '[{"image": "a", "caption": "b", "image": "c"}]', "row 1: not valid JSON ('image' is there twice)"),
        ("a.json", "[]", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", "image,caption\n", "no rows"),
        ("a.csv", "image,caption\na,b,c\n", "row 1: 'a,b,c' has 3 values, but the header names 2 columns"),
        ("a.xml", "", "cannot read annotations from '.xml'; allowed: .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, or"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_annotations([file])
    assert str(error.value).startswith(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_wrong_types_and_nothing_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        read_annotations([tmp_path / "a.json"])
    with pytest.raises(UserError, match="No annotation file"):
        read_annotations([])
    for rows, message in (
        ([{"image": "a", "caption": 3}], "column 'caption' holds int64"),
        ([{"image": 3, "caption": "a"}], "column 'image' holds int64; allowed: text."),
        ([{"image": "a", "caption": "a", "concept": 0.5}], "row 1: 'concept' is 0.5; allowed: text or a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            read_annotations([write(tmp_path / "b.parquet", rows)])
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as .parquet"):
        read_annotations([torn])
    latin = tmp_path / "latin.csv"
    latin.write_bytes("image,caption\na,Hündchen\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as .csv.*save it as UTF-8"):
        read_annotations([latin])
    latin = tmp_path / "latin.jsonl"  # far behind what is read of it first
    latin.write_bytes(b'{"image": "a", "caption": "b"}\n' * 1000 + '{"image": "a", "caption": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_annotations([latin])
    no_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], dtype=np.int32)), pa.py_buffer(b"\xe9")])
    pyarrow.parquet.write_table(pa.table({"image": ["a"], "caption": no_text}), tmp_path / "latin.parquet")
    with pytest.raises(UserError, match="Invalid UTF8"):
        read_annotations([tmp_path / "latin.parquet"])
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["image", "caption", "caption"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="column 'caption' is there 2 times"):
        read_annotations([tmp_path / "twice.parquet"])


def test_a_corrupt_page_of_parquet_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [{"image": f"{number}.png", "caption": f"a dog {number}"} for number in range(2000)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file, use_dictionary=False)
    content = file.read_bytes()
    file.write_bytes(content[:30] + bytes(2000) + content[2030:])
    with pytest.raises(UserError, match="cannot be read as .parquet") as error:
        read_annotations([file])
    assert "\n" not in str(error.value)
