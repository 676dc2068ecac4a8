"""Ids and concepts stay what they were, in every format; an empty one is none, and none is ever that of another image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.formats import QUESTIONS
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import typed_ids
from lavis_mafa.datasets.pairs import ImageQuestions, RetrievalPairs
from lavis_mafa.errors import UserError

NAN = float("nan")


def write(path: Path, column: str, values: list[Any]) -> Path:
    rows = [{"image": f"{n}.png", "caption": f"text {n}", column: value} for n, value in enumerate(values)]
    if path.suffix == ".parquet":
        large = any(isinstance(value, int) and value >= 2**63 for value in values)
        kinds = {"image": pa.string(), "caption": pa.string(), column: pa.uint64()} if large else None
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(kinds) if kinds else None), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(map(str, ("" if value is None else value for value in row.values()))) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]))
    return path


def read(path: Path, column: str, values: list[Any]) -> list[Any]:
    table = read_annotations([write(path, column, values)])
    return typed_ids(table, column) if column in table.column_names else [None] * table.num_rows


FORMATS = [".json", ".jsonl", ".csv", ".tsv", ".parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("column", ["image_id", "concept"])
@pytest.mark.parametrize("empty", ["", "  ", "nan", "NaN", "None", "null", "NULL", "<NA>", "NA", "\\N", None])
def test_an_empty_one_is_none(tmp_path: Path, suffix: str, column: str, empty: str | None) -> None:
    path = tmp_path / f"a{suffix}"
    assert read(path, column, ["x", empty, empty]) == ["x", None, None]
    assert read(path, column, [empty, empty]) == [None, None]
    table = read_annotations([path])
    assert table.column_names == ["image", "caption"] and image_keys(table).tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_numbers_stay_numbers_and_texts_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for values in ([7, 1827492, 0], ["01827492", "1827492"], ["7", "8"], [2**63 + 5, 2**64 - 1], ["22jbM6gDxdaMaunuzgrsBB", "x"]):
        assert read(path, "image_id", values) == values
        assert [type(value) for value in read(path, "image_id", values)] == [type(value) for value in values]
    assert read(path, "image_id", [7.0, NAN, 2.0**53 - 1]) == [7, None, 2**53 - 1]
    for wrong in (0.5, 2.0**53, float("inf"), True):
        with pytest.raises(UserError, match="row [12].*allowed: text or a whole number|holds bool"):
            read(path, "image_id", [1.0 if isinstance(wrong, float) else False, wrong])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_of_texts_alone_whole_numbers_are_numbers_where_all_are_written_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for written, meant in (
        (["7", "0", "-3"], [7, 0, -3]),
        (["7.0", "", "12.0"], [7, None, 12]),  # pandas, of whole numbers with gaps
        (["01827492", "1827492"], ["01827492", "1827492"]),
        (["7", "x"], ["7", "x"]),
        (["7.0", "7.5"], ["7.0", "7.5"]),
        ([str(2**64 - 1), "1"], [2**64 - 1, 1]),
    ):
        assert read(path, "image_id", written) == meant


def test_numbers_of_parquet_of_every_kind(tmp_path: Path) -> None:
    from decimal import Decimal

    for array in (
        pa.array([2**64 - 1, 3], pa.uint64()),
        pa.array([5, 3], pa.int8()),
        pa.array([5, 3], pa.float32()),
        pa.array([Decimal("5.00"), Decimal("3.00")]),
        pa.array([5, 3]).dictionary_encode(),
    ):
        rows = pa.table({"image": ["a", "b"], "caption": ["x", "y"], "image_id": array})
        pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
        expected = [int(value) for value in array.to_pylist()]
        assert typed_ids(read_annotations([tmp_path / "a.parquet"]), "image_id") == expected


def test_all_kinds_of_text_in_parquet(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        for of_captions in (kind, pa.list_(kind), pa.large_list(kind), pa.list_(kind, 1)):
            captions = pa.array(["x", "y"] if of_captions == kind else [["x"], ["y"]], of_captions)
            table = pa.table({"image": pa.array(["a", "b"], kind), "caption": captions, "concept": pa.array(["c", ""], kind)})
            pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
            rows = read_annotations([tmp_path / "a.parquet"]).to_pylist()
            assert rows == [{"image": "a", "caption": ["x"], "concept": "c"}, {"image": "b", "caption": ["y"], "concept": None}]


def test_an_id_counts_within_its_file_and_is_one_image_there(tmp_path: Path) -> None:
    def rows(name: str, text: str) -> Path:
        (tmp_path / name).write_text("image,caption,image_id\n" + text)
        return tmp_path / name

    files = [rows("a.csv", "a.jpg,x,0\nb.jpg,y,1\na.jpg,z,0\n"), rows("b.csv", "c.jpg,x,0\n./a.jpg,y,1\n")]
    assert image_keys(read_annotations(files)).tolist() == [0, 1, 0, 2, 3]
    assert read_annotations([rows("c.csv", "a.jpg,x,0\n./a.jpg,y,0\n")]).num_rows == 2
    with pytest.raises(UserError) as error:
        read_annotations([files[0], rows("d.csv", "a.jpg,x,0\nb.jpg,y,1\nc.jpg,y,\nc.jpg,x,0\n")])
    expected = "d.csv, row 4: image_id '0' is that of 'c.jpg' here, but of 'a.jpg' in row 1; allowed: one image an id"
    assert expected in str(error.value)


def test_paths_count_as_one_image_where_the_file_says_so(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,caption,image_id,same_image\na.jpg,x,1,0\nc.jpg,x,2,\nb.jpg,y,1,0\na.jpg,z,,\n")
    assert image_keys(read_annotations([tmp_path / "a.csv"])).tolist() == [0, 1, 0, 0]
    (tmp_path / "b.csv").write_text("image,caption,same_image\nd.jpg,x,0\nc.jpg,y,0\n")
    assert image_keys(read_annotations([tmp_path / "a.csv", tmp_path / "b.csv"])).tolist() == [0, 1, 0, 0, 1, 1]


def test_what_a_row_without_a_concept_shows_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption,concept\na.jpg,x,dog\nb.jpg,y,\nc.jpg,z,\nd.jpg,x,\n")
    table = read_annotations([tmp_path / "a.csv"])
    truth = GroundTruth.from_table(table)
    assert truth is not None
    concepts = truth.concepts.find_all(table["concept"])
    texts = torch.tensor([truth.text_key(text) for text in "xyz"])
    assert (concepts.tolist(), texts.tolist()) == ([0, -1, -1, -1], [0, -1, -1])
    matches, known = truth.matrix(concepts, texts), truth.knows(concepts[:, None], texts)
    assert matches.sum() == known.sum() == 1 and matches[0, 0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("ids", [["01827492", "1827492", "x"], [2**64 - 1, 2**63, 1], [5, 3, 4], ["7", "07", "8"]])
def test_ids_of_questions_and_galleries_go_through_a_batch(folder: Path, ids: list[int | str]) -> None:
    rows = [{"image": f"{n}.png", "question": "what?", "answer": "x", "question_id": one} for n, one in enumerate(ids)]
    (folder / "q.json").write_text(json.dumps(rows))
    questions = ImageQuestions(pil_to_tensor, str, folder, read_annotations([folder / "q.json"], QUESTIONS))
    batch = questions.collater([questions[n] for n in range(3)])
    assert [type(one) for one in questions.question_ids] == [type(one) for one in ids]
    assert list(np.asarray(batch["question_id"], dtype=object)) == questions.question_ids == ids
    gallery = RetrievalPairs(pil_to_tensor, str, folder, [write(folder / "g.json", "image_id", ids)])
    batch = gallery.collater([gallery[n] for n in range(3)])
    expected = ids if all(str(one).isdecimal() for one in ids) else [0, 1, 2]
    assert list(np.asarray(batch["image_id"], dtype=object)) == gallery.image_ids == expected
    assert batch["index"].tolist() == [0, 1, 2] and batch["image"].shape == (3, 3, 4, 4)
