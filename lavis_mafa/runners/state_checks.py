"""What a checkpoint says of its run, looked at before any of it is used: a torn or edited file is one message, not a crash later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.grit.saved import saved_number, saved_tensor, saved_value

# Mersenne Twister, in Python's and numpy's generator alike
WORDS, WORD = 624, 2**32


def check_progress(content: Mapping[str, Any]) -> tuple[int, int]:
    """Where a checkpoint's run stands.

    Args:
        content: of ``checkpoint_X.pth``, ours or LAVIS's, which has an ``epoch`` alone.

    Returns:
        the epoch to go on with, and how many of its steps are done.

    Raises:
        ValueError: an entry is missing or no such number.

    Example:
        >>> check_progress({"epoch": 3})
        (4, 0)
    """
    best = content.get("best_metric", 0.0)
    if not isinstance(best, int | float) or isinstance(best, bool) or best != best:
        raise ValueError(f"the saved best_metric is {type(best).__name__} {str(best)[:40]!r}, but must be a number.")
    if content.get("best_epoch") is not None:
        saved_number(content, "best_epoch")
    epoch = saved_number(content, "epoch")
    if "next_epoch" not in content:
        return epoch + 1, 0
    return saved_number(content, "next_epoch", least=epoch, most=epoch + 1), saved_number(content, "step")


def check_rank_state(state: Any, dataset_size: int, epoch: int, step: int, device: torch.device) -> None:
    """All of a rank's state that neither its sampler nor its queue can judge: they check the rest when they load it.

    Args:
        state: of ``checkpoint_X.rankR.pth``.
        dataset_size: N, of the training set.
        epoch: of :func:`check_progress`, from the checkpoint beside it.
        step: likewise.
        device: the run's; the state of its generator is looked at too.

    Raises:
        ValueError: an entry is missing or malformed, or belongs to another checkpoint.
    """
    feed = saved_value(state, "feed")
    sampler, queue = saved_value(feed, "sampler"), saved_value(feed, "queue")
    own = saved_number(sampler, "epoch"), saved_number(sampler, "start_step")
    # between two epochs the next order is there only if GRIT made it
    allowed = [(epoch, step)] if step else [(epoch, 0), (epoch - 1, 0)]
    if own not in allowed:
        raise ValueError(f"it stands at epoch {own[0]}, step {own[1]}, but the checkpoint beside it at epoch {epoch}, step {step}.")
    if queue is not None:
        for name in ("finished", "index"):
            _within(saved_tensor(queue, name, torch.long, dims=1), name, dataset_size)
    _check_random_state(saved_value(state, "random"), device)


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """That ``optimizer.load_state_dict(saved)`` works, and the next step after it.

    Args:
        saved: of an AdamW, from this version of torch or an older one, which lacks some of the settings.
        optimizer: the AdamW that would take it.

    Raises:
        ValueError: it is of other parameters, or malformed.
    """
    groups, state = saved_value(saved, "param_groups"), saved_value(saved, "state")
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own) or not isinstance(state, Mapping):
        raise ValueError(f"the saved optimizer must have a state and {len(own)} groups of parameters.")
    for group, wanted in zip(groups, own, strict=True):
        for name in ("params", "lr", "betas", "eps", "weight_decay"):
            saved_value(group, name)
        wrong = [name for name, value in wanted.items() if name in group and not _alike(group[name], value)]
        if wrong or group["params"] != wanted["params"]:
            raise ValueError(f"the saved optimizer's {', '.join(wrong) or 'numbering of parameters'} does not fit this model's.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in state.items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise ValueError(f"the saved optimizer knows a parameter {str(number)[:40]!r}, but there are {len(parameters)}.")
        for name in ("exp_avg", "exp_avg_sq", "step"):
            value, shape = saved_value(entry, name), () if name == "step" else parameters[number].shape
            if not isinstance(value, Tensor) or value.shape != shape or value.layout != torch.strided or value.is_meta:
                raise ValueError(f"the saved optimizer's {name} of parameter {number} is no tensor of {list(shape)}.")


def _alike(saved: Any, own: Any) -> bool:
    """Is it a switch where ``own`` is one, a number where it is one, a list as long as it?"""
    if isinstance(own, bool) or own is None:
        return saved is None or isinstance(saved, bool)
    if isinstance(own, int | float):
        return isinstance(saved, int | float) and not isinstance(saved, bool)
    return isinstance(saved, tuple | list) and len(saved) == len(own) and all(map(_alike, saved, own))


def _check_random_state(state: Any, device: torch.device) -> None:
    """That every generator takes its state: numpy's would read past its end without a word."""
    python, numpy = saved_value(state, "python"), saved_value(state, "numpy")
    saved_number(python, "version", least=3, most=3)
    numbers = saved_tensor(python, "numbers", torch.long, dims=1)
    _check_words(numbers[:-1], "state of Python's generator")
    if not 0 <= int(numbers[-1]) <= WORDS:
        raise ValueError(f"the saved state of Python's generator has position {int(numbers[-1])} of {WORDS}.")
    gauss = saved_value(python, "gauss")
    if gauss is not None and not isinstance(gauss, float):
        raise ValueError("the saved gauss of Python's generator is neither a number nor None.")

    if saved_value(numpy, "name") != "MT19937":
        raise ValueError("the saved state of numpy's generator is not of MT19937.")
    _check_words(saved_tensor(numpy, "keys", torch.long, dims=1), "state of numpy's generator")
    rest = saved_value(numpy, "rest")
    if not isinstance(rest, list | tuple) or len(rest) != 3 or not isinstance(rest[2], float):
        raise ValueError("the saved rest of numpy's generator must be its position, whether it has a number in store, and that number.")
    saved_number({"position of numpy's generator": rest[0]}, "position of numpy's generator", most=WORDS)
    saved_number({"flag of numpy's generator": rest[1]}, "flag of numpy's generator", most=1)

    generators = {"torch": torch.device("cpu"), "cuda": device}
    for name in ("torch", "cuda"):
        if name == "torch" or (device.type == "cuda" and name in state):
            try:
                torch.Generator(generators[name]).set_state(saved_tensor(state, name, torch.uint8, dims=1))
            except RuntimeError as error:
                raise ValueError(f"the saved state of the {name} generator is malformed ({str(error).splitlines()[0]}).") from error


def _check_words(words: Tensor, name: str) -> None:
    if len(words) != WORDS or bool(((words < 0) | (words >= WORD)).any()):
        raise ValueError(f"the saved {name} must be {WORDS} numbers below 2**32.")


def _within(index: Tensor, name: str, dataset_size: int) -> None:
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < dataset_size):
        raise ValueError(f"the saved {name} holds positions outside the data set, which has {dataset_size} samples.")
