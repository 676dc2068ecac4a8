"""`check-data` finds what training cannot use, and training replaces, lists and counts exactly that."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import struct
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lavis_mafa import progress
from lavis_mafa.cli.main import main
from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.datasets.pairs import ImageTextPairs
from lavis_mafa.processors import AlbefCaptionProcessor

pytestmark = pytest.mark.slow

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
ROWS = 64
GOOD, MISSING, UNREADABLE, LARGE, SMALL, EMPTY = "", "missing", "unreadable", "too_large", "too_small", "empty_caption"


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def write_images(folder: Path) -> dict[str, str]:
    """The images of every sort that the web has -> what is wrong with them."""
    folder.mkdir(parents=True)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    NOISE.save(folder / "plain.png")
    NOISE.save(folder / "sideways.jpg", exif=sideways)
    NOISE.convert("CMYK").save(folder / "cmyk.jpg")
    NOISE.convert("P").save(folder / "palette.png", transparency=b"\x00\xff")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(folder / "sixteen.png")
    NOISE.save(folder / "animated.gif", save_all=True, append_images=[NOISE.rotate(90)])
    NOISE.rotate(3).save(folder / "animated.webp", save_all=True, append_images=[NOISE.rotate(90)])
    NOISE.rotate(5).save(folder / "torn.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:900])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "bomb.png").write_bytes(bomb())
    NOISE.resize((1, 1)).save(folder / "dot.png")
    bad = {
        "torn.png": UNREADABLE,
        "empty.jpg": UNREADABLE,
        "text.jpg": UNREADABLE,
        "bomb.png": LARGE,
        "dot.png": SMALL,
        "gone.png": MISSING,
    }
    return {**{path.name: GOOD for path in sorted(folder.iterdir())}, **bad}


CAPTIONS = {
    "?!": EMPTY,
    "…": EMPTY,
    "\x00\x01": EMPTY,
    " ".join(f"word{number}" for number in range(10_000)): GOOD,
    "一只狗在沙滩上": GOOD,
    "كلب على الشاطئ": GOOD,
    "bell \x07 and nul \x00": GOOD,
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> tuple[Path, dict[int, str]]:
    """``data/pairs.jsonl`` that training accepts, with its bad rows (from 0) -> their kind."""
    monkeypatch.chdir(tmp_path)
    kinds = write_images(tmp_path / "data/images")
    images = sorted(kinds, key=lambda name: (kinds[name] != GOOD, name))  # the first one must be there
    rows = [{"image": name, "caption": f"a picture of {name}"} for name in images]
    rows += [{"image": images[number % 7], "caption": caption} for number, caption in enumerate(CAPTIONS)]
    rows += [{"image": images[number % 7], "caption": f"again {number}"} for number in range(ROWS - len(rows))]
    expected = [kinds[row["image"]] or CAPTIONS.get(row["caption"], GOOD) for row in rows]
    write(tmp_path / "data/pairs.jsonl", rows)
    return tmp_path / "data", {number: kind for number, kind in enumerate(expected) if kind}


def check(data: Path, *options: object, name: str = "pairs.jsonl") -> int:
    arguments = ["check-data", "--annotations", data / name, "--images", data / "images", "--workers", 0, *options]
    return main([str(argument) for argument in arguments])


def problems(folder: str | Path = "output/check-data", kinds: tuple[str, ...] = ()) -> list[dict]:
    found = [json.loads(line) for line in (Path(folder) / "problems.jsonl").read_text().splitlines()]
    return [problem for problem in found if not kinds or problem["kind"] in kinds]


KIND_OF_ERROR = {
    "FileNotFoundError": MISSING,
    "ImageError": UNREADABLE,
    "ImageTooLargeError": LARGE,
    "ImageTooSmallError": SMALL,
    "EmptyCaption": EMPTY,
}
BAD = tuple(KIND_OF_ERROR.values())


def listed(folder: Path) -> dict[int, str]:
    """Row -> kind, from the only run's ``bad_samples.jsonl``; each row is there once, with a reason that says something."""
    (path,) = folder.glob("output/2*/bad_samples.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert max(Counter(sample["index"] for sample in samples).values()) == 1
    assert all(sample["image"].startswith(str(folder)) and "rank" in sample for sample in samples)
    kinds, reasons = zip(*(sample["reason"].split(": ", 1) for sample in samples), strict=True)
    assert all(len(reason) > 15 for reason in reasons)
    return {sample["index"]: KIND_OF_ERROR[kind] for sample, kind in zip(samples, kinds, strict=True)}


@pytest.fixture
def hostile_yaml(tmp_path, hostile) -> Path:
    text = RUN.replace("DATA", str(hostile[0]))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def test_training_replaces_lists_and_counts_what_the_check_finds(tmp_path, hostile, hostile_yaml, monkeypatch):
    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.runners.loading import BadSamples

    data, expected = hostile
    assert main(["check-data", "--cfg-path", str(hostile_yaml), "--workers", "0"]) == 1
    found = problems(kinds=BAD)
    assert {problem["row"] - 1: problem["kind"] for problem in found} == expected and len(found) == len(expected)

    sizes, counters = [], set()
    forward, add = AlbefMafa.forward, BadSamples.add

    def counting_forward(self, samples):
        sizes.append(len(samples["image"]))
        return forward(self, samples)

    def counting_add(self, samples, batch_size):
        counters.add(self)
        return add(self, samples, batch_size)

    monkeypatch.setattr(AlbefMafa, "forward", counting_forward)
    monkeypatch.setattr(BadSamples, "add", counting_add)
    assert main(["train", "--cfg-path", str(hostile_yaml), "--options", f"run.output_dir={tmp_path}/output"]) == 0
    assert sizes == [16] * 8  # 64 samples, two epochs
    assert listed(tmp_path) == expected
    (counter,) = counters
    assert (counter.count, counter.seen) == (2 * len(expected), 2 * ROWS)


def test_two_processes_share_one_list_and_keep_their_batches(tmp_path, hostile, hostile_yaml, run_cli):
    _, expected = hostile
    done = run_cli("train", "--cfg-path", hostile_yaml, "--options", f"run.output_dir={tmp_path}/output", processes=2)
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path) == expected
    # 64 samples are two steps of two ranks with 16 each, twice: a smaller batch anywhere would have ended the other rank
    assert "epoch 1 step 2/2" in done.stderr
    path = next(tmp_path.glob("output/2*/bad_samples.jsonl"))
    assert {json.loads(line)["rank"] for line in path.read_text().splitlines()} == {0, 1}


