"""ALBEF after pre-training: LAVIS's classes on the same weights, and what a checkpoint of pre-training gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.models.albef_models.albef_classification import AlbefClassification
from lavis.models.med import XBertEncoder
from torch import Tensor

import reduced
import reduced_blip
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import AlbefVeBlock, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_ve import AlbefVeMafa
from lavis_mafa.models.encoders import MINILM, build_tokenizer

TEACHER = {"momentum": 0.9, "alpha": 0.4}
PARTS = ("tokenizer", "max_text_length", "image_encoder", "text_encoder")
LABELS = torch.tensor([0, 2, 1, 2])
State = dict[str, Tensor]


def block(**changes: Any) -> AlbefVeBlock:
    sizes = {name: reduced.SIZES[name] for name in PARTS}
    settings: AlbefVeBlock = typed_block("model", {"arch": "albef_ve_mafa", "model_type": "tiny", **sizes, **changes})
    return settings


def ours(seed: int = 0, **changes: Any) -> AlbefVeMafa:
    torch.manual_seed(seed)
    model = AlbefVeMafa(block(**changes))
    reduced.spread(model)
    model._copy_to_teacher()
    return model


class OfflineClassification(AlbefClassification):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_tokenizer(MINILM)


def lavis(taught: bool = True, seed: int = 1) -> AlbefClassification:
    torch.manual_seed(seed)
    text = XBertEncoder(config=reduced._text_config(), add_pooling_layer=False)
    model = OfflineClassification(reduced._image_encoder(), text, 3, momentum=0.9, use_distill=taught, max_txt_len=30)
    reduced.spread(model)
    if taught:
        model.copy_params()
    return model


def batch(**more: Any) -> dict[str, Any]:
    return reduced.batch(4, label=LABELS, epoch=1, iters=0, num_iters_per_epoch=1, **more)


def saved(state: State, folder: Path) -> str:
    torch.save({"model": state}, folder / "file.pth")
    return str(folder / "file.pth")


@pytest.mark.parametrize("taught", [True, False])
def test_a_step_is_that_of_lavis(taught):
    """Its weights in both directions, logits, loss, gradients, and the teacher after it."""
    mine, theirs = ours(momentum_distillation=TEACHER if taught else None), lavis(taught)
    mine.load_state_dict(theirs.state_dict())
    for parameter, other in zip(mine.cls_head.parameters(), theirs.cls_head.parameters(), strict=True):
        parameter.data.add_(0.1), other.data.add_(0.1)  # else the teacher says what the student does
    output, theirs_output = mine.train()(batch()), theirs.train()(batch())
    torch.testing.assert_close(output.logits, theirs_output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, theirs_output.loss, atol=1e-5, rtol=0)
    output.loss.backward(), theirs_output.loss.backward()
    for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if parameter.requires_grad:  # DDP waits for a gradient of each
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0)
    theirs.load_state_dict(mine.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, mine.state_dict()[name])
    predicted = mine.eval().predict(batch())
    torch.testing.assert_close(predicted["predictions"], theirs.eval().predict(batch())["predictions"], atol=1e-5, rtol=0)
    assert torch.equal(predicted["targets"], LABELS) and not predicted["predictions"].requires_grad


def test_the_teacher_moves_once_a_window_and_in_training_alone():
    model = ours(momentum_distillation=TEACHER)
    model.cls_head_m[0].weight.data.zero_()

    def moves(**now: Any) -> bool:
        before = model.cls_head_m[0].weight.clone()
        model({**batch(), "window": 2, **now})
        return not torch.equal(before, model.cls_head_m[0].weight)

    assert moves(iters=2) and not moves(iters=3)
    model.eval()
    assert not moves(iters=2)
    with torch.no_grad():
        model.predict(batch())


def by_the_authors(state: State) -> State:
    """BERT with token types, as the authors' and LAVIS's released files have it."""
    kinds = torch.randn(2, reduced.WIDTH, generator=torch.Generator().manual_seed(3))
    state = {f"{name}": value.clone() for name, value in state.items()}
    state["text_encoder.bert.embeddings.position_embeddings.weight"] -= kinds[0]
    return {**state, "text_encoder.bert.embeddings.token_type_embeddings.weight": kinds}


STARTS = {
    "ours": lambda: reduced.ours(5, itc={"momentum_distillation": {"queue_size": 8}, "smoothing": 0.0}).state_dict(),
    "LAVIS's": lambda: reduced.lavis_pretrain(5).state_dict(),
    "the authors'": lambda: by_the_authors(reduced.lavis_pretrain(5).state_dict()),
    "fine-tuned for retrieval": lambda: reduced.lavis_retrieval(5).state_dict(),
}


@pytest.mark.parametrize("whose", STARTS)
def test_pre_training_gives_all_but_the_classifier(whose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start = STARTS[whose]()
    model, first = ours(momentum_distillation=TEACHER), ours()
    model.load_from_pretrained(saved(start, tmp_path))
    own = {
        name.replace("text_encoder.bert.", "text_encoder."): value
        for name, value in STARTS[whose.replace("the authors'", "LAVIS's")]().items()
    }
    state = model.state_dict()
    for name, value in first.state_dict().items():
        expected = value if name.startswith("cls_head.") else own[name]
        torch.testing.assert_close(state[name], expected)
        part, _, rest = name.partition(".")
        torch.testing.assert_close(state[f"{part}_m.{rest}"], expected)
    assert [r.message.count("has no cls_head, which starts at random") for r in caplog.records] == [1]


def test_images_may_be_larger_than_in_pre_training(tmp_path):
    larger = {**reduced.SIZES["image_encoder"], "image_size": 48}
    model = ours(image_encoder=larger)
    model.load_from_pretrained(saved(reduced.ours(5).state_dict(), tmp_path))
    assert model.visual_encoder.pos_embed.shape == (1, 1 + 6 * 6, reduced.WIDTH)
    model({**batch(), "image": torch.randn(4, 3, 48, 48)}).loss.backward()


@pytest.mark.parametrize("of", ["ours", "LAVIS's"])
def test_of_a_classifier_every_weight_is_taken(of, tmp_path):
    state = (ours(5, momentum_distillation=TEACHER) if of == "ours" else lavis(seed=5)).state_dict()
    model = ours()
    model.load_checkpoint(saved(state, tmp_path))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if n != "cls_head.2.bias"}, "1 missing: cls_head.2.bias"),
        (lambda s: {n: v for n, v in s.items() if n != "visual_encoder.norm.bias"}, "1 missing: visual_encoder.norm.bias"),
        (lambda s: {**s, "cls_head.4.bias": torch.zeros(3)}, "1 left over: cls_head.4.bias"),
        (lambda s: {**s, "cls_head.2.weight": torch.zeros(2, reduced.WIDTH)}, r"1 other size: cls_head.2.weight \[2, 32\]"),
        (
            lambda s: {n: v for n, v in s.items() if not n.startswith("text_encoder.")},
            "is an image encoder alone, but albef_ve_mafa needs an ALBEF",
        ),
    ],
)
def test_what_does_not_fit_is_told_by_its_keys(changed, message, tmp_path):
    model = ours()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        model.load_from_pretrained(saved(changed(ours(5).state_dict()), tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("state", "evaluate", "message"),
    [
        (lambda: ours().state_dict(), True, None),
        (lambda: reduced.ours().state_dict(), False, None),
        (lambda: reduced.ours().state_dict(), True, r"has no classifier \(cls_head\): it was not fine-tuned"),
        (lambda: {**ours().state_dict(), "cls_head.2.weight": torch.zeros(2, 32)}, False, "tells 2 classes apart, not the 3"),
        (lambda: {**ours().state_dict(), "text_decoder.cls.predictions.bias": torch.zeros(2)}, False, "has a text decoder"),
        (lambda: reduced_blip.ours().state_dict(), False, "is a BLIP checkpoint, but albef_ve_mafa needs an ALBEF checkpoint"),
        (lambda: reduced.ours(text_encoder={"layers": 4}).state_dict(), False, "a text encoder of 4 layers"),
    ],
)
def test_another_kind_is_told_before_weights_are_read(state, evaluate, message, tmp_path):
    settings = block(pretrained=saved(state(), tmp_path))
    if message is None:
        return check_kinds(settings, evaluate=evaluate)
    with pytest.raises(UserError, match=message):
        check_kinds(settings, evaluate=evaluate)


@pytest.mark.parametrize("label", [None, [0, 1, 2, 0], LABELS.float(), LABELS[:3]])
def test_labels_that_are_none_are_one_message(label):
    with pytest.raises(UserError, match=r"samples\['label'\] is .*; needed: a LongTensor \[4\]"):
        ours()({**batch(), "label": label})
