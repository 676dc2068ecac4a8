"""SoftMask, TCL and ITC alone from the command line: a run, and one that was stopped on the way and resumed."""

from __future__ import annotations

import pytest

import outputs
from lavis_mafa.cli.main import main

pytestmark = pytest.mark.slow
STEPS = 5  # of an epoch
MOMENTUM = "momentum_distillation: {queue_size: 16}"
DEEPER = "model.text_encoder.layers=3"
SYSTEMS = {
    "softmask": (
        [DEEPER, f"model.itc={{focal: 2, {MOMENTUM}}}", "model.itm.soft_mask={share: 0.4}", "model.mlm.mask_everywhere=true"],
        {"itm_accuracy_extra_positive"},
    ),
    "tcl": ([f"model.itc={{{MOMENTUM}, intra_modal: [global, local]}}"], {"loss_imc", "loss_lmi"}),
    "itc alone": (
        ["model.itm.negatives=none", "model.mlm.mask_probability=0", "model.ecm={use_in: [itc]}", "run.k_test=0"],
        {"loss_itc", "new_positive_share"},
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_and_goes_on_as_if_it_had_not_stopped(system, run_yaml):
    options, figures = SYSTEMS[system]

    def trained(*more: str):
        assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.output_dir=output", *options, *more]) == 0
        return outputs.newest_run(run_yaml.parent)

    whole = trained()
    for record in outputs.metrics(whole):
        assert figures <= record.keys() and all(record[name] is not None for name in figures)
        assert ("loss_itm" in record) == (system != "itc alone")
    part = trained(f"run.max_steps={STEPS + 2}")
    resumed = trained(f"run.resume_ckpt_path={part}/checkpoint_1_2.pth")
    outputs.assert_same_weights(whole / "checkpoint_1.pth", resumed / "checkpoint_1.pth")
