"""Marks of people: their files, the correction factor, and what `mine` makes of them, in a pass and from a finished result."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavis_mafa import api
from lavis_mafa.cli.main import main
from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.tools.explore import Explorer
from lavis_mafa.tools.gallery import DIRECTIONS, distinct_candidates, gallery_data, rows_of_all
from lavis_mafa.tools.marks import FORMULA, SCHEMA, confirmed, fitted, read_marks, write_marks
from lavis_mafa.tools.mine import KNOWN, MINED, OUTCOMES, OVER_ALL, REJECTED, Rules, choose
from lavis_mafa.tools.render import TEMPLATES
from lavis_mafa.tools.run_files import open_runs

BITES = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''-1",
    "'tis a dog",
    'a, "b"\nc\r\nd',
    "猫 🐈",
    "=cmd|' /C calc'!A0",
    "a - b",
]


def table(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA)


def hostile() -> pa.Table:
    return table(
        *(
            {"image": n, "text": n + 1, "direction": "text for image", "mark": "accept", "image_path": bite, "caption": bite}
            | {"probability": -0.5 + n / 10, "verdict": "positive"}
            for n, bite in enumerate(BITES)
        )
    )


@pytest.mark.parametrize("name", ["marks.csv", "marks.parquet"])
def test_what_is_written_is_read(tmp_path, name):
    for marks in (hostile(), SCHEMA.empty_table()):
        write_marks(marks, tmp_path / name)
        assert read_marks(tmp_path / name).equals(marks) and [path.name for path in tmp_path.iterdir()] == [name]


def test_no_text_in_a_csv_is_a_formula(tmp_path):
    write_marks(hostile(), tmp_path / "marks.csv")
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows for name in ("image_path", "caption") if re.match(r"[=+\-@\t\r]", row[name])]
    assert f"/^{FORMULA.pattern}/" in (TEMPLATES / "gallery_script.html").read_text(), "a page's export escapes the same"
    assert FORMULA.match(BITES[0]) and [row["caption"] for row in rows if not FORMULA.match(row["caption"])] == BITES[8:11] + BITES[12:]


GOOD = {"image": 0, "text": 1, "mark": "accept"}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"image": 0, "text": 1}], "no column 'mark'"),
        ([{**GOOD, "mark": "yes"}], "row 1: mark is 'yes'; allowed: accept or reject"),
        ([GOOD, {**GOOD, "image": -1}], "row 2: image is -1"),
        ([{**GOOD, "image": "a.jpg"}], "'image' holds string, not int64"),
        ([GOOD, {**GOOD, "mark": "reject"}], "rows 1 and 2: image 0 with text 1 is marked accept and reject"),
    ],
)
def test_what_is_no_mark_is_refused(tmp_path, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=re.escape(message)):
        read_marks(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.csv", "image,text,mark\n1,2\n", "row 1 has 2 values, not 3"),
        ("m.csv", "", "no column 'image'"),
        ("m.csv", "image,text,mark,mark\n1,2,accept,reject\n", "two columns 'mark'"),
        ("m.csv", "image,text,mark\nx,2,accept\n", "holds string, not int64"),
        ("m.parquet", "no parquet", "cannot be read"),
        ("m.txt", "", "allowed: a .parquet or .csv file"),
    ],
)
def test_what_is_no_file_of_marks_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_marks(tmp_path / name)


def test_marks_of_other_data_are_refused():
    images, captions = pa.chunked_array([["a.jpg", "b.jpg"]]), pa.chunked_array([[["a dog"], ["a cat", "=a  cat"]]], TEXTS)

    def fits(**row: object) -> list:
        return fitted(table({**GOOD, **row}), images, captions, "m.csv")["caption"].to_pylist()

    assert fits() == ["a cat"] and fits(caption="=a cat", image_path="/data/a.jpg") == ["=a cat"]
    for row, message in [
        ({"text": 2}, "have 2 rows"),
        ({"image_path": "ba.jpg"}, "the image is 'a.jpg' here"),
        ({"caption": "a dog"}, "the caption is"),
    ]:
        with pytest.raises(UserError, match=message):
            fits(**row)


def test_the_factor_and_its_interval():
    rows = [
        {**GOOD, "text": n, "mark": "reject" if n % 6 == 0 else "accept", "verdict": "positive", "probability": 0.9} for n in range(90)
    ]
    rows += [{**GOOD, "text": 90 + n, "mark": "reject", "verdict": "negative", "probability": 0.6} for n in range(10)]
    found = confirmed(table(*rows))
    assert (found.accepted, found.rejected, found.factor) == (75, 15, 75 / 90)
    p, n, z = 75 / 90, 90, 1.959964
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert found.interval() == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert f"{found.factor:.3f} (95 %: {middle - half:.3f} to {middle + half:.3f})" in str(found)
    assert confirmed(table(*rows), above=0.5).rejected == 25, "by the probability, whatever the verdict was"
    assert confirmed(table(GOOD)).accepted == 1, "a file that tells no verdict"
    assert confirmed(SCHEMA.empty_table()).factor is None and "no correction factor" in str(confirmed(SCHEMA.empty_table()))


@pytest.mark.parametrize("seed", range(20))
def test_people_are_obeyed(seed):
    """Rejected pairs are never mined, whichever row has the image and the caption; accepted ones are, unless the image has them."""
    random = np.random.default_rng(seed)
    keys, captions = np.array([0, 0, 1, 2, 3, 4]), pa.chunked_array([[[f"text {n % 5}"] for n in range(6)]], TEXTS)
    pairs = [(int(i), int(t)) for i, t in random.integers(0, 6, (30, 2))]
    candidates = pa.table(
        {
            "image": [image for image, _ in pairs],
            "text": [text for _, text in pairs],
            "caption": [f"text {text % 5}" for _, text in pairs],
            "probability": random.random(30).astype(np.float32),
            "own_probability": random.random(30).astype(np.float32),
        }
    )
    told = {pair: random.choice(["accept", "reject"]) for pair in pairs[:12]}
    marks = table(*({"image": i, "text": t, "mark": mark, "caption": f"text {t % 5}"} for (i, t), mark in told.items()))
    rules = Rules(0.5, 0.9, *[(None, None), (1, None), (2, 3)][seed % 3])
    without, outcome = (choose(candidates, keys, captions, rules, given) for given in (None, marks))
    content = [(int(keys[i]), t % 5) for i, t in pairs]
    said = {mark: {(int(keys[i]), t % 5) for (i, t), word in told.items() if word == mark} for mark in ("accept", "reject")}
    own = {(int(keys[n]), n % 5) for n in range(6)}
    mined = {pair for pair, o in zip(content, outcome, strict=True) if OUTCOMES[o] == MINED}
    assert all((OUTCOMES[o] == REJECTED) == (pair in said["reject"]) for pair, o in zip(content, outcome, strict=True))
    assert not mined & (said["reject"] | own)
    assert all(
        OUTCOMES[o] == KNOWN
        for pair, o in zip(content, outcome, strict=True)
        if pair in own - said["reject"] and pair in said["accept"]
    )
    accepted = said["accept"] - said["reject"] - own
    if rules.per_image is None:
        before = {pair for pair, o in zip(content, without, strict=True) if OUTCOMES[o] == MINED}
        assert mined == before - said["reject"] | accepted
    for pair, o in zip(content, outcome, strict=True):  # they go first
        if pair in accepted - mined:
            instead = mined if OUTCOMES[o] == OVER_ALL else {other for other in mined if other[0] == pair[0]}
            assert rules.per_image is not None and instead <= accepted


@pytest.fixture(scope="module")
def mined(tmp_path_factory) -> Path:
    """A result of `mine` on features that are given: pairs of six things, a guide that knows them."""
    folder = tmp_path_factory.mktemp("mined")
    random = np.random.default_rng(0)
    essence = random.normal(size=(6, 16))[np.arange(24) % 6]
    for name in ("images", "texts"):
        np.save(folder / f"{name}.npy", essence + 0.3 * random.normal(size=essence.shape))
    rows = ["image,caption", *(f"{n}.jpg,=thing {n % 6} in picture {n}" for n in range(24))]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    assert main(passed(folder, folder / "mine")) == 0
    return folder


def passed(folder: Path, output: Path) -> list[str]:
    files = [str(folder / name) for name in ("images.npy", "texts.npy")]
    flags = ["--annotations", str(folder / "pairs.csv"), "--features", *files, "--guide-features", *files, "--guide-margin", "0"]
    return ["mine", *flags, "--batch-size", "8", "--search-space", "24", "--force", "--output", str(output)]


def test_the_pass_and_the_choice_from_its_result_agree(mined, tmp_path, capsys, monkeypatch):
    found = pq.read_table(mined / "mine" / "connections.parquet").to_pylist()
    good, bad = ([row for row in found if (row["outcome"] == "mined") == yes and row["image"] >= 0] for yes in (True, False))
    below = next(row for row in bad if row["outcome"] == "not above the threshold")
    rows = [
        {"image": r["image"], "text": r["text"], "mark": mark, "caption": r["caption"]}
        for r, mark in ((good[0], "reject"), (below, "accept"))
    ]
    asked = {(row["image"], row["text"]) for row in found}
    absent = next((i, t) for i in range(24) for t in range(24) if i != t and (i, t) not in asked)
    rows.append({"image": absent[0], "text": absent[1], "mark": "accept"})
    write_marks(table(*rows), tmp_path / "marks.csv")
    reviewed = ["--reviewed", str(tmp_path / "marks.csv")]
    assert main([*passed(mined, tmp_path / "pass"), *reviewed]) == 0
    again = ["mine", "--again", str(mined / "mine"), "--output"]
    assert main([*again, str(tmp_path / "again"), *reviewed]) == 0
    said = capsys.readouterr().out
    assert said.count("People accepted 2 pairs and rejected 1") == said.count("1 of these pairs are no candidates") == 2
    assert said.count("Human correction factor: 0.667") == 2
    for name in ("pairs.parquet", "connections.parquet"):
        assert pq.read_table(tmp_path / "pass" / name).equals(pq.read_table(tmp_path / "again" / name))
    pair = [
        (row["image_sample"], row["text_sample"])
        for row in pq.read_table(tmp_path / "again" / "pairs.parquet").to_pylist()
        if row["source"] == "mined"
    ]
    assert (good[0]["image"], good[0]["text"]) not in pair and (below["image"], below["text"]) in pair and absent not in pair
    results = [json.loads((folder / "mine.json").read_text()) for folder in (tmp_path / "pass", tmp_path / "again")]
    assert results[0] == results[1] and main([*again, str(tmp_path / "same")]) == 0
    assert pq.read_table(tmp_path / "same" / "pairs.parquet").equals(pq.read_table(mined / "mine" / "pairs.parquet"))
    assert main([*again, str(tmp_path / "fewer"), "--at-most", "1"]) == 0
    assert json.loads((tmp_path / "fewer" / "mine.json").read_text())["mined"] == 1
    assert main(["mine", "--again", str(tmp_path / "again"), "--per-image", "9", "--output", str(tmp_path / "kept")]) == 0
    assert json.loads((tmp_path / "kept" / "mine.json").read_text())["reviewed"] == results[1]["reviewed"], "marks stay"

    monkeypatch.setattr(Explorer, "serve_forever", lambda _: None)
    capsys.readouterr()
    assert main(["explore", str(tmp_path / "again"), "--port", "0"]) == 0 and "3 pairs marked" in capsys.readouterr().out


def test_choosing_again_searches_nothing(mined, tmp_path, capsys):
    again = ["mine", "--again", str(mined / "mine"), "--output", str(tmp_path / "new")]
    for flags, message in [
        (["--samples", "3"], "--again and --samples exclude each other"),
        (["--seed", "0"], "--again and --seed exclude each other"),
        (["--threshold", "0.3"], "a guide judged"),
        (["--reviewed", "no.csv"], "no.csv cannot be read"),
    ]:
        assert main([*again, *flags]) == 2 and message in capsys.readouterr().err
    assert main(["mine", "--again", str(tmp_path), "--output", str(tmp_path / "new")]) == 2
    assert "no whole result of mine" in capsys.readouterr().err and not (tmp_path / "new").exists()


def page_of(folder: Path) -> dict:
    run = open_runs([folder])
    rows = rows_of_all(run)
    return gallery_data(run, rows, [distinct_candidates(0, run[0].connections, rows[0])], 100)


def test_a_mark_is_of_the_caption_that_was_judged(mined, tmp_path):
    """Not of the first one of its row: on a page, in its export, and in a frame. A browser's marks are of these data, too."""
    shutil.copytree(mined / "mine", tmp_path / "mine")
    before = page_of(tmp_path / "mine")["key"]
    pairs = pq.read_table(tmp_path / "mine" / "pairs.parquet")
    several = pa.array([["another", caption] for caption in pairs["caption"].to_pylist()], TEXTS)
    pq.write_table(pairs.set_column(pairs.column_names.index("caption"), "caption", several), tmp_path / "mine" / "pairs.parquet")
    found = pq.read_table(tmp_path / "mine" / "connections.parquet").to_pylist()
    judged = {(row["direction"], row["image"], row["text"]): row["caption"] for row in found}
    frame = api.connections(tmp_path / "mine").frame
    assert dict(zip(zip(*(frame[n] for n in ("direction", "image", "text")), strict=True), frame["caption"], strict=True)) == judged
    page = page_of(tmp_path / "mine")
    assert page["key"] == page_of(tmp_path / "mine")["key"] != before
    for way, anchor, other, *_ in page["connections"]:
        image, text = (page["rows"][place] for place in ((anchor, other) if way == 0 else (other, anchor)))
        assert text[1:3] == [judged[DIRECTIONS[way], image[3], text[3]], 0] and image[1:3] == ["another", 1]


