"""A step that is not finite: its loss says so, nothing crashes on the way, and the momentum queue takes nothing of it in."""

from __future__ import annotations

import pytest
import torch

from families import Always, batch, build, every_family, step
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import build_discriminator

NAN, INF = float("nan"), float("inf")


def spoilt(family, value, row: int = 1):
    samples = batch(family)
    samples["image"][row, 0, 0, 0] = value
    return samples


@every_family
@pytest.mark.parametrize("negatives", ["hardest", "sampled", "random"])
@pytest.mark.parametrize(
    ("value", "con_d"),
    [(NAN, None), (NAN, Always(0.9)), (INF, Always(0.6)), (-INF, Always(0.9))],
    ids=["nan", "nan, all positive", "inf, all ambiguous", "-inf, all positive"],
)
def test_a_spoilt_image_gives_a_loss_that_is_not_finite(family, negatives, value, con_d):
    model = build(family, con_d, itm={"negatives": negatives})
    output, _ = step(model, spoilt(family, value))
    assert not output.loss.isfinite()
    assert not output.ranges["similarity"].isfinite().any()
    assert not output.ranges["image_feature_norm"].isfinite().any() and output.ranges["text_feature_norm"].isfinite().all()


@every_family
@pytest.mark.parametrize("false_negatives", ["convert", "eliminate"])
@pytest.mark.parametrize("how", ["one weight", "temperature", "every image"])
def test_broken_weights_and_batches_give_a_loss_that_is_not_finite(family, how, false_negatives):
    model, samples = build(family, Always(0.9), ecm={"false_negatives": false_negatives}), batch(family)
    with torch.no_grad():
        if how == "one weight":
            model.vision_proj.weight[0, 0] = NAN
        elif how == "temperature":
            model.temp.fill_(NAN)
        else:
            samples["image"].fill_(NAN)
    output, _ = step(model, samples)
    assert output.loss.isnan() and output.loss_itc.isnan()


@pytest.mark.parametrize("family", [("albef", True), ("blip", True)], ids=["albef", "blip"])
def test_a_teacher_that_broke_alone_gives_a_loss_that_is_not_finite(family):
    model = build(family, itc={"momentum_distillation": {"queue_size": 12, "momentum": 0.9}})
    with torch.no_grad():
        model.text_proj_m.weight.fill_(NAN)
    assert step(model, batch(family))[0].loss_itc.isnan()


@pytest.mark.parametrize("family", [("albef", False), ("blip", False), ("blip2", False)], ids=["albef", "blip", "blip2"])
def test_a_spoilt_image_is_no_fault_of_a_real_con_d(tmp_path, family):
    """Its probabilities are NaN where the similarities are; that stops nothing."""
    path = tmp_path / "con_d.pth"
    torch.save({"model": build(family).state_dict()}, path)
    model = build(
        family, discriminator={"arch": f"{family[0]}_mafa", "checkpoint": str(path), "precision": "fp32"}, ecm={"enabled": True}
    )
    model.set_discriminator(build_discriminator(model.settings, model))
    output, _ = step(model, {**spoilt(family, NAN), "epoch": 0})
    assert output.loss.isnan() and output.ranges["con_d_probability"].isnan().any()
    kept = output.verdicts["exists"]
    assert not kept.all() and output.verdicts["probability"][kept].isfinite().all()
    assert not (output.verdicts["positive"] & ~kept).any()
    assert step(model, batch(family))[0].loss.isfinite()


@every_family
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_broken_con_d_is_an_error(family, epoch):
    """The model's own scores are sound: nothing to skip, every step would be the same."""
    with pytest.raises(UserError, match=r"match probabilities must be in \[0, 1\].*indices of the batch: \[0, 1, 2, 3\]"):
        build(family, Always(NAN))(batch(family, epoch=epoch))


@pytest.mark.parametrize("family", [("albef", True), ("blip", True)], ids=["albef", "blip"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_queue_takes_no_row_that_is_not_finite(family, modality, monkeypatch):
    model, samples = build(family), batch(family)
    if modality == "image":
        samples = spoilt(family, NAN)
    else:
        features = model._momentum_features

        def broken(*arguments, **more):
            images, image, text, parts = features(*arguments, **more)
            return images, image, text.index_fill(0, torch.tensor(1), INF), parts

        monkeypatch.setattr(model, "_momentum_features", broken)
    before = {name: getattr(model, name).clone() for name in ("image_queue", "text_queue", "idx_queue")}
    with torch.no_grad():
        model(samples)
    assert int(model.queue_ptr) == 4  # as many columns as ever
    for name, old in before.items():
        now = getattr(model, name)
        assert now.isfinite().all()
        assert torch.equal(now[:, 1], old[:, 1]) and torch.equal(now[:, 4:], old[:, 4:])  # pair and key stay together
        assert all(not torch.equal(now[:, column], old[:, column]) for column in (0, 2, 3))
    monkeypatch.undo()
    assert step(model, batch(family))[0].loss.isfinite()  # the next step is sound


@every_family
@pytest.mark.parametrize("con_d", [None, Always(0.9)], ids=["no ecm", "ecm"])
def test_ranges_hold_the_least_and_the_greatest_score(family, con_d):
    model, samples = build(family, con_d), batch(family)
    _, encoded, _ = model.eval().encode(model.inputs({**samples}))
    output = model(samples)
    similarities = torch.cat([encoded.sim_i2t, encoded.sim_t2i]) / encoded.temperature
    wanted = {"similarity", "itm_logits", "temperature", "image_feature_norm", "text_feature_norm"}
    assert output.ranges.keys() == wanted | ({"con_d_probability"} if con_d else set())
    for value in output.ranges.values():
        assert value.shape == (2,) and value.dtype == torch.float32 and not value.requires_grad and value[0] <= value[1]
    torch.testing.assert_close(output.ranges["similarity"], torch.stack([similarities.min(), similarities.max()]).detach())
    torch.testing.assert_close(output.ranges["image_feature_norm"], torch.ones(2))
    assert output.ranges["temperature"].tolist() == pytest.approx([float(model.temp)] * 2)
    assert not set(output.ranges) & {"loss", *output.stats} - {"temperature"}  # they are no metrics


def test_a_range_of_something_not_finite_is_not_finite():
    from lavis_mafa.objectives import value_range

    assert value_range(torch.tensor([1.0, NAN]), torch.tensor([[2.0]])).isnan().all()
    assert value_range(torch.tensor([1.0, -INF], dtype=torch.bfloat16), torch.tensor(2.0)).tolist() == [-INF, 2.0]
