"""Files that are whole or absent, and the order of a run's checkpoints."""

from __future__ import annotations

import os

import pytest

from lavis_mafa.errors import UserError
from lavis_mafa.files import digest, file_digest, last_checkpoint, new_folder, numbered_checkpoints, position, replacing, write_text


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