def test_negative_cosines_are_positives_where_they_were_mined(mined, tmp_path):
    """Without a margin nothing is below it."""
    shutil.copytree(mined / "mine", tmp_path / "mine")
    found = pq.read_table(tmp_path / "mine" / "connections.parquet")
    for name in ("probability", "own_probability"):
        lower = pc.subtract(found[name], pa.scalar(2, pa.float32()))
        found = found.set_column(found.column_names.index(name), name, lower)
    pq.write_table(found, tmp_path / "mine" / "connections.parquet")
    connections = open_runs([tmp_path / "mine"])[0].connections
    assert set(connections.filter(pc.equal(connections["outcome"], MINED))["verdict"].to_pylist()) == {"positive"}


def test_a_count_is_corrected_by_marks(mined, tmp_path, capsys):
    rows = [{**GOOD, "text": n, "mark": "reject" if n < 2 else "accept", "verdict": "positive"} for n in range(8)]
    write_marks(table(*rows), tmp_path / "marks.parquet")
    flags = passed(mined, tmp_path / "count")[1:]
    assert main(["count-false-negatives", *flags, "--correction", str(tmp_path / "marks.parquet")]) == 0
    assert "Human correction factor: 0.750" in capsys.readouterr().out
    assert json.loads((tmp_path / "count" / "count.json").read_text())["correction"] == 0.75
    write_marks(SCHEMA.empty_table(), tmp_path / "marks.parquet")
    assert main(["count-false-negatives", *flags, "--correction", str(tmp_path / "marks.parquet")]) == 2
    assert "tells no factor" in capsys.readouterr().err
