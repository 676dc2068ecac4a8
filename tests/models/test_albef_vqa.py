"""ALBEF answers questions: LAVIS's class on the same weights, a start from pre-training, and answers that are ranked or generated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.models import med
from lavis.models.albef_models.albef_vqa import AlbefVQA
from torch import Tensor, nn

import reduced
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import AlbefVqaBlock, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_vqa import AlbefVqaMafa
from lavis_mafa.models.encoders import MINILM, build_tokenizer
from lavis_mafa.objectives import rank_answers

TEACHER = {"momentum": 0.9, "alpha": 0.4}
PARTS = ("tokenizer", "max_text_length", "image_encoder", "text_encoder")
ANSWERS = ["red", "a small dog", "two", "red", "yes"]
LIST = ["red", "a small dog", "two", "yes", "no", "a cat", "red and white", "in the old house"]
State = dict[str, Tensor]


def block(**changes: Any) -> AlbefVqaBlock:
    sizes = {name: reduced.SIZES[name] for name in PARTS}
    settings: AlbefVqaBlock = typed_block("model", {"arch": "albef_vqa_mafa", "model_type": "tiny", **sizes, **changes})
    return settings


def ours(seed: int = 0, **changes: Any) -> AlbefVqaMafa:
    torch.manual_seed(seed)
    model = AlbefVqaMafa(block(**changes))
    reduced.spread(model)
    model._copy_to_teacher()
    return model


class OfflineVqa(AlbefVQA):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return build_tokenizer(MINILM)


@pytest.fixture
def lavis(monkeypatch) -> OfflineVqa:
    """Its label smoothing, which the authors do not have, set to 0."""
    monkeypatch.setattr(med, "CrossEntropyLoss", lambda reduction, label_smoothing: nn.CrossEntropyLoss(reduction=reduction))
    torch.manual_seed(1)
    config = reduced._text_config()
    config.update({"num_hidden_layers": reduced.LAYERS - reduced.FUSION, "fusion_layer": 0})
    decoder = med.BertLMHeadModel(config)
    decoder.cls.predictions.decoder.weight = decoder.bert.embeddings.word_embeddings.weight  # as from_pretrained ties them
    encoder = med.XBertEncoder(config=reduced._text_config(), add_pooling_layer=False)
    model = OfflineVqa(reduced._image_encoder(), encoder, decoder, momentum=0.9, max_txt_len=30)
    reduced.spread(model)
    model.copy_params()
    return model


def batch(**more: Any) -> dict[str, Any]:
    """Of the first question two answers, of questions that are not of the same length."""
    answers = {"answer": ANSWERS, "weight": torch.tensor([0.7, 0.3, 1.0, 0.5, 1.0]), "n_answers": torch.tensor([2, 1, 1, 1])}
    return reduced.batch(4, **{**answers, "epoch": 0, "iters": 1, "num_iters_per_epoch": 4, **more})


def saved(state: State, folder: Path) -> str:
    torch.save({"model": state}, folder / "file.pth")
    return str(folder / "file.pth")


def test_a_step_is_that_of_lavis(lavis):
    """Its weights in both directions, loss with its ramp, gradients, the teacher after it, and ranked answers."""
    mine = ours(momentum_distillation=TEACHER)
    mine.load_state_dict(lavis.state_dict())
    for model in (mine, lavis):
        model.train()
        for parameter in model.text_decoder.bert.encoder.parameters():
            parameter.data.add_(0.02)  # else the teacher says what the student does
    loss, other_loss = mine(batch()).loss, lavis(batch()).loss
    torch.testing.assert_close(loss, other_loss, atol=1e-5, rtol=1e-6)
    loss.backward(), other_loss.backward()
    others = dict(lavis.named_parameters())
    for name, parameter in mine.named_parameters():
        if parameter.requires_grad:  # DDP waits for a gradient of each
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, others[name].grad, atol=1e-5, rtol=1e-5)
    lavis.load_state_dict(mine.state_dict())
    for name, value in lavis.state_dict().items():
        torch.testing.assert_close(value, mine.state_dict()[name])
    mine.eval(), lavis.eval()
    kept = {name: value.clone() for name, value in mine.state_dict().items()}
    words = [word for word in mine.tokenizer.vocab if word.isalpha()][::50]
    for candidates, answers in ((3, LIST), (100, LIST), (40, words), (100, [f"{word} dog" for word in words[::4]])):
        asked = {"answer_list": answers, "num_ans_candidates": candidates}
        assert mine.predict_answers(batch(), **asked) == lavis.predict_answers(batch(), **asked)
    assert all(torch.equal(value, kept[name]) for name, value in mine.state_dict().items()), "evaluation moves nothing"


def test_without_a_teacher_it_is_a_loop_over_answers():
    """What LAVIS's class cannot do: no distillation (MAFA section F)."""
    model = ours()
    samples = batch()
    question_of = [0, 0, 1, 2, 3]
    total = 0.0
    for answer, weight, question in zip(ANSWERS, samples["weight"], question_of, strict=True):
        total += weight * -log_likelihood(model, samples, question, answer)
    torch.testing.assert_close(model(batch()).loss, total / 4)
    with_one_each = {**batch(), "answer": ANSWERS[:4]}
    del with_one_each["n_answers"], with_one_each["weight"]
    assert model(with_one_each).loss.isfinite()


