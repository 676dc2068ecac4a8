"""Expressions and their boxes: the files, what an image may be, overlap against counted pixels."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from boxes_file import box, write_boxes
from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.boxes import Expression, GroundedImages, overlap, read_expressions
from lavis_mafa.datasets.images import load_rgb, upright_size
from lavis_mafa.errors import UserError


@pytest.fixture
def boxes_file(tmp_path) -> Path:
    return write_boxes(tmp_path)


def read_boxes(path: Path) -> list[Expression]:
    return read_expressions([AnnotationFile(path)])


def grounded(path: Path) -> GroundedImages:
    return GroundedImages(lambda picture: torch.zeros(3, 32, 32), str.lower, read_boxes(path))


def test_overlap_is_that_of_counted_pixels_and_refcocos():
    rng = random.Random(0)
    for _ in range(50):
        (a, c), (b, d), (e, g), (f, h) = (sorted(rng.sample(range(9), 2)) for _ in range(4))
        one, other = (a, b, c, d), (e, f, g, h)
        pixels, others = ({(x, y) for x in range(r[0], r[2]) for y in range(r[1], r[3])} for r in (one, other))
        assert overlap(one, other) == overlap(other, one) == pytest.approx(len(pixels & others) / len(pixels | others))
        across, down = min(c - 1, g - 1) - max(a, e) + 1, min(d - 1, h - 1) - max(b, f) + 1  # the last pixels are inside
        inside = across * down if across > 0 and down > 0 else 0
        assert overlap(one, other) == pytest.approx(inside / ((c - a) * (d - b) + (g - e) * (h - f) - inside))


def test_half_an_overlap_is_a_hit():
    one = Expression("", 0, Path(), "", (0, 0, 4, 4), ((0, 0, 4, 2), (0, 0, 4, 1.99), (0, 0, 4, 4)))
    assert [one.right(each) for each in one.boxes] == [True, False, True] and one.hits == 2 and not one.right(None)


# --- the file ----------------------------------------------------------------------------------------------------------


def test_parquet_and_json_say_the_same_whatever_other_columns_hold(boxes_file):
    rows = [json.loads(line) | {"score": number or "none"} for number, line in enumerate(boxes_file.with_suffix(".jsonl").open())]
    boxes_file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxes_file.with_suffix(".json").write_text(json.dumps(rows))
    one, *others = (read_boxes(boxes_file.with_suffix(suffix)) for suffix in (".parquet", ".jsonl", ".json"))
    for other in others:
        assert [(e.image, e.text, e.box, e.boxes) for e in one] == [(e.image, e.text, e.box, e.boxes) for e in other]
    assert one[1].box == (20, 0, 32, 10) and len(one[1].boxes) == 4 and one[1].image == boxes_file.parent / "1.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": None}, "row 2: a box is null; allowed: {left, top, right, bottom}, numbers from 0 with left < right"),
        ({"box": box(8, 0, 8, 6)}, "row 2: a box is"),
        ({"box": {"left": 0, "top": 0, "right": 4}}, "row 2: a box is"),
        ({"boxes": [box(0, 0, 3, float("nan"))]}, "row 2: a box is"),
        ({"boxes": None}, "row 2: 'boxes' is null; allowed: a list of boxes"),
        ({"text": " "}, "row 2: 'text' is"),
        ({"image": "../1.png"}, "row 2: the image path '../1.png' leaves the image folder"),
        ({"image": "9.png"}, "row 2: no image at .*9.png; is that the folder the paths start from?"),
    ],
)
def test_what_a_row_may_not_hold(boxes_file, change, message):
    rows = pq.read_table(boxes_file).to_pylist()
    rows[1] |= change
    pq.write_table(pa.Table.from_pylist(rows), boxes_file)
    with pytest.raises(UserError, match=message):
        read_boxes(boxes_file)


def test_what_a_file_may_not_be(boxes_file):
    table = pq.read_table(boxes_file)
    pq.write_table(table.drop_columns(["box"]), boxes_file)
    with pytest.raises(UserError, match="no column 'box'; its columns are image, text, boxes"):
        read_boxes(boxes_file)
    pq.write_table(table.drop_columns(["boxes"]), boxes_file)
    with pytest.raises(UserError, match="no column 'boxes', the list of boxes that each row's thing is to be found among"):
        read_boxes(boxes_file)
    pq.write_table(table.slice(0, 0), boxes_file)
    with pytest.raises(UserError, match="boxes.parquet: no rows"):
        read_boxes(boxes_file)
    boxes_file.write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as .parquet"):
        read_boxes(boxes_file)
    for name, message in (("boxes.csv", "boxes are read from .parquet, .json or .jsonl"), ("other.parquet", "there is no such file")):
        with pytest.raises(UserError, match=message):
            read_boxes(boxes_file.with_name(name))


def test_several_files_have_one_numbering_and_ids_stay_what_they_are(boxes_file):
    files = [AnnotationFile(boxes_file), AnnotationFile(boxes_file.with_suffix(".jsonl"))]
    assert [one.expression_id for one in read_expressions(files)] == list(range(8))
    kept = read_expressions(files, select=lambda rows: rows[3:5])
    assert [one.where.split("/")[-1] for one in kept] == ["boxes.parquet, row 4", "boxes.jsonl, row 1"]
    table = pq.read_table(boxes_file)
    for ids, message in (
        ([7, 8, 9, 10], ""),
        (["007", "7", "a", "b"], ""),
        ([7, 7, 8, 9], "7 is that of .*row 1, too"),
        ([7, None, 8, 9], "no expression_id; allowed: one in every row"),
    ):
        pq.write_table(table.append_column("expression_id", pa.array(ids)), boxes_file)
        if message:
            with pytest.raises(UserError, match=f"row 2: .*{message}"):
                read_boxes(boxes_file)
        else:
            assert [one.expression_id for one in read_boxes(boxes_file)] == ids


def test_images_come_once_with_all_that_is_asked_of_them(boxes_file):
    rows = pq.read_table(boxes_file).to_pylist()
    pq.write_table(pa.Table.from_pylist([rows[n] for n in (2, 0, 2, 1)]), boxes_file)
    images = grounded(boxes_file)
    assert [image.name for image in images.image] == ["2.png", "0.png", "1.png"] and images.about == [[0, 2], [1], [3]]
    asked, of_image = images.asked([2, 0])
    assert asked == [3, 0, 2] and of_image.tolist() == [0, 1, 1] and images.sizes == [(32, 24)] * 3
    assert images.collater([images[2], images[0]])["index"].tolist() == [2, 0]


def test_a_turned_photograph_is_measured_upright(tmp_path):
    exif = Image.Exif()
    for orientation in (1, 3, 6):
        exif[0x0112] = orientation
        Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
        assert upright_size(tmp_path / "a.jpg") == load_rgb(tmp_path / "a.jpg").size == ((10, 20) if orientation == 6 else (20, 10))


def test_what_an_image_may_not_be(boxes_file):
    rows = pq.read_table(boxes_file).to_pylist()
    rows[0]["boxes"].append(box(0, 0, 33, 5))
    pq.write_table(pa.Table.from_pylist(rows), boxes_file)
    with pytest.raises(UserError, match=r"row 1: the box \(0.*, 33.*\) lies outside of 0.png, which is 32 x 24 pixels"):
        grounded(boxes_file)
    (boxes_file.parent / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="row 1: .*0.png.*the file is empty"):
        grounded(boxes_file)


def test_a_text_must_say_something(boxes_file):
    rows = pq.read_table(boxes_file).to_pylist()
    rows[3]["text"] = "..."
    pq.write_table(pa.Table.from_pylist(rows), boxes_file)
    with pytest.raises(UserError, match=r"row 4: The caption '...' holds no word. Evaluation replaces nothing"):
        grounded(boxes_file)
