"""Files that are whole or absent, and the order of a run's checkpoints."""

from __future__ import annotations

import os

import pytest

from lavis_mafa.errors import UserError
from lavis_mafa.files import (
    LATEST,
    digest,
    file_digest,
    last_checkpoint,
    new_folder,
    numbered_checkpoints,
    point_latest,
    position,
    replacing,
    run_checkpoint,
    runs_with,
    write_text,
)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.txt"]
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["table.txt"]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_text(tmp_path / "a", "text")
    assert done == [str(tmp_path / ".a.part"), str(tmp_path)]


def test_the_last_checkpoint_is_the_one_after_most_steps(tmp_path):
    for name in ("3", "10_7", "10_12", "9", "best", "10_12.rank0", "11.damaged", "x"):
        (tmp_path / f"checkpoint_{name}.pth").touch()  # not in the order of training
    assert [path.stem for path in numbered_checkpoints(tmp_path)] == [f"checkpoint_{n}" for n in ("10_12", "10_7", "9", "3")]
    assert last_checkpoint(tmp_path).name == "checkpoint_10_12.pth"
    assert position(tmp_path / "checkpoint_9.pth") == (10, 0) < position(tmp_path / "checkpoint_10_7.pth")
    with pytest.raises(UserError, match="has no checkpoint"):
        last_checkpoint(tmp_path / "nowhere")


def test_latest_leads_to_the_newest_run_and_replaces_nothing_else(tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("20250101000000", "20250102000000")]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").touch()
        point_latest(run)
        assert (tmp_path / LATEST).resolve() == run and os.readlink(tmp_path / LATEST) == run.name
    assert runs_with(tmp_path, "config.yaml") == runs
    monkeypatch.setattr(type(tmp_path), "symlink_to", lambda *_, **__: exec('raise OSError("no links here")'))
    point_latest(runs[0])
    assert (tmp_path / LATEST).resolve() == runs[1]
    monkeypatch.undo()
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("mine"), lambda path: path.symlink_to(tmp_path / "elsewhere")):
        (tmp_path / LATEST).rename(tmp_path / f"old_{len(list(tmp_path.iterdir()))}")
        make(tmp_path / LATEST)
        before = os.lstat(tmp_path / LATEST)
        point_latest(runs[0])
        assert os.lstat(tmp_path / LATEST).st_ino == before.st_ino


def test_a_run_stands_for_its_best_checkpoint_or_its_last(tmp_path):
    run = tmp_path / "20250101000000"
    (run / "result").mkdir(parents=True)
    (run / "config.yaml").touch()
    (tmp_path / LATEST).symlink_to(run.name)
    with pytest.raises(UserError, match=f"model.pretrained: the run {run} has no checkpoint"):
        run_checkpoint(tmp_path / LATEST, "model.pretrained")
    for name in ("0", "1_5", "1_5.rank0"):
        (run / f"checkpoint_{name}.pth").touch()
    assert run_checkpoint(tmp_path / LATEST, "") == run / "checkpoint_1_5.pth"
    (run / "checkpoint_best.pth").touch()
    assert run_checkpoint(run, "").name == "checkpoint_best.pth" and run_checkpoint(run, "", resumes=True).name == "checkpoint_1_5.pth"
    with pytest.raises(UserError, match=f"--con-d: {tmp_path} is a folder of runs; name one of them, such as {run}"):
        run_checkpoint(tmp_path, "--con-d")
    assert run_checkpoint(run / "result", "") == run / "result" and run_checkpoint(tmp_path / "none", "") == tmp_path / "none"
    for name in ("0", "1_5"):
        (run / f"checkpoint_{name}.pth").unlink()
    with pytest.raises(UserError, match="run.resume_ckpt_path: .* only its best checkpoint, which does not resume"):
        run_checkpoint(run, "run.resume_ckpt_path", resumes=True)


def test_a_new_folder_is_never_an_old_one(tmp_path):
    assert [new_folder(tmp_path / "out" / "run").name for _ in range(3)] == ["run", "run_2", "run_3"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output: cannot write"):
        new_folder(tmp_path / "file" / "run")


def test_digests_change_with_what_they_are_of(tmp_path):
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abc"), other.write_bytes(b"d")
    both = file_digest([one, other])
    other.write_bytes(b"e")
    assert len(both) == 16 and both != file_digest([one, other])