def log_likelihood(model: AlbefVqaMafa, samples: dict[str, Any], question: int, answer: str) -> Tensor:
    """One question with one answer, nothing padded."""
    alone = {"image": samples["image"][question : question + 1], "text_input": samples["text_input"][question : question + 1]}
    ids, mask = model.answer_words([answer])
    logits, words = model.logits(alone, ids, mask, torch.tensor([0]))
    assert words.tolist() == ids[0, 1:].tolist()
    return logits.log_softmax(dim=1)[range(len(words)), words].sum()


@pytest.fixture(scope="module")
def trained() -> AlbefVqaMafa:
    """Half a fit, so that questions have different answers."""
    model = ours(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(batch()).loss.backward()
        optimizer.step()
    return model.eval()


def test_ranking_all_is_brute_force(trained):
    model = trained
    with torch.no_grad():
        scores = torch.stack([torch.stack([log_likelihood(model, batch(), q, answer) for answer in LIST]) for q in range(4)])
    answers = model.predict_answers(batch(), answer_list=LIST, num_ans_candidates=len(LIST))
    assert answers == [LIST[best] for best in scores.argmax(dim=1)]
    assert len(set(answers)) > 1, "else it tells nothing"


@pytest.mark.parametrize("candidates", [1, 3, 6])
def test_ranking_some_is_a_loop(candidates):
    generator = torch.Generator().manual_seed(candidates)
    first, likelihood = torch.randn(7, 20, generator=generator), torch.randn(7, 6, generator=generator)
    first_words = torch.tensor([3, 7, 1, 19, 0, 4])
    expected = []
    for question in range(7):
        likeliest = sorted(range(6), key=lambda answer: -first[question, first_words[answer]])[:candidates]
        expected.append(max(likeliest, key=lambda answer: likelihood[question, answer]))
    assert rank_answers(first, first_words, candidates, lambda which: likelihood.gather(1, which)).tolist() == expected
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="needed: 1 to 6, the number of answers"):
            rank_answers(first, first_words, wrong, lambda which: which)


def test_generated_words_are_the_likeliest(trained):
    model = trained
    samples = batch()
    answers = model.predict_answers(samples, inference_method="generate", max_len=3, min_len=2)
    states, seen = model.question_states(samples)
    for question in range(4):
        ids = [model.tokenizer.cls_token_id]
        for place in range(3):
            logits = model._next_logits(states[question : question + 1], seen[question : question + 1], torch.tensor([ids]))[0]
            if place < 2:
                logits[model.tokenizer.sep_token_id] = float("-inf")
            ids.append(int(logits.argmax()))
            if ids[-1] == model.tokenizer.sep_token_id:
                break
        assert answers[question] == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(set(answers)) > 1, "else it tells nothing"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"inference_method": "generate", "num_beams": 3}, "num_beams is 3, but albef_vqa_mafa generates without beams"),
        ({"inference_method": "generate", "min_len": 12}, "min_len"),
        ({}, "inference_method is 'rank' and answer_list None; allowed: 'rank' with a list of texts, or 'generate'"),
        ({"answer_list": []}, r"answer_list \[\]"),
    ],
)
def test_what_cannot_be_asked_is_one_message(asked, message):
    with pytest.raises(UserError, match=message):
        ours().predict_answers(batch(), **asked)


