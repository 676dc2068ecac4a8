"""A terminal shows a bar, a log file plain lines at their pace, and nobody asks tqdm for anything else."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lavis_mafa
from lavis_mafa import distributed
from lavis_mafa.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    """Time as tqdm sees it: it passes where a test says so."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def work(count: int, seconds: float = 1.0) -> Iterator[int]:
        for number in range(count):
            now[0] += seconds
            yield number

    return work


@pytest.fixture
def shown(monkeypatch):
    """What a function writes to stderr, where that is a pipe, or a terminal of some size."""

    def call(function: Callable[[], object], terminal: tuple[int, int] | None = None) -> str:
        read, write = os.pipe() if terminal is None else os.openpty()
        if terminal is not None:
            fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", *terminal, 0, 0))
        parts: list[bytes] = []
        reader = threading.Thread(target=lambda: parts.extend(iter(lambda: _read(read), b"")))
        reader.start()
        with os.fdopen(write, "w") as stream, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            function()
        reader.join()
        os.close(read)
        return b"".join(parts).decode()

    return call


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the terminal is closed
        return b""


def test_a_pipe_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, shown):
    def work():
        for _ in Bar(clock(35), total=35, desc="mine", unit="pair"):
            pass

    assert shown(work).split("\n") == [
        "mine: 10 of 35 (29 %),  1.00pair/s, 00:10 so far, 00:25 left",
        "mine: 20 of 35 (57 %),  1.00pair/s, 00:20 so far, 00:15 left",
        "mine: 30 of 35 (86 %),  1.00pair/s, 00:30 so far, 00:05 left",
        "mine: 35 of 35 (100 %),  1.00pair/s, 00:35 so far, 00:00 left",
        "",
    ]


def test_short_work_says_nothing_in_a_pipe(clock, shown):
    assert shown(lambda: [*Bar(clock(9), total=9, desc="short")]) == ""


def test_without_a_total_a_pipe_gets_count_and_rate(clock, shown):
    said = shown(lambda: [*Bar(clock(12), desc="clean", unit="row")])
    assert said == "clean: 10,  1.00row/s, 00:10 so far\nclean: 12,  1.00row/s, 00:12 so far\n"


def test_the_pace_holds_where_work_becomes_slower(clock, shown):
    """tqdm would wait for as many items as the ten seconds before had."""

    def work():
        with Bar(desc="images", unit="image") as bar:
            for seconds, count in ((0.01, 2000), (1.0, 35)):
                for _ in clock(count, seconds):
                    bar.update()

    assert len(shown(work).splitlines()) == 6


def nested(clock: Callable[..., Iterator[int]]) -> None:
    for _ in Bar(range(3), desc="splits", unit="split"):
        with Bar(total=40e6, desc="bytes", unit="B", unit_scale=True) as bar:
            for _ in clock(40):
                bar.update(1e6)


def test_nested_bars_are_lines_too(clock, shown):
    lines = shown(lambda: nested(clock)).splitlines()
    assert all(
        re.fullmatch(r"(splits|bytes): [\d.]+M? of [\d.]+M? \(\d+ %\), .*/s(plit)?, [\d:]+ so far, [\d:]+ left", line) for line in lines
    )
    assert sum(line.startswith("bytes: 10.0M of 40.0M (25 %)") for line in lines) == 3
    assert [line[:16] for line in lines if line.startswith("splits")][:2] == ["splits: 1 of 3 (", "splits: 2 of 3 ("]


@pytest.mark.parametrize("size", [(24, 90), (0, 0)])
def test_a_terminal_gets_a_bar(clock, shown, size):
    """Also one that does not tell its size, as a container's."""
    said = shown(lambda: [*Bar(clock(35), total=35, desc="mine", unit="pair")], size)
    assert said.count("\r") > 35
    last = said.rstrip().rsplit("\r", 1)[1]
    assert re.fullmatch(r"mine: 100%\|█+\| 35/35 \[00:35<00:00,  1.00pair/s\]", last) and 78 <= len(last) <= 90
    assert "mine:  29%|" in said and "| 10/35 [00:10<00:25,  1.00pair/s]" in said


def test_on_a_terminal_a_bar_within_another_is_wiped_off(clock, shown):
    said = shown(lambda: nested(clock), (24, 90))
    assert "\x1b[A" in said and "bytes:  50%|" in said and re.search(r"\r {80,}\x1b\[A", said)
    assert said.rstrip().rsplit("\r", 1)[1].startswith("splits: 100%|")


def test_only_the_first_rank_speaks(clock, shown, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for size, disable in ((None, False), ((24, 90), False), (None, True)):
        assert shown(lambda disable=disable: [*Bar(clock(35), total=35, desc="mine", disable=disable)], size) == ""


def test_a_delay_hides_what_is_nearly_always_short(clock, shown):
    assert shown(lambda: [*Bar(clock(4), total=4, desc="reading", delay=5)], (24, 90)) == ""
    assert "6/9" in shown(lambda: [*Bar(clock(9), total=9, desc="reading", delay=5)], (24, 90))


def test_everybody_shows_progress_the_same_way():
    package = Path(lavis_mafa.__file__).parent
    asks = {str(path.relative_to(package)) for path in package.rglob("*.py") if re.search(r"import .*tqdm|from tqdm", path.read_text())}
    assert asks == {"progress.py"}
