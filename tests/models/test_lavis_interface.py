"""What LAVIS's users call on a model: features, losses without a Con-D, a single text, captions by the number."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_feature_extractor import AlbefFeatureExtractor
from lavis.models.blip_models.blip_feature_extractor import BlipFeatureExtractor

import families
import reduced_opt as OPT
from lavis_mafa.errors import UserError

ALBEF, BLIP, BLIP2 = (families.REDUCED[name] for name in ("albef", "blip", "blip2"))
MODELS = {"albef": ALBEF, "blip": BLIP, "blip2": BLIP2, "opt": OPT}
MODES = ["image", "text", "multimodal"]


def batch(family: str, count: int = 3) -> dict[str, Any]:
    return (BLIP2 if family == "opt" else MODELS[family]).batch(count)


# --- features --------------------------------------------------------------------------------------------------------------


class OfflineAlbef(AlbefFeatureExtractor):
    @classmethod
    def init_tokenizer(cls) -> Any:
        return ALBEF.build_tokenizer(ALBEF.MINILM)


class OfflineBlip(BLIP.Offline, BlipFeatureExtractor):
    pass


def extractor(family: str) -> Any:
    """LAVIS's, and ours with its weights."""
    torch.manual_seed(1)
    if family == "albef":
        theirs = OfflineAlbef(ALBEF._image_encoder(), ALBEF.BertForMaskedLM(ALBEF._text_config()), embed_dim=ALBEF.DIM)
    else:
        theirs = OfflineBlip(ALBEF._image_encoder(), BLIP._encoder(), embed_dim=ALBEF.DIM)
    ALBEF.spread(theirs)
    mine = MODELS[family].ours(7)
    state = {name: value for name, value in theirs.state_dict().items() if name in mine.state_dict()}
    assert len(state) > 50
    mine.load_state_dict(state, strict=False)
    return theirs.eval(), mine


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_features_are_those_of_lavis_extractors(family):
    theirs, mine = extractor(family)
    samples = batch(family)
    long = {**samples, "text_input": [f"{text} and a dog by the sea" * 6 for text in samples["text_input"]]}  # LAVIS cuts none
    for mode in MODES:
        for given in (samples, long):
            wanted, found = theirs.extract_features(given, mode), mine.extract_features(given, mode)
            assert type(found) is type(wanted) and found.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
                assert not found[name].requires_grad
    if family == "albef":  # LAVIS's BLIP takes one
        wanted, found = (model.extract_features(samples, ["image", "text"]) for model in (theirs, mine))
        assert found.keys() == wanted.keys() and torch.equal(found.text_embeds_proj, mine.extract_features(samples, "text")[1])


def test_what_lavis_asks_of_blip_2_is_what_its_own_answers():
    mine, samples = BLIP2.ours(), batch("blip2")
    theirs = BLIP2.in_lavis(mine)
    for mode in MODES:
        wanted, found = theirs.extract_features(samples, mode), mine.extract_features(samples, mode)
        assert found.keys() == wanted.keys() and len(found)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    text = mine.tokenizer(samples["text_input"], padding=True, return_tensors="pt")
    with torch.no_grad():
        (states, images), (wanted, _) = mine.forward_image(samples["image"]), theirs.forward_image(samples["image"])
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.forward_text(text), theirs.forward_text(text), atol=1e-5, rtol=1e-4)
        scores = (model.compute_itm(images, text.input_ids, text.attention_mask) for model in (mine, theirs))
        torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["albef", "blip", "blip2"])
def test_one_text_is_a_list_of_one(family):
    model, samples = MODELS[family].ours(), batch(family, 1)
    alone = {**samples, "text_input": samples["text_input"][0]}
    for mode in MODES:
        wanted = model.extract_features(samples, mode)
        assert all(torch.equal(value, wanted[name]) for name, value in model.extract_features(alone, mode).items())
    torch.manual_seed(0)
    wanted = model(samples).loss
    torch.manual_seed(0)
    assert torch.equal(model(alone).loss, wanted)
    text = {"text_input": samples["text_input"]}
    assert model.extract_features(text, "text") is not None and model.extract_features({"image": samples["image"]}, "image") is not None
    for mode in ("both", None, []):
        with pytest.raises(UserError, match=rf"mode is {re.escape(repr(mode))}; allowed: image, text, multimodal"):
            model.extract_features(samples, mode)
    with pytest.raises(UserError, match="samples has no 'image'"):
        model.extract_features(text)


@pytest.mark.parametrize("family", MODELS)
def test_samples_that_do_not_go_together_are_one_message(family):
    model, samples = MODELS[family].ours(), batch(family)
    size = samples["image"].shape[-1]
    for change, message in (
        ({"text_input": samples["text_input"][:2]}, "3 images and 2 texts"),
        ({"text_input": "one text"}, "3 images and 1 texts"),
        ({"text_input": ["a", 3, "b"]}, "holds 3; needed: a list of texts"),
        ({"text_input": ["a", None, "b"]}, "holds None; needed: a list of texts"),
        ({"text_input": None}, "no 'text_input'"),
        ({"image_key": [1, 2, 3]}, r"samples\['image_key'\] is \[1, 2, 3\]; needed: a LongTensor \[3\]"),
        ({"index": torch.arange(2)}, r"samples\['index'\] is tensor\(\[0, 1\]\); needed: a LongTensor \[3\]"),
        ({"image": samples["image"][:0], "text_input": []}, "has no image"),
        ({"image": samples["image"].byte()}, "is torch.uint8; needed: torch.float32"),
        ({"image": samples["image"][0]}, rf"\[3, {size}, {size}\]; needed: .*give one image as image.unsqueeze"),
        ({"image": samples["image"][..., :4]}, rf"\[3, 3, {size}, 4\]; needed: a tensor \[B, 3, {size}, {size}\]"),
        ({"image": "dog.jpg"}, "is str; needed: a tensor"),
    ):
        calls = [model]
        if family == "opt":
            calls += [model.predict_answers, *([model.generate] if "image" in change else [])]
        for call in calls:
            with pytest.raises(UserError, match=message):
                call({**samples, **change})


