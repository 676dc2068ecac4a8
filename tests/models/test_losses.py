"""What the YAML says about losses, their weights and the teacher arrives in the step; what is off costs nothing and trains nothing."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

from families import FAMILIES, NAMES, TEACHER, Always, batch, build, every_family, step
from lavis_mafa.config.schema import loss_weights
from lavis_mafa.models import albef as albef_pairs
from lavis_mafa.models import base as mafa_model
from lavis_mafa.objectives import ItcSettings, mafa_step
from lavis_mafa.runners.checkpoint import load_model

with_teacher = pytest.mark.parametrize("family", [f for f in FAMILIES if f[1]], ids=[n for n in NAMES if "teacher" in n])
ALBEF = ("albef", True)


def third(family) -> str:
    return "mlm" if family[0] == "albef" else "lm"


@every_family
@pytest.mark.parametrize("smooth_when", ["always", "grouped", "never"])
def test_every_setting_of_the_step_arrives(family, smooth_when, monkeypatch):
    """Each has another value than its default."""
    seen = []
    monkeypatch.setattr(mafa_model, "mafa_step", lambda *args: seen.append(args[3]) or mafa_step(*args))
    ecm = {
        "threshold": 0.9,
        "ambiguous_from": 0.2,
        "use_in": ["itm", "lm"],
        "false_negatives": "eliminate",
        "resample_ambiguous": False,
    }
    itc = {"weight": 0.5, "smoothing": 0.4, "smooth_when": smooth_when, "consistency": 0.3}
    itm = {"weight": 0.25, "negatives": "random"}
    model = build(family, Always(0.1), ecm=ecm, itc=itc, itm=itm, **{third(family): {"weight": 2.0}})
    for grouped in (False, True):
        model(batch(family, grouped=grouped))
    for settings, grouped in zip(seen, (False, True), strict=True):
        smooth = smooth_when == "always" or (smooth_when == "grouped" and grouped)
        assert settings.itc == ItcSettings(weight=0.5, smoothing=0.4 if smooth else 0.0, consistency=0.3)
        arrived = dataclasses.asdict(settings.ecm)
        assert {name: arrived[name] for name in ("enabled", *ecm)} == {"enabled": True, **ecm}
        assert (settings.negatives, settings.itm_weight, settings.lm_weight) == ("random", 0.25, 2.0)


@every_family
def test_keys_of_itc_carry_no_gradient(family):
    model = build(family)
    _, encoded, _ = model.encode(model.inputs({**batch(family)}))
    image, text = model.vision_proj.weight, model.text_proj.weight
    for similarity, of_anchor, of_key in ((encoded.sim_i2t, image, text), (encoded.sim_t2i, text, image)):
        found, none = torch.autograd.grad(similarity.sum(), (of_anchor, of_key), allow_unused=True, retain_graph=True)
        assert found.abs().sum() > 0 and none is None


@every_family
@pytest.mark.parametrize("on", [on for on in product((True, False), repeat=3) if any(on)], ids=str)
def test_a_loss_that_is_off_is_neither_computed_nor_logged(family, on, monkeypatch):
    names = dict(zip(("itc", "itm", third(family)), on, strict=True))
    model = build(family, Always(0.6), **{name: {"weight": 0.5 if yes else 0.0} for name, yes in names.items()})
    assert loss_weights(model.settings) == {name: 0.5 * yes for name, yes in names.items()}
    output, gradients = step(model, batch(family))
    assert {name for name in output.stats if name.startswith("loss_")} == {f"loss_{name}" for name, yes in names.items() if yes}
    torch.testing.assert_close(output.loss, sum(0.5 * output[f"loss_{name}"] for name, yes in names.items() if yes))
    assert ("itm_accuracy_positive" in output.stats) == ("itm_logits" in output.ranges) == names["itm"]
    # DDP waits for the gradient of every weight that wants one; the others stay as they are, without decay
    assert ("vision_proj.weight" in gradients) == ("temp" in gradients) == names["itc"]
    assert ("itm_head.weight" in gradients) == names["itm"]
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted
    # and no weight that moves a loss was frozen
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _, gradients = step(model, batch(family))
    assert gradients.keys() == wanted


@every_family
def test_the_temperature_stays_below_its_bound(family):
    model = build(family)
    with torch.no_grad():
        model.temp.fill_(7.0)
    assert model(batch(family)).stats["temperature"] == 0.5


# --- the same text ---------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("same_text", [True, False])
def test_equal_captions_are_known_positives(family, same_text):
    texts = ["a red dog", "a blue car", " a red  dog", "a red dog now"]
    model = build(family, ecm={"same_text": same_text})
    known = model.encode(model.inputs({**batch(family, text_input=texts)}))[1].known_positive[:, :4]
    wanted = torch.eye(4, dtype=torch.bool)
    wanted[0, 2] = wanted[2, 0] = same_text
    assert torch.equal(known, wanted)
    asked = model(batch(family, text_input=texts)).verdicts
    pairs = set(zip(asked["image"].tolist(), asked["text"].tolist(), strict=True))
    assert not same_text or not pairs & {(0, 2), (2, 0)}


# --- the teacher ----------------------------------------------------------------------------------------------------------


@with_teacher
def test_a_teacher_without_a_queue(family, tmp_path):
    """MD_NQ of MAFA Table 17: its keys and targets are those of the batch; everything else as with a queue."""
    itc = {"momentum_distillation": {"queue_size": 0, "momentum": 0.9}}
    model, plain = build(family, itc=itc), build(family)
    plain.load_state_dict({**plain.state_dict(), **{n: v for n, v in model.state_dict().items() if "queue" not in n}})
    samples = {**batch(family)}
    with torch.no_grad():
        found, wanted = (m.eval().encode(m.inputs(samples))[1] for m in (model, plain))
    assert found.candidates == 4 and found.distillation == wanted.distillation > 0
    for name in ("sim_i2t", "sim_t2i", "teacher_i2t", "teacher_t2i", "known_positive"):
        assert getattr(found, name).shape == (4, 4)
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name)[:, :4])
    before = model.train().vision_proj_m.weight.clone()
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
    for _ in range(2):
        output, _ = step(model, batch(family))
        assert output.loss.isfinite()
    after = model.vision_proj_m.weight.clone()
    assert not torch.equal(after, before) and int(model.queue_ptr) == 0
    step(model, batch(family, iters=1, window=2))  # the student has not moved since, so the teacher does not
    assert torch.equal(model.vision_proj_m.weight, after)
    ramp = model._distillation_weight(model.inputs({**batch(family), "epoch": 0, "iters": 5, "num_iters_per_epoch": 10}))
    assert ramp == pytest.approx(0.4 * 0.5 / model.ramp_up_epochs)
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    other = build(family, itc=itc)
    load_model(other, torch.load(tmp_path / "file.pth", weights_only=True)["model"], "file")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    other.load_from_pretrained(str(tmp_path / "file.pth"))


def test_a_checkpoint_may_not_know_the_texts_of_its_queue():
    """As those from before they were kept, and LAVIS's."""
    model = build(ALBEF)
    step(model, batch(ALBEF))
    state = {name: value for name, value in model.state_dict().items() if name != "text_queue_keys"}
    other = build(ALBEF)
    load_model(other, state, "file")
    assert torch.equal(other.image_queue, model.image_queue) and (other.text_queue_keys == -100).all()


