"""One optimisation step and the learning rate, on a model of one layer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch import Tensor, nn

import lavis_mafa.plugin
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.runners.runner_mafa import RunnerMafa
from lavis_mafa.runners.schedule import WarmupCosinePerStep
from lavis_mafa.runners.step import Stepper, losses_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TASK = SimpleNamespace(train_step=lambda model, samples: F.mse_loss(model(samples["x"]), samples["y"]))


def data(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator)


class Training:
    """Plain gradient descent with our stepper; a batch is a slice of the same samples."""

    def __init__(self, learning_rate: float = 0.1, **settings: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.x, self.y = data(24)
        optimizer = torch.optim.SGD(self.model.parameters(), learning_rate)
        self.stepper = Stepper(TASK, self.model, optimizer, None, RunBlock(**settings), CPU)  # type: ignore[arg-type]

    def run(self, *slices: tuple[int, int]) -> Tensor:
        """One epoch of these batches -> all weights."""
        for step, (start, end) in enumerate(slices):
            self.step(step, len(slices), start, end)
        return self.weights

    def step(self, step: int, steps: int, start: int, end: int) -> None:
        self.stepper({"x": self.x[start:end], "y": self.y[start:end]}, step, steps)

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


def test_accumulated_windows_equal_big_batches():
    big = Training().run((0, 8), (8, 16))
    small = Training(accum_grad_iters=2).run((0, 4), (4, 8), (8, 12), (12, 16))
    torch.testing.assert_close(small, big)
    assert not torch.allclose(big, Training().weights)


def test_a_short_last_window_is_divided_by_its_own_length():
    big = Training().run((0, 12), (12, 20))
    small = Training(accum_grad_iters=3).run((0, 4), (4, 8), (8, 12), (12, 16), (16, 20))
    torch.testing.assert_close(small, big)


def test_the_optimizer_is_that_of_lavis():
    model, run = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), RunBlock(weight_decay=0.3, beta2=0.98)
    model.add_module("ln_vision", nn.Linear(2, 2))
    model.add_module("frozen", nn.Linear(2, 2).requires_grad_(False))
    ours = RunnerMafa.optimizer.func(SimpleNamespace(model=model, settings=run))
    config = OmegaConf.create({"run_cfg": {"weight_decay": 0.3, "init_lr": run.init_lr, "beta2": 0.98}})
    theirs = RunnerBase.optimizer.fget(SimpleNamespace(_optimizer=None, model=model, config=SimpleNamespace(run_cfg=config.run_cfg)))
    for mine, group in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(weight) for weight in mine["params"]] == [id(weight) for weight in group["params"]]
        assert {**mine, "params": 0} == {**group, "params": 0, "fused": True}


def test_a_task_may_return_the_parts_of_its_loss():
    """As LAVIS's tasks do in versions later than 1.0.2."""
    plain, parts = Training(), Training()
    parts.stepper.task = SimpleNamespace(train_step=lambda *a, **k: (TASK.train_step(*a, **k), {"loss_itm": torch.ones(())}))
    assert torch.equal(plain.run((0, 8)), parts.run((0, 8)))
    output = parts.stepper({"x": parts.x, "y": parts.y}, 0, 1).output
    assert losses_of(output).keys() == {"loss", "loss_itm"}


def test_nothing_moves_inside_a_window():
    training = Training(accum_grad_iters=2)
    first = training.weights
    training.step(0, 4, 0, 4)
    assert torch.equal(training.weights, first) and training.model.weight.grad is not None
    training.step(1, 4, 4, 8)
    assert not torch.equal(training.weights, first) and training.model.weight.grad is None


@pytest.mark.parametrize("window", [1, 2])
def test_clipping_limits_the_norm_of_a_windows_gradient(window):
    slices = [(0, 8)] if window == 1 else [(0, 4), (4, 8)]
    free = Training(learning_rate=1.0)
    gradient = free.weights - free.run((0, 8))
    clipped = Training(learning_rate=1.0, accum_grad_iters=window, grad_clip=0.5 * float(gradient.norm()))
    moved = clipped.weights - clipped.run(*slices)
    torch.testing.assert_close(moved, 0.5 * gradient, atol=1e-5, rtol=1e-5)  # shorter, in the same direction
    loose = Training(learning_rate=1.0, accum_grad_iters=window, grad_clip=2 * float(gradient.norm()))
    torch.testing.assert_close(loose.weights - loose.run(*slices), gradient)


# --- the learning rate -------------------------------------------------------------------------------------------------


def schedule(**changes: object) -> WarmupCosinePerStep:
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}], lr=1.0)
    values = {"max_epoch": 5, "min_lr": 1e-5, "init_lr": 1e-4, "warmup_steps": 4, "warmup_start_lr": 2e-5, "steps_per_epoch": 4}
    return WarmupCosinePerStep(optimizer, **{**values, **changes})  # type: ignore[arg-type]


def test_warm_up_and_cosine_by_hand():
    """20 steps of which 4 warm up: the cosine spans the other 16, from 1e-4 down to 1e-5."""
    table = {0: 2e-5, 1: 4e-5, 2: 6e-5, 3: 8e-5, 4: 1e-4, 12: 5.5e-5, 20: 1e-5, 21: 1e-5, 1000: 1e-5}
    table |= {8: 1e-5 + 9e-5 * (1 + math.sqrt(0.5)) / 2, 16: 1e-5 + 9e-5 * (1 - math.sqrt(0.5)) / 2}
    table |= {step: 1e-5 + 4.5e-5 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(5, 20)}
    rates = schedule()
    for step, rate in table.items():
        assert rates.at(step) == pytest.approx(rate, rel=1e-9), step
    falling = [rates.at(step) for step in range(4, 21)]
    assert falling == sorted(falling, reverse=True)


def test_warm_up_may_be_longer_than_an_epoch_or_absent():
    long = schedule(warmup_steps=10, warmup_start_lr=0.0)
    assert [long.at(step) for step in (0, 5, 10, 15, 20)] == pytest.approx([0.0, 5e-5, 1e-4, 5.5e-5, 1e-5])
    assert [schedule(warmup_steps=0).at(step) for step in (0, 10, 20)] == pytest.approx([1e-4, 5.5e-5, 1e-5])
    assert schedule(warmup_start_lr=-1).at(0) == pytest.approx(1e-4)  # LAVIS's way of saying "none given"


def test_a_horizon_beyond_the_training_ends_above_the_minimum():
    """The authors' 20 of 30 epochs: two thirds of the cosine are walked, so (1 + cos 120 deg) / 2 = a quarter is left."""
    rates = schedule(max_epoch=30, warmup_steps=0, steps_per_epoch=10)
    assert rates.at(20 * 10) == pytest.approx(1e-5 + 9e-5 / 4)
    assert rates.at(30 * 10) == pytest.approx(1e-5)


def test_lavis_finds_it_and_it_sets_all_groups():
    lavis_mafa.plugin.register()
    assert registry.get_lr_scheduler_class("warmup_cosine_per_step") is WarmupCosinePerStep
    rates = schedule()
    for epoch, step in ((0, 2), (1, 0), (3, 1)):
        rates.step(cur_epoch=epoch, cur_step=step)
        assert [group["lr"] for group in rates.optimizer.param_groups] == [rates.at(4 * epoch + step)] * 2
    with pytest.raises(ValueError, match="runner_mafa"):
        schedule(steps_per_epoch=None)
