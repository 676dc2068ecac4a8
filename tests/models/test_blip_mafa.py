"""blip_mafa and its Con-D against LAVIS's own BLIP: the same names, the same numbers; and what is ours alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import BertConfig, BertForMaskedLM

import reduced_blip as reduced
from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.schema import MedEncoder, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.blip import BlipMafa, BlipPairs
from lavis_mafa.models.con_d import build_discriminator
from lavis_mafa.models.encoders import build_blip_text
from lavis_mafa.models.transformer import Reading

batch, ours, block = reduced.batch, reduced.ours, reduced.block
TEACHER = {"momentum_distillation": {"queue_size": 8, "momentum": 0.9}}
STEP = {"epoch": 3, "iters": 1, "num_iters_per_epoch": 10}
OWN = torch.arange(4)
IMAGE, TEXT = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 3, 2, 0, 3])


def save(model: torch.nn.Module, path: Path, **changes: torch.Tensor | None) -> Path:
    state = {**model.state_dict(), **changes}
    torch.save({"model": {name: value for name, value in state.items() if value is not None}}, path)
    return path


def close(found: torch.Tensor, wanted: torch.Tensor, **more: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, **more)


# --- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "iters", "alpha"), [(0, 0, 0.0), (1, 3, 0.26)])
def test_one_step_equals_lavis_blip_pretrain(monkeypatch, epoch, iters, alpha):
    """ITC with teacher and queue, ITM and LM, every gradient; LAVIS draws its negatives, here both take the hardest."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, _: weights.argmax(dim=-1, keepdim=True))
    theirs, mine = reduced.lavis_pretrain(), ours(itc=TEACHER)
    assert theirs.state_dict().keys() == mine.state_dict().keys() - {"idx_queue", "text_queue_keys"}
    mine.load_state_dict({**theirs.state_dict(), "idx_queue": mine.idx_queue, "text_queue_keys": mine.text_queue_keys})
    assert mine._distillation_weight(mine.inputs({**batch(2), "epoch": 2})) == pytest.approx(0.4)
    mine.train()  # the teacher moves in training only; there is no dropout
    samples = {**batch(4), "epoch": epoch, "iters": iters, "num_iters_per_epoch": 10}
    assert mine._distillation_weight(mine.inputs(samples)) == pytest.approx(alpha)
    wanted, found = theirs(samples), mine(samples)
    for name in ("loss_itc", "loss_itm", "loss_lm", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
    found.loss.backward()
    wanted.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    trained = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    assert len(trained) > 50 and all(name in gradients for name in trained)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)
    for name in ("image_queue", "text_queue", "queue_ptr", "vision_proj_m.weight", "visual_encoder_m.norm.weight"):
        torch.testing.assert_close(mine.state_dict()[name], theirs.state_dict()[name], msg=name)


def test_the_teachers_image_encoder_is_called_as_lavis_calls_it():
    """LAVIS calls the module, not forward_features; in its ViT both are one."""
    model, image = ours(itc=TEACHER), batch(2)["image"]
    with torch.no_grad():
        assert torch.equal(model.visual_encoder_m(image), model.visual_encoder_m.forward_features(image))


def test_without_momentum_itc_is_a_plain_loop():
    model, samples = ours(), batch(4)
    images, texts = model.grit_features(samples)
    total = torch.zeros(())
    for b in range(4):
        for anchor, keys in ((images[b], texts), (texts[b], images)):
            logits = torch.stack([anchor @ key for key in keys]) / model.temp
            total = total - torch.log(logits[b].exp() / logits.exp().sum()) / 8
    close(model(samples).loss_itc, total)


class Matches:
    """A Con-D that finds every pair to match."""

    def match_probability(self, samples: dict[str, Any], image_index: torch.Tensor, text_index: torch.Tensor) -> torch.Tensor:
        return torch.full(image_index.shape, 0.9)


