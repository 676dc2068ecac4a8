"""Runs without timestamps: `latest`, a run's folder in place of a checkpoint, and `evaluate RUN`."""

from __future__ import annotations

import json
import shutil

import pytest

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import check_yaml

RUN = "output/latest"


@pytest.fixture(scope="module")
def work(tmp_path_factory, run_of, written_pairs):
    """A folder with a run that has validated, so that its best checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("work")
    written_pairs(folder / "data")
    (folder / "run.yaml").write_text(run_of(folder / "data"))
    own = f"datasets.grit_pairs.build_info.annotations.val.storage={folder}/data/pairs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--cfg-path", "run.yaml", "--options", own, "run.valid_splits=[val]"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)


def test_a_run_is_named_wherever_a_checkpoint_is(work):
    (trained,) = (work / "output").glob("2*")
    best, last = trained / "checkpoint_best.pth", trained / "checkpoint_1.pth"
    keys = "model.pretrained", "model.discriminator.checkpoint", "run.resume_ckpt_path"
    options = ["model.discriminator.arch=albef_mafa", *(f"{key}={RUN}" for key in keys)]
    config = check_yaml("run.yaml", options)
    named = config.model.pretrained, config.model.discriminator.checkpoint, config.run.resume_ckpt_path
    assert [*named] == [str(path.relative_to(work)) for path in (best, best, last)]


def test_a_run_is_resumed_from_its_newest_whole_checkpoint(work, tmp_path):
    shutil.copytree(work / RUN, tmp_path / "run")
    last = tmp_path / "run/checkpoint_1.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    config = check_yaml("run.yaml", [f"run.resume_ckpt_path={tmp_path}/run", "run.max_epoch=3"])
    assert config.run.resume_ckpt_path == str(tmp_path / "run/checkpoint_0.pth")


def test_evaluate_takes_a_runs_own_settings(work, capsys, refused):
    trained = sorted((work / "output").glob("2*"))
    assert main(["evaluate", RUN, "--options", "run.batch_size_eval=7"]) == 0
    (new,) = {*(work / "output").glob("2*")} - {*trained}
    scored = json.loads((new / "evaluation.jsonl").read_text().splitlines()[0])
    at_best = [json.loads(line) for line in (trained[0] / "evaluation.jsonl").read_text().splitlines()]
    assert scored["split"] == "val" and max(record["agg_metrics"] for record in at_best) == pytest.approx(scored["agg_metrics"])
    assert "batch_size_eval: 7" in (new / "config.yaml").read_text()
    assert (work / RUN).resolve() == trained[0], "an evaluation leaves no checkpoint"
    assert "has no checkpoint" in refused("evaluate", new)
    assert f"Did you mean {trained[0].relative_to(work)}" in refused("evaluate", "output")
    assert "not allowed with argument" in refused("evaluate", RUN, "--cfg-path", "run.yaml")
    assert "one of the arguments RUN --cfg-path is required" in refused("evaluate")


def test_a_run_is_a_con_d(tmp_path, refused):
    assert main(["mine", "--cfg-path", "run.yaml", "--con-d", RUN, "--output", str(tmp_path / "mined"), "--force"]) == 0
    about = json.loads((tmp_path / "mined/mine.json").read_text())
    assert about["con_d"].endswith("checkpoint_best.pth") and "latest" not in about["con_d"]
    assert "--miner: output is a folder of runs" in refused(
        "count-false-negatives", "--cfg-path", "run.yaml", "--con-d", RUN, "--miner", "output"
    )
