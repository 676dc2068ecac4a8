"""Own data whose truth is told by facts, through the commands: what each says of a pair is what inclusion of sets says."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.tools import candidates
from lavis_mafa.tools import count as counting

pytestmark = pytest.mark.slow

COLOURS, SHAPES = ("red", "green", "blue"), ("square", "disc", "star", "moon")
FACTS = [
    [colour, shape, "big"] if number % 3 else [colour, shape]
    for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES))
]


def rows_of(seed: int, count: int) -> list[dict]:
    """Each image with a caption of one to all of its facts, but every fifth with that of another image."""
    draw = random.Random(seed)
    has = [draw.choice(FACTS) for _ in range(count)]
    claims = [draw.sample(one, draw.randint(1, len(one))) for one in has]
    claims = [claims[(number + 1) % count] if number % 5 == 4 else claim for number, claim in enumerate(claims)]
    return [
        {"image": f"{seed}_{number}.png", "caption": " ".join(sorted(claim)), "facts": one, "caption_facts": claim}
        for number, (one, claim) in enumerate(zip(has, claims, strict=True))
    ]


TRAIN, VAL = rows_of(0, 24), rows_of(1, 12)


def match(image: int, text: int) -> bool:
    return set(TRAIN[text]["caption_facts"]) <= set(TRAIN[image]["facts"])


@pytest.fixture(scope="module")
def work(tmp_path_factory, run_of) -> Path:
    """``run.yaml`` on ``data``, and the run that it makes."""
    folder = tmp_path_factory.mktemp("facts")
    (folder / "data/images").mkdir(parents=True)
    for name, rows in (("pairs", TRAIN), ("val", VAL)):
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            Image.new("RGB", (16, 16), row["facts"][0]).save(folder / "data/images" / row["image"])
    val = f"val: {{storage: {folder}/data/val.jsonl}}"
    yaml = run_of(folder / "data").replace("{train: ", f"{{{val}, train: ", 1)
    (folder / "run.yaml").write_text(yaml + f"  test_splits: [val]\n  output_dir: {folder}/output\n")
    assert main(["train", "--cfg-path", str(folder / "run.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(work) -> Path:
    return next((work / "output").glob("2*"))


def test_ground_truth_con_d_calls_positive_what_matches(trained):
    table = pq.read_table(trained / "connections")
    pairs = [*zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True)]
    verdicts = ["positive" if match(*pair) else "negative" for pair in pairs]
    assert table["verdict"].to_pylist() == verdicts and {*verdicts} == {"positive", "negative"}
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(r["con_d_precision"] == r["con_d_recall"] == 1 for r in records if r["false_negative_share"])
    assert all(r["new_positive_share"] == pytest.approx(r["false_negative_share"], abs=1e-6) for r in records)
    assert any(r["false_negative_share"] for r in records)


def test_the_gallery_is_scored_by_what_matches(trained, work):
    from lavis_mafa.datasets.pairs import RetrievalPairs

    texts = list(dict.fromkeys(row["caption"] for row in VAL))
    data = RetrievalPairs(lambda image: image, str, work / "data/images", [work / "data/val.jsonl"])
    claims = {row["caption"]: set(row["caption_facts"]) for row in VAL}
    assert data.relevant.tolist() == [[claims[text] <= set(row["facts"]) for text in texts] for row in VAL]
    scored = json.loads((trained / "evaluation.jsonl").read_text().splitlines()[-1])
    assert scored["split"] == "val" and 0 <= scored["tr_r_precision"] <= 100


def test_the_report_measures_verdicts_against_the_facts(trained, tmp_path, monkeypatch):
    from lavis_mafa.tools import report

    tables = []
    made = report.truth_table
    monkeypatch.setattr(report, "truth_table", lambda *args: tables.append(made(*args)) or tables[0])
    assert main(["report", str(trained), "--output", str(tmp_path / "page.html")]) == 0
    table = pq.read_table(trained / "connections")
    sightings = [match(*pair) for pair in zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True)]
    (every,) = (row for row in tables[0].rows if row[1] == "every sighting")
    assert every[2:] == [str(len(sightings)), f"{sum(sightings) / len(sightings):.1%}", str(sum(sightings)), "100.0%", "100.0%"]


@pytest.fixture
def opinion(monkeypatch):
    """A Con-D that is often wrong; (image row, text row) -> its probability."""

    def of(image: int, text: int) -> float:
        return (7 * image + 13 * text) % 10 / 10 + 0.05

    def asked(encoder, block, image, text, pairs_at_once=512):
        return torch.tensor([of(*pair) for pair in zip(block.index[image].tolist(), block.index[text].tolist(), strict=True)])

    monkeypatch.setattr(candidates, "match_probabilities", asked)
    return of


def call(command: str, work: Path, trained: Path, output: Path, *more: str) -> int:
    con_d = str(trained / "checkpoint_1.pth")
    return main([command, "--cfg-path", str(work / "run.yaml"), "--con-d", con_d, "--force", "--output", str(output), *more])


def test_the_count_against_the_truth_is_a_plain_count(work, trained, tmp_path, opinion, monkeypatch):
    asked: list[list[tuple[int, int]]] = []
    hardest = counting.hardest_negatives

    def watched(block, batches, known):
        found = hardest(block, batches, known)
        rows = zip(block.index[found.image].tolist(), block.index[found.text].tolist(), found.exists.tolist(), strict=True)
        asked.append([(image, text) for image, text, exists in rows if exists])
        return found

    monkeypatch.setattr(counting, "hardest_negatives", watched)
    more = ("--truth", "--random-only", "--batch-size", "6", "--same-text", "exclude", "--same-image", "exclude", "--threshold", "0.5")
    assert call("count-false-negatives", work, trained, tmp_path / "out", *more) == 0
    (way,) = json.loads((tmp_path / "out/count.json").read_text())["ways"]
    pairs = [pair for block in asked for pair in block]
    said, true = [opinion(*pair) > 0.5 for pair in pairs], [match(*pair) for pair in pairs]
    both = sum(a and b for a, b in zip(said, true, strict=True))
    assert 0 < both < sum(said)
    assert way["truth"]["true_share"] == pytest.approx(sum(true) / len(true))
    found = way["truth"]["thresholds"][0]
    assert (found["precision"], found["recall"]) == pytest.approx((both / sum(said), both / sum(true)))


def test_mined_rows_keep_facts_and_claims_and_are_measured_by_them(work, trained, tmp_path, opinion):
    assert call("mine", work, trained, tmp_path / "out", "--threshold", "0.5") == 0
    rows = pq.read_table(tmp_path / "out/pairs.parquet").to_pylist()
    mined = [row for row in rows if row["source"] == "mined"]
    assert rows[: len(TRAIN)] == [{**rows[number], **row} for number, row in enumerate(TRAIN)]
    for row in mined:
        assert (row["facts"], row["caption"]) == (TRAIN[row["image_sample"]]["facts"], TRAIN[row["text_sample"]]["caption"])
        assert set(row["caption_facts"]) == set(TRAIN[row["text_sample"]]["caption_facts"])
    true = [set(row["caption_facts"]) <= set(row["facts"]) for row in mined]
    assert true == [match(row["image_sample"], row["text_sample"]) for row in mined] and 0 < sum(true) < len(true)
    results = json.loads((tmp_path / "out/mine.json").read_text())
    assert results["mined_truly_match"] == pytest.approx(sum(true) / len(true))
    options = [f"datasets.grit_pairs.build_info.annotations.train.storage={tmp_path}/out/pairs.parquet", "run.max_steps=2"]
    train = ["train", "--cfg-path", str(work / "run.yaml"), "--options", *options, f"run.output_dir={tmp_path}/again"]
    assert main(train) == 0, "pairs.parquet tells the truth of its rows"


def test_check_data_says_what_does_not_fit_and_keeps_the_claims_of_good_captions(work, tmp_path, capsys):
    several = {"image": TRAIN[0]["image"], "caption": ["?!", "fine"], "facts": ["x"], "caption_facts": [["x"], ["y"]]}
    cells = {name: json.dumps(value) if isinstance(value, list) else value for name, value in TRAIN[1].items()}
    (tmp_path / "a.jsonl").write_text(json.dumps(several) + "\n")
    (tmp_path / "b.tsv").write_text("\t".join(cells) + "\n" + "\t".join(cells.values()) + "\n")
    check = ["check-data", "--images", str(work / "data/images"), "--workers", "0", "--annotations"]
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.tsv")]
    assert main([*check, *files, "--output", str(tmp_path / "out"), "--clean", str(tmp_path / "clean.jsonl")]) == 1
    clean = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert clean == [{**several, "caption": ["fine"], "caption_facts": [["y"]]}, TRAIN[1]]
    capsys.readouterr()
    (tmp_path / "c.jsonl").write_text(json.dumps({**TRAIN[1], "image": "other.png", "caption_facts": []}) + "\n")
    assert main([*check, *files, str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "again")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/c.jsonl, row 1: 'caption_facts' of caption" in said and f"{tmp_path}/b.tsv, row 1" in said


def test_check_data_knows_images_of_one_name_in_two_folders_apart(work, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / TRAIN[0]["image"])
    (tmp_path / "other.jsonl").write_text(json.dumps({**TRAIN[0], "facts": ["else"]}) + "\n")
    storage = f"[{work}/data/pairs.jsonl, {{annotations: {tmp_path}/other.jsonl, images: {tmp_path}/other}}]"
    options = [f"datasets.grit_pairs.build_info.annotations.train.storage={storage}", "run.test_splits=[]"]
    check = ["check-data", "--cfg-path", str(work / "run.yaml"), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert main([*check, "--options", *options]) == 0


def test_a_gallery_without_a_match_and_data_without_truth_are_found_before_training(work, tmp_path, capsys):
    wrong, plain = ([{**row, **change} for row in VAL] for change in ({"facts": ["nothing"]}, {"facts": None, "caption_facts": None}))
    for rows in (wrong, plain):
        for row in rows:
            row["image"] = VAL[0]["image"]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    for option, message in (
        (f"val.storage={tmp_path}/wrong.jsonl", "no caption is right for any image"),
        (
            f"train.storage={tmp_path}/plain.jsonl",
            "ground_truth, but the training data tell no truth (a column `concept`, or `facts` with",
        ),
    ):
        capsys.readouterr()
        options = [f"datasets.grit_pairs.build_info.annotations.{option}", f"run.output_dir={tmp_path}/output"]
        assert main(["train", "--cfg-path", str(work / "run.yaml"), "--options", *options]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said
