"""Trackers, with the libraries themselves: W&B offline, MLflow in a folder, TensorBoard's own reader."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import launched
import outputs
from lavis_mafa.cli.main import main
from lavis_mafa.runners import trackers
from lavis_mafa.runners.trackers import Picture, Trackers, tag

ALL = "run.trackers=[tensorboard,wandb,mlflow]"
STEPS = 5  # of an epoch
SIGNALLING = Path(__file__).parents[1] / "runs" / "signalling.py"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, and nothing of what trackers of an earlier test have set in the environment."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


# --- what was told -----------------------------------------------------------------------------------------------------


def wandb_records(run: Path) -> Iterator:
    """Everything in the transaction logs of a run's folder, in order: LevelDB's format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for log in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = log.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # a record in one part, or its last part
                yield Record.FromString(whole)
                whole = b""


def wandb_points(run: Path, name: str) -> list[tuple[int, float]]:
    found = []
    for record in wandb_records(run):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name in items:
            found.append((items["step"], items[name]))
    return found


def mlflow_run(run: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.parent / "mlruns").as_uri())
    (only,) = client.search_runs([client.get_experiment_by_name("lavis_mafa").experiment_id])
    return client, only


def mlflow_points(run: Path, name: str) -> list[tuple[int, float]]:
    client, of_it = mlflow_run(run)
    return [(point.step, point.value) for point in client.get_metric_history(of_it.info.run_id, name)]


def tensorboard(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def tensorboard_points(run: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tensorboard(run).Scalars(name)]


POINTS = {"wandb": wandb_points, "mlflow": mlflow_points, "tensorboard": tensorboard_points}


# --- a run that is killed, and goes on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, written_pairs, run_of) -> Path:
    """Two epochs: killed in step 8 without a word, gone on with from the end of the first."""
    folder = tmp_path_factory.mktemp("tracked")
    annotations = written_pairs(folder / "data")
    colours = ["red", "green"] * 10  # so that Con-D finds something
    rows = [{"image": f"{row}.png", "caption": f"{colour} square {row}", "concept": colour} for row, colour in enumerate(colours)]
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(run_of(folder / "data"))
    splits = f"datasets.grit_pairs.build_info.annotations.val={{storage: {folder}/data/pairs.jsonl}}"
    train = ["train", "--cfg-path", folder / "run.yaml", "--resume", "auto", "--options", ALL, splits, "run.valid_splits=[val]"]
    environment = {"WANDB_MODE": "offline", "HOME": str(folder / "home")}
    killed = launched.run(SIGNALLING, "step", 8, "SIGKILL", *train, cwd=folder, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["step"] for record in outputs.metrics(outputs.only_run(folder))] == [1, 2, 3, 4, 5, 1, 2]
    done = launched.run("-m", "lavis_mafa", *train, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return outputs.only_run(folder)


@pytest.mark.parametrize("tracker", POINTS)
def test_each_step_is_told_once(resumed, tracker):
    """The run of W&B and of MLflow is one, though the process was killed."""
    records = outputs.metrics(resumed)
    wanted = [(STEPS * record["epoch"] + record["step"], pytest.approx(record["loss_itc"])) for record in records]
    assert POINTS[tracker](resumed, "loss/itc") == wanted and len(wanted) == 2 * STEPS


@pytest.mark.parametrize("tracker", POINTS)
def test_evaluations_stand_at_their_step(resumed, tracker):
    wanted = [
        (STEPS * (record["epoch"] + 1), pytest.approx(record["tr_r1"])) for record in outputs.json_lines(resumed / "evaluation.jsonl")
    ]
    assert sorted(set(POINTS[tracker](resumed, "val/tr_r1"))) == wanted and len(wanted) == 2


def test_wandb_has_config_pictures_and_files(resumed):
    records = list(wandb_records(resumed))
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {json.loads((resumed / "wandb.json").read_text())["id"]}
    assert {(run.project, run.display_name) for run in runs} == {("lavis_mafa", resumed.name)}
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["model"]["arch"] == "albef_mafa" and config["run"]["max_epoch"] == 2
    captions = wandb_points(resumed, "connections/captions")[-1]
    assert captions[0] == 2 * STEPS and all(" | found: " in caption for caption in captions[1])
    (artifact,) = [record.artifact for record in records if record.HasField("artifact")]
    assert {entry.path for entry in artifact.manifest.contents} == {"config.yaml", "metrics.jsonl", "evaluation.jsonl", "report.html"}
    assert [record.exit.exit_code for record in records if record.HasField("exit")][-1] == 0


def test_mlflow_has_config_pictures_and_files(resumed):
    client, run = mlflow_run(resumed)
    assert (run.info.status, run.info.run_name) == ("FINISHED", resumed.name)
    assert run.data.params["model.arch"] == "albef_mafa" and run.data.params["run.max_epoch"] == "2"
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "metrics.jsonl", "evaluation.jsonl", "report.html", "images", "captions"}
    captions = Path(client.download_artifacts(run.info.run_id, "captions/connections_5.txt"))
    assert captions.read_text().startswith("1. ") and " | found: " in captions.read_text()


def test_tensorboard_has_config_and_pictures(resumed):
    board = tensorboard(resumed)
    config, connections = (board.Tensors(f"{name}/text_summary") for name in ("config", "connections"))
    assert "    arch: albef_mafa" in config[0].tensor_proto.string_val[0].decode()
    assert " | found: " in connections[0].tensor_proto.string_val[0].decode()
    assert [image.step for image in board.Images("connections/1")] == [STEPS, 2 * STEPS]
    assert [image.step for image in board.Images("samples/1")] == [1, STEPS + 1]
    assert (board.Images("samples/1")[0].width, board.Images("samples/1")[0].height) == (16, 16)


def test_nothing_is_written_elsewhere(resumed):
    assert {path.name for path in resumed.parents[1].iterdir()} <= {"data", "run.yaml", "output", "home"}
    home = resumed.parents[1] / "home"
    assert not list(home.rglob("*wandb*")) and not list(home.rglob("*mlflow*"))


# --- several processes, and a signal -----------------------------------------------------------------------------------


def processes_of(pid: int) -> list[str]:
    lines = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()]
    commands = [line.read_bytes().decode().replace("\0", " ") for line in lines if line.exists()]
    return [command for command in commands if "wandb-core" in command and f"--pid {pid}" in command]