@pytest.mark.parametrize(
    "wrong", [{"answer": []}, {"answer": ANSWERS[:3]}, {"n_answers": torch.tensor([5])}, {"weight": torch.ones(2)}]
)
def test_answers_that_do_not_fit_are_one_message(wrong):
    with pytest.raises(UserError, match="needed: n_answers for each question"):
        ours()({**batch(), **wrong})


# --- checkpoints -------------------------------------------------------------------------------------------------------

STARTS = {
    "ours": lambda: reduced.ours(5, itc={"momentum_distillation": {"queue_size": 8}, "smoothing": 0.0}).state_dict(),
    "LAVIS's": lambda: reduced.lavis_pretrain(5).state_dict(),
}


@pytest.mark.parametrize("whose", STARTS)
def test_the_decoder_starts_as_the_fusion_layers(whose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start = STARTS[whose]()
    kinds = torch.randn(2, reduced.WIDTH, generator=torch.Generator().manual_seed(3))  # as the authors' BERT has them
    place = "text_encoder.bert.embeddings.position_embeddings.weight"
    file = {**start, place: start[place] - kinds[0], place.replace("position", "token_type"): kinds}
    model = ours(momentum_distillation=TEACHER)
    model.load_from_pretrained(saved(file, tmp_path))
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        theirs = f"{part.removesuffix('_m')}.{rest}"
        if theirs.startswith("text_encoder."):
            theirs = theirs.replace("text_encoder.", "text_encoder.bert.", 1)
        if theirs.startswith("text_decoder."):
            theirs = theirs.replace("text_decoder.", "text_encoder.", 1)
            for number in range(reduced.LAYERS - reduced.FUSION)[::-1]:
                theirs = theirs.replace(f".layer.{number}.", f".layer.{number + reduced.FUSION}.")
        torch.testing.assert_close(value, start[theirs], msg=name)
    assert [r.message.count("text_decoder starts as the fusion layers") for r in caplog.records] == [1]


@pytest.mark.parametrize("of", ["ours", "LAVIS's"])
def test_of_an_answering_model_every_weight_is_taken(of, lavis, tmp_path):
    state = ours(5, momentum_distillation=TEACHER).state_dict() if of == "ours" else lavis.state_dict()
    model = ours()
    model.load_checkpoint(saved(state, tmp_path))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if of == "ours":
        lavis.load_checkpoint(saved(state, tmp_path))
        assert all(torch.equal(value, state[name]) for name, value in lavis.state_dict().items())


@pytest.mark.parametrize(
    ("state", "evaluate", "message"),
    [
        (lambda: ours().state_dict(), True, None),
        (lambda: reduced.ours().state_dict(), False, None),
        (lambda: reduced.ours().state_dict(), True, "has no text decoder: it was not fine-tuned to answer questions"),
        (lambda: reduced.lavis_retrieval().state_dict(), False, r"has no MLM head \(text_encoder.cls\), which answers start with"),
        (lambda: {**ours().state_dict(), "cls_head.0.weight": torch.zeros(2)}, False, r"has a classifier \(cls_head\)"),
        (lambda: reduced.ours(text_encoder={"layers": 4}).state_dict(), False, "a text encoder of 4 layers"),
        (lambda: reduced.ours(image_encoder={"width": 16}).state_dict(), False, "texts of width 32 and images of width 16"),
    ],
)
def test_another_kind_is_told_before_weights_are_read(state, evaluate, message, tmp_path):
    file = state()
    width = file["visual_encoder.patch_embed.proj.weight"].shape[0]
    settings = block(pretrained=saved(file, tmp_path), image_encoder={**reduced.SIZES["image_encoder"], "width": width})
    if message is None:
        return check_kinds(settings, evaluate=evaluate)
    with pytest.raises(UserError, match=message):
        check_kinds(settings, evaluate=evaluate)


def test_half_a_decoder_is_told_by_its_keys(tmp_path):
    state = {name: value for name, value in ours(5).state_dict().items() if name != "text_decoder.cls.predictions.transform.dense.bias"}
    with pytest.raises(UserError, match="1 missing: text_decoder.cls.predictions.transform.dense.bias"):
        ours().load_from_pretrained(saved(state, tmp_path))