def test_the_check_calls_good_exactly_what_a_data_set_can_read(tmp_path, monkeypatch):
    """Broken bytes and odd captions of all sorts: a row is good here where a sample can be made of it there."""
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(1 << 32)))
    draw, images = random.Random(seed), tmp_path / "data/images"
    monkeypatch.chdir(tmp_path)
    originals = [(images / name).read_bytes() for name in write_images(images) if (images / name).exists()]
    NOISE.save(images / "first.png")
    rows = [{"image": "first.png", "caption": "the first image must be there"}]
    for number in range(150):
        content = bytearray(draw.choice(originals))
        for _ in range(draw.choice((0, 0, 1, 4)) if content else 0):
            content[draw.randrange(min(len(content), 300))] = draw.randrange(256)
        (images / f"{number}.img").write_bytes(content)
        caption = "".join(draw.choices(".,!?…— \t\x00a一🐶", weights=[9, 9, 9, 9, 9, 9, 9, 9, 9, 2, 2, 2], k=draw.randrange(1, 9)))
        rows.append({"image": f"{number}.img", "caption": caption if caption.strip() else "?"})
    write(tmp_path / "data/pairs.jsonl", rows)
    check(tmp_path / "data")
    found = {problem["row"] - 1: problem["kind"] for problem in reversed(problems(kinds=BAD))}  # the image's, where both are bad

    pairs = ImageTextPairs(pil_to_tensor, AlbefCaptionProcessor(), images, [tmp_path / "data/pairs.jsonl"])
    bad = {row: IndexedDataset(pairs).__getitems__([0, row])[1].get("bad_samples") for row in range(len(rows))}
    replaced = {row: KIND_OF_ERROR[samples[0]["reason"].split(":")[0]] for row, samples in bad.items() if samples}
    assert found == replaced and 0 < len(found) < 150, f"FUZZ_SEED={seed}"


