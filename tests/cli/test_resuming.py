"""Going on with a checkpoint: only with the data whose rows its order numbers, and under the settings that are given now."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.runners.resume import rewind, same_runs

pytestmark = pytest.mark.slow

NAME = "checkpoint_0_3"


@pytest.fixture
def rows(pairs) -> list[dict]:
    return [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture
def go_on(run_yaml, trained):
    command = ["train", "--cfg-path", str(run_yaml), "--resume", str(trained / f"{NAME}.pth")]
    return lambda *options: [*command, "--options", "run.max_steps=4", *options]


def write(pairs: Path, rows: list[dict]) -> None:
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: rows[::-1], "row content differs since the checkpoint was written (image, caption, concept)"),
        (lambda rows: [*rows[:-1], {**rows[-1], "caption": "a mouse"}], "(caption)"),
        (lambda rows: [{**rows[0], "image": "1.png"}, *rows[1:]], "(image)"),
        (lambda rows: [*rows, *rows[:4]], "the data had 20 rows, now 24"),
        (lambda rows: rows[:16], "the data had 20 rows, now 16"),
    ],
)
def test_other_data_are_refused(go_on, refused, pairs, rows, edit, said):
    write(pairs, edit(rows))
    message = refused(*go_on())
    assert said in message and f"{NAME}.pth" in message and "start a new run" in message


def test_auto_refuses_other_data_too(run_yaml, refused, pairs, rows, tmp_path):
    train = ["train", "--cfg-path", str(run_yaml), "--resume", "auto", "--options"]
    assert main([*train, "run.max_steps=2"]) == 0
    write(pairs, rows[::-1])
    assert "row content differs" in refused(*train, "run.max_steps=4")
    write(pairs, rows)
    assert main([*train, "run.max_steps=4"]) == 0
    (run,) = (tmp_path / "output").glob("2*")
    saved = torch.load(run / "checkpoint_0_4.pth", weights_only=True)["config"]["run"]["resume_ckpt_path"]
    assert saved == OmegaConf.load(run / "config.yaml").run.resume_ckpt_path == "auto", "what was found is no setting"


@pytest.fixture
def old(trained, tmp_path) -> Path:
    """A checkpoint of a version that did not write down what it was trained on."""
    for file in trained.glob(f"{NAME}*"):
        shutil.copy(file, tmp_path)
    content = torch.load(tmp_path / f"{NAME}.pth", weights_only=True)
    assert content.pop("data")[0]["rows"] == 20
    torch.save(content, tmp_path / f"{NAME}.pth")
    return tmp_path / f"{NAME}.pth"


def test_a_checkpoint_that_does_not_know_its_data_is_gone_on_with(run_yaml, old, pairs, rows, refused, caplog):
    assert main(["train", "--cfg-path", str(run_yaml), "--resume", str(old), "--options", "run.max_steps=4"]) == 0
    assert "does not say what its rows held" in caplog.text
    write(pairs, [*rows, *rows[:4]])
    assert "the data had 20 rows, now 24" in refused("train", "--cfg-path", run_yaml, "--resume", old)


def test_settings_hold_from_the_resume_on_and_are_named(go_on, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lavis_mafa")
    options = ["run.weight_decay=0.5", "run.beta2=0.9", "run.init_lr=0.001", "model.temperature=0.03"]
    assert main(go_on(*options)) == 0
    (file,) = (tmp_path / "output").glob("2*/checkpoint_0_4.pth")
    content = torch.load(file, weights_only=True)
    assert [(g["weight_decay"], tuple(g["betas"])) for g in content["optimizer"]["param_groups"]] == [
        (0.5, (0.9, 0.9)),
        (0, (0.9, 0.9)),
    ]
    (applied,) = [r.getMessage() for r in caplog.records if "goes on with other settings" in r.getMessage()]
    assert "run.weight_decay 0.02 -> 0.5" in applied and "run.beta2 0.999 -> 0.9" in applied and "max_steps" not in applied
    (kept,) = [r.getMessage() for r in caplog.records if "no effect on a resumed run" in r.getMessage()]
    assert "model.temperature" in kept and "0.03" in kept and "model.temperature" not in applied
    assert abs(float(content["model"]["temp"]) - 0.07) < 0.01


def test_a_resume_without_changes_says_nothing_of_settings(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lavis_mafa")
    command = ["train", "--cfg-path", trained.parents[1] / "run.yaml", "--resume", trained / f"{NAME}.pth", "--options"]
    assert main([*map(str, command), "run.max_steps=4", f"run.output_dir={tmp_path}/out", "run.num_workers=0"]) == 0
    assert "resuming" in caplog.text and "other settings" not in caplog.text and "no effect" not in caplog.text


# --- auto --------------------------------------------------------------------------------------------------------------

SEEN_OTHERWISE = "resume_ckpt_path rank gpu world_size distributed dist_backend dist_url device find_unused_parameters output_dir"
SEEN_OTHERWISE += " num_workers max_steps log_freq save_every_epochs save_every_steps keep_checkpoints record_connections"
SEEN_OTHERWISE += " max_bad_share max_nonfinite_steps rank_timeout_minutes test_splits trackers"


def saved_run(parent: Path, name: str, config: dict, when: int) -> Path:
    folder = parent / name
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "checkpoint_0.pth").write_text("")
    os.utime(folder / "checkpoint_0.pth", (when, when))
    return folder


def test_a_run_is_another_one_by_any_setting_that_the_training_depends_on(tmp_path):
    config = {"run": dataclasses.asdict(RunBlock()), "model": {"arch": "x", "itc": {"smoothing": 0.5}}, "datasets": {"d": {"a": [1]}}}
    folder = saved_run(tmp_path, "run", config, when=1)
    assert [*same_runs(tmp_path, config)] == [folder]
    for key, value in config["run"].items():
        other = {**config, "run": {**config["run"], key: "other" if value is None else None}}
        assert [*same_runs(tmp_path, other)] == ([folder] if key in SEEN_OTHERWISE.split() else []), key
    for other in ({"model": {"arch": "x", "itc": {"smoothing": 0.4}}}, {"datasets": {"d": {"a": [2]}}}, {"datasets": {"d": {}}}):
        assert not [*same_runs(tmp_path, {**config, **other})]


def test_the_newest_run_is_the_one_that_saved_last(tmp_path):
    config = {"run": {"seed": 1}}
    folders = [saved_run(tmp_path, name, config, when) for name, when in (("c", 20), ("a", 30), ("b", 10))]
    assert [*same_runs(tmp_path, config)] == [folders[1], folders[0], folders[2]]


@pytest.mark.parametrize(("name", "steps", "evaluated"), [("1_3", 8, [0]), ("1", 10, [0]), ("0", 5, []), ("2_1", 11, [0, 1])])
def test_a_folder_is_put_back_to_what_its_checkpoint_knows(tmp_path, name, steps, evaluated):
    """Five steps an epoch, each logged; an epoch is evaluated after it was saved, so a resumed run evaluates it again."""
    (tmp_path / "connections").mkdir()
    records = [{"epoch": step // 5, "step": step % 5 + 1} for step in range(15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"epoch": 2, "st')
    lines = [{"split": "val", "epoch": epoch} for epoch in (0, 1, 2, "best")]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch in range(3):
        for part in ("", "_3"):
            (tmp_path / f"connections/epoch_{epoch}{part}_rank_0.parquet").write_text("")
    (tmp_path / f"checkpoint_{name}.pth").write_text("")
    (tmp_path / "checkpoint_2.pth").write_text("damaged")
    (tmp_path / ".checkpoint_7.pth.part").write_text("")
    (tmp_path / "bad_samples.jsonl").write_text("")
    rewind(tmp_path, tmp_path / f"checkpoint_{name}.pth")
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == records[:steps]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "evaluation.jsonl").open()] == evaluated
    kept = {path.name for path in (tmp_path / "connections").iterdir()}
    begun = {f"epoch_{epoch}{part}_rank_0.parquet": 5 * epoch + (3 if part else 0) for epoch in range(3) for part in ("", "_3")}
    assert kept == {file for file, first in begun.items() if first < steps}
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {f"checkpoint_{name}.pth", "checkpoint_2.damaged"}
    assert not (tmp_path / "bad_samples.jsonl").exists()


def test_another_batch_size_counts_other_steps(go_on, trained, tmp_path, monkeypatch):
    """12 of 20 samples are done: with batches of 6 two steps of three, and the third serves the next 6 of the order."""
    served: list[int] = []
    read = IndexedDataset._sample
    monkeypatch.setattr(IndexedDataset, "_sample", lambda self, index: served.append(index) or read(self, index))
    assert main(go_on("run.batch_size_train=6", "run.max_steps=3")) == 0
    (run,) = (tmp_path / "output").glob("2*")
    assert [(r["epoch"], r["step"]) for r in map(json.loads, (run / "metrics.jsonl").open())] == [(0, 3)]
    order = torch.load(trained / f"{NAME}.rank0.pth", weights_only=True)["feed"]["sampler"]["order"]
    assert served == order[12:18].tolist()
