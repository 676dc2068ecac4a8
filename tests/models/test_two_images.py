"""ALBEF on two images: LAVIS's class on the same weights, doubled layers and what they share, and text assignment."""

from __future__ import annotations

import logging
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.models.albef_models.albef_nlvr import AlbefNLVR
from lavis.models.med import BertModel
from torch import Tensor

import reduced
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_nlvr import AlbefNlvrMafa
from lavis_mafa.models.albef_ta import AlbefTaMafa
from lavis_mafa.models.encoders import MINILM, build_tokenizer
from lavis_mafa.objectives.text_assignment import Assignment

TEACHER = {"momentum": 0.9, "alpha": 0.4}
PARTS = ("tokenizer", "max_text_length", "image_encoder", "text_encoder")
CLASSES = {"albef_nlvr_mafa": AlbefNlvrMafa, "albef_ta_mafa": AlbefTaMafa}
COUPLES = [(1, 2), (3, 4)]  # of the reduced size: one text layer, two fusion layers
State = dict[str, Tensor]


def block(arch: str = "albef_nlvr_mafa", layers: int = reduced.LAYERS, text: int = reduced.FUSION, **changes: Any) -> Any:
    sizes = {name: reduced.SIZES[name] for name in PARTS}
    sizes["text_encoder"] = {**sizes["text_encoder"], "layers": layers, "fusion_layer": text}
    if arch == "albef_ta_mafa":
        sizes["embed_dim"] = reduced.DIM
    return typed_block("model", {"arch": arch, "model_type": "tiny", **sizes, **changes})


def ours(arch: str = "albef_nlvr_mafa", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = CLASSES[arch](block(arch, **changes))
    reduced.spread(model)
    model._copy_to_teacher()
    return model


class OfflineNlvr(AlbefNLVR):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_tokenizer(MINILM)


def lavis(taught: bool, seed: int = 1) -> AlbefNLVR:
    """It has 6 text layers and 6 couples, whatever its config says."""
    torch.manual_seed(seed)
    config = reduced._text_config()
    config.update({"num_hidden_layers": 18, "fusion_layer": 6})
    text = BertModel(config=config, add_pooling_layer=False)
    model = OfflineNlvr(reduced._image_encoder(), text, 2, momentum=0.9, use_distill=taught, max_txt_len=30)
    reduced.spread(model)
    if taught:
        model.copy_params()
    return model


def batch(**more: Any) -> dict[str, Any]:
    images = {f"image{number}": reduced.batch(4, seed=number)["image"] for number in (0, 1)}
    texts = {"text_input": reduced.CAPTIONS, "label": torch.tensor([0, 1, 1, 0])}
    return {**images, **texts, "epoch": 2, "iters": 0, "num_iters_per_epoch": 1, **more}


def saved(state: State, folder: Path) -> str:
    torch.save({"model": state}, folder / "file.pth")
    return str(folder / "file.pth")


def test_the_teachers_share_rises_within_the_first_epoch():
    """From nothing, where the loss is that without a teacher, in a straight line to alpha."""
    model, now = ours(momentum_distillation=TEACHER).eval(), {"num_iters_per_epoch": 4}
    start, middle, end = (model(batch(epoch=0, iters=iters, **now)).loss for iters in (0, 2, 4))
    torch.testing.assert_close(start, ours().eval()(batch()).loss)
    assert abs(end - start) > 1e-4
    torch.testing.assert_close(middle - start, end - middle)
    torch.testing.assert_close(end, model(batch(epoch=1, iters=0, **now)).loss)


@pytest.mark.parametrize("taught", [True, False])
def test_a_step_is_that_of_lavis(taught, monkeypatch):
    """Its weights in both directions, logits, loss, gradients, and the teacher after it; where LAVIS's teacher reads with the
    student's text encoder, that is the teacher's own here."""
    mine, theirs = ours(layers=12, text=6, momentum_distillation=TEACHER if taught else None), lavis(taught)
    mine.load_state_dict(theirs.state_dict())
    for part in ("cls_head", "visual_encoder"):  # else the teacher says what the student does
        for parameter, other in zip(getattr(mine, part).parameters(), getattr(theirs, part).parameters(), strict=True):
            parameter.data.mul_(1.2), other.data.mul_(1.2)
    mine.train(), theirs.train()
    output = mine(batch())
    torch.testing.assert_close(output.logits, theirs(batch(), is_train=False)["predictions"], atol=1e-5, rtol=0)
    if not taught:  # LAVIS stacks what there is not
        monkeypatch.setattr(torch, "stack", lambda tensors, dim=0: tensors)
    theirs_loss = theirs(batch())["loss"]
    torch.testing.assert_close(output.loss, theirs_loss, atol=1e-5, rtol=0)
    output.loss.backward(), theirs_loss.backward()
    for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if parameter.requires_grad:  # DDP waits for a gradient of each
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0)
    theirs.load_state_dict(mine.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, mine.state_dict()[name])
    predicted = mine.eval().predict(batch())
    torch.testing.assert_close(predicted["predictions"], theirs.eval().predict(batch())["predictions"], atol=1e-5, rtol=0)


