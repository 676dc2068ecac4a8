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
from lavis_mafa.config import check
from lavis_mafa.config.check import check_combinations, check_lavis, examine
from lavis_mafa.errors import UserError
from lavis_mafa.models import albef as albef_pairs
from lavis_mafa.models import synthetic_texts
from lavis_mafa.models.encoders import build_blip_tokenizer, build_tokenizer, tokenize
from lavis_mafa.models.language_teacher import build_language_teacher
from lavis_mafa.models.synthetic_texts import ReplaceableWords
from lavis_mafa.objectives.synthetic_negatives import draw, replacements

VOCABULARY = families.REDUCED["blip2"].VOCABULARY
every_host = pytest.mark.parametrize("host", families.REDUCED)
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


def build(folder: Path | None, con_d: Any = None, host: str = "albef", **changes: Any) -> Any:
    """Without a folder: no teacher."""
    block = {} if folder is None else {"language_teacher": {"init": str(folder)}}
    model = families.build((host, False), con_d, tokenizer=VOCABULARY, **block, **changes)
    model.set_language_teacher(None if folder is None else teacher_of(folder))
    return model


def batch(host: str = "albef", **more: Any) -> dict[str, Any]:
    return {**families.batch((host, False)), "text_input": CAPTIONS, **more}


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


def test_words_that_a_host_has_added_are_unknown_to_the_teacher_and_never_replaced(folder):
    tokenizer = build_blip_tokenizer(VOCABULARY)
    teacher = build_language_teacher(str(folder), tokenizer)  # its words are the first ones
    ids, _ = tokenize(tokenizer, ["a [DEC] dog [ENC]"], 30)
    added = ids >= tokenizer.vocab_size
    assert added.sum() == 2
    reading = build(None, host="blip").reading(ids >= 0)
    plain = ids.masked_fill(added, tokenizer.unk_token_id)
    assert torch.equal(teacher.read(ids, reading), teacher.read(plain, reading))
    words = ReplaceableWords(tokenizer, 5)
    assert not words.content[tokenizer.vocab_size :].any() and len(words.content) == tokenizer.vocab_size + 2
    tokenizer.add_tokens(["puppy"])  # a word like any other, which the teacher has no number for
    assert not ReplaceableWords(tokenizer, 5).content[tokenizer.vocab_size :].any()


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


# --- synthetic negatives -----------------------------------------------------------------------------------------------


def test_replacements_equal_the_loop():
    """p_m / q of the top k words by p_m, without the word itself and what may not be drawn."""
    generator = torch.Generator().manual_seed(3)
    masked, whole = 3 * torch.randn(2, 5, 30, generator=generator)
    allowed = torch.rand(30, generator=generator) < 0.6
    original = torch.randint(30, (5,), generator=generator)
    words, probability = replacements(masked, whole, original, allowed, 7)
    for b in range(5):
        p_m, q = (oracles.softmax(row[b].tolist()) for row in (masked, whole))
        open_to = [w for w in range(30) if allowed[w] and w != original[b]]
        best = sorted(open_to, key=lambda w: -p_m[w])[:7]
        total = sum(p_m[w] / q[w] for w in best)
        found = dict(zip(words[b].tolist(), probability[b].tolist(), strict=True))
        assert found == pytest.approx({w: p_m[w] / q[w] / total for w in best}, rel=1e-4)


def test_words_are_drawn_as_often_as_they_are_probable():
    torch.manual_seed(0)
    probability = torch.tensor([0.6, 0.3, 0.1, 0.0]).expand(10_000, 4)
    drawn = draw(torch.tensor([7, 2, 5, 9]).expand(10_000, 4), probability)
    shares = [float((drawn == word).float().mean()) for word in (7, 2, 5, 9)]
    assert shares == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.02) and shares[3] == 0
    draw(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), float("nan")))


def test_any_whole_content_word_may_be_replaced_and_nothing_else():
    tokenizer = build_tokenizer(VOCABULARY)
    captions = ["a red dog on the roof", "dogs walking home at night", "the man and the woman", "an on the", "sleeps"]
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    choices, chosen = ReplaceableWords(tokenizer, 5), [set() for _ in captions]
    for _ in range(200):
        for places, place in zip(chosen, choices.choose(ids).tolist(), strict=True):
            places.add(place)
    for caption, places in zip(captions, chosen, strict=True):
        wanted, place = set(), 1  # after [CLS]
        for word in caption.split():
            pieces = tokenizer.tokenize(word)
            if len(pieces) == 1 and pieces != ["[UNK]"] and word not in ("a", "an", "on", "the", "at", "and"):
                wanted.add(place)
            place += len(pieces)
        assert places == (wanted or {-1}), caption


