"""What the page holds, and what a user is told when it cannot be made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.runners.log import ConnectionRecord
from lavis_mafa.tools.gallery import Thumbnails, distinct_candidates, read_training_rows
from lavis_mafa.tools.report import evaluation_tables
from lavis_mafa.tools.run_files import Run, open_runs, read_evaluations
from lavis_mafa.tools.significance import half_widths


@pytest.fixture
def own(tmp_path) -> Path:
    """Where a run may be written, beside data of its own."""
    run_folder.write_data(tmp_path / "data")
    return tmp_path / "output" / "20250101000000"


def report(run: Path, to: Path, *arguments: str) -> dict:
    assert main(["report", str(run), "--output", str(to), *arguments]) == 0
    return embedded(to)


def embedded(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="connections">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_needs_nothing_but_itself(page):
    html = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "url(http" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_it_shows_settings_curves_scores_and_evaluations(page):
    html = page.read_text()
    for words in (
        "ITC loss",
        "ITM loss",
        "MLM loss",
        "False share of the hardest negatives",
        "positive above 0.8",
        "negative up to 0.5",
    ):
        assert words in html
    assert html.count("<svg viewBox") >= 6
    assert "model.ecm.threshold" in html and "model.itc.smoothing" in html
    assert '<td class="best">40.5</td>' in html and '<td class="best">30.0</td>' in html  # each column's best run
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_no_caption_becomes_markup(page):
    assert run_folder.BITES in {row[1] for row in embedded(page)["rows"]}
    assert "<script>window.bitten" not in page.read_text() and "<img src=x" not in page.read_text()


def test_every_image_is_in_the_page_once_or_has_a_reason(page):
    data = embedded(page)
    assert len(data["images"]) == run_folder.ROWS
    problems = {Path(image["name"]).stem: image["problem"] for image in data["images"] if "src" not in image}
    assert problems == {str(run_folder.MISSING): "image is missing", str(run_folder.TORN): "image is unreadable"}
    sources = [image["src"] for image in data["images"] if "src" in image]
    assert all(page.read_text().count(source) == 1 for source in set(sources))


def test_the_gallery_has_both_directions_and_the_surest_first(page):
    data = embedded(page)
    chosen = [data["connections"][n] for n in data["lists"]["gallery"]]
    assert {c[0] for c in chosen} == {0, 1}
    scores = [c[3] for c in chosen if c[0] == 0]
    assert scores == sorted(scores, reverse=True)


def test_anchor_and_candidate_are_the_right_way_round(own, tmp_path):
    rows = [run_folder.connection("text for image", 1, 2, 0.9), run_folder.connection("image for text", 7, 8, 0.95)]
    data = report(run_folder.write_run(own, rows, metrics=False), tmp_path / "r.html")
    found = {c[0]: (data["rows"][c[1]][1], data["rows"][c[2]][1]) for c in data["connections"]}
    assert found == {0: (run_folder.caption(1), run_folder.caption(2)), 1: (run_folder.caption(8), run_folder.caption(7))}


def test_truth_and_disagreements_equal_the_loop(page):
    data = embedded(page)
    for name, verdict, true in (("doubted", 2, 0), ("missed", 0, 1)):
        listed = [data["connections"][n] for n in data["lists"][name]]
        assert listed and all((c[4], c[5]) == (verdict, true) for c in listed)
        scores = [c[3] for c in listed]
        assert scores == sorted(scores, reverse=name == "doubted")
    for c in data["connections"]:
        anchor, other = data["rows"][c[1]][3], data["rows"][c[2]][3]
        image, text = (anchor, other) if c[0] == 0 else (other, anchor)
        assert c[5] == int(run_folder.CONCEPTS[image % 4] == run_folder.CONCEPTS[text % 4])


def test_a_pair_seen_again_counts_once_at_its_last_sighting(runs):
    run = open_runs([runs[0]])[0]
    rows = read_training_rows(run)
    again = [run_folder.connection("text for image", 1, 2, p, epoch=e) for p, e in ((0.7, 10), (0.9, 2), (0.6, 0))]
    table = pq.read_table(runs[0] / "connections" / "epoch_0_rank_0.parquet").from_pylist(again)
    (candidate,) = distinct_candidates(0, table, rows)
    assert (candidate.probability, candidate.epoch, candidate.times) == (0.7, 10, 3)


def test_gallery_n_bounds_it(own, tmp_path, capsys):
    run = run_folder.write_run(own, run_folder.many(100), metrics=False)
    assert len(report(run, tmp_path / "r.html", "--gallery", "10")["lists"]["gallery"]) == 10
    assert "10 of 100 recorded" in capsys.readouterr().out
    assert main(["report", str(run), "--output", str(tmp_path / "r.html"), "--gallery", "0"]) == 0
    assert "--gallery 0" in (tmp_path / "r.html").read_text()


def test_without_its_data_a_run_still_has_its_page(tmp_path, capsys):
    run = run_folder.write_run(tmp_path / "output" / "20250101000000", run_folder.many(100))
    data = report(run, tmp_path / "r.html")
    assert "pairs.jsonl" in capsys.readouterr().out
    html = (tmp_path / "r.html").read_text()
    assert "could not be read again" in html and "ITC loss" in html
    assert all(row[1] is None for row in data["rows"]) and not any("src" in image for image in data["images"])


def test_a_data_set_of_lavis_is_read_without_downloading(own, tmp_path):
    rows = [{"image": f"{n}.jpg", "image_id": str(n), "caption": run_folder.caption(n)} for n in range(run_folder.ROWS)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run = run_folder.write_run(own, run_folder.many(20), metrics=False)
    nowhere = "http://localhost:9/x.json"
    info = {
        "annotations": {
            "train": {"url": [nowhere], "storage": [str(tmp_path / "train.json")]},
            "val": {"url": [nowhere], "storage": [str(tmp_path / "gone.json")]},
        },
        "images": {"storage": str(tmp_path / "data" / "images")},
    }
    processors = {"vis_processor": {"train": {"name": "blip_image_train"}}, "text_processor": {"train": {"name": "blip_caption"}}}
    block = {"coco_caption": {"data_type": "images", "build_info": info, **processors}}
    (run / "config.yaml").write_text(json.dumps({"datasets": block}))  # JSON is YAML
    data = report(run, tmp_path / "r.html")
    assert run_folder.caption(0) in {row[1] for row in data["rows"]}
    assert {c[5] for c in data["connections"]} == {None} and any("src" in image for image in data["images"])


def test_captions_stay_where_only_the_images_are_gone(own, tmp_path):
    shutil.rmtree(tmp_path / "data" / "images")
    data = report(run_folder.write_run(own, run_folder.many(100), metrics=False), tmp_path / "r.html")
    assert {image["problem"] for image in data["images"]} == {"image is missing"}
    assert run_folder.caption(0) in {row[1] for row in data["rows"]}


def test_data_that_changed_are_not_shown_as_if_they_fitted(own, tmp_path, capsys):
    report(
        run_folder.write_run(own, [run_folder.connection("text for image", 0, run_folder.ROWS, 0.9)], metrics=False),
        tmp_path / "r.html",
    )
    assert "they changed since then" in capsys.readouterr().out


@pytest.mark.parametrize("make", ["nothing", "empty", "above"])
def test_a_folder_without_metrics_is_one_message(make, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    if make == "empty":
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
    if make == "above":
        shutil.copytree(runs[1], folder / "20250101000000")
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(folder) in said
    assert ("Did you mean" in said) == (make == "above")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("a: !!python/object/apply:os.system ['touch mark']", "!!python/object/apply:os.system is not allowed"),
        (
            "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdefg", "bcdefgh", strict=True)),
            "aliases",
        ),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_config_that_is_more_than_settings(config, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = run_folder.write_run(tmp_path / "run", None, metrics=False)
    (run / "config.yaml").write_text(config)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and said in error and "config.yaml" in error
    assert not (tmp_path / "mark").exists() and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("arguments", [["--gallery", "-1"], ["--gallery", "x"], ["--output", "."]])
def test_wrong_arguments_are_one_message(arguments, runs, capsys):
    assert main(["report", str(runs[1]), *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and arguments[0] in said


def test_thumbnails_are_bounded_in_number_and_bytes(tmp_path):
    for n in range(6):
        Image.effect_noise((300, 200), 90).save(tmp_path / f"{n}.png")
    few = Thumbnails(at_most=3)
    assert [few.add(tmp_path / f"{n}.png", "") for n in (0, 1, 1, 2, 3, 0)] == [0, 1, 1, 2, 3, 0]
    assert ["src" in entry for entry in few.entries] == [True, True, True, False]
    one = len(few.entries[0]["src"])
    assert one < 10_000
    short = Thumbnails(at_most_bytes=2 * one + one // 2)
    for n in range(6):
        short.add(tmp_path / f"{n}.png", "")
    assert sum(len(entry.get("src", "")) for entry in short.entries) <= 2 * one + one // 2
    assert short.entries[-1]["problem"] == "not embedded"


@pytest.mark.parametrize(("limit", "steps", "batch"), [(2000, 50, 96), (2000, 7, 8), (10, 1001, 4)])
def test_the_record_of_an_epoch_is_bounded_in_rows_and_bytes(limit, steps, batch, tmp_path):
    record = ConnectionRecord(tmp_path, 0, limit, steps)
    for step in range(steps):
        numbers, yes = torch.randint(1 << 40, (2 * batch,)), torch.ones(2 * batch, dtype=torch.bool)
        verdicts = {"image": numbers, "text": numbers.flip(0), "exists": yes, "probability": torch.rand(2 * batch)}
        record.add(0, step, {**verdicts, "positive": yes, "ambiguous": ~yes})
    path = record.write(0)
    rows = pq.read_table(path).num_rows
    assert 0 < rows <= limit
    assert path.stat().st_size <= 8_000 + 60 * limit


def test_the_cosine_alone_stands_below_the_score_a_run_was_ranked_by():
    found = {
        "grit": {"epoch": "best", "rank_by": "itm", "tr_r1": 6.9, "itc_tr_r1": 22.0, "ir_r1": 9.0, "itc_ir_r1": 8.0},
        "mafa": {"epoch": "best", "rank_by": "itm", "tr_r1": 17.2, "itc_tr_r1": 21.0, "ir_r1": 9.5, "itc_ir_r1": 9.0},
        "old": {"epoch": 3, "tr_r1": 12.0, "ir_r1": 1.0},
        "cosine": {"epoch": 3, "rank_by": "itc", "tr_r1": 1.0, "ir_r1": 1.0, "itc_tr_r1": 1.0, "itc_ir_r1": 1.0},
    }
    runs = [
        Run(name, Path(name), OmegaConf.create({}), [], {"val": values | {"agg_metrics": 1.0}}, None) for name, values in found.items()
    ]
    (table,) = evaluation_tables(runs)["val"]
    assert table.head == ["run", "epoch", "ranked by", "TR R@1", "IR R@1"]
    assert table.rows == [
        ["grit", "best", "itm", "6.9", "9.0"],
        ["grit", "best", "itc", "22.0", "8.0"],
        ["mafa", "best", "itm", "17.2", "9.5"],
        ["mafa", "best", "itc", "21.0", "9.0"],
        ["old", "3", "–", "12.0", "1.0"],
        ["cosine", "3", "itc", "1.0", "1.0"],
    ]
    assert table.best == {(2, 3), (2, 4), (1, 3), (3, 4)}


def test_what_was_scored_query_by_query_has_intervals(tmp_path):
    scored, old = run_folder.write_run(tmp_path / "scored", None), run_folder.write_run(tmp_path / "old", None)
    run_folder.write_scores(scored, 1.0)
    (table,) = evaluation_tables(open_runs([scored, old]))["val"]
    assert "± is half of the 95 % interval over queries" in table.caption
    columns = {head: number for number, head in enumerate(table.head)}
    by_itm, by_itc, without = table.rows
    half, values = half_widths(scored, "val"), read_evaluations(scored)["val"]
    for row, score in ((by_itm, ""), (by_itc, "itc_")):
        for name, head in (("tr_r_precision", "TR R-Precision"), ("ir_r1", "IR R@1")):
            assert row[columns[head]] == f"{values[score + name]:.1f} ± {half[score + name]:.1f}"
    assert by_itm[1:] != by_itc[1:] and not any("±" in cell for cell in without)


def test_pictures_of_a_run_are_linked_to_from_wherever_the_page_is(own, tmp_path):
    run = run_folder.write_run(own.with_name("javascript:alert(1) & 'b'"), None, metrics=False)
    for name in ("pictures", "pictures_2"):
        (run / name).mkdir()
        (run / name / "pictures.html").touch()
    for page in (tmp_path / "r.html", tmp_path / "pages/r.html", run / "r.html"):
        assert main(["report", str(run), "--output", str(page)]) == 0
        links = re.findall(r'<a href="([^"#]+)"', page.read_text())
        assert [(page.parent / unquote(link)).resolve() for link in links] == [
            run / n / "pictures.html" for n in ("pictures", "pictures_2")
        ]
        assert not any(":" in link for link in links)