def test_momentum_distillation_of_itc_alone():
    """ALBEF Table 1, ITC_MoD + MLM + ITM_hard."""
    teacher = TEACHER["momentum_distillation"]
    samples, outputs = batch(ALBEF, epoch=2), {}
    for mlm in (True, False, None):
        itc = {"momentum_distillation": None if mlm is None else {**teacher, "mlm": mlm}}
        model = build(ALBEF, itc=itc)
        if mlm is not None:
            with torch.no_grad():  # another teacher than the student
                for name, parameter in model.named_parameters():
                    if "_m." in name and parameter.dim() > 1:
                        parameter.mul_(1.5)
        outputs[mlm] = step(model, samples)[0]
    assert torch.equal(outputs[False].loss_itc, outputs[True].loss_itc)
    assert torch.equal(outputs[False].loss_mlm, outputs[None].loss_mlm)
    assert abs(outputs[True].loss_mlm - outputs[None].loss_mlm) > 1e-3


@pytest.mark.parametrize(("mlm", "weight", "asked"), [(True, 1.0, True), (False, 1.0, False), (True, 0.0, False)])
def test_the_teacher_reads_no_words_in_vain(mlm, weight, asked):
    itc = {"momentum_distillation": {**TEACHER["momentum_distillation"], "mlm": mlm}}
    model = build(ALBEF, itc=itc, mlm={"weight": weight})
    pairs = model.encode(model.inputs(batch(ALBEF))).pairs
    assert (pairs.momentum_image_embeds is not None) == asked


@every_family
def test_no_negatives_is_no_matching_loss(family):
    """ITC alone (GRIT-VLP Table 5): exactly the contrastive loss; what it does not train gets no gradient and no decay."""
    alone = {third(family): {"weight": 0}}
    model = build(family, Always(0.9), itm={"negatives": "none"}, **alone)
    assert loss_weights(model.settings) == {"itc": 1.0, "itm": 0.0, third(family): 0.0}
    output, gradients = step(model, batch(family))
    weighted, same = step(build(family, Always(0.9), itm={"weight": 0}, **alone), batch(family))
    assert torch.equal(output.loss, output.loss_itc) and torch.equal(output.loss, weighted.loss) and output.loss_itm is None
    assert gradients.keys() == same.keys() and output.verdicts["positive"].any()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any("itm_head" in name for name in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen and "_m." not in name)


def test_masking_nothing_is_no_masked_lm():
    assert loss_weights(build(ALBEF, mlm={"mask_probability": 0}).settings) == {"itc": 1.0, "itm": 1.0, "mlm": 0.0}


def test_every_word_can_be_masked_and_nothing_else(monkeypatch):
    asked = []
    loss = albef_pairs.masked_lm_loss
    monkeypatch.setattr(
        albef_pairs, "masked_lm_loss", lambda logits, labels, *more: asked.append(labels) or loss(logits, labels, *more)
    )
    model, samples = build(ALBEF, mlm={"mask_probability": 1.0}), batch(ALBEF)
    step(model, samples)
    words = [word for text in samples["text_input"] for word in model.tokenizer(text, add_special_tokens=False).input_ids]
    assert asked[0].tolist() == words
