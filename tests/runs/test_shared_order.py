"""The order of an epoch is in rank 0's file; the other ranks' have its checksum, and take it from there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lavis_mafa.config.schema import Grit
from lavis_mafa.errors import UserError
from lavis_mafa.runners import checkpoint
from lavis_mafa.runners.checkpoint import RunState, rank_file
from lavis_mafa.runners.loading import GritFeed
from lavis_mafa.weights import read_checkpoint, write_atomically

SIZE, BATCH, RANKS, STEPS = 5000, 8, 2, 100


def run_state(rank: int, scope: str = "local", seed: int = 0) -> RunState:
    """A run of which all but the feed is next to nothing."""
    grit = Grit(queue_size=16, search_space=16, batch_scope=scope)
    model, nothing = torch.nn.Linear(1, 1), SimpleNamespace(state_dict=dict, load_state_dict=lambda *_: None)
    feed = GritFeed(grit, SIZE, BATCH, rank, RANKS, seed)
    state = RunState(model, torch.optim.AdamW(model.parameters()), None, feed, nothing, nothing, None, {}, torch.device("cpu"))
    state.__dict__["data"] = []  # of no data set
    return state


@pytest.fixture
def as_rank(monkeypatch) -> Callable[[int], None]:
    return lambda number: monkeypatch.setattr(checkpoint, "rank", lambda: number)


@pytest.fixture(params=["local", "global"])
def saved(request, as_rank, tmp_path, monkeypatch) -> Path:
    """In the middle of an epoch, by all ranks; in global scope what they would gather is the other's beside the own."""
    path, scope = tmp_path / "checkpoint_0_100.pth", request.param
    monkeypatch.setattr("lavis_mafa.runners.loading.gather_in_rank_order", lambda rows: torch.cat([rows, rows + 1]))
    for rank in range(RANKS):
        as_rank(rank)
        state = run_state(rank, scope)
        state.feed.sampler.set_order(torch.arange(SIZE - 1, -1, -1), epoch=0, grouped=True)
        for start in range(rank * 100, rank * 100 + 80, 8):
            state.feed.collect(torch.arange(start, start + 8), torch.eye(8), torch.eye(8))
        write_atomically(state.of_rank(STEPS)(), rank_file(path, rank))
        if rank == 0:
            write_atomically(state.content(0, 0, STEPS), path)
    return path


def scope_of(path: Path) -> str:
    return read_checkpoint(rank_file(path, 0))["feed"]["scope"]


def restored(rank: int, path: Path) -> GritFeed:
    state = run_state(rank, scope_of(path), seed=0)
    state.feed.sampler.set_epoch(7)
    assert state.restore(path)[:2] == (0, STEPS)
    return state.feed


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = read_checkpoint(file)
    edit(content["feed"])
    write_atomically(content, file)


def test_it_is_written_once_and_every_rank_goes_on_in_it(saved, as_rank):
    sizes = [rank_file(saved, rank).stat().st_size for rank in range(RANKS)]
    assert sizes[0] - sizes[1] > 0.9 * 4 * SIZE
    for rank in range(RANKS):
        as_rank(rank)
        feed = restored(rank, saved)
        served = list(feed.sampler)
        assert served[:BATCH] == [SIZE - 1 - (STEPS * RANKS + rank) * BATCH - n for n in range(BATCH)]
        assert feed.sampler.grouped and len(served) == (SIZE // (BATCH * RANKS) - STEPS) * BATCH


def test_what_each_rank_has_grouped_is_its_own_but_rank_0s_in_global_scope(saved, as_rank):
    states = [read_checkpoint(rank_file(saved, rank))["feed"]["queue"] for rank in range(RANKS)]
    if scope_of(saved) == "global":
        assert sorted(states[0]["finished"].tolist()) == list(range(80)) and states[1] is None
        return
    for rank, state in enumerate(states):
        assert sorted(state["finished"].tolist()) == list(range(rank * 100, rank * 100 + 80))


def test_a_checkpoint_of_before_has_it_in_each_file_in_eight_bytes(saved, as_rank):
    """With it in the rank's own file, rank 0's is not looked at."""
    order = read_checkpoint(rank_file(saved, 0))["feed"]["sampler"]["order"].long()

    def before(feed: dict[str, Any]) -> None:
        feed["sampler"]["order"] = order.clone()
        feed.pop("scope")

    scope = scope_of(saved)
    change(rank_file(saved, 1), before)
    rank_file(saved, 0).unlink()
    as_rank(1)
    state = run_state(1, scope)
    assert state.restore(saved)[:2] == (0, STEPS) and torch.equal(state.feed.sampler.order.long(), order)


SPOILED = [
    (lambda file: file.unlink(), "checkpoint_0_100.rank0.pth is missing beside .*; it holds rank 0's order and queue"),
    (lambda file: file.write_bytes(file.read_bytes()[:-50]), "checkpoint_0_100.rank0.pth is damaged: it ends too early"),
    (
        lambda file: change(file, lambda feed: feed["sampler"]["order"].copy_(torch.arange(SIZE))),
        "the order in checkpoint_0_100.rank0.pth is not the one that checkpoint_0_100.rank1.pth names",
    ),
    (lambda file: change(file, lambda feed: feed["sampler"].update(order=1)), "the saved order is no contiguous tensor"),
    (lambda file: change(file, lambda feed: feed.pop("sampler")), "is damaged: KeyError: 'sampler'"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[row[1][:40] for row in SPOILED])
def test_a_file_of_rank_0_that_has_it_not_is_one_message_of_the_others(saved, as_rank, spoil, said):
    scope = scope_of(saved)
    spoil(rank_file(saved, 0))
    as_rank(1)
    with pytest.raises(UserError, match=said) as raised:
        run_state(1, scope).restore(saved)
    assert re.match("run.resume_ckpt_path: ", str(raised.value)) and "\n" not in str(raised.value)


def test_another_scope_is_refused(saved, as_rank):
    other = {"local": "global", "global": "local"}[scope_of(saved)]
    for rank in range(RANKS):
        as_rank(rank)
        with pytest.raises(UserError, match=f"run.grit.batch_scope is {other}, but the saved order was made with {scope_of(saved)}"):
            run_state(rank, other).restore(saved)