def test_two_processes_tell_it_once_and_a_signal_ends_it(run_yaml, tmp_path):
    train = ["-m", "lavis_mafa", "train", "--cfg-path", run_yaml, "--options", ALL, "run.batch_size_train=2", "run.max_epoch=500"]
    ranks = launched.start_ranks(2, *train, cwd=tmp_path)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("output/2*/checkpoint_0.pth")) and time.monotonic() < until and ranks[0].poll() is None:
        time.sleep(0.1)
    assert processes_of(ranks[0].pid) and not processes_of(ranks[1].pid)
    os.kill(ranks[0].pid, signal.SIGTERM)
    ended = [rank.communicate(60) for rank in ranks]
    assert [one.returncode for one in ended] == [143, 143], ended[0].stderr
    run = outputs.only_run(tmp_path)
    assert mlflow_run(run)[1].info.status == "KILLED"
    assert [record.exit.exit_code for record in wandb_records(run) if record.HasField("exit")] == [143], ended[0].stderr
    steps = [step for step, _ in wandb_points(run, "loss/total")]
    assert steps == list(range(1, len(steps) + 1)) == [step for step, _ in mlflow_points(run, "loss/total")]
    while processes_of(ranks[0].pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_of(ranks[0].pid)


# --- trackers that fail ------------------------------------------------------------------------------------------------


def test_what_a_server_missed_is_told_later(tmp_path, monkeypatch, caplog):
    """The place of MLflow's folder is taken at first."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mlruns").touch()
    monkeypatch.setattr(trackers, "PAUSE", 0.0)
    with caplog.at_level(logging.WARNING), Trackers(["mlflow"], run, {"run": {"seed": 1}}) as told:
        told.scalars({"loss/total": 3.0}, 1)
        told.scalars({"loss/total": 2.0}, 2)
        assert len(caplog.records) == 1 and "mlflow fails" in caplog.text and "the training goes on" in caplog.text
        (tmp_path / "mlruns").unlink()
        told.pictures("samples", [Picture(Image.new("RGB", (4, 4)), "a dog")], 2)
    assert mlflow_points(run, "loss/total") == [(1, 3.0), (2, 2.0)]
    assert mlflow_run(run)[1].info.status == "FINISHED" and len(caplog.records) == 1


def test_a_server_that_is_gone_is_not_asked_at_each_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{launched.free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    opened = []
    monkeypatch.setattr(Trackers, "_open", lambda *given, plain=Trackers._open: opened.append(given) or plain(*given))
    with caplog.at_level(logging.WARNING, "lavis_mafa"), Trackers(["mlflow", "mlflow"], tmp_path, {}) as told:
        for step in range(5):
            told.scalars({"loss/total": 1.0}, step)
        assert len(opened) == 1
    assert len(opened) == 2  # once more at the end
    assert "mlflow has not got the last 5 records" in caplog.messages[-1] and len(caplog.records) == 2


def test_tensorboard_without_a_place_to_write(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    with caplog.at_level(logging.WARNING, "lavis_mafa"), Trackers(["tensorboard"], tmp_path, {}) as told:
        told.scalars({"loss/total": 1.0}, 1)
    assert "tensorboard fails" in caplog.text


def test_tensorboard_goes_on_when_its_disk_has_room_again(tmp_path, monkeypatch, caplog):
    """Of a resumed run, whose events after the checkpoint are forgotten once, not each time that it is opened."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    plain, full = gfile.LocalFileSystem._write, []
    monkeypatch.setattr(trackers, "PAUSE", 0.0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its thread tells of the error, too

    def write(*given):
        if full:
            raise OSError("no space left")
        plain(*given)

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", write)
    with Trackers(["tensorboard"], tmp_path, {"run": {"seed": 1}}) as told:
        told.first_step = 1
        told.scalars({"loss/total": 2.0}, 2)
        full.append(True)
        told.scalars({"loss/total": 3.0}, 3)
        full.clear()
        told.scalars({"loss/total": 4.0}, 4)
    assert dict(tensorboard_points(tmp_path, "loss/total")) == {2: 2.0, 3: 3.0, 4: 4.0}
    assert caplog.text.count("tensorboard fails") == 1 and "has not got" not in caplog.text


def test_mlflow_takes_any_name(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with Trackers(["mlflow"], run, {"labels": {"red?": 1}}) as told:
        told.scalars({"val/accuracy_what's this?": 1.0}, 1)
    assert mlflow_points(run, "val/accuracy_what_s this_") == [(1, 1.0)]
    assert mlflow_run(run)[1].data.params == {"labels.red_": "1"}


@pytest.mark.parametrize(
    ("tracker", "name", "value"), [("wandb", "WANDB_MODE", "of_line"), ("mlflow", "MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")]
)
def test_a_wrong_variable_of_its_environment_is_a_warning(tmp_path, monkeypatch, caplog, tracker, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{launched.free_port()}")
    with Trackers([tracker], tmp_path, {}) as told:
        told.scalars({"loss/total": 1.0}, 1)
    assert f"{tracker} fails" in caplog.text and value in caplog.text


KILLED = """
import logging, os, sys, time
from pathlib import Path
import psutil
from lavis_mafa.runners.trackers import Trackers

logging.basicConfig(level=logging.WARNING)
with Trackers(["wandb", "tensorboard"], Path("run"), {}) as told:
    told.scalars({"loss/total": 1.0}, 1)
    (service,) = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
    service.kill()
    service.wait()
    for step in (2, 3):
        told.scalars({"loss/total": 1.0}, step)
        time.sleep(0.1)
"""


def test_wandb_is_killed_and_the_others_go_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "killed.py").write_text(KILLED)
    done = launched.run(tmp_path / "killed.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb fails") == 1
    assert [step for step, _ in tensorboard_points(tmp_path / "run", "loss/total")] == [1, 2, 3]


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("tensorboard", "tensorboard")])
def test_one_that_is_not_installed(refused_early, run_yaml, monkeypatch, capsys, name, package):
    monkeypatch.setitem(sys.modules, name, None)  # as Python itself hides a module
    option = f"run.trackers=[{name}]"
    said = refused_early("train", "--cfg-path", run_yaml, "--options", option)
    assert f"run.trackers has {name}, which is not installed; pip install {package}, or leave it out." in said
    assert main(["validate", str(run_yaml), "--options", option]) == 2 and "pip install" in capsys.readouterr().err
    assert main(["validate", "--no-files", str(run_yaml), "--options", option]) == 0  # another machine may have it


def test_a_folder_is_no_library(refused_early, run_yaml, tmp_path, monkeypatch):
    """W&B makes one of its own name where it is told to write."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if not (Path(entry) / "wandb").is_dir())])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    assert "wandb, which is not installed" in refused_early("train", "--cfg-path", run_yaml, "--options", "run.trackers=[wandb]")


def test_a_name_that_is_no_tracker(refused_early, run_yaml):
    said = refused_early("train", "--cfg-path", run_yaml, "--options", "run.trackers=[wandbb]")
    assert "must be one of tensorboard, wandb, mlflow. Did you mean 'wandb'?" in said


def test_no_tracker_writes_nothing(run_yaml, tmp_path):
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.trackers=[]", "run.max_steps=1"]) == 0
    assert not {"tensorboard", "wandb", "report.html"} & {path.name for path in outputs.only_run(tmp_path).iterdir()}


def test_groups():
    groups = {"loss": "loss/total", "loss_lm": "loss/lm", "itm_accuracy_negative": "itm/accuracy_negative"}
    groups |= {"new_positive_share": "false_negatives/new_positive_share", "temperature": "training/temperature"}
    assert {name: tag(name) for name in groups} == groups
