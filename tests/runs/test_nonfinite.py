"""A step whose loss or gradient is not finite changes nothing, is written down, and ends the run when it comes again and again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.errors import UserError
from lavis_mafa.runners.step import NonFinite, Stepper, StepResult

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TASK = SimpleNamespace(train_step=lambda model, samples: F.mse_loss(model(samples["x"]), samples["y"]) * samples.get("times", 1.0))
GOOD, NAN, INFINITE = 1.0, float("nan"), float("inf")


class Training:
    """AdamW with our stepper, on batches whose loss is multiplied by what the test says."""

    def __init__(self, scale: float | None = None, **settings: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(24, 3, generator=generator), torch.randn(24, 2, generator=generator)
        optimizer = torch.optim.AdamW(self.model.parameters(), 0.1, fused=True)
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        self.stepper = Stepper(TASK, self.model, optimizer, self.scaler, RunBlock(**settings), CPU)  # type: ignore[arg-type]

    def run(self, *batches: tuple[int, float]) -> list[bool | None]:
        """Batches by number, and what their loss is multiplied by; what was applied."""
        applied = []
        for step, (number, times) in enumerate(batches):
            part = slice(4 * number, 4 * number + 4)
            applied.append(self.stepper({"x": self.x[part], "y": self.y[part], "times": times}, step, len(batches)).applied)
        return applied

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_leaves_everything_as_if_it_had_not_been(bad, clip):
    with_it, without = Training(grad_clip=clip), Training(grad_clip=clip)
    assert with_it.run((0, GOOD), (1, bad), (2, GOOD)) == [True, False, True]
    assert without.run((0, GOOD), (2, GOOD)) == [True, True]
    assert torch.equal(with_it.weights, without.weights)  # and so are the optimizer's averages and step count


def test_one_bad_batch_spoils_its_accumulation_window_and_no_other():
    with_it, without = Training(accum_grad_iters=2), Training(accum_grad_iters=2)
    assert with_it.run((0, GOOD), (1, NAN), (2, GOOD), (3, GOOD)) == [None, False, None, True]
    without.run((2, GOOD), (3, GOOD))
    assert torch.equal(with_it.weights, without.weights)


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is():
    training = Training()
    training.model.bias.register_hook(lambda gradient: gradient * NAN)
    before = training.weights
    assert training.run((0, GOOD)) == [False] and torch.equal(training.weights, before)


def test_a_loss_scaler_looking_for_its_scale_is_not_mistaken_for_it():
    """Scaled gradients beyond fp32 with a finite loss: the scaler skips the step, halves its scale, and nothing is wrong."""
    training = Training(scale=2.0**127)
    before = training.weights
    assert training.run((0, 100.0)) == [True] and torch.equal(training.weights, before)
    assert training.scaler is not None and training.scaler.get_scale() == 2.0**126
    assert training.run(*[(0, 100.0)] * 12) == [True] * 12
    assert not torch.equal(training.weights, before)


@pytest.mark.parametrize("scale", [1024.0, 1.0])
def test_with_a_loss_scaler_a_loss_that_is_not_finite_counts(scale):
    training = Training(scale=scale)
    assert training.run((0, GOOD), (1, NAN), (2, GOOD)) == [True, False, True]
    assert bool(training.weights.isfinite().all())


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_any_micro_batch_of_a_window_counts_though_its_gradient_is_finite(scale, bad):
    """A constant that is infinite spoils the loss and not the gradient."""
    training = Training(scale=scale, accum_grad_iters=3)
    before, plain = training.weights, training.stepper.task.train_step
    losses = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    losses[bad] = INFINITE
    training.stepper.task = SimpleNamespace(train_step=lambda model, samples: plain(model, samples) + losses.pop(0))
    assert training.run(*[(0, GOOD)] * 3) == [None, None, False] and torch.equal(training.weights, before)
    assert training.run(*[(0, GOOD)] * 3) == [None, None, True] and not torch.equal(training.weights, before)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_what_another_rank_says_of_its_step_holds_here(scale):
    training, told = Training(scale=scale), []
    before = training.weights
    training.stepper.vote = lambda bad: (0, False, bool(told.append(bad)) or True)
    assert training.run((0, GOOD)) == [False] and torch.equal(training.weights, before) and told == [False]
    training.stepper.vote = lambda bad: (0, False, bool(told.append(bad)))  # the others are well
    assert training.run((0, GOOD), (1, NAN)) == [True, True] and told == [False, False, True]


def test_at_the_smallest_scale_a_bad_gradient_is_nobodys_but_the_models():
    training = Training(scale=1.0)
    training.model.bias.register_hook(lambda gradient: gradient * INFINITE)
    assert training.run((0, GOOD)) == [False]


def test_so_many_in_a_row_end_the_run_and_are_written_down(tmp_path, caplog):
    watch = NonFinite(tmp_path / "nonfinite.rank0.jsonl", at_most=3)
    output = {"loss": torch.tensor(NAN), "loss_itc": torch.tensor(2.5), "ranges": {"similarity": torch.tensor([-3.0, INFINITE])}}
    samples = {"index": torch.arange(100, 120)}
    for step, applied in enumerate([False, False, True, False, False]):
        watch.add(1, step, samples, StepResult(output, applied))
    with pytest.raises(UserError) as error:
        watch.add(1, 5, samples, StepResult(output, applied=False, gradient_norm=torch.tensor(INFINITE)))
    said = str(error.value)
    assert "3 steps in a row (run.max_nonfinite_steps)" in said and "epoch 1, step 6" in said and "loss nan" in said
    assert "similarity -3.0 to inf" in said and "samples 100, 101" in said and "12 more" in said and "gradient norm inf" in said
    lines = [json.loads(line) for line in watch.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6] and all(line["samples"] == list(range(100, 120)) for line in lines)
    assert lines[0]["losses"] == {"loss": "nan", "loss_itc": 2.5} and lines[0]["ranges"] == {"similarity": [-3.0, "inf"]}
    assert len(caplog.records) == 1, "the first one is told at once"


@pytest.fixture
def broken(monkeypatch):
    """Spoil the pixels of chosen steps, on chosen ranks."""
    from lavis_mafa.runners.runner_mafa import RunnerMafa

    prepare = RunnerMafa._prepare

    def spoil(wanted) -> None:
        def prepared(self, samples, epoch, step):
            samples = prepare(self, samples, epoch, step)
            if wanted(epoch, step):
                samples["image"] = samples["image"] * NAN
            return samples

        monkeypatch.setattr(RunnerMafa, "_prepare", prepared)

    return spoil


@pytest.fixture
def train(tmp_path, tiny_yaml, monkeypatch):
    from lavis_mafa.cli.main import main

    monkeypatch.chdir(tmp_path)
    return lambda *options: main(["train", "--cfg-path", str(tiny_yaml), "--options", "run.test_splits=[]", *options])


@pytest.mark.parametrize("kind", [[], ["model.itc.momentum_distillation={queue_size: 64}"]], ids=["plain", "momentum"])
def test_a_run_goes_on_after_broken_pixels(train, broken, tmp_path, kind):
    broken(lambda epoch, step: (epoch, step) in ((0, 2), (1, 4)))
    assert train(*kind) == 0
    (run,) = (tmp_path / "output").glob("2*")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"]) for r in records if r.get("skipped_steps")] == [(0, 3), (1, 5)]
    assert all("loss" in r for r in records if not r.get("skipped_steps"))
    written = [json.loads(line) for line in (run / "nonfinite.rank0.jsonl").read_text().splitlines()]
    assert len(written) == 2 and written[0]["losses"]["loss"] == "nan" and len(written[0]["samples"]) == 16
    state = torch.load(run / "checkpoint_1.pth", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in state["model"].values() if value.is_floating_point())
    order = torch.load(run / "checkpoint_1.rank0.pth", weights_only=True)["feed"]["sampler"]["order"]
    assert torch.equal(order.sort().values, torch.arange(len(order))), "samples of skipped steps are served again"


def test_a_learning_rate_beyond_all_bounds_ends_with_a_message_and_good_weights(train, tmp_path, capsys):
    assert train("run.init_lr=1e9", "run.warmup_steps=6", "run.max_nonfinite_steps=4", "run.save_every_steps=1") == 2
    said = capsys.readouterr().err
    assert "4 steps in a row (run.max_nonfinite_steps)" in said and "nonfinite.rank0.jsonl" in said and "similarity" in said
    assert "Traceback" not in said and len(said.splitlines()) == 1
    (run,) = (tmp_path / "output").glob("2*")
    for path in run.glob("checkpoint_*.pth"):
        if "rank" not in path.name:
            assert all(
                not bool(v.isnan().any()) for v in torch.load(path, weights_only=True)["model"].values() if v.is_floating_point()
            )