# --- losses without a Con-D ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES, ids=families.NAMES)
def test_evaluation_losses_need_no_con_d(family):
    """They are the plain labels' losses; training says what to pass."""
    model, plain = families.build(family), families.build(family)
    model.settings.ecm.enabled = True
    samples = families.batch(family)
    with pytest.raises(UserError, match=r"set_discriminator.*model.discriminator.*ecm.enabled: false"):
        model(samples)
    found = []
    for one in (model, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(one.eval()(samples))
    for name in ("loss", "loss_itc", "loss_itm"):
        assert torch.isfinite(found[0][name]) and torch.equal(found[0][name], found[1][name])


def test_a_con_d_is_asked_in_evaluation_too():
    model = families.build(("albef", False), families.Always(0.9)).eval()
    assert model(families.batch(("albef", False))).verdicts["positive"].all()


# --- captions ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["blip2", "opt"])
def test_captions_by_the_number(family):
    model, samples = MODELS[family].ours(), batch(family, 2)
    one = model.generate(samples, num_beams=3, max_length=8, min_length=1)
    three = model.generate(samples, num_beams=3, max_length=8, min_length=1, num_captions=3, length_penalty=1.0, temperature=1.0)
    assert len(one) == 2 and len(three) == 6
    assert three[::3] == one, "the first of an image is its best"
    assert len(model.generate(samples, use_nucleus_sampling=True, max_length=8, min_length=1, num_captions=4, top_p=0.8)) == 8
    for settings, message in (
        ({"num_captions": 4}, "num_captions is 4, but num_beams is 3"),
        ({"num_captions": 0}, "num_captions is 0; allowed: 1 or more"),
        ({"num_captions": 0, "use_nucleus_sampling": True}, "num_captions is 0"),
        ({"num_beams": 0}, "num_beams is 0; allowed: 1 or more"),
        ({"min_length": 9, "max_length": 8}, "min_length is 9 and max_length 8; allowed: "),
        ({"min_length": 0, "max_length": 0}, "min_length is 0 and max_length 0; allowed: "),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(samples, **{"num_beams": 3, "min_length": 1, **settings})


def test_a_text_beyond_the_positions_of_blip_2_is_one_message():
    with pytest.raises(UserError, match="a text of 602 tokens; allowed: at most the model's 512 positions"):
        BLIP2.ours().extract_features({"text_input": ["a cat", "cat " * 600]}, "text")


def test_captions_of_blip_2_are_lavis_captions_and_every_argument_acts():
    model, samples = BLIP2.ours(5), batch("blip2", 3)
    theirs = BLIP2.in_lavis(model)
    for settings in ({}, {"num_beams": 1}, {"num_beams": 2, "max_length": 12, "min_length": 3}):
        assert model.generate(samples, **settings) == theirs.generate(samples, **settings)
    sampled = {"use_nucleus_sampling": True, "max_length": 12, "min_length": 3}
    assert len({(torch.manual_seed(0), tuple(m.generate(samples, **sampled)))[1] for m in (model, theirs)}) == 1
    plain = model.generate(samples, num_beams=2, max_length=14, min_length=1)
    assert model.generate(samples, num_beams=2, max_length=14, min_length=1, repetition_penalty=5.0) != plain
    shuffled = samples["image"].flip(0)
    assert model.generate({"image": shuffled}, num_beams=2, max_length=14, min_length=1) == plain[::-1], "each image has its own"
    assert F.cosine_similarity(samples["image"][0].flatten(), samples["image"][1].flatten(), dim=0) < 0.5 and len(set(plain)) > 1


def test_captions_of_blip_2_pass_every_argument_on(monkeypatch):
    """What needs a model that ends its lines to be seen (``length_penalty``), or many draws (``temperature``)."""
    model, seen = BLIP2.ours(), {}
    monkeypatch.setattr("lavis_mafa.models.blip2.write", lambda reader, prompts, how: seen.update(vars(how)) or [[0]] * 4)
    shared = {"top_p": 0.7, "repetition_penalty": 1.3, "length_penalty": -0.5, "temperature": 0.6}
    for sampled in (False, True):
        model.generate(batch("blip2", 2), sampled, 5, max_length=9, min_length=2, num_captions=2, **shared)
        of_model = {"end": model.tokenizer.sep_token_id, "sampled": sampled, "beams": 5, "lines": 2}
        assert seen == {**shared, **of_model, "longest": 8, "shortest": 1}, "LAVIS's lengths count [DEC]"
