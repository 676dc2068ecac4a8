"""A saved state can hold anything; what it holds wrongly is one sentence, and whoever was asked to load it stays as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lavis_mafa.grit import GritQueue, GritSampler
from lavis_mafa.runners.state_checks import check_optimizer, check_progress, check_rank_state

HUGE = torch.zeros(1, dtype=torch.long).expand(10**12)  # eight bytes on disk
CPU = torch.device("cpu")


def set_to(*path_and_value: Any) -> Callable[[dict], None]:
    *path, last, value = path_and_value

    def edit(state: dict) -> None:
        for name in path:
            state = state[name]
        state[last] = value

    return edit


def without(*path: Any) -> Callable[[dict], None]:
    def edit(state: dict) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return edit


def sampler() -> GritSampler:
    made = GritSampler(20, 3)
    made.set_order(torch.arange(19, -1, -1), epoch=2, grouped=True)
    return made


def queue() -> GritQueue:
    made = GritQueue(queue_size=8, search_space=4)
    rows = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    for index in torch.arange(11).split(4):
        made.collect(index, rows[0, index], rows[1, index])
    return made


SAMPLER = [
    (set_to("order", torch.zeros(20, dtype=torch.long)), "not a permutation"),
    (set_to("order", torch.arange(20.0)), "order is a tensor of torch.float32"),
    (set_to("order", [1, 2]), r"order is \[1, 2\]"),
    (set_to("order", torch.arange(20).to_sparse()), "order is a tensor"),
    (set_to("order", torch.empty(20, dtype=torch.long, device="meta")), "order is a tensor"),
    (set_to("order", HUGE), "order is a tensor"),
    (without("order"), "has no 'order'"),
    (set_to("epoch", "1"), "epoch is '1', but must be a whole number"),
    (set_to("epoch", -1), "epoch is -1"),
    (set_to("epoch", 1.5), "epoch is 1.5"),
    (set_to("epoch", True), "epoch is True"),
    (set_to("grouped", "no"), "grouped is 'no', but must be True or False"),
    (set_to("start_step", -1), "start_step is -1, but must be a whole number, 0 to 6"),
    (set_to("start_step", 7), "start_step is 7"),
    (set_to("global_batch", 0), "global_batch is 0"),
    (set_to("global_batch", 10**30), "global_batch is 1000"),
    (set_to("global_batch", torch.tensor(3)), "global_batch is a tensor"),
    (without("global_batch"), "has no 'global_batch'"),
]


@pytest.mark.parametrize(("edit", "said"), SAMPLER)
def test_a_malformed_sampler_state_changes_nothing(edit, said):
    state, loading = sampler().state_dict(step=2), GritSampler(20, 3, seed=5)
    before = loading.state_dict()
    edit(state)
    with pytest.raises(ValueError, match=said):
        loading.load_state_dict(state)
    after = loading.state_dict()
    assert torch.equal(after.pop("order"), before.pop("order")) and after == before


QUEUE = [
    (set_to("seed", "0"), "seed is '0'"),
    (set_to("queue_size", torch.zeros(2)), "queue_size is a tensor"),
    (set_to("epoch", "one"), "epoch is 'one'"),
    (set_to("queues_grouped", -1), "queues_grouped is -1"),
    (set_to("queues_grouped", 2), "8 grouped and 3 waiting samples"),
    (set_to("finished", torch.arange(7)), "7 grouped and 3 waiting samples"),
    (set_to("finished", torch.zeros(8, dtype=torch.long)), "an index twice"),
    (set_to("finished", torch.arange(8) - 1), "holds index -1"),
    (set_to("index", torch.tensor([0, 1, 2])), "an index twice"),
    (set_to("index", torch.arange(8, 12)), r"index, image_features and text_features are \[4\], \[3, 5\] and \[3, 5\]"),
    (set_to("index", torch.tensor([8.0, 9.0, 10.0])), "index is a tensor of torch.float32"),
    (set_to("image_features", torch.zeros(3, 4)), r"\[3, 4\] and \[3, 5\]"),
    (set_to("image_features", torch.zeros(3, 5, 1)), "with 2 dimensions"),
    (set_to("text_features", torch.zeros(3, 5, dtype=torch.half)), "must be a tensor of torch.float32"),
    (set_to("text_features", torch.full((3, 5), float("nan"))), "text_features is not finite"),
    (set_to("text_features", torch.zeros(1).expand(3, 10**12)), "text_features is a tensor"),
    (set_to("text_features", {"a": 1}), "text_features is {'a': 1}"),
    (without("text_features"), "has no 'text_features'"),
    (without("queue_size"), "has no 'queue_size'"),
]


@pytest.mark.parametrize(("edit", "said"), QUEUE)
def test_a_malformed_queue_state_changes_nothing(edit, said):
    state, loading, untouched = queue().state_dict(), queue(), queue()
    edit(state)
    with pytest.raises(ValueError, match=said):
        loading.load_state_dict(state)
    assert torch.equal(loading.finish_epoch(), untouched.finish_epoch())


def test_a_state_that_is_no_dictionary():
    for loading in (sampler(), queue()):
        for state in (None, [1], torch.zeros(3)):
            with pytest.raises(ValueError, match="must be a dictionary"):
                loading.load_state_dict(state)


# --- a rank's whole state ----------------------------------------------------------------------------------------------


def rank_state() -> dict[str, Any]:
    """As ``runners/saving.py`` writes it after 2 steps of epoch 2."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "feed": {"sampler": sampler().state_dict(step=2), "queue": queue().state_dict()},
        "random": {
            "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
            "numpy": {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
            "torch": torch.get_rng_state(),
        },
    }


