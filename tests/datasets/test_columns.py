"""Columns by the file's own names: the same table as with ours, whatever the format and the kind of annotations."""

from __future__ import annotations

import json

import pytest

from annotation_files import write
from lavis_mafa.cli.main import main
from lavis_mafa.config.data import COLUMNS, AnnotationFile, check_info, own_files
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.formats import PAIRS, QUESTIONS, SENTENCES
from lavis_mafa.datasets.ids import number_columns
from lavis_mafa.errors import UserError

KINDS = {"grit_pairs": PAIRS, "grit_vqa": QUESTIONS, "grit_entailment": SENTENCES}
ROWS = {
    "grit_pairs": [
        {"image": "a.png", "caption": 'a "small" dog,\nrunning', "image_id": "7", "concept": "dog"},
        {"image": "b.png", "caption": "a cat", "image_id": "8", "concept": "cat"},
    ],
    "grit_vqa": [{"image": "a.png", "question": "what?", "answer": "none", "question_id": "1"}],
    "grit_entailment": [{"image": "a.png", "sentence": "a dog", "label": "neutral", "sentence_id": "3"}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_renamed_columns_give_the_same_table(tmp_path, kind, suffix):
    """All renamed, the last two exchanged, beside a column that has our name and means something else."""
    rows = ROWS[kind] if suffix != ".tsv" else [{name: " ".join(text.split()) for name, text in row.items()} for row in ROWS[kind]]
    names = dict(zip(rows[0], ["filepath", "title", *list(rows[0])[:1:-1]], strict=True))
    renamed = [{names[name]: value for name, value in row.items()} | {"image": "of another kind"} for row in rows]
    theirs = AnnotationFile(write(tmp_path / f"theirs{suffix}", renamed), columns=names)
    wanted = read_annotations([write(tmp_path / f"ours{suffix}", rows)], KINDS[kind])
    found = read_annotations([theirs], KINDS[kind])
    assert found.equals(wanted) and number_columns(found) == number_columns(wanted), "and ids are numbers or texts as they were"
    wrong = theirs._replace(columns={**names, "image": "filepth"})
    with pytest.raises(UserError, match="no column 'filepth', which columns names for image; its columns are filepath, .* 'filepath'"):
        read_annotations([wrong], KINDS[kind])


def test_what_is_told_counts_more_than_the_second_name_that_is_known(tmp_path):
    """A file of sentences may call them captions; one that has both is told which."""
    rows = [{"image": "a.png", "caption": "a photo", "hypothesis": "a dog", "label": "neutral"}]
    file = AnnotationFile(write(tmp_path / "a.jsonl", rows), columns={"sentence": "hypothesis"})
    assert read_annotations([file], SENTENCES)["sentence"].to_pylist() == [["a dog"]]
    assert read_annotations([file.path], SENTENCES)["sentence"].to_pylist() == [["a photo"]]


def test_a_quotation_mark_that_nobody_closes_is_found_under_any_name(tmp_path):
    (tmp_path / "a.csv").write_text('filepath,title\na.png,"a dog\nb.png,a cat\nc.png,"a ""bird"""\n')
    with pytest.raises(UserError, match="is not closed before the next row, 'b.png,a cat'"):
        read_annotations([AnnotationFile(tmp_path / "a.csv", columns={"image": "filepath", "caption": "title"})])


def test_what_may_be_renamed_are_the_columns_that_are_read():
    for kind, columns in KINDS.items():
        assert {*COLUMNS[kind]} == {*columns.known} - {*columns.facts}


def test_files_of_one_split_may_differ(tmp_path):
    entry = {"annotations": str(tmp_path / "b.csv"), "columns": {"caption": "text"}}
    storage = [str(tmp_path / "a.csv"), entry, {**entry, "columns": None}]
    info = {"annotations": {"train": {"storage": storage}}, "images": {"storage": str(tmp_path)}, "columns": {"image": "path"}}
    check_info("grit_pairs", info)
    files, *_ = own_files("", info, ("train",))
    assert [file.columns for file in files["train"]] == [{"image": "path"}, {"caption": "text"}, {}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"imge": "filepath"}, "build_info.columns.imge is not a key; allowed: image, caption, .* Did you mean 'image'"),
        ({"image": 3}, "build_info.columns.image is 3, but must be the name of a column"),
        ({"image": "caption"}, "build_info.columns: image and caption are both read from the column 'caption'"),
        (["image=filepath"], "build_info.columns is .*; allowed: a block, such as"),
    ],
)
def test_a_wrong_mapping_is_one_message(columns, message):
    with pytest.raises(UserError, match=message):
        check_info("grit_pairs", {"columns": columns})


def test_check_data_reads_and_cleans_them(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    rows = [{"path": "a.png", "texts": ["a dog", ""], "id": 7}, {"path": "gone.png", "texts": ["a cat"], "id": 8}]
    write(tmp_path / "pairs.jsonl", rows)
    call = ["check-data", "--annotations", "pairs.jsonl", "--images", ".", "--workers", "0"]
    named = ["--columns", "image=path", "caption=texts", "image_id=id"]
    assert main([*call, *named, "--clean", "clean.json"]) == 1
    assert json.loads((tmp_path / "clean.json").read_text()) == [{**rows[0], "texts": ["a dog"]}]
    for wrong, message in (
        (["--columns", "path"], "--columns takes OURS=THEIRS"),
        (["--columns", "image=path", "image=other"], "--columns names a column of ours twice"),
        (["--columns", "imag=path"], "--columns.imag is not a key"),
        ([], "no column 'image'; its columns are path, texts, id. A column of another name is told by columns ({image: NAME}"),
    ):
        assert main([*call, "--output", "again", *wrong]) == 2
        assert message in capsys.readouterr().err