def test_a_run_without_bad_rows_lists_nothing(tmp_path, hostile, hostile_yaml):
    data, expected = hostile
    assert check(data, "--clean", data / "clean.jsonl") == 1
    assert read_annotations([data / "clean.jsonl"]).num_rows == ROWS - len(expected)
    assert check(data, "--output", tmp_path / "second", name="clean.jsonl") == 0
    storage = f"datasets.grit_pairs.build_info.annotations.train.storage={data}/clean.jsonl"
    options = [storage, f"run.output_dir={tmp_path}/output", "run.max_epoch=1"]
    assert main(["train", "--cfg-path", str(hostile_yaml), "--options", *options]) == 0
    assert not list(tmp_path.glob("output/2*/bad_samples.jsonl"))


def test_the_table_shows_counts_shares_and_examples(hostile, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    data, expected = hostile
    assert check(data) == 1
    said = capsys.readouterr()
    lines = {line[:34].strip(): line[34:].split() for line in said.out.splitlines()}
    for text, kind in (
        ("missing image", MISSING),
        ("unreadable image", UNREADABLE),
        ("image too large", LARGE),
        ("empty caption", EMPTY),
    ):
        count = list(expected.values()).count(kind)
        assert lines[text] == [str(count), f"{count / ROWS:.3%}"]
    row = next(row for row, kind in expected.items() if kind == MISSING) + 1
    assert f"{data}/pairs.jsonl, row {row}: no file {data}/images/gone.png" in said.out
    assert f"Training can use {ROWS - len(expected)} of {ROWS} rows" in said.out
    assert re.search(r"^captions: .*caption/s", said.err, re.M) and re.search(r"^images: .*100 %.*image/s", said.err, re.M)


@pytest.fixture
def three(tmp_path, monkeypatch) -> Path:
    """Three images, two of which are the same file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for name, turn in (("a", 0), ("b", 0), ("c", 7)):
        NOISE.rotate(turn).save(folder / f"images/{name}.png")
    return folder


def test_duplicates_are_reported_and_are_not_bad(three):
    rows = [("a", "a dog"), ("b", "a cat"), ("c", "a dog"), ("a", "a dog"), ("a", "a cat"), ("c", "a house")]
    write(three / "pairs.jsonl", [{"image": f"{image}.png", "caption": caption} for image, caption in rows])
    assert check(three, "--clean", "clean.json") == 0
    found = [(problem["row"], problem["kind"]) for problem in problems()]
    assert found == [(2, "duplicate_image"), (3, "duplicate_caption"), (4, "duplicate_row"), (5, "duplicate_caption")]
    reasons = [problem["reason"] for problem in problems()]
    assert reasons[0].endswith("a.png") and reasons[1].endswith("row 1 too") and reasons[3].startswith("'a cat'")
    assert len(json.loads(Path("clean.json").read_text())) == 6


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("target", ["clean.json", "clean.jsonl"])
def test_cleaning_keeps_every_column_and_the_good_captions(three, suffix, target):
    rows: list[dict[str, Any]] = [
        {"id": 1, "image": "a.png", "caption": ["a dog", "!?", "", None, "犬"], "width": 0.5},
        {"id": 2, "image": "gone.png", "caption": ["a dog"], "width": 1.5},
        {"id": 3, "image": "c.png", "caption": [], "width": None},
        {"id": 4, "image": "../images/c.png", "caption": ["outside"], "width": 2.5},
        {"id": 5, "image": "c.png", "caption": ["—", None], "width": 2.5},
        {"id": 6, "image": "c.png", "caption": None, "width": 2.5},
        {"id": 7, "image": "", "caption": ["x"], "width": 2.5},
        {"id": 8, "image": None, "caption": ["x"], "width": 2.5},
        {"id": 9, "image": "b.png", "caption": ["a cat"], "width": 3.5},
    ]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), three / "pairs.parquet")
    else:
        write(three / f"pairs{suffix}", rows)
    assert check(three, "--clean", target, name=f"pairs{suffix}") == 1
    text = Path(target).read_text()
    clean = json.loads(text) if target.endswith("json") else [json.loads(line) for line in text.splitlines()]
    assert clean == [{**rows[0], "caption": ["a dog", "犬"]}, rows[8]]
    kinds = [(problem["row"], problem["kind"]) for problem in problems(kinds=("leaves_folder", "no_image", *BAD))]
    empty = [(1, EMPTY)] * 3 + [(2, MISSING), (3, EMPTY), (4, "leaves_folder"), (5, EMPTY), (5, EMPTY), (6, EMPTY)]
    assert kinds == [*empty, (7, "no_image"), (8, "no_image")]
    assert read_annotations([target]).num_rows == 2


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_cleaned_rows_are_those_that_training_reads(three, name):
    """Numbers that a format writes as texts or with a point stay the same ids, and ``same_image`` counts within its file."""
    ids = [Decimal("7.00"), Decimal("8.00"), None]
    table = pa.table(
        {"image": ["a.png", "b.png", "c.png"], "caption": ["x", "y", "z"], "image_id": pa.array(ids, pa.decimal128(20, 2))}
    )
    pyarrow.parquet.write_table(table, three / "a.parquet")
    (three / "a.csv").write_text("image,caption,image_id\na.png,x,7.0\nb.png,y,8.0\nc.png,z,\n")
    (three / "b.csv").write_text("image,caption,same_image\na.png,x,1\nb.png,y,1\n")
    (three / "c.jsonl").write_text('{"image": "c.png", "caption": "x", "same_image": 1}\n')
    assert check(three, "--clean", "clean.jsonl", name=name) == 0
    clean, own = read_annotations(["clean.jsonl"]), read_annotations([three / name])
    assert clean.equals(own, check_metadata=True) and clean["image_id"].to_pylist() == ["7", "8", None]
    files = ["--annotations", three / "b.csv", three / "c.jsonl", "--images", three / "images", "--output", "o", "--clean", "d.json"]
    assert main(["check-data", *map(str, files)]) == 0
    assert image_keys(read_annotations(["d.json"])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("depth", [900, 980, 200_000])
def test_an_unused_column_that_cannot_be_cleaned_is_one_message(three, depth, capsys):
    row = '{"image": "a.png", "caption": "a dog"'
    (three / "pairs.jsonl").write_text(row + "}\n" + row + ', "x": ' + "[" * depth + "NaN" + "]" * depth + "}\n")
    code = check(three, "--clean", "clean.jsonl")
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and "nested too deeply" in said and "Traceback" not in said)
    assert Path("clean.jsonl").exists() == (code == 0) and not list(Path().glob(".*.part")) and (code == 2 or depth < 1000)


def test_an_interrupted_cleaning_leaves_nothing(three, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    write(three / "pairs.jsonl", [{"image": "a.png", "caption": "a dog"}])
    monkeypatch.setattr("lavis_mafa.tools.check_data._as_json", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        check(three, "--clean", "clean.jsonl")
    assert not Path("clean.jsonl").exists() and not list(Path().glob(".*"))


def test_what_json_has_not_becomes_null_and_bytes_are_refused(three, refused):
    rows = [{"image": "a.png", "caption": "a dog", "x": {"y": [float("nan"), float("inf"), 1.5]}, "half": "\ud83d"}]
    write(three / "pairs.json", rows)
    assert check(three, "--clean", "clean.jsonl", name="pairs.json") == 0
    assert json.loads(Path("clean.jsonl").read_text()) == {**rows[0], "x": {"y": [None, None, 1.5]}}
    nested = [{"image": "a.png", "caption": "a dog", "thumb": [{"bytes": b"x"}]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(nested), three / "pairs.parquet")
    options = ["--images", three / "images", "--output", "second", "--clean", "other.jsonl"]
    assert "--clean: column 'thumb' of" in refused("check-data", "--annotations", three / "pairs.parquet", *options)


def test_what_lavis_would_end_with_is_a_problem(three, monkeypatch):
    from lavis_mafa.tools import check_data

    rows = [("a.png", "a dog"), ("a.png", ["a cat"]), ("b.png", None), (None, "a house"), ("gone.png", "x"), ("c.png", "...")]
    write(three / "pairs.json", [{"image": image, "caption": caption} for image, caption in rows])
    info = {"annotations": {"train": {"storage": [str(three / "pairs.json")]}}, "images": {"storage": str(three / "images")}}
    found = check_data.source_of("coco_caption", OmegaConf.create({"build_info": info}), "train", {"train": str.lower})
    monkeypatch.setattr(check_data, "from_files", lambda *_: [found])
    assert check(three, "--clean", "clean.json", name="pairs.json") == 1
    kinds = [(problem["row"], problem["kind"]) for problem in problems(kinds=("list_of_captions", "no_image", *BAD))]
    assert kinds == [(2, "list_of_captions"), (3, EMPTY), (4, "no_image"), (5, MISSING), (6, EMPTY)]
    assert json.loads(Path("clean.json").read_text()) == [{"image": "a.png", "caption": "a dog"}]


def test_a_line_break_in_a_path_stays_in_its_line(three):
    write(three / "pairs.jsonl", [{"image": "a\nb.png", "caption": "a dog"}])
    assert check(three) == 1
    assert problems()[0]["reason"] == f"no file {str(three / 'images') + '/a' + chr(10) + 'b.png'!r}"


def test_tables_of_texts_and_several_files(three):
    with (three / "one.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image", "caption", "note"), ("a.png", "two\nlines, quoted", "x"), ("gone.png", "a", "y")])
        writer.writerow(("c.png", "word " * 40_000, "z"))
    (three / "two.tsv").write_text("image\tcaption\nb.png\t\nb.png\ta cat\n")
    arguments = [
        "--annotations",
        three / "one.csv",
        three / "two.tsv",
        "--images",
        three / "images",
        "--workers",
        "1",
        "--clean",
        "c.jsonl",
    ]
    assert main(["check-data", *map(str, arguments)]) == 1
    rows = [(Path(problem["file"]).name, problem["row"], problem["kind"]) for problem in problems(kinds=BAD)]
    assert rows == [("one.csv", 2, MISSING), ("two.tsv", 1, EMPTY)]
    clean = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    assert clean[0] == {"image": "a.png", "caption": "two\nlines, quoted", "note": "x"}
    assert [row["image"] for row in clean] == ["a.png", "c.png", "b.png"]


def test_absolute_paths_where_they_are_allowed(three):
    write(three / "pairs.jsonl", [{"image": str(three / "images/a.png"), "caption": "a"}, {"image": "../images/c.png", "caption": "c"}])
    assert check(three) == 1
    assert [problem["kind"] for problem in problems()] == ["leaves_folder"] * 2
    assert check(three, "--allow-absolute-paths", "--output", "second") == 0


def test_a_larger_min_side(three):
    write(three / "pairs.jsonl", [{"image": "a.png", "caption": "a"}])
    assert check(three, "--min-side", 64) == 1
    assert problems()[0]["reason"] == "32x24 pixels, but a side needs at least 64"


def test_what_tables_of_other_programs_hold_is_named_row_by_row(three):
    rows = [
        "image,caption,image_id",
        "a.png,a dog,1",
        "b.png,nan,2",
        "c.png,\"['a', 'b']\",3",
        "c.png,a cat,1",
        "sub\\a.png,x,",
        "a.png,y,",
    ]
    (three / "pairs.csv").write_text("\n".join(rows))
    assert check(three, "--clean", "clean.jsonl", name="pairs.csv") == 1
    found = {problem["row"]: (problem["kind"], problem["reason"]) for problem in problems() if problem["kind"] != "duplicate_image"}
    assert found.pop(2) == (EMPTY, "The caption 'nan' is how a missing caption is written.")
    assert found.pop(3) == ("list_of_captions", "The caption \"['a', 'b']\" is a printed list.")
    assert found.pop(4) == ("id_of_another", "'1' is the image_id of another image in row 1")
    assert found[5][0] == MISSING and found.pop(5)[1].endswith("; the path holds a backslash.")
    assert not found and [json.loads(line)["caption"] for line in Path("clean.jsonl").read_text().splitlines()] == ["a dog", "y"]


def test_an_id_of_two_files_is_fine_until_they_become_one(three, refused):
    for name in "ab":
        (three / f"{name}.csv").write_text(f"image,caption,image_id\n{name}.png,text {name},0\n")
    files = ["--annotations", three / "a.csv", three / "b.csv", "--images", three / "images", "--workers", 0]
    assert "image_id '0' of" in refused("check-data", *files, "--clean", "clean.json")
    assert main(["check-data", *map(str, files)]) == 0
    (three / "shards").mkdir()
    (three / "a.csv").rename(three / "shards/a.csv")
    assert check(three, "--output", "second", name="shards") == 0


@pytest.mark.parametrize("options", [["run.valid_splits=[val]"], ["run.test_splits=[test]"], []])
def test_every_split_that_the_run_names_is_looked_at(three, options):
    """Needs no model, so a machine without a GPU will do for half precision."""
    for name, image in (("train", "a"), ("val", "torn"), ("test", "gone")):
        write(three / f"{name}.jsonl", [{"image": "c.png", "caption": "a dog"}, {"image": f"{image}.png", "caption": "a cat"}])
    (three / "images/torn.png").write_bytes((three / "images/a.png").read_bytes()[:900])
    text = RUN.replace("DATA", str(three)).replace("{train: {storage", "{val: {storage: %s}, test: {storage: %s}, train: {storage")
    text = text.replace("pairs.jsonl", "train.jsonl") % (three / "val.jsonl", three / "test.jsonl")
    model = "model: {arch: blip2_mafa, model_type: base, ecm: {enabled: false}}\n"
    (three / "run.yaml").write_text(model + text[text.index("datasets:") :].replace("image_size: 16", "image_size: 224"))
    code = main(["check-data", "--cfg-path", str(three / "run.yaml"), "--workers", "0", "--options", "run.num_workers=0", *options])
    found = {(Path(problem["file"]).name, problem["kind"]) for problem in problems(kinds=BAD)}
    expected = {"val": {("val.jsonl", UNREADABLE)}, "test": {("test.jsonl", MISSING)}}
    assert found == next((bad for split, bad in expected.items() if options and split in options[0]), set())
    assert code == bool(options)


def test_questions_have_images_too(three):
    rows = [{"image": f"{image}.png", "question": "what?", "answer": "x"} for image in ("a", "gone", "c")]
    write(three / "q.jsonl", rows)
    block = f"annotations: {{test: {{storage: {three}/q.jsonl}}}}\n      images: {{storage: {three}/images}}"
    model, run = "model: {arch: albef_vqa_mafa, model_type: tiny}", "run: {task: mafa_vqa, evaluate: true, test_splits: [test]}"
    eyes = "vis_processor: {eval: {name: albef_image_eval, image_size: 48}}"
    (three / "run.yaml").write_text(f"{model}\ndatasets:\n  grit_vqa:\n    build_info:\n      {block}\n    {eyes}\n{run}\n")
    assert main(["check-data", "--cfg-path", str(three / "run.yaml"), "--workers", "0"]) == 1
    assert [(problem["row"], problem["kind"]) for problem in problems()] == [(2, MISSING)]


def test_a_terminal_without_the_letters_of_a_caption_shows_their_codes(three, monkeypatch):
    write(three / "pairs.jsonl", [{"image": "a.png", "caption": "…"}, {"image": "c.png", "caption": "ein Hündchen"}] * 2)
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    assert check(three) == 1
    assert b"\\xfcndchen" in written.getvalue() and json.loads(Path("output/check-data/check.json").read_text())["bad_rows"] == 2


def test_nothing_is_overwritten(three, refused):
    write(three / "pairs.jsonl", [{"image": "gone.png", "caption": "a"}])
    base = ["check-data", "--annotations", three / "pairs.jsonl", "--images", three / "images", "--workers", 0]
    assert "exists already and is never overwritten" in refused(*base, "--clean", three / "pairs.jsonl")
    assert check(three, "--clean", "clean.jsonl") == 1
    assert not Path("clean.jsonl").exists() and not list(Path().glob(".*.part"))
    assert "holds a finished result (check.json)" in refused(*base)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "one of the arguments --cfg-path --annotations is required"),
        (["--annotations", "DATA/pairs.jsonl"], "--annotations needs --images"),
        (["--annotations", "DATA/none.jsonl", "--images", "DATA/images"], "none.jsonl: no such annotation file"),
        (["--annotations", "DATA/pairs.jsonl", "--images", "DATA/none"], "The image folder"),
        (["--annotations", "DATA/pairs.jsonl", "--images", "DATA/images", "--min-side", "1"], "--min-side is 1, but"),
        (
            ["--annotations", "DATA/pairs.jsonl", "--images", "DATA/images", "--workers", "-1"],
            "--workers: '-1' is not a whole number of at least 0",
        ),
        (["--annotations", "DATA/pairs.jsonl", "--images", "DATA/images", "--clean", "c.jsnol"], "Did you mean '.jsonl'?"),
        (["--annotations", "DATA/pairs.jsonl", "--images", "DATA/images", "--clean", "no/c.json"], "the folder no does not exist"),
        (["--annotations", "DATA/torn.jsonl", "--images", "DATA/images"], "torn.jsonl, row 1: not valid JSON"),
        (["--cfg-path", "nowhere.yaml"], "nowhere.yaml"),
        (["--cfg-path", "x.yaml", "--images", "DATA/images"], "belong to --annotations"),
    ],
)
def test_mistakes_are_one_message(three, refused, options, part):
    write(three / "pairs.jsonl", [{"image": "a.png", "caption": "a"}])
    (three / "torn.jsonl").write_text("{")
    assert part in refused("check-data", *(option.replace("DATA", str(three)) for option in options))


RUN = """
model:
  arch: albef_mafa
  model_type: tiny
  ecm: {enabled: false}
  itc: {smoothing: 0}
  image_encoder: {image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}
  text_encoder: {init: null, width: 16, layers: 2, fusion_layer: 1, heads: 1}
  embed_dim: 8
datasets:
  grit_pairs:
    build_info:
      annotations: {train: {storage: DATA/pairs.jsonl}}
      images: {storage: DATA/images}
    vis_processor:
      train: {name: albef_image_train, image_size: 16}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_pretrain
  runner: runner_mafa
  max_epoch: 2
  max_bad_share: 0.5
  batch_size_train: 16
  warmup_steps: 2
  num_workers: 0
  grit: {queue_size: 32, search_space: 16}
  log_freq: 1
  device: cpu
"""