def test_the_teacher_reads_with_its_own_text_encoder():
    model = ours(momentum_distillation=TEACHER).eval()
    with torch.no_grad():
        for parameter in model.text_encoder_m.parameters():
            parameter.mul_(0.5)
    output, student = model(batch()), ours().eval()
    student.load_state_dict({n: model.state_dict()[f"{n.split('.')[0]}_m.{n.partition('.')[2]}"] for n in student.state_dict()})
    torch.testing.assert_close(output.logits_m, student(batch()).logits)


def shared(text_encoder: Any) -> bool:
    layers = [layer.crossattention.self for layer in text_encoder.encoder.layer[1:]]
    return all(
        getattr(layers[n], part).weight is getattr(layers[n + 1], part).weight
        and layers[n].query.weight is not layers[n + 1].query.weight
        for n in (0, 2)
        for part in ("key", "value")
    )


def test_keys_and_values_of_a_couple_stay_one_parameter(tmp_path):
    model = ours(momentum_distillation=TEACHER)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.load_from_pretrained(saved(state, tmp_path))
    for one in (model, deepcopy(model), model.double()):
        assert shared(one.text_encoder) and shared(one.text_encoder_m)
    names = [name for name, _ in model.text_encoder.named_parameters() if ".crossattention.self." in name]
    assert len(names) == len(set(names)) == 2 * (2 + 1 + 1) * 2  # a couple's queries, key and value; weight and bias


def start(seed: int = 5) -> State:
    return reduced.ours(seed, itc={"momentum_distillation": {"queue_size": 8}, "smoothing": 0.0}).state_dict()


