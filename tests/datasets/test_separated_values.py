"""CSV and TSV as people have them: every row arrives, or one message names the row that cannot."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.separated_values import WHOLE
from lavis_mafa.errors import UserError

TEXT = st.text("ab,;\"' \n\té", min_size=1, max_size=9).filter(str.strip)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDS = st.sampled_from(["\n", "\r\n"])


def captions(path: Path, content: str) -> list[str]:
    path.write_bytes(content.encode())
    table = read_annotations([path])
    assert table["image"].to_pylist() == [f"{n}.jpg" for n in range(len(table))]
    return [texts[0] for texts in table["caption"].to_pylist()]


@QUICK
@given(
    texts=st.lists(TEXT, min_size=1, max_size=6),
    first=st.booleans(),
    end=ENDS,
    style=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_what_a_writer_of_quoted_values_wrote_is_read(
    tmp_path: Path, suffix: str, texts: list[str], first: bool, end: str, style: int
) -> None:
    """Line breaks, separators and quotation marks in texts, in the last column and in the first one."""
    if suffix == ".tsv":
        texts = [text.replace("\t", " ") for text in texts]
    rows = [["image", "caption"], *([f"{n}.jpg", text] for n, text in enumerate(texts))]
    with (tmp_path / "w").open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator=end, quoting=style).writerows(
            row[::-1] if first else row for row in rows
        )
    assert captions(tmp_path / f"a{suffix}", (tmp_path / "w").read_bytes().decode()) == texts


@QUICK
@given(
    texts=st.lists(st.text("ab,\" '", min_size=1, max_size=7).filter(str.strip), min_size=1, max_size=8), first=st.booleans(), end=ENDS
)
def test_tsv_without_quoting_is_read_as_it_is(tmp_path: Path, texts: list[str], first: bool, end: str) -> None:
    rows = ["image\tcaption", *(f"{n}.jpg\t{text}" for n, text in enumerate(texts))]
    rows = ["\t".join(row.split("\t")[::-1]) for row in rows] if first else rows
    whole = [WHOLE.fullmatch(text) for text in texts]
    expected = [match[1].replace('""', '"') if match else text for match, text in zip(whole, texts, strict=True)]
    if all(text.strip() for text in expected):
        assert captions(tmp_path / "a.tsv", end.join(rows) + end) == expected


def test_marks_that_open_a_text_of_a_tsv_and_do_not_close_swallow_nothing(tmp_path: Path) -> None:
    texts = ['"hello', "a dog", 'he said "hi"', '"a" and "b"', '"', 'x"', '""quoted""', '"end']
    content = "image\tcaption\n" + "\n".join(f"{n}.jpg\t{text}" for n, text in enumerate(texts))
    assert captions(tmp_path / "a.tsv", content) == texts


def many(odd: dict[int, str], count: int = 60) -> str:
    return "image,caption\n" + "".join(f"{n}.jpg,{odd.get(n, 'a dog')}\n" for n in range(count))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", many({3: '"small dog'}), "row 4: a quotation mark in '3.jpg,\"small dog' is not closed before the next row, '4."),
        ("a.csv", many({3: '"small dog', 5: 'a 5"'}), "row 4: a quotation mark in"),  # closed again, at the end of a later row
        ("a.csv", many({58: '"x', 59: '"y"'}), "row 59: a quotation mark in"),
        ("a.csv", many({59: '"small dog'}), "row 60: a quotation mark in '59.jpg,\"small dog' is never closed"),
        ("a.csv", "caption,image\n\"a,0.jpg\nb,1.jpg\n", "row 1: a quotation mark in"),
        ("a.csv", "image,caption\nid7,\"a\nid8,b\n", "row 1: a quotation mark in"),
        ("a.csv", 'image,caption\n7,"a\n8,b"\n9,c"\n', "row 1: a quotation mark in '7,\"a' is not closed before the next row, '8,b\"'"),
        ("a.tsv", "image\tcaption\r0.jpg\ta\r1.jpg\tb\r", "its header holds \\r, which ends lines"),
        ("a.csv", '"image","cap\ntion"\n0.jpg,a\n', "no column 'caption'"),
        ("a.csv", many({2: '"Hello" he said'}), "row 3: a quotation mark in '2.jpg,\"Hello\" he said' ends a text"),
        ("a.csv", many({2: "a dog, running"}), "row 3: '2.jpg,a dog, running' has 3 values, but the header names 2 columns"),
        ("a.csv", many({2: ' "a dog, running"'}), "row 3:"),
        ("a.csv", "image,caption\n\n0.jpg,a\r\n\r\n1.jpg\n", "row 2: '1.jpg' has 1 values"),
        ("a.csv", 'image,"caption\n0.jpg,a\n', "the header: a quotation mark"),
        ("a.tsv", "image\tcaption\n0.jpg\ta\n1.jpg\tb\tc\n", "row 2: '1.jpg\\tb\\tc' has 3 values"),
        ("a.tsv", 'image\tcaption\tid\n0.jpg\t"a\n1.jpg\tb\t7\n2.jpg\tc"\t8\n', "row 1: '0.jpg\\t\"a' has 2 values"),
        ("a.csv", "image;caption\n0.jpg;a\n", "separated by semicolons, but .csv means commas; save it with commas as .csv."),
        ("a.csv", "image\tcaption\n0.jpg\ta\n", "separated by tabs, but .csv means commas; name it .tsv."),
        ("a.tsv", "image,caption\n0.jpg,a\n", "separated by commas, but .tsv means tabs; name it .csv."),
        ("a.tsv", "0.jpg\ta dog\n1.jpg\ta cat\n", "in its first line, '0.jpg\\ta dog'; the first line must be a header"),
        ("a.csv", "image,caption,caption\n0.jpg,a,b\n", "column 'caption' is there 2 times"),
        ("a.csv", many({4: "\"['a dog', 'a puppy']\""}), "row 5: the caption \"['a dog', 'a puppy']\" is a printed list"),
        ("a.csv", many({4: "['a dog' 'a puppy']"}), "row 5: the caption"),
        ("a.csv", many({4: "nan"}), "row 5: the caption 'nan' is how a missing caption is written"),
        ("a.tsv", many({4: "None"}).replace(",", "\t"), "row 5: the caption 'None'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(UserError) as error:
        read_annotations([tmp_path / name])
    assert str(error.value).startswith(f"{tmp_path / name}") and "\n" not in str(error.value)
    assert message in str(error.value)


def test_texts_of_several_lines_may_hold_separators_and_names_of_pictures(tmp_path: Path) -> None:
    text = 'a dog,\nrunning, fast\n\nand "5.jpg",\n'
    assert captions(tmp_path / "a.csv", many({2: '"' + text.replace('"', '""') + '"'}))[2] == text
    swapped = 'caption,image\n"a\nb",0.jpg\n"c, d\ne, f",1.jpg\n'
    assert captions(tmp_path / "b.csv", swapped) == ["a\nb", "c, d\ne, f"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_row_of_any_length_is_read(tmp_path: Path, suffix: str) -> None:
    """Arrow's reader stops at a row of more than its block of a megabyte."""
    text = "very long words " * 200_000
    content = f"image,caption\n0.jpg,{text}\n1.jpg,a cat\n".replace(",", "\t" if suffix == ".tsv" else ",")
    if suffix == ".jsonl":
        content = "".join(json.dumps({"image": f"{n}.jpg", "caption": one}) + "\n" for n, one in enumerate((text, "a cat")))
    assert captions(tmp_path / f"a{suffix}", content) == [text, "a cat"]


def test_compressed_files(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv.gz", "image,caption\n0.jpg,a dog\n"),
        ("a.TSV.gz", "image\tcaption\n0.jpg\ta dog\n"),
        ("a.jsonl.gz", '{"image": "0.jpg", "caption": "a dog"}\n'),
        ("a.ndjson.gz", '{"image": "0.jpg", "caption": "a dog"}\n{"image": "0.jpg", "caption": ["a pet"]}\n'),
        ("a.json.gz", '[{"image": "0.jpg", "caption": "a dog"}]'),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert read_annotations([tmp_path / name])["caption"][0].as_py() == ["a dog"]
        (tmp_path / name).write_bytes(gzip.compress(content.encode())[:-9])
        with pytest.raises(UserError, match="cannot be read as"):
            read_annotations([tmp_path / name])
