"""Ranks that differ are refused: which facts are compared, and what the message says."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import ConcatDataset

from lavis_mafa.datasets import fingerprint
from lavis_mafa.datasets.fingerprint import column_fingerprint, data_difference, data_record, fingerprints, rows_fingerprint
from lavis_mafa.errors import UserError
from lavis_mafa.runners import agreement
from lavis_mafa.runners.agreement import (
    check_ranks_agree,
    facts_of_run,
    first_differences,
)

IMAGES = ["a.jpg", "b.jpg", "", None, "é.jpg", "f.jpg"]
CAPTIONS = [["one"], ["two", "three"], [], None, ["", None, "fünf"], ["six"]]


def columns() -> dict[str, pa.ChunkedArray]:
    return {
        "string": pa.chunked_array([pa.array(IMAGES, pa.string())]),
        "large": pa.chunked_array([pa.array(IMAGES, pa.large_string())]),
        "list": pa.chunked_array([pa.array(CAPTIONS, pa.list_(pa.string()))]),
        "number": pa.chunked_array([pa.array([1, 2, 3, None, 5, 6])]),
    }


@pytest.mark.parametrize("kind", columns())
def test_a_columns_fingerprint_does_not_depend_on_chunks_slices_or_what_lies_under_nulls(kind):
    column = columns()[kind]
    wanted = column_fingerprint(column)
    for cut in range(1, len(column)):
        pieces = pa.chunked_array([*column.slice(0, cut).chunks, *column.slice(cut).chunks])
        assert pieces.num_chunks == 2 and column_fingerprint(pieces) == wanted
    longer = pa.chunked_array([column.slice(0, 2).combine_chunks(), column.combine_chunks(), column.slice(0, 1).combine_chunks()])
    inside = longer.combine_chunks().slice(2, len(column))  # does not begin where its buffers begin
    assert column_fingerprint(pa.chunked_array([inside])) == wanted
    assert column_fingerprint(pa.chunked_array([column.slice(0, 0).combine_chunks(), *column.chunks])) == wanted


def test_what_lies_under_a_null_does_not_count():
    hidden = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"ax"), pa.py_buffer(b"\x01"))
    assert hidden.to_pylist() == ["a", None]
    assert column_fingerprint(pa.chunked_array([hidden])) == column_fingerprint(pa.chunked_array([["a", None]]))


@pytest.mark.parametrize("values", [IMAGES, CAPTIONS], ids=["string", "list"])
def test_a_columns_fingerprint_depends_on_every_cell(values):
    kind = pa.string() if values is IMAGES else pa.list_(pa.string())
    seen = {column_fingerprint(pa.chunked_array([values], kind))}
    other = "x" if values is IMAGES else ["x"]
    changed = [[*values[:place], other, *values[place + 1 :]] for place in range(len(values))]
    moved = [[*values[1:], values[0]], values[:-1], [*values, values[0]]]
    same_letters = [["ab", "c"], ["a", "bc"], ["abc", ""], ["abc", None]] if values is IMAGES else [[["a"], ["b"]], [["a", "b"], []]]
    for content in [*changed, *moved, *same_letters]:
        fingerprint = column_fingerprint(pa.chunked_array([content], kind))
        assert fingerprint not in seen, content
        seen.add(fingerprint)


def test_annotations_of_lavis_count_by_every_row(monkeypatch):
    monkeypatch.setattr(fingerprint, "ROWS_AT_ONCE", 7)
    rows = [{"image": f"{n}.jpg", "caption": str(n)} for n in range(20)]
    wanted = rows_fingerprint(rows)
    assert rows_fingerprint([dict(row) for row in rows]) == wanted
    assert rows_fingerprint(rows[:-1]) != wanted and rows_fingerprint(rows[::-1]) != wanted
    for place in range(20):
        assert rows_fingerprint([{**row, "caption": "x"} if n == place else row for n, row in enumerate(rows)]) != wanted
    assert rows_fingerprint([]) != rows_fingerprint([[]])
    # an object's text holds its address
    assert rows_fingerprint([object(), (1, 2)]) == rows_fingerprint([object(), (1, 2)])
    assert fingerprints(SimpleNamespace(annotation=rows)) == {"annotation": f"{wanted:08x}"} and fingerprints(object()) == {}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images: list[str]) -> None:
        self.table = pa.table({"image": images})

    def __len__(self) -> int:
        return self.table.num_rows


def test_what_a_checkpoint_says_of_its_data():
    def record(*parts: list[str]) -> list[dict[str, Any]]:
        return data_record(ConcatDataset([Pairs(list(part)) for part in parts]))

    assert data_difference(record("ab", "c"), record("ab", "c")) is None
    assert data_difference(record("ab", "c"), record("ab", "cde")) == "the data had 2 + 1 rows, now 2 + 3"
    assert data_difference(record("ab", "c"), record("a", "bc")) == "the data had 2 + 1 rows, now 1 + 2"
    assert data_difference(record("ab"), record("a", "b")) == "the data had 2 rows, now 1 + 1"
    for other in (record("ab", "x"), record("ba", "c"), [{"rows": 2, "columns": {}}, *record("c")]):
        assert data_difference(record("ab", "c"), other) == "row content differs since the checkpoint was written (image)"
        assert data_difference(other, record("ab", "c")) == "row content differs since the checkpoint was written (image)"
    for torn in ("x", [3], [{"rows": "x", "columns": {}}], [{"rows": 3, "columns": None}], [{}], 7):
        with pytest.raises(ValueError, match="the saved record of the data is damaged"):
            data_difference(torn, record("ab"))


def facts(images: Any = ("a", "b"), width: int = 2, **run: Any) -> dict[str, Any]:
    config = {"run": {"init_lr": 0.1, "grit": {"enabled": True}, "rank": 0, "gpu": 0, "output_dir": "x", **run}, "datasets": {}}
    config["datasets"] = {"coco": {"build_info": {"images": {"storage": run.get("storage", "/a")}}, "text_processor": {"name": "t"}}}
    datasets = {"coco": {"train": ConcatDataset([Pairs(list(images)), Pairs(["c"])])}}
    return facts_of_run(SimpleNamespace(config=OmegaConf.create(config)), datasets, torch.nn.Linear(width, 1))


def test_what_may_differ_is_not_compared():
    torch.manual_seed(1)
    one = facts()
    torch.manual_seed(2)  # weights are sent from rank 0
    other = facts(rank=1, gpu=1, output_dir="y", dist_backend="nccl", dist_url="tcp://b:1")
    assert one == other
    assert one["library torch"] == importlib.metadata.version("torch")
    assert one["setting run.grit.enabled"] is True and one["setting datasets.coco.text_processor.name"] == "t"
    assert one["data coco.train: samples"] == 2 and one["data coco.train, part 1: samples"] == 1 and one["model parameters"] == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lr": 0.2}, "setting run.init_lr: 0.1 on rank 0 (a), 0.2 on rank 2 (c). Start every rank with the same YAML"),
        ({"extra": 5}, "setting run.extra: None on rank 0 (a), 5 on rank 2 (c)."),
        ({"images": ["a"]}, "data coco.train: samples: 2 on rank 0 (a), 1 on rank 2 (c)"),
        ({"images": ["a", "x"]}, "data coco.train: contents of image: "),
        ({"width": 3}, "model parameters: 3 on rank 0 (a), 4 on rank 2 (c)"),
    ],
)
def test_the_difference_is_named_with_its_ranks_and_values(changes, named):
    everyone = [facts(), facts(), facts(**changes), facts()]
    message = first_differences(everyone, ["a", "b", "c", "d"])
    assert message is not None and named in message and message.startswith("the ranks differ in ")
    assert first_differences([facts(), facts()], ["a", "b"]) is None


def test_many_differences_and_ranks_are_cut_short():
    message = first_differences([{f"setting {n}": n for n in range(9)}, *[{} for _ in range(6)]], list("abcdefg"))
    assert message is not None and message.count("setting") == 3 and "; and 6 more. Start every rank" in message
    assert "setting 0: 0 on rank 0 (a), None on rank 1 (b), None on rank 2 (c), None on rank 3 (d) and 3 more; " in message


def test_all_ranks_raise_and_a_single_process_computes_nothing(monkeypatch):
    check_ranks_agree(None, None, None)
    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    monkeypatch.setattr(agreement, "facts_of_run", lambda *_: {"library torch": "2.6"})
    monkeypatch.setattr(agreement, "gather_objects", lambda mine: [("a", {"library torch": "2.5"}), mine])
    with pytest.raises(UserError, match=r"library torch: 2.5 on rank 0 \(a\), 2.6 on rank 1 .* Install the same versions"):
        check_ranks_agree(None, None, None)
