"""What trades speed for something else, in real runs of the tiniest model: ``ecm.every``."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

import outputs
from lavis_mafa.cli.main import main

pytestmark = pytest.mark.slow
STEPS = 5  # of an epoch
OF_CON_D = {"new_positive_share", "ambiguous_share", "false_negative_share", "con_d_precision", "con_d_recall"}


def trained(run_yaml, *options: str):
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.output_dir=output", *options]) == 0
    return outputs.newest_run(run_yaml.parent)


def test_con_d_has_its_own_rhythm_and_its_own_averages(run_yaml):
    every = "model.ecm.every=2"
    whole = trained(run_yaml, every)
    asked = [number for number in range(2 * STEPS) if number % 2 == 0]  # the second epoch begins between two
    records = outputs.metrics(whole)
    assert [number for number, record in enumerate(records) if "new_positive_share" in record] == asked
    for number, record in enumerate(records):
        assert number in asked or not OF_CON_D & record.keys()
        # its truth is perfect, so that every false negative becomes a positive
        assert number not in asked or record["new_positive_share"] == pytest.approx(record["false_negative_share"])
    table = pq.read_table(whole / "connections")
    pairs = {(epoch, step) for epoch, step in zip(table["epoch"].to_pylist(), table["step"].to_pylist(), strict=True)}
    assert pairs == {divmod(number, STEPS) for number in asked}

    (first, _) = outputs.metrics(trained(run_yaml, every, f"run.log_freq={STEPS}"))
    for name in ("new_positive_share", "false_negative_share"):
        assert first[name] == pytest.approx(sum(records[number][name] for number in asked if number < STEPS) / 3)

    part = trained(run_yaml, every, f"run.max_steps={STEPS + 2}")
    resumed = trained(run_yaml, every, f"run.resume_ckpt_path={part}/checkpoint_1_2.pth")
    outputs.assert_same_weights(whole / "checkpoint_1.pth", resumed / "checkpoint_1.pth")
    assert [outputs.timeless(r) for r in outputs.metrics(resumed)] == [outputs.timeless(r) for r in records[STEPS + 2 :]]