RANK = [
    (without("feed"), "has no 'feed'"),
    (without("feed", "queue"), "has no 'queue'"),
    (set_to("feed", [1]), "must be a dictionary"),
    (set_to("feed", "sampler", None), "must be a dictionary"),
    (set_to("feed", "sampler", "epoch", 1), "at epoch 1, step 2, but the checkpoint beside it at epoch 2, step 2"),
    (set_to("feed", "sampler", "start_step", 3), "at epoch 2, step 3"),
    (set_to("feed", "sampler", "start_step", "2"), "start_step is '2'"),
    (set_to("feed", "queue", "index", torch.tensor([8, 9, 2**60])), "index holds positions outside the data set, which has 20"),
    (set_to("feed", "queue", "finished", -torch.arange(8)), "finished holds positions outside"),
    (without("random"), "has no 'random'"),
    (set_to("random", 4), "must be a dictionary"),
    (without("random", "numpy", "rest"), "has no 'rest'"),
    (set_to("random", "python", "version", 2), "version is 2"),
    (set_to("random", "python", "numbers", torch.zeros(9, dtype=torch.long)), "Python's generator must be 624 numbers"),
    (set_to("random", "python", "numbers", torch.zeros(0, dtype=torch.long)), "Python's generator must be 624 numbers"),
    (set_to("random", "python", "numbers", torch.full((625,), 2**33)), "Python's generator must be 624 numbers"),
    (set_to("random", "python", "numbers", torch.full((625,), 700)), "position 700 of 624"),
    (set_to("random", "python", "gauss", "x"), "gauss of Python's generator"),
    (set_to("random", "numpy", "name", "PCG64"), "not of MT19937"),
    (set_to("random", "numpy", "keys", torch.zeros(623, dtype=torch.long)), "numpy's generator must be 624 numbers"),
    (set_to("random", "numpy", "keys", torch.zeros(624)), "keys is a tensor of torch.float32"),
    (set_to("random", "numpy", "rest", [10**6, 0, 0.0]), "position of numpy's generator is 1000000"),
    (set_to("random", "numpy", "rest", [0, 2, 0.0]), "flag of numpy's generator is 2"),
    (set_to("random", "numpy", "rest", [0, 0]), "rest of numpy's generator"),
    (set_to("random", "torch", torch.zeros(10, dtype=torch.uint8)), "torch generator is malformed"),
    (set_to("random", "torch", torch.zeros(5056, dtype=torch.uint8)), "torch generator is malformed"),
    (set_to("random", "torch", torch.zeros(5056)), "torch is a tensor of torch.float32"),
]


