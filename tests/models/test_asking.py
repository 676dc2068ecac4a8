"""``ecm.every``: Con-D is asked in every n-th optimizer step of the run, and the others are GRIT's."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import families
from lavis_mafa.models import sanity
from lavis_mafa.runners.log import ConnectionRecord

FAMILY = ("albef", False)


class Counts(families.Always):
    calls = 0

    def match_probability(self, *asked):
        self.calls += 1
        return super().match_probability(*asked)


def samples(epoch: int, step: int, steps: int, window: int = 1, **more):
    return families.batch(FAMILY, epoch=epoch, iters=step, num_iters_per_epoch=steps, window=window, **more)


def asked(every: int, epochs: int, steps: int, window: int = 1, first: int = 0) -> list[int]:
    """The steps of the run in which Con-D is asked, by a model that begins at ``first``."""
    con_d, found = Counts(0.9), []
    model = families.build(FAMILY, con_d, ecm={"every": every})
    model.con_d_check = None
    with torch.no_grad():
        for number in range(first, epochs * steps):
            model(samples(*divmod(number, steps), steps, window))
            if con_d.calls:
                found.append(number)
            con_d.calls = 0
    return found


@pytest.mark.parametrize(("every", "steps", "window"), [(1, 3, 1), (2, 3, 1), (3, 4, 1), (2, 5, 2), (3, 7, 3), (50, 4, 1)])
def test_every_nth_optimizer_step_is_asked_through_the_whole_run(every, steps, window):
    wanted, update = [], -1
    for number in range(3 * steps):
        update += number % steps % window == 0  # windows begin anew with each epoch
        wanted += [number] if update % every == 0 else []
    assert asked(every, 3, steps, window) == wanted
    assert asked(every, 3, steps, window, first=steps + 1) == [number for number in wanted if number > steps]  # resumed


@families.every_family
def test_the_steps_between_are_plain_and_the_others_are_as_ever(family):
    of_step = {"epoch": 1, "iters": 1, "num_iters_per_epoch": 4, "grouped": True}  # the sixth of the run
    for every, plain in ((2, True), (5, False)):
        model = families.build(family, families.Always(0.9), ecm={"every": every}, itc={"smoothing": 0.3})
        other = families.build(family, families.Always(0.9), itc={"smoothing": 0.3}, ecm={"enabled": not plain})
        other.load_state_dict(model.state_dict())
        (found, gradients), (wanted, of_other) = (families.step(m, families.batch(family, **of_step)) for m in (model, other))
        assert torch.equal(found.loss, wanted.loss) and gradients.keys() == of_other.keys()
        assert all(torch.equal(value, of_other[name]) for name, value in gradients.items())
        assert found.metrics.keys() == wanted.metrics.keys() and ("new_positive_share" in found.metrics) is not plain
        assert (found.verdicts is None) is plain


def test_the_look_at_con_d_keeps_its_rhythm(caplog):
    caplog.set_level("INFO", logger=sanity.__name__)
    con_d = Counts(0.5)
    model = families.build(FAMILY, con_d, ecm={"every": 3})
    for number in range(15):
        families.step(model, samples(0, number, 100))
    assert con_d.calls == 5 + sanity.BATCHES
    assert [r for r in caplog.records if "of 16 own pairs" in r.getMessage()]


@pytest.mark.parametrize(("limit", "every"), [(2000, 1), (10, 1), (10, 7), (10, 3), (1, 4)])
def test_verdicts_are_recorded_of_steps_that_have_some(limit, every, tmp_path: Path):
    """As often as the limit allows, though not in the very steps that it falls on."""
    record, batch, steps = ConnectionRecord(tmp_path, 0, limit, 100), 4, 100
    for step in range(steps):
        numbers, yes = torch.arange(2 * batch), torch.ones(2 * batch, dtype=torch.bool)
        verdicts = {"image": numbers, "text": numbers, "exists": yes, "probability": torch.rand(2 * batch)}
        record.add(0, step, {**verdicts, "positive": yes, "ambiguous": ~yes} if (step + 2) % every == 0 else None)
    table = pq.read_table(record.write(0))
    taken = sorted(set(table["step"].to_pylist()))
    assert 0 < table.num_rows <= limit and all((step + 2) % every == 0 for step in taken)
    assert len(taken) == min(steps // record.every, len(range(-2 % every, steps, every)))