SYNTHETIC = {"top_k": 5}


def watched(model, monkeypatch) -> dict[str, Any]:
    """What the model draws from, and the words that come of it."""
    seen: dict[str, Any] = {}

    def watch(*given):
        seen["given"] = given
        seen["found"] = replacements(*given)
        return seen["found"]

    monkeypatch.setattr(synthetic_texts, "replacements", watch)
    replace = model.replaceable.replace
    model.replaceable.replace = lambda *given: seen.setdefault("made", replace(*given))
    return seen


def decoded(model, ids) -> list[str]:
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


MADE = [("albef", "add", 0.0), ("albef", "replace", 0.5), ("blip", "add", 0.0), ("blip2", "replace", 0.0)]


@pytest.mark.parametrize(("host", "mode", "share"), MADE)
def test_synthetic_texts_differ_in_one_word_that_the_teacher_finds_fitting(folder, host, mode, share, monkeypatch):
    distilled = {"mlm": {"cross_distillation": share}} if share else {}
    model = build(folder, host=host, itm={"synthetic": {**SYNTHETIC, "mode": mode}}, **distilled)
    seen = watched(model, monkeypatch)
    with torch.no_grad():
        pairs, encoded, _ = model.encode(model.inputs(batch(host)))
    made, _ = seen["made"]
    ids, mask = tokenize(model.tokenizer, CAPTIONS, 30)
    masked, whole, original, allowed, top_k = seen["given"]
    assert torch.equal(allowed, model.replaceable.content[: model.tokenizer.vocab_size]) and top_k == 5
    for b, length in enumerate(mask.sum(dim=1).tolist()):
        own, new = ids[b, :length].tolist(), made[b, :length].tolist()
        [place] = [t for t in range(length) if own[t] != new[t]]
        assert torch.equal(made[b, length:], ids[b, length:])
        assert original[b] == own[place] and allowed[own[place]] and allowed[new[place]] and new[place] in seen["found"][0][b]
        torch.testing.assert_close(whole[b], hub_logits(own)[place], atol=1e-4, rtol=1e-4)
        own[place] = model.tokenizer.mask_token_id
        torch.testing.assert_close(masked[b], hub_logits(own)[place], atol=1e-4, rtol=1e-4)
    extra = encoded.extra
    assert extra.image_index.tolist() == [0, 1, 2, 3] and extra.text_index.tolist() == [4, 5, 6, 7] and encoded.candidates == 4
    assert extra.label.tolist() == [0] * 4 and extra.weight.tolist() == [1.0] * 4 and extra.in_place == (mode == "replace")
    # and matching reads them as any other text
    with torch.no_grad():
        found = pairs.itm_logits(extra.image_index, extra.text_index)
        model.settings.itm.synthetic = None
        others = model.encode(model.inputs(batch(host, text_input=decoded(model, made)))).pairs
        wanted = others.itm_logits(torch.arange(4), torch.arange(4))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@every_host
def test_matching_alone_sees_them(folder, host, monkeypatch):
    """Bit for bit; and its loss is the mean over its 3B pairs and these, read one by one."""
    plain = families.step(build(None, host=host), batch(host))[0]
    model = build(folder, host=host, itm={"synthetic": SYNTHETIC})
    seen = watched(model, monkeypatch)
    output, gradients = families.step(model, batch(host))
    assert torch.equal(output.loss_itc, plain.loss_itc) and output.stats["synthetic_share"] == 1
    assert torch.equal(output.image_features, plain.image_features) and torch.equal(output.text_features, plain.text_features)
    assert host == "albef" or torch.equal(output.loss_lm, plain.loss_lm)  # where which words are masked is drawn after them
    assert output.verdicts.keys() == plain.verdicts.keys()
    assert all(torch.equal(output.verdicts[name], value) for name, value in plain.verdicts.items())
    assert output.metrics.keys() >= {"itm_accuracy_extra_negative", "itm_accuracy_negative"}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    total, one = 12 * plain.loss_itm.item(), torch.tensor([0])
    for b, text in enumerate(decoded(model, seen["made"][0])):
        with torch.no_grad():
            image, texts = model.image_rows(batch(host)["image"][b : b + 1])[0], model.text_rows([text])[0]
            total -= math.log(oracles.softmax(model.match_rows(image, texts, one, one)[0].tolist())[0])
    assert output.loss_itm.item() == pytest.approx(total / 16, rel=1e-4) and abs(output.loss_itm - plain.loss_itm) > 1e-4


