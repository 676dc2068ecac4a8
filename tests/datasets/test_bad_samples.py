"""The list of bad samples: each once, whichever rank and epoch it came in, and the share that ends a run."""

from __future__ import annotations

import json
import logging
from multiprocessing import get_context
from pathlib import Path

import pytest

from lavis_mafa.errors import UserError
from lavis_mafa.runners import loading
from lavis_mafa.runners.loading import BadSamples


def batch(*indices: int) -> dict:
    return {
        "image": "pixels",
        "bad_samples": [{"index": index, "reason": f"torn {index}", "image": f"{index}.png"} for index in indices],
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_listed_once_and_counted_each_time(tmp_path, caplog):
    bad = BadSamples(tmp_path / "bad.jsonl", 0.5)
    with caplog.at_level(logging.WARNING):
        for indices in ((), (3, 5), (5, 8), (3,)):
            samples = batch(*indices)
            bad.add(samples, 10)
            assert samples == {"image": "pixels"}
    assert (bad.count, bad.seen) == (5, 40)
    assert [(line["index"], line["image"], line["rank"]) for line in lines(bad.path)] == [(n, f"{n}.png", 0) for n in (3, 5, 8)]
    assert len(caplog.records) == 1 and "torn 3" in caplog.text


def test_ranks_share_the_list(tmp_path, monkeypatch):
    ranks = [BadSamples(tmp_path / "bad.jsonl", 1) for _ in range(2)]
    for rank, index in ((0, 1), (1, 2), (1, 1), (0, 2), (0, 3), (1, 3)):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        ranks[rank].add(batch(index), 4)
    assert [(line["index"], line["rank"]) for line in lines(tmp_path / "bad.jsonl")] == [(1, 0), (2, 1), (3, 0)]
    assert [rank.count for rank in ranks] == [3, 3]


def _append(path: Path, start: int) -> None:
    bad = BadSamples(path, 1)
    for index in range(start, start + 300):
        bad.add({"image": "", "bad_samples": [{"index": index, "reason": "x" * 300}]}, 1)


def test_lines_of_several_processes_never_interleave(tmp_path):
    context = get_context("fork")
    processes = [context.Process(target=_append, args=(tmp_path / "bad.jsonl", start)) for start in (0, 300, 600)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(line["index"] for line in lines(tmp_path / "bad.jsonl")) == list(range(900))


def test_a_resumed_run_keeps_its_share_and_its_list(tmp_path):
    stopped = BadSamples(tmp_path / "bad.jsonl", 0.1)
    for index in range(9):
        stopped.add(batch(index), 10)
    state = json.loads(json.dumps(stopped.state_dict()))  # nothing but plain values
    resumed = BadSamples(tmp_path / "elsewhere.jsonl", 0.1)
    resumed.load_state_dict(state)
    assert (resumed.count, resumed.seen) == (9, 90) and lines(resumed.path) == lines(stopped.path)
    resumed.add(batch(0), 10)
    with pytest.raises(UserError, match=r"11 of 105 samples could not be read, more than run.max_bad_share \(0.1\)"):
        resumed.add(batch(9), 5)
    assert [line["index"] for line in lines(resumed.path)] == list(range(10))
    again = BadSamples(stopped.path, 0.1)
    again.load_state_dict(state)
    assert len(lines(stopped.path)) == 9
    assert again.state_dict() == state


def test_a_batch_without_a_readable_sample_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="no sample of a whole batch could be read, the first because of torn 4.*check-data"):
        BadSamples(tmp_path / "bad.jsonl", 0.5).add({"bad_samples": batch(4)["bad_samples"]}, 1)
    assert len(lines(tmp_path / "bad.jsonl")) == 1
