"""Whatever happens while a checkpoint is written, a good one is there afterwards, and damaged ones are never taken for good."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import launched
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.files import position
from lavis_mafa.runners import checkpoint as checkpoint_module
from lavis_mafa.runners.checkpoint import CheckpointFolder, host_copy
from lavis_mafa.runners.resume import newest_good
from lavis_mafa.weights import damage, read_checkpoint, write_atomically

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_every_line_and_every_write_of_a_save_one_good_checkpoint_is_left(tmp_path, keep):
    done = launched.run(Path(__file__).with_name("killed_save.py"), tmp_path / "run", keep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) > 100 and moments[-1]["over"]
    for moment in moments:
        assert moment["found"] in (["0", [0.0], [0]], ["1", [1.0], [1]]), moment
    assert moments[0]["found"][0] == "0" and moments[-1]["found"][0] == "1"
    assert any(".checkpoint_1.pth.part" in moment["files"] for moment in moments), "one was killed while it wrote the weights"
    assert moments[-1]["files"] == [
        *(["checkpoint_0.pth", "checkpoint_0.rank0.pth"] if keep == 2 else []),
        *["checkpoint_1.pth", "checkpoint_1.rank0.pth"],
    ]


def test_a_flipped_bit_is_found_which_torch_load_does_not(tmp_path):
    path = tmp_path / "checkpoint_3.pth"
    write_atomically({"model": {"w": torch.ones(10_000)}}, path)
    assert damage(path) is None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.ones(10_000)), "it would have been a wrong weight"
    assert damage(path) is not None
    with pytest.raises(UserError, match="checkpoint_3.pth is damaged: the checksum of"):
        read_checkpoint(path)
    path.write_bytes(content[:-100])
    assert damage(path) is not None


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_are_named(tmp_path, caplog):
    for name in ("0_3", "0", "1_3", "10_2"):
        write_atomically({"model": {"w": torch.ones(1000)}}, tmp_path / f"checkpoint_{name}.pth")
        write_atomically({"order": torch.arange(1000)}, tmp_path / f"checkpoint_{name}.rank0.pth")
    write_atomically({"model": {}}, tmp_path / "checkpoint_best.pth")
    assert [position(tmp_path / f"checkpoint_{name}.pth") for name in ("0_3", "0", "1_3", "10_2")] == [(0, 3), (1, 0), (1, 3), (10, 2)]
    assert newest_good(tmp_path) == tmp_path / "checkpoint_10_2.pth"
    (tmp_path / "checkpoint_10_2.rank0.pth").unlink()
    state = tmp_path / "checkpoint_1_3.rank0.pth"
    state.write_bytes(state.read_bytes().replace(b"\x07\x00\x00\x00", b"\x08\x00\x00\x00", 1))
    assert newest_good(tmp_path) == tmp_path / "checkpoint_0.pth"
    assert "checkpoint_10_2.rank0.pth is missing" in caplog.text and "checkpoint_1_3.rank0.pth is damaged" in caplog.text


def test_a_save_returns_before_it_is_written_and_one_is_in_flight(tmp_path, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()

    def slow(content, path):
        writing.set()
        assert go_on.wait(60)
        write_atomically(content, path)

    monkeypatch.setattr(checkpoint_module, "write_atomically", slow)
    folder = CheckpointFolder(tmp_path)
    weight = torch.zeros(1000)
    folder.save("0", {"model": {"w": weight}}, None, rank=0)
    assert writing.wait(60) and not (tmp_path / "checkpoint_0.pth").exists(), "it is being written beside us"
    weight += 1  # the training goes on
    second = threading.Thread(target=lambda: folder.save("1", {"model": {"w": weight}}, None, rank=0))
    second.start()
    time.sleep(0.3)
    assert second.is_alive(), "the second one waits for the first"
    go_on.set()
    second.join(60)
    folder.wait()
    values = [torch.load(tmp_path / f"checkpoint_{name}.pth", weights_only=True)["model"]["w"].unique().item() for name in (0, 1)]
    assert values == [0.0, 1.0]


def test_a_copy_shares_nothing_but_what_was_shared():
    tied = torch.ones(3)
    tree = {"a": tied, "b": [tied, (torch.zeros(2), "text")], "empty": torch.zeros(0)}
    copy = host_copy(tree)
    tied += 1
    assert copy["a"].tolist() == [1, 1, 1] and copy["a"] is copy["b"][0] and copy["b"][1][1] == "text"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes, as far as one file is concerned."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_in_the_middle_of_a_save_is_one_message(tmp_path):
    write_atomically({"model": {"w": torch.zeros(100)}}, tmp_path / "checkpoint_0.pth")
    for size in (100, 100_000, 400_000):  # in the first record, in the middle, in the last
        with files_of_at_most(size):
            folder = CheckpointFolder(tmp_path)
            folder.save("1", {"model": {"w": torch.zeros(100_000)}}, None, rank=0)
            with pytest.raises(UserError, match=r"cannot write .*checkpoint_1.pth: File too large. What was saved before is kept"):
                folder.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_0.pth"] and damage(tmp_path / "checkpoint_0.pth") is None


@pytest.fixture
def train(run_yaml):
    """Five steps an epoch, three epochs."""
    return lambda *options: main(["train", "--cfg-path", str(run_yaml), "--resume", "auto", "--options", "run.max_epoch=3", *options])


def test_a_full_disk_ends_a_run_which_goes_on_when_there_is_room(train, tmp_path, capsys):
    assert train("run.max_steps=3") == 0
    (saved,) = (tmp_path / "output").glob("2*/checkpoint_0_3.pth")
    capsys.readouterr()
    with files_of_at_most(saved.stat().st_size // 2):
        assert train("run.save_every_steps=2") == 2
    said = capsys.readouterr().err
    assert "File too large" in said and "cannot write" in said and len(said.splitlines()) == 1, said
    assert newest_good(saved.parent) == saved and not list(saved.parent.glob(".*.part"))
    assert train("run.max_steps=7") == 0
    assert newest_good(saved.parent) == saved.with_name("checkpoint_1_2.pth")


def test_a_damaged_checkpoint_is_passed_over_and_kept_apart(train, run_yaml, tmp_path, capsys, caplog):
    assert train("run.save_every_steps=2", "run.max_steps=7", "run.keep_checkpoints=2") == 0
    (newest,) = (tmp_path / "output").glob("2*/checkpoint_1_2.pth")
    assert {path.name for path in newest.parent.glob("*.rank0.pth")} == {"checkpoint_0.rank0.pth", "checkpoint_1_2.rank0.pth"}
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert main(["train", "--cfg-path", str(run_yaml), "--resume", str(newest)]) == 2
    assert "checkpoint_1_2.pth is damaged: the checksum of" in capsys.readouterr().err
    assert train("run.max_steps=7") == 0
    assert "checkpoint_1_2.pth is passed over" in caplog.text
    assert newest.with_suffix(".damaged").is_file() and damage(newest) is None


def test_auto_starts_anew_for_other_settings_and_says_what_differs(train, tmp_path, caplog):
    assert train("run.max_steps=2") == 0
    assert train("run.max_steps=2", "model.ecm.threshold=0.7") == 0
    assert len(list((tmp_path / "output").glob("2*"))) == 2
    assert "model.ecm.threshold is not set there and 0.7 here" in caplog.text
    assert train("run.max_steps=4", "run.log_freq=3", "run.num_workers=1") == 0  # the same run, seen otherwise
    assert len(list((tmp_path / "output").glob("2*"))) == 2


def test_a_run_in_use_is_not_touched(train, tmp_path, capsys):
    assert train("run.max_steps=2") == 0
    (run,) = (tmp_path / "output").glob("2*")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        capsys.readouterr()
        code = train("run.max_steps=4")
        other.kill()
    assert code == 2
    assert f"{run} is still written by process {os.getpid()}" in capsys.readouterr().err
    assert {path.name for path in run.glob("checkpoint_*.pth")} == {"checkpoint_0_2.pth", "checkpoint_0_2.rank0.pth"}


def test_a_resumed_run_reads_only_what_is_left(train, tmp_path, monkeypatch):
    """Position comes from the saved order: nothing is read to be thrown away."""
    from lavis_mafa.datasets.indexed import IndexedDataset

    assert train("run.max_steps=3") == 0
    served: list[int] = []
    read = IndexedDataset._sample
    monkeypatch.setattr(IndexedDataset, "_sample", lambda self, index: served.append(index) or read(self, index))
    (state,) = (tmp_path / "output").glob("2*/checkpoint_0_3.rank0.pth")
    order = torch.load(state, weights_only=True)["feed"]["sampler"]["order"].tolist()
    assert train("run.max_steps=4") == 0
    assert served == order[3 * 4 : 4 * 4]


def test_the_best_checkpoint_survives_a_part_of_an_epoch(run_yaml, pairs, tmp_path, monkeypatch):
    """``max_steps`` ends epoch 2 in its middle, where the figures happen to be good; then the run goes on."""
    from lavis_mafa.runners import runner_mafa

    figures = {0: 10.0, 1: 80.0, 2: 70.0, "part": 90.0}
    part = True

    def evaluated(*arguments):
        split, epoch, folder = arguments[4], arguments[5], arguments[6]
        figure = figures["part" if epoch == 2 and part else epoch] if isinstance(epoch, int) else 0.0
        with open(folder / "evaluation.jsonl", "a") as file:
            file.write(json.dumps({"split": split, "epoch": epoch, "agg_metrics": figure}) + "\n")
        return {"agg_metrics": figure}

    monkeypatch.setattr(runner_mafa, "evaluate_split", evaluated)
    data = f"datasets.grit_pairs.build_info.annotations.val.storage={pairs}/pairs.jsonl"
    options = ["run.max_epoch=3", "run.valid_splits=[val]", data]
    train = ["train", "--cfg-path", str(run_yaml), "--resume", "auto", "--options", *options]
    for _ in range(2):  # the second time there is nothing to train, and the part is evaluated again
        assert main([*train, "run.max_steps=12"]) == 0
        (run,) = (tmp_path / "output").glob("2*")
        assert [json.loads(line)["epoch"] for line in (run / "evaluation.jsonl").read_text().splitlines()] == [0, 1, 2]
        assert torch.load(run / "checkpoint_best.pth", weights_only=True)["best_epoch"] == 1
    part = False
    assert main(train) == 0
    assert torch.load(run / "checkpoint_best.pth", weights_only=True)["best_epoch"] == 1
    assert [json.loads(line)["agg_metrics"] for line in (run / "evaluation.jsonl").read_text().splitlines()] == [10.0, 80.0, 70.0]


def test_a_damaged_best_checkpoint_blocks_nothing(run_yaml, pairs, tmp_path, caplog):
    data = f"datasets.grit_pairs.build_info.annotations.val.storage={pairs}/pairs.jsonl"
    train = ["train", "--cfg-path", str(run_yaml), "--resume", "auto", "--options", "run.valid_splits=[val]", data, "run.max_epoch=3"]
    assert main([*train, "run.max_steps=12"]) == 0
    (best,) = (tmp_path / "output").glob("2*/checkpoint_best.pth")
    best.write_bytes(best.read_bytes()[:-50])
    assert main(train) == 0
    assert "checkpoint_best.pth is damaged" in caplog.text


def test_bad_samples_are_listed_once_however_a_run_was_ended(train, pairs, tmp_path):
    (pairs / "images/3.png").write_text("no image")
    assert train("run.max_steps=7", "run.max_bad_share=0.5") == 0
    (listed,) = (tmp_path / "output").glob("2*/bad_samples.jsonl")
    first = listed.read_text()
    listed.write_text(first + '{"index": 5, "rea')  # a disk that was full
    assert train("run.max_steps=12", "run.max_bad_share=0.5") == 0
    assert listed.read_text() == first and len(first.splitlines()) == 1


def test_an_error_of_the_writing_thread_is_raised_where_the_training_waits(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save("0", {"model": {}, "strange": lambda: None}, None, rank=0)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        folder.wait()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_obstacle(train, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    assert train("run.max_steps=2") == 0 and train("run.max_steps=4") == 0
    assert "cannot be locked (No locks available)" in caplog.text


def test_max_steps_inside_an_accumulation_window_stops_at_its_end(train, tmp_path):
    assert train("run.max_steps=3", "run.accum_grad_iters=2") == 0
    (run,) = (tmp_path / "output").glob("2*")
    assert {path.name for path in run.glob("checkpoint*.pth")} == {"checkpoint_0_4.pth", "checkpoint_0_4.rank0.pth"}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