@pytest.mark.parametrize("host", ["blip", "blip2"])
def test_those_switched_off_change_nothing(folder, host):
    """A teacher that is not asked, and none: bit for bit, gradients too."""
    outputs = [families.step(build(where, families.Always(0.6), host), batch(host)) for where in (folder, None)]
    (one, of_one), (other, of_other) = outputs
    assert one.stats == other.stats and of_one.keys() == of_other.keys()
    assert all(torch.equal(gradient, of_other[name]) for name, gradient in of_one.items())


class Judge(families.Always):
    """Says of texts beyond the batch what it is told to."""

    def match_probability(self, samples, image_index, text_index):
        self.texts = samples.get("more_texts")
        return torch.where(text_index >= 4, self.probability, 0.0)


JUDGED = [("albef", 0.9, True), ("albef", 0.6, True), ("albef", 0.1, False), ("blip", 0.9, True), ("blip2", 0.9, True)]


@pytest.mark.parametrize(("host", "probability", "dropped"), JUDGED)
def test_what_con_d_takes_for_true_is_no_negative(folder, host, probability, dropped, monkeypatch):
    con_d = Judge(probability)
    outputs = {}
    for judge in (True, False):
        model = build(folder, con_d, host, itm={"synthetic": {**SYNTHETIC, "judge": judge}})
        model.con_d_check, seen = None, watched(model, monkeypatch)
        outputs[judge] = families.step(model, batch(host))[0]
        assert con_d.texts == (decoded(model, seen["made"][0]) if judge else None)
    assert outputs[True].stats["extra_judged_true_share"] == dropped and "extra_judged_true_share" not in outputs[False].stats
    plain = families.step(build(None, host=host), batch(host))[0].loss_itm
    torch.testing.assert_close(outputs[True].loss_itm, plain if dropped else outputs[False].loss_itm)


def test_con_d_is_not_asked_in_steps_between(folder):
    con_d = Judge(0.9)
    model = build(folder, con_d, itm={"synthetic": SYNTHETIC}, ecm={"every": 2})
    con_d.texts = None
    output = families.step(model, batch(epoch=0, iters=1, num_iters_per_epoch=4))[0]
    assert con_d.texts is None and "extra_judged_true_share" not in output.stats


@pytest.mark.parametrize(("host", "mode"), [("albef", "add"), ("albef", "replace"), ("blip", "replace"), ("blip2", "add")])
def test_texts_without_a_word_to_replace_have_no_synthetic_one(folder, host, mode):
    texts = ["the on a", "an and the", "a", "the"]
    model, plain = build(folder, host=host, itm={"synthetic": {**SYNTHETIC, "mode": mode}}), build(None, host=host)
    output, wanted = (families.step(m, batch(host, text_input=texts))[0] for m in (model, plain))
    assert output.stats["synthetic_share"] == 0
    torch.testing.assert_close(output.loss_itm, wanted.loss_itm)


def test_the_model_itself_may_say_which_words_fit(monkeypatch):
    """As its masked language modelling does for an image whose every token is zero."""
    model = build(None, itm={"synthetic": {**SYNTHETIC, "generator": "model"}})
    seen = watched(model, monkeypatch)
    with torch.no_grad():
        pairs = model.encode(model.inputs(batch())).pairs
        pairs.image_embeds = torch.zeros_like(pairs.image_embeds[:1])
        ids, mask = model.words(CAPTIONS)
        images, reading = pairs.reading(torch.zeros(4, dtype=torch.long), torch.arange(4))
        logits = model.predict(model.text_encoder, reading.take(ids), reading, images, reading.tokens_at(torch.arange(int(mask.sum()))))
    place = (seen["made"][0] != ids).int().argmax(dim=1)
    start = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1)
    torch.testing.assert_close(seen["given"][1], logits[start + place], atol=1e-4, rtol=1e-4)


def test_more_words_than_there_are_cannot_come_into_question():
    with pytest.raises(UserError, match="model.itm.synthetic.top_k is 500, but model.tokenizer has .* words"):
        build(None, itm={"synthetic": {"top_k": 500}})