@pytest.mark.parametrize("arch", CLASSES)
def test_pre_training_starts_both_layers_of_a_couple(arch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model, pretrained, first = ours(arch), start(), ours(arch)
    model.load_from_pretrained(saved(pretrained, tmp_path))
    of_layer = {0: 0, **{couple: number for number, couples in enumerate(COUPLES, 1) for couple in couples}}
    for name, value in model.state_dict().items():
        if name.startswith(("cls_head.", "ta_head.")):
            assert torch.equal(value, first.state_dict()[name])
            continue
        source = name.replace("text_encoder.", "text_encoder.bert.")
        if ".layer." in name:
            number = int(name.split(".")[3])
            source = source.replace(f".layer.{number}.", f".layer.{of_layer[number]}.")
        assert torch.equal(value, pretrained[source]), name
    assert shared(model.text_encoder)
    assert caplog.text.count("Both layers of a couple start as the fusion layer of pre-training") == 1
    assert ("without the text assignment" in caplog.text) == (arch == "albef_nlvr_mafa")


def test_text_assignment_gives_all_but_the_classifier(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model, assigned = ours(), ours("albef_ta_mafa", seed=5).state_dict()
    model.load_from_pretrained(saved(assigned, tmp_path))
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("cls_head.")}
    assert own.keys() == {name for name in assigned if not name.startswith(("ta_head.", "vision_proj."))}
    assert all(torch.equal(value, assigned[name]) for name, value in own.items())
    assert "has no cls_head, which starts at random" in caplog.text and "fusion layer of pre-training" not in caplog.text


@pytest.mark.parametrize("arch", CLASSES)
def test_of_its_own_checkpoint_every_weight_is_taken(arch, tmp_path):
    state, model = ours(arch, seed=5).state_dict(), ours(arch)
    model.load_checkpoint(saved(state, tmp_path))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_couple_with_other_keys_is_an_error():
    state = {name: value.clone() for name, value in ours().state_dict().items()}
    state["text_encoder.encoder.layer.4.crossattention.self.key.weight"] += 1
    with pytest.raises(UserError, match=r"layer.4.crossattention.self.key.weight is not that of layer 3, .* shares keys"):
        ours().own_weights(state)


def without(state: State, *beginnings: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("arch", "state", "message"),
    [
        ("albef_nlvr_mafa", lambda: without(start(), "text_encoder.bert.encoder.layer.1.output."), "8 missing: .*layer.1.output.dense"),
        ("albef_nlvr_mafa", lambda: without(ours(seed=5).state_dict(), "cls_head.2.bias"), "1 missing: cls_head.2.bias"),
        ("albef_ta_mafa", lambda: without(start(), "vision_proj."), "2 missing: vision_proj.weight, vision_proj.bias"),
        ("albef_ta_mafa", lambda: ours(seed=5).state_dict(), "missing: vision_proj.* left over: cls_head.0.weight"),
    ],
)
def test_what_does_not_fit_is_told_by_its_keys(arch, state, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ours(arch).load_from_pretrained(saved(state(), tmp_path))


OTHERS = ("albef_ve_mafa", "albef_mafa")


def other(arch: str, **changes: Any) -> Any:
    sizes = {name: reduced.SIZES[name] for name in (*PARTS, *(("ecm", "itc", "embed_dim") if arch == "albef_mafa" else ()))}
    return typed_block("model", {"arch": arch, "model_type": "tiny", **sizes, **changes})


@pytest.mark.parametrize(
    ("made", "state", "evaluate", "message"),
    [
        (block, lambda: ours().state_dict(), True, None),
        (block, start, False, None),
        (block, lambda: ours("albef_ta_mafa").state_dict(), False, None),
        (lambda **k: block("albef_ta_mafa", **k), start, False, None),
        (block, start, True, r"has no classifier \(cls_head\): it was not fine-tuned for statements about two images"),
        (block, lambda: ours("albef_ta_mafa").state_dict(), True, r"has no classifier \(cls_head\)"),
        (
            block,
            lambda: {**start(), "cls_head.2.weight": torch.zeros(3, 32)},
            False,
            "tells 3 classes apart, not the 2 of",
        ),
        (block, lambda: reduced.ours(text_encoder={"layers": 4}).state_dict(), False, "a text encoder of 4 layers of width 32, but 3"),
        (lambda **k: block("albef_ta_mafa", **k), lambda: ours().state_dict(), False, "trained for .*text assignment starts from"),
        *(
            (
                partial(other, arch),
                lambda of=of: ours(of).state_dict(),
                False,
                "5 text layers of a model of two images" if arch == "albef_ve_mafa" else "trained for",
            )
            for arch in OTHERS
            for of in CLASSES
        ),
    ],
)
def test_another_kind_is_told_before_weights_are_read(made, state, evaluate, message, tmp_path):
    settings = made(pretrained=saved(state(), tmp_path))
    if message is None:
        return check_kinds(settings, evaluate=evaluate)
    with pytest.raises(UserError, match=message):
        check_kinds(settings, evaluate=evaluate)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image1": None}, "samples has no 'image1'; needed: image0 and image1 and text_input"),
        ({"image1": torch.zeros(3, 3, 32, 32)}, "3 images and 4 texts"),
        ({"label": None}, r"samples\['label'\] is None"),
    ],
)
def test_samples_that_do_not_go_together_are_one_message(more, message):
    with pytest.raises(UserError, match=message):
        ours()({**batch(), **more})


def test_a_text_is_read_with_the_two_images_that_were_drawn(monkeypatch):
    """Text assignment's logits are those of NLVR2's model with the same encoders, on these images."""
    model, assigned = ours("albef_ta_mafa").eval(), Assignment(*torch.tensor([[0, 3, 1, 0], [2, 1, 3, 2], [0, 1, 2, 2]]))
    nlvr = ours().eval()
    nlvr.load_state_dict({**model.state_dict(), **nlvr.cls_head.state_dict(prefix="cls_head.")}, strict=False)
    nlvr.cls_head = model.ta_head
    monkeypatch.setattr("lavis_mafa.models.albef_ta.assign_texts", lambda similarity: assigned)
    image = reduced.batch(4)["image"]
    logits = nlvr.logits({"image0": image[assigned.first], "image1": image[assigned.second], "text_input": reduced.CAPTIONS})
    output = model(reduced.batch(4))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, assigned.label))
    assert output.metrics["ta_accuracy"] == (logits.argmax(dim=1) == assigned.label).float().mean()
    output.loss.backward()
    lacking = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not lacking and not model.vision_proj.weight.requires_grad