@pytest.mark.parametrize(("edit", "said"), RANK)
def test_a_malformed_rank_state(edit, said):
    state = rank_state()
    edit(state)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        check_rank_state(state, 20, epoch=2, step=2, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_run_saves_passes():
    state = rank_state()
    check_rank_state(state, 20, epoch=2, step=2, device=CPU)
    sampler().load_state_dict(state["feed"]["sampler"])
    queue().load_state_dict(state["feed"]["queue"])
    state["feed"]["queue"] = None  # without GRIT the order of the next epoch is not there yet
    state["feed"]["sampler"].update(start_step=0)
    check_rank_state(state, 20, epoch=3, step=0, device=CPU)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "has no 'epoch'"),
        ({"epoch": "3"}, "epoch is '3'"),
        ({"epoch": 3, "next_epoch": 3}, "has no 'step'"),
        ({"epoch": 3, "next_epoch": 9, "step": 0}, "next_epoch is 9, but must be a whole number, 3 to 4"),
        ({"epoch": 3, "next_epoch": 4, "step": -1}, "step is -1"),
        ({"epoch": 3, "best_metric": "high"}, "best_metric is str 'high'"),
        ({"epoch": 3, "best_metric": float("nan")}, "best_metric is float 'nan'"),
        ({"epoch": 3, "best_epoch": [1]}, r"best_epoch is \[1\]"),
    ],
)
def test_a_malformed_progress(content, said):
    with pytest.raises(ValueError, match=said):
        check_progress(content)


def test_progress_of_ours_and_of_lavis():
    assert check_progress({"epoch": 3, "next_epoch": 3, "step": 2, "best_metric": float("-inf"), "best_epoch": None}) == (3, 2)
    assert check_progress({"epoch": 3}) == (4, 0)


# --- the optimizer -----------------------------------------------------------------------------------------------------


def adamw() -> torch.optim.AdamW:
    model = nn.Linear(3, 2)
    made = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], fused=True)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    return made


OPTIMIZER = [
    (without("state"), "has no 'state'"),
    (set_to("param_groups", []), "2 groups"),
    (set_to("param_groups", 0, "lr", "fast"), "lr does not fit"),
    (set_to("param_groups", 0, "betas", [0.9]), "betas does not fit"),
    (set_to("param_groups", 0, "foreach", "yes"), "foreach does not fit"),
    (set_to("param_groups", 1, "params", [0]), "numbering of parameters does not fit"),
    (without("param_groups", 1, "eps"), "has no 'eps'"),
    (set_to("state", "x", {}), "a parameter 'x'"),
    (set_to("state", 7, {}), "a parameter '7', but there are 2"),
    (set_to("state", 0, "exp_avg", torch.zeros(3, 2)), r"exp_avg of parameter 0 is no tensor of \[2, 3\]"),
    (set_to("state", 0, "step", "many"), "step of parameter 0"),
    (without("state", 1, "exp_avg_sq"), "has no 'exp_avg_sq'"),
]


@pytest.mark.parametrize(("edit", "said"), OPTIMIZER)
def test_a_malformed_optimizer_state(edit, said):
    state = copy.deepcopy(adamw().state_dict())
    edit(state)
    with pytest.raises(ValueError, match=said):
        check_optimizer(state, adamw())


def test_an_optimizer_state_of_now_and_of_an_older_torch():
    state = copy.deepcopy(adamw().state_dict())
    check_optimizer(state, adamw())
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"], group["fused"]
    check_optimizer(state, adamw())
    check_optimizer({**state, "state": {}}, adamw())  # before its first step