@torch.no_grad()
def naive_lm_loss(model: BlipMafa, samples: dict[str, Any], pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Token by token, each caption alone and unpadded; 0.1 of the label's weight goes to all words alike."""
    decoder = reduced.lavis_pretrain().text_decoder.eval()
    decoder.load_state_dict(model.text_decoder.state_dict())
    states, losses = model.visual_encoder.forward_features(samples["image"]), []
    for image, text in pairs:
        ids = model.tokenizer([samples["text_input"][text]], return_tensors="pt").input_ids
        ids[0, 0] = model.tokenizer.bos_token_id
        logits = decoder(ids, encoder_hidden_states=states[image : image + 1], return_dict=True).logits[0]
        for position in range(ids.shape[1] - 1):
            log_probability = logits[position].log_softmax(dim=0)
            losses.append(-(0.9 * log_probability[ids[0, position + 1]] + 0.1 * log_probability.mean()))
    return torch.stack(losses).mean()


def test_pairs_that_con_d_finds_are_written_too():
    model, samples = ours(ecm={"enabled": True}), batch(4, index=OWN)
    model.set_discriminator(Matches())
    output = model(samples)
    found = {(int(i), int(t)) for i, t in zip(output.verdicts["image"], output.verdicts["text"], strict=True)}
    own = [(b, b) for b in range(4)]
    assert found and not found & set(own)
    close(output.loss_lm, naive_lm_loss(model, samples, own + sorted(found)))
    assert abs(output.loss_lm - naive_lm_loss(model, samples, own)) > 1e-3
    model.settings.ecm.use_in = ["itc", "itm"]
    close(model(samples).loss_lm, naive_lm_loss(model, samples, own))


def test_an_index_may_name_gathered_rows():
    """Rows beyond the batch's own, as other ranks' are put there."""
    model, samples = ours(), batch(4)
    with torch.no_grad():
        pairs, _, _ = model.encode(model.inputs(samples))
        order = torch.tensor([2, 3, 0, 1])
        other = BlipPairs(model, len(order), pairs.image_embeds[order], pairs.text_mask[order], pairs.text_ids[order])
        close(other.itm_logits(order[IMAGE], order[TEXT]), pairs.itm_logits(IMAGE, TEXT))
        close(other.lm_loss(order[IMAGE], order[TEXT]), pairs.lm_loss(IMAGE, TEXT))


@pytest.mark.parametrize("itc", [{"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2}, TEACHER], ids=["smooth", "teacher"])
@pytest.mark.parametrize("count", [1, 2])
def test_losses_and_gradients_are_finite(count, itc):
    model = ours(itc=itc).train()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(batch(count, **STEP))
        output.loss.backward()
        assert all(math.isfinite(value) for name, value in output.stats.items() if name.startswith("loss"))
        assert output.image_features.dtype == torch.float32 and not output.image_features.requires_grad
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None or not torch.isfinite(gradient).all()]


def test_nothing_depends_on_padding():
    model = ours()
    with torch.no_grad():
        alone, _, one = model.encode(model.inputs(batch(1)))
        together, _, two = model.encode(model.inputs(batch(2)))  # the second caption is longer
        assert together.text_ids.shape[1] > alone.text_ids.shape[1]
        close(one[1][0], two[1][0])
        close(alone.itm_logits(OWN[:1], OWN[:1]), together.itm_logits(OWN[:1], OWN[:1]))
        close(alone.lm_loss(OWN[:1], OWN[:1]), together.lm_loss(OWN[:1], OWN[:1]))


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_into_lavis_blip_pretrain_and_back(tmp_path):
    mine, theirs, samples = ours(itc=TEACHER), reduced.lavis_pretrain(), {**batch(4), **STEP}
    report = theirs.load_from_pretrained(str(save(mine, tmp_path / "ours.pth")))
    assert not report.missing_keys and set(report.unexpected_keys) == {"idx_queue", "text_queue_keys"}
    with torch.no_grad():
        pairs, _, _ = mine.encode(mine.inputs(samples))
        wanted = theirs(samples).intermediate_output
        close(pairs.itm_logits(OWN, OWN), wanted.itm_logits[:4])
        close(pairs.lm_loss(OWN, OWN), wanted.decoder_output.loss)
        assert wanted.itm_logits[:4, 1].std() > 1e-3  # the comparison says something
        for itc in ({}, TEACHER):
            again = ours(5, itc=itc)
            again.load_from_pretrained(str(save(theirs, tmp_path / "theirs.pth")))
            close(again.encode(again.inputs(samples))[0].itm_logits(OWN, OWN), wanted.itm_logits[:4])
            close(again.encode(again.inputs(samples))[0].lm_loss(OWN, OWN), wanted.decoder_output.loss)
        assert torch.equal(again.vision_proj_m.weight, again.vision_proj.weight)
        assert not torch.equal(again.image_queue, theirs.image_queue)  # another run's features are no negatives of this one


def test_retrieval_scores_equal_lavis_blip_retrieval(tmp_path):
    mine, theirs, gallery = ours(itc=TEACHER), reduced.lavis_retrieval(), reduced.Gallery()
    report = theirs.load_from_pretrained(str(save(mine, tmp_path / "ours.pth")))
    assert not report.missing_keys and all(n.startswith("text_decoder.") or n == "text_queue_keys" for n in report.unexpected_keys)
    task = OmegaConf.create({"k_test": 3})
    with torch.no_grad():
        wanted = theirs.compute_sim_matrix(gallery, task)
    for one, other in zip(mine.compute_sim_matrix(gallery, task), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_loads_into_lavis_matching_and_captioning(tmp_path):
    mine, samples = ours(), batch(4)
    path = save(mine, tmp_path / "ours.pth")
    matching, captioning = reduced.lavis_itm(), reduced.lavis_caption()
    with torch.no_grad():
        pairs, _, _ = mine.encode(mine.inputs(samples))
        assert not matching.load_from_pretrained(str(path)).missing_keys
        close(pairs.itm_logits(OWN, OWN), matching(samples))
        assert not captioning.load_from_pretrained(str(path)).missing_keys
        close(pairs.lm_loss(OWN, OWN), captioning(samples).loss)


def test_load_from_pretrained_resizes_position_embeddings(tmp_path):
    target = ours(image_encoder={"image_size": 48})
    target.load_from_pretrained(str(save(ours(), tmp_path / "small.pth")))
    assert target.visual_encoder.pos_embed.shape[1] == 37


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itm_head.weight": None, "temp": None}, r"2 missing: .*itm_head.weight"),
        ({"itm_head.weight": torch.zeros(3, 32)}, r"1 other size: itm_head.weight \[3, 32\] \(wanted \[2, 32\]\)"),
        ({"another.weight": torch.zeros(1)}, r"1 left over: another.weight"),
    ],
)
def test_load_from_pretrained_lists_what_does_not_fit(tmp_path, changes, message):
    path = save(ours(), tmp_path / "bad.pth", **changes)
    with pytest.raises(UserError, match=message):
        ours().load_from_pretrained(str(path))


# --- first weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path) -> tuple[BertForMaskedLM, Path]:
    """transformers' BERT with random weights and token types, in a folder."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_()
        model.cls.predictions.bias.normal_()
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def test_encoder_and_decoder_start_from_bert(bert):
    source, folder = bert
    encoder, decoder = build_blip_text(MedEncoder(init=str(folder), width=32, layers=2, heads=2, dropout=0.0), encoder_width=48)
    ids, mask = torch.randint(1000, 2000, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        wanted = source.bert(ids, mask).last_hidden_state
        for text in (encoder.eval(), decoder.bert.eval()):
            close(text.read(ids, Reading.of(mask.bool(), ids.device)), wanted[mask.bool()])
        close(decoder.cls(wanted)[..., :30522], source.cls(wanted))
    words = encoder.embeddings.word_embeddings.weight
    assert words.shape == (30524, 32) and words[-2:].abs().min(dim=1).values.max() > 0  # [DEC] and [ENC] are drawn, as by LAVIS
    with pytest.raises(UserError, match="other size"):
        build_blip_text(MedEncoder(init=str(folder), width=64, layers=2, heads=2), encoder_width=48)


def test_all_but_self_attention_is_shared():
    model = ours()
    encoder, decoder = dict(model.text_encoder.named_parameters()), dict(model.text_decoder.bert.named_parameters())
    assert encoder.keys() == decoder.keys()
    own = {name for name in encoder if encoder[name] is not decoder[name]}
    assert own == {name for name in encoder if ".attention." in name}
    assert model.text_decoder.cls.predictions.decoder.weight is decoder["embeddings.word_embeddings.weight"]
    assert (len(model.tokenizer), model.tokenizer.bos_token_id, model.tokenizer.enc_token_id) == (30524, 30522, 30523)


def base_size(**changes: Any) -> Any:
    defaults = OmegaConf.load(BlipMafa.PRETRAINED_MODEL_CONFIG_DICT["base"]).model
    offline = {"tokenizer": reduced.MINILM, "image_encoder": {"init": None}, "text_encoder": {"init": None}}
    return typed_block("model", OmegaConf.merge(defaults, offline, changes))


def test_the_base_type_has_blips_size(monkeypatch):
    """On the meta device: names and shapes of the real thing, without its memory."""
    linspace = torch.linspace  # LAVIS reads drop-path rates out of a tensor, which the meta device cannot give
    monkeypatch.setattr(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with torch.device("meta"):
        model = BlipMafa(base_size(itc=TEACHER))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(252e6, rel=0.005)  # BLIP, Table 3


def test_the_tiny_type_starts_with_word_embeddings():
    model = BlipMafa(typed_block("model", OmegaConf.load(BlipMafa.PRETRAINED_MODEL_CONFIG_DICT["tiny"]).model))
    words = F.normalize(model.text_decoder.cls.predictions.decoder.weight.detach(), dim=1)
    dog, puppy, paint = (words[model.tokenizer.convert_tokens_to_ids(word)] for word in ("dog", "puppy", "paint"))
    assert dog @ puppy > 0.5 > dog @ paint


# --- Con-D -------------------------------------------------------------------------------------------------------------


def con_d_of(path: Path, arch: str = "blip_image_text_matching", **more: Any) -> dict[str, Any]:
    return {"arch": arch, "checkpoint": str(path), "precision": "fp32", **more}


@torch.no_grad()
def of_lavis(model: Any, samples: dict[str, Any]) -> torch.Tensor:
    """LAVIS's ITM, pair by pair."""
    rows = [
        model({"image": samples["image"][i : i + 1], "text_input": [samples["text_input"][t]]}).softmax(dim=1)[0, 1]
        for i, t in zip(IMAGE.tolist(), TEXT.tolist(), strict=True)
    ]
    return torch.stack(rows)


def test_con_d_says_what_lavis_blip_itm_says(tmp_path):
    theirs, samples = reduced.lavis_itm(), batch(4)
    path = save(theirs, tmp_path / "itm.pth")
    con_d = build_discriminator(block(discriminator=con_d_of(path)))
    found = con_d.match_probability(samples, IMAGE, TEXT)
    close(found, of_lavis(theirs, samples))
    assert found.std() > 1e-3 and not found.requires_grad
    fast = build_discriminator(block(discriminator=con_d_of(path, precision="bf16"))).match_probability(samples, IMAGE, TEXT)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, found, atol=0.03, rtol=0)


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip_mafa"])
def test_con_d_reads_retrieval_and_our_checkpoints(tmp_path, arch):
    """Their projections, decoder, teacher and queues are left aside."""
    model, samples = ours(itc=TEACHER), batch(4)
    if arch == "blip_retrieval":
        theirs = reduced.lavis_retrieval()
        theirs.load_from_pretrained(str(save(model, tmp_path / "ours.pth")))
        path = save(theirs, tmp_path / "con_d.pth")
    else:
        path = save(model, tmp_path / "con_d.pth")
    con_d = build_discriminator(block(discriminator=con_d_of(path, arch)))
    with torch.no_grad():
        wanted = model.encode(model.inputs(samples))[0].itm_logits(IMAGE, TEXT).softmax(dim=1)[:, 1]
    close(con_d.match_probability(samples, IMAGE, TEXT), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itm_head.weight": None, "itm_head.bias": None}, "no matching head"),
        ({"itm_head.weight": torch.zeros(2, 5)}, r"1 other size: itm_head.weight \[2, 5\] \(wanted \[2, 32\]\)"),
        ({"text_encoder.another": torch.zeros(1)}, "1 left over: text_encoder.another"),
    ],
)
def test_a_con_d_that_does_not_fit_lists_the_keys(tmp_path, changes, message):
    path = save(reduced.lavis_itm(), tmp_path / "partly.pth", **changes)
    with pytest.raises(UserError, match=message):
        build_discriminator(block(discriminator=con_d_of(path)))


