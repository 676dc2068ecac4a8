"""Two processes of which one dies, hangs, or was started differently: the job ends soon and names it."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import launched
import outputs
import uneven_shares

pytestmark = pytest.mark.ranks

LAUNCHER = Path(__file__).with_name("ranks_launcher.py")
SHORT = ["run.grit.search_space=64", "run.batch_size_train=8", "run.max_epoch=1", "run.test_splits=[]"]
SLACK = 10  # seconds, on a busy machine


def run_two_ranks(folder: Path, yaml: Path, how: str, *options: str) -> tuple[list[int], list[str], float]:
    """Start ``ranks_launcher.py`` twice, by hand as a cluster does; each rank's exit code and what it said, and how many seconds
    after rank 1 misbehaved both had ended."""
    arguments = [how, "train", "--cfg-path", yaml, "--options", *SHORT, *options]
    ranks = launched.start_ranks(2, LAUNCHER, *arguments, cwd=folder)
    try:
        done = [rank.communicate(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    at = re.search(r"^at ([\d.]+)$", done[1].stderr, re.MULTILINE)
    return [rank.returncode for rank in done], [rank.stderr for rank in done], time.time() - float(at[1]) if at else 0.0


@pytest.fixture
def two_ranks(tiny_yaml, tmp_path):
    return partial(run_two_ranks, tmp_path, tiny_yaml)


@pytest.fixture(scope="module")
def misbehaved(tiny_yaml, tmp_path_factory) -> dict[str, tuple[Path, list[int], list[str], float]]:
    """The folder and the end of each job that is waited for in vain: all at once, since waiting is most of what they do."""
    jobs = {"dies": [], "hangs": ["run.rank_timeout_minutes=0.1"], "keeps_the_lock": []}
    folders = {how: tmp_path_factory.mktemp(how) for how in jobs}
    with ThreadPoolExecutor() as at_once:
        ends = {how: at_once.submit(run_two_ranks, folders[how], tiny_yaml, how, *options) for how, options in jobs.items()}
    return {how: (folders[how], *end.result()) for how, end in ends.items()}


def lines_of_ours(*texts: str) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.startswith("lavis-mafa")]


def test_a_rank_that_is_killed_ends_the_job_in_the_stated_time_with_its_name(misbehaved):
    _, codes, said, seconds = misbehaved["dies"]
    assert codes == [3, -9]
    (line,) = lines_of_ours(*said)
    assert "rank 1 (" in line and "died or cannot be reached" in line and "last seen " in line and "--resume auto" in line
    assert "Traceback" not in said[0] and 0 < seconds < 10 + SLACK


def test_a_rank_that_hangs_ends_the_job_in_the_stated_time_with_its_name_and_place(misbehaved):
    folder, codes, said, seconds = misbehaved["hangs"]
    assert codes == [3, 3], said
    (line,) = lines_of_ours(*said)
    assert "rank 1 (" in line and "loading data, epoch 0 step" in line and "ranks_launcher.py" in line
    assert "The others wait for rank 1 (" in line and 6 < seconds < 6 + 10 + SLACK
    run = outputs.only_run(folder)
    assert "ranks_launcher.py" in (run / "hang_rank1.txt").read_text() and (run / "hang_rank0.txt").is_file()


def test_a_rank_that_is_stuck_with_pythons_lock_is_named_by_the_others_and_shows_its_stack(misbehaved):
    _, codes, said, _ = misbehaved["keeps_the_lock"]
    assert codes == [3, 9], said
    (line,) = lines_of_ours(*said)
    assert "rank 1 (" in line and "no heartbeat for" in line
    assert "Timeout (0:00:06)!" in said[1] and "in keep_the_lock" in said[1]


def test_ranks_that_were_started_differently_are_refused(two_ranks):
    codes, said, _ = two_ranks("other_start")
    assert codes == [2, 2]
    for text in said:
        (line,) = lines_of_ours(text)
        assert "library torch: " in line and "1.13.1 on rank 1" in line
        assert "setting run.init_lr: 0.001 on rank 0" in line and "0.5 on rank 1" in line


def test_ranks_with_other_data_are_refused(two_ranks, tmp_path):
    codes, said, _ = two_ranks("other_data")
    assert codes == [2, 2]
    assert all("data grit_emoji.train: samples: " in text and "Traceback" not in text for text in said)
    assert not list(outputs.only_run(tmp_path).glob("*.pth"))


def test_a_run_that_goes_well_says_nothing_leaves_no_thread_and_is_not_changed(two_ranks, tmp_path):
    codes, said, _ = two_ranks("well")
    assert codes == [0, 0], said
    assert not lines_of_ours(*said) and "threads left: ['MainThread'" in said[0] and "watchdog" not in said[0]
    watched = outputs.only_run(tmp_path).rename(tmp_path / "watched")
    two_ranks("unwatched")  # whose ranks end in any order: gloo may abort one that is still connected, all work being done
    outputs.assert_same_weights(watched / "checkpoint_0.pth", outputs.only_run(tmp_path) / "checkpoint_0.pth")


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> dict[int, tuple[Path, dict]]:
    """What ``uneven_shares.py`` writes as one process and as two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    uneven_shares.write_results(one)
    # with a timeout, since the promise is that nobody waits forever
    done = launched.run(uneven_shares.__file__, two, cwd=two, processes=2, timeout=90)
    assert done.returncode == 0, done.stderr
    return {processes: (folder, json.loads((folder / "results.json").read_text())) for processes, folder in ((1, one), (2, two))}


@pytest.mark.parametrize("count", ["1", "5"])
def test_each_caption_and_answer_is_there_once_however_many_ranks_share_them(shares, count):
    for processes, (folder, results) in shares.items():
        captions = json.loads((folder / "result" / f"of{count}_epoch0.json").read_text())
        answers = json.loads((folder / "result" / f"of{count}_vqa_result.json").read_text())
        assert sorted(row["image_id"] for row in captions) == list(range(int(count)))
        assert sorted((row["question_id"], row["answer"]) for row in answers) == [(n, str(n)) for n in range(int(count))]
        told = json.loads((folder / "result" / f"of{count}_classification_result.json").read_text())
        assert [row["sentence_id"] for row in told] == list(range(int(count)))
        assert results["labels"][count][0]["accuracy"] == pytest.approx(100 * (1 - 1 / int(count)))
        for task in ("captions", "answers", "labels"):
            figures = results[task][count]
            assert len(figures) == processes and all(rank == pytest.approx(shares[1][1][task][count][0]) for rank in figures)
    assert shares[2][1]["asked"] == [1 + 3, 1 + 3]  # the sampler repeats one of one, and one of five


def test_retrieval_of_a_gallery_that_ranks_share_unevenly_is_that_of_one_process(shares):
    assert shares[2][1]["retrieval"] == shares[1][1]["retrieval"]


def test_lists_of_rows_of_any_lengths_reach_all_ranks(shares):
    assert shares[1][1]["rows"] == [[[]]]
    assert shares[2][1]["rows"] == [[[], [1, 3, 5, 7, 9]]] * 2


def test_all_ranks_train_the_same_number_of_batches_and_no_sample_twice(shares):
    ranks = shares[2][1]["trained"]
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert [len(batches) for batches in ranks] == [3, 3]
    assert len(rows) == 18 == len(set(rows)) and set(rows) <= set(range(20))