TEACHER = {"init": "bert-base-uncased"}
MOMENTUM = {"momentum_distillation": {"queue_size": 8}}
COMBINATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("albef", {"mlm": {"cross_distillation": 0.5}}, "but there is no model.language_teacher"),
    ("albef", {"mlm": {"cross_distillation": 0.5, "weight": 0}, "language_teacher": TEACHER}, "masked language modelling is off"),
    ("albef", {"mlm": {"cross_distillation": 0.5}, "language_teacher": TEACHER, "itc": MOMENTUM}, "one prediction has one teacher"),
    ("albef", {"language_teacher": TEACHER}, "cross_distillation is 0 and nothing else asks it"),
    ("blip", {"language_teacher": TEACHER}, "nothing asks it; set model.itm.synthetic"),
    ("albef", {"itm": {"synthetic": {}}}, "synthetic.generator is teacher, but there is no model.language_teacher"),
    ("blip2", {"itm": {"synthetic": {}}}, "give {init: bert-base-uncased}"),
    ("albef", {"itm": {"synthetic": {}, "weight": 0}, "language_teacher": TEACHER}, "whose negatives they are, is off"),
    ("albef", {"itm": {"synthetic": {"generator": "model"}}, "mlm": {"weight": 0}}, "nothing trains the head that it asks"),
    ("blip", {"itm": {"synthetic": {"generator": "model"}}}, "blip_mafa predicts no masked words.*allowed here: teacher"),
    ("blip2", {"itm": {"synthetic": {"generator": "model"}}}, "blip2_mafa predicts no masked words"),
    ("albef", {"mlm": {"temperature": 2.0}}, "cross_distillation's alone"),
    ("blip", {"mlm": {"cross_distillation": 0.5}}, "model.mlm is not a setting"),
    ("blip2", {"itc": {"intra_modal": ["global"]}}, "model.itc.intra_modal is not a setting"),
]


@pytest.mark.parametrize(("host", "changes", "message"), COMBINATIONS, ids=[f"{host}: {why}" for host, _, why in COMBINATIONS])
def test_what_does_not_go_together_is_one_message(host, changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_combinations(families.REDUCED[host].block(**changes), None)
    assert len(error.value.messages) == 1


# --- everything at once, and nothing of it in evaluation ---------------------------------------------------------------

ALL_ON: dict[str, dict[str, Any]] = {
    "albef": {
        "itc": {"momentum_distillation": {"queue_size": 8, "mlm": False}, "intra_modal": ["global", "local"]},
        "mlm": {"cross_distillation": 0.5, "temperature": 2.0, "mask_everywhere": True},
        "itm": {"soft_mask": {}},
    },
    "blip": {"itc": {"momentum_distillation": {"queue_size": 8}}, "itm": {"soft_mask": {}}},
    "blip2": {},
}


@every_host
def test_all_methods_that_a_host_takes_go_together(folder, host):
    changes = dict(ALL_ON[host])
    itc = {"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2, "focal": 2.0, **changes.pop("itc", {})}
    itm = {"synthetic": {**SYNTHETIC, "judge": False}, "negatives": "sampled", **changes.pop("itm", {})}
    model = build(folder, families.Always(0.9), host, itc=itc, itm=itm, discriminator={"arch": "ground_truth"}, **changes)
    check_combinations(model.settings, None)
    samples = batch(host, epoch=1)
    output, gradients = families.step(model, samples | {"image_second_view": samples["image"].flip(3)})
    losses = [value for name, value in output.items() if name.startswith("loss")]
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses) and output.stats["new_positive_share"] > 0
    told = {"itm_accuracy_extra_negative": True, "itm_accuracy_extra_positive": host != "blip2"}
    assert {name: math.isfinite(output.stats[name]) for name in told} == told
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["mafa/albef/train/vilta.yaml", "mafa/blip/train/pretrain.yaml", "mafa/blip2/train/stage_1.yaml"])
def test_evaluation_needs_no_teacher(name):
    options = ["model.language_teacher.init=./gone", "model.itm.synthetic.top_k=5", "model.pretrained=x.pth"]
    _, found = examine(name, options)
    assert any("model.language_teacher.init is './gone'" in message for message in found.messages)
    checked, found = examine(name, [*options, "run.evaluate=true"])
    assert not any("teacher" in message or "ecm" in message for message in found.messages)
    assert checked.model.language_teacher is None and checked.model.itm.synthetic is None and not checked.model.ecm.enabled


def test_evaluation_by_laviss_own_script_needs_none_either(monkeypatch):
    """Which comes with a configuration of its own, that nobody has examined."""
    checked, _ = examine("mafa/albef/train/vilta.yaml", ["model.pretrained=x.pth"], files=False)
    checked.config.run.evaluate = True
    monkeypatch.setattr(check, "check_kinds", lambda *_, **__: None)  # which would read x.pth
    model = check_lavis(checked.config).model
    assert model.language_teacher is None and model.itm.synthetic is None and model.mlm.cross_distillation == 0
