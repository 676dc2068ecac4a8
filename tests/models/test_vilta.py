"""ViLTA: what the language teacher says, and what the losses make of it, against plain loops and transformers' BERT."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import families
import oracles
from lavis_mafa.config.check import check_combinations
from lavis_mafa.errors import UserError
from lavis_mafa.models import albef as albef_pairs
from lavis_mafa.models.encoders import build_tokenizer
from lavis_mafa.models.language_teacher import build_language_teacher

VOCABULARY = families.REDUCED["blip2"].VOCABULARY
FAMILY = ("albef", False)
CAPTIONS = ["a red dog", "two birds on the roof of an old house near the sea", "a blue car in the rain", "the small cat sleeps"]


@cache
def hub_bert() -> BertForMaskedLM:
    torch.manual_seed(7)
    words = len(Path(VOCABULARY).read_text().splitlines())
    sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=words, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    hub_bert().save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "vocab.txt").write_text(Path(VOCABULARY).read_text())
    return tmp_path / "teacher"


def teacher_of(folder: Path) -> Any:
    return build_language_teacher(str(folder), build_tokenizer(VOCABULARY))


def build(folder: Path | None, con_d: Any = None, **changes: Any) -> Any:
    """Without a folder: no teacher."""
    block = {} if folder is None else {"language_teacher": {"init": str(folder)}}
    model = families.build(FAMILY, con_d, tokenizer=VOCABULARY, **block, **changes)
    model.set_language_teacher(None if folder is None else teacher_of(folder))
    return model


def batch(**more: Any) -> dict[str, Any]:
    return families.batch(FAMILY, text_input=CAPTIONS, **more)


@torch.no_grad()
def hub_logits(ids: list[int]) -> torch.Tensor:
    """One text without padding -> [T, words]."""
    return hub_bert()(torch.tensor([ids])).logits[0]


# --- the teacher -------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_bert_of_its_folder(folder):
    model, teacher = build(folder), teacher_of(folder)
    ids, mask = model.words(CAPTIONS)
    states = teacher.states(ids, mask, model.reading(mask))
    for row, length, own in zip(ids, mask.sum(dim=1).tolist(), states, strict=True):
        torch.testing.assert_close(teacher.predict(own[:length]), hub_logits(row[:length].tolist()), atol=1e-4, rtol=1e-4)
        assert not own[length:].any()


def test_the_teacher_is_no_part_of_the_model(folder):
    model, plain = build(folder, mlm={"cross_distillation": 0.5}), build(None)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.modules())) == len(list(plain.modules()))
    families.step(model, batch())
    assert all(p.grad is None and not p.requires_grad for p in model.language_teacher.network.parameters())
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    teacher_of(folder)
    assert torch.equal(torch.rand(1), before)  # training draws the same with and without


def test_words_that_differ_and_a_bert_without_a_head_are_refused(folder):
    words = Path(VOCABULARY).read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:7], "bats", *words[8:]]) + "\n")
    with pytest.raises(UserError, match=f"'bats' as word 7, not '{words[7]}' as model.tokenizer"):
        teacher_of(folder)
    (folder / "vocab.txt").write_text("\n".join(words[:-1]) + "\n")
    with pytest.raises(UserError, match=f"has {len(words) - 1} words, not {len(words)}"):
        teacher_of(folder)
    (folder / "vocab.txt").write_text(Path(VOCABULARY).read_text())
    hub_bert().bert.save_pretrained(folder)
    with pytest.raises(UserError, match=r"lacks .* of its weights.*cls\."):
        teacher_of(folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"model.language_teacher.init is .*no vocab.txt"):
        teacher_of(folder)


# --- cross-distillation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "temperature"), [(0.5, 1.0), (1.0, 2.0)])
def test_cross_distillation_equals_the_loops(folder, share, temperature, monkeypatch):
    """Of own pairs, and of a text that is read with another image: labels are where the masks are, the teacher saw none."""
    model = build(folder, mlm={"cross_distillation": share, "temperature": temperature}).eval()
    seen = []
    loss_of = albef_pairs.masked_lm_loss
    monkeypatch.setattr(albef_pairs, "masked_lm_loss", lambda *given: seen.append(given) or loss_of(*given))
    masks_of, labels_of = albef_pairs.mask_tokens, []
    monkeypatch.setattr(albef_pairs, "mask_tokens", lambda *given: labels_of.append(masks_of(*given)) or labels_of[-1])
    pairs = model.encode(model.inputs(batch())).pairs
    image, text = [0, 1, 2, 3, 0], [0, 1, 2, 3, 2]
    loss = pairs.lm_loss(torch.tensor(image), torch.tensor(text))
    (logits, labels, *_), labels_at = seen[0], labels_of[0][1].tolist()

    expected, right, place = [], [], 0
    for number in text:
        ids = model.tokenizer(CAPTIONS[number]).input_ids
        for word in hub_logits(ids):
            if labels_at[place] >= 0:
                soft = oracles.softmax([value / temperature for value in word.tolist()])
                expected.append(soft)
                right.append(int(word.argmax()) == labels_at[place])
            place += 1
    assert place == len(labels_at) and len(expected) == len(labels) > 8
    wanted = 0.0
    for row, label, soft in zip(logits.tolist(), labels.tolist(), expected, strict=True):
        log_p = [math.log(p) for p in oracles.softmax(row)]
        wanted -= ((1 - share) * log_p[label] + share * sum(q * p for q, p in zip(soft, log_p, strict=True))) / len(labels)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert pairs.metrics["teacher_top1"].item() == pytest.approx(sum(right) / len(right))


def test_it_changes_masked_language_modelling_alone(folder):
    """Bit for bit; where it is off, nobody asks the teacher."""
    outputs = {share: families.step(build(folder, mlm={"cross_distillation": share}), batch())[0] for share in (0.0, 0.5)}
    plain = families.step(build(None), batch())[0]
    assert torch.equal(outputs[0.0].loss, plain.loss) and "teacher_top1" not in outputs[0.0].metrics
    assert torch.equal(outputs[0.5].loss_itc, plain.loss_itc) and torch.equal(outputs[0.5].loss_itm, plain.loss_itm)
    assert abs(outputs[0.5].loss_mlm - plain.loss_mlm) > 1e-3 and 0 <= outputs[0.5].stats["teacher_top1"] <= 1


def test_training_without_the_teacher_that_is_set_is_refused(folder):
    model = build(folder, mlm={"cross_distillation": 0.5})
    model.set_language_teacher(None)
    with pytest.raises(UserError, match="set_language_teacher"):
        model(batch())


TEACHER = {"init": "bert-base-uncased"}
MOMENTUM = {"momentum_distillation": {"queue_size": 8}}
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"mlm": {"cross_distillation": 0.5}}, "but there is no model.language_teacher"),
    ({"mlm": {"cross_distillation": 0.5, "weight": 0}, "language_teacher": TEACHER}, "masked language modelling is off"),
    ({"mlm": {"cross_distillation": 0.5}, "language_teacher": TEACHER, "itc": MOMENTUM}, "one prediction has one teacher"),
    ({"language_teacher": TEACHER}, "it would teach nothing"),
    ({"mlm": {"temperature": 2.0}}, "cross_distillation's alone"),
]


@pytest.mark.parametrize(("changes", "message"), COMBINATIONS, ids=[message for _, message in COMBINATIONS])
def test_what_does_not_go_together_is_one_message(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_combinations(families.REDUCED["albef"].block(**changes), None)
    assert len(error.value.messages) == 1