def test_a_con_d_of_another_resolution_is_resized(tmp_path):
    theirs = reduced.lavis_itm(image_size=48)
    path = save(theirs, tmp_path / "larger.pth")
    found = build_discriminator(block(discriminator=con_d_of(path))).match_probability(batch(4), IMAGE, TEXT)
    assert found.shape == (6,)
    samples = {**batch(4), "image": torch.randn(4, 3, 48, 48)}
    settings = block(discriminator=con_d_of(path), image_encoder={"image_size": 48})
    close(build_discriminator(settings).match_probability(samples, IMAGE, TEXT), of_lavis(theirs, samples))


def test_an_albef_asks_a_blip(tmp_path):
    theirs, samples = reduced.lavis_itm(), batch(4, index=OWN)
    of_vit = {name: value for name, value in reduced.SIZES["image_encoder"].items() if name != "image_size"}
    sizes = {"image_encoder": of_vit, "text_encoder": reduced.TEXT}
    con_d = con_d_of(save(theirs, tmp_path / "itm.pth"), **sizes)
    host = reduced.reduced.ours(ecm={"enabled": True}, discriminator=con_d)
    host.set_discriminator(build_discriminator(host.settings, host))
    verdicts = host(samples).verdicts
    found = dict(zip(zip(verdicts["image"].tolist(), verdicts["text"].tolist(), strict=True), verdicts["probability"], strict=True))
    for (image, text), probability in found.items():
        one = {"image": samples["image"][image : image + 1], "text_input": [samples["text_input"][text]]}
        close(probability, theirs(one).softmax(dim=1)[0, 1].detach())


# --- the shipped YAMLs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "blip_base"])
def test_a_shipped_yaml_takes_a_step_at_a_small_size(name):
    options = [
        f"model.tokenizer={reduced.MINILM}",
        "model.image_encoder={init: null, image_size: 32, width: 32, depth: 2, heads: 2}",
        "model.text_encoder={init: null, width: 32, layers: 2, heads: 2}",
    ]
    model = BlipMafa(typed_block("model", check_yaml(f"mafa/blip/train/{name}.yaml", options, files=False).model)).train()
    assert (model.settings.ecm.enabled, model.settings.itc.momentum_distillation is None) == ((name == "pretrain"),) * 2
    model.set_discriminator(Matches())
    output = model(batch(2, grouped=True))
    output.loss.backward()
    assert torch.isfinite(output.loss) and model.vision_proj.weight.grad.abs().sum() > 0
