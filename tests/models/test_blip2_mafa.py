"""blip2_mafa against LAVIS's own BLIP-2 stage 1: the same names, the same numbers; and what is ours alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.models.blip2_models import blip2 as lavis_blip2
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import reduced_blip2 as reduced
from lavis_mafa.config.schema import QFormer
from lavis_mafa.errors import UserError
from lavis_mafa.models import encoders as blip2_encoders
from lavis_mafa.models.blip2 import Blip2Mafa, Blip2Pairs
from lavis_mafa.models.encoders import MINILM, build_eva, build_qformer
from lavis_mafa.objectives.mining import most_similar_query

batch, block, ours, save = reduced.batch, reduced.block, reduced.ours, reduced.save
SMOOTH = {"smoothing": 0.1, "smooth_when": "always"}  # what LAVIS has built in
TRAINED = {"freeze": False}
WORDS = len(Path(reduced.VOCABULARY).read_text().split())


def close(found: Tensor, wanted: Tensor, atol: float = 1e-5, rtol: float = 1e-4, msg: str | None = None) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol, msg=None if msg is None else lambda text: f"{msg}: {text}")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def features(model: Any, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, queries, d] and [B, d], by LAVIS's methods."""
    text = model.tokenizer(samples["text_input"], padding="max_length", max_length=reduced.LENGTH, return_tensors="pt")
    image = F.normalize(model.vision_proj(model.forward_image(samples["image"])[0]), dim=-1)
    return image, F.normalize(model.text_proj(model.forward_text(text)), dim=-1)


@torch.no_grad()
def matching(model: Any, samples: dict[str, Any], image: int, text: int) -> Tensor:
    """LAVIS's two logits of one pair: [2]."""
    pair = {"image": samples["image"][image : image + 1], "text_input": samples["text_input"][text]}
    return reduced.OfflineMatching.forward(model, pair)[0]


class Says:
    """A Con-D that finds these pairs (image, text) to match."""

    def __init__(self, *pairs: tuple[int, int]) -> None:
        self.pairs = set(pairs)

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        found = [pair in self.pairs for pair in zip(image_index.tolist(), text_index.tolist(), strict=True)]
        return torch.tensor(found).float() * 0.9


# --- one step is LAVIS's step ------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    """LAVIS asks for its rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_one_step_equals_lavis_stage_1(one_process, monkeypatch, freeze, count):
    """ITC, ITM and LM and every gradient, when LAVIS's draw picks the hardest negative too. It pads to max_length, we do not."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, _: weights.argmax(dim=-1, keepdim=True))
    theirs = reduced.lavis_stage_1(freeze=freeze)
    mine = reduced.same_as(theirs, itc=SMOOTH, image_encoder={"freeze": freeze})
    found, wanted = mine.train()(batch(count)), theirs.train()(batch(count))
    for name in ("loss_itc", "loss_itm", "loss_lm", "loss"):
        close(getattr(found, name), getattr(wanted, name), msg=name)
    found.loss.backward()
    wanted.loss.backward()
    own, other = gradients(mine), gradients(theirs)
    assert own.keys() == other.keys()
    for name, gradient in other.items():
        close(own[name], gradient, rtol=1e-3, msg=name)
    assert any(name.startswith("visual_encoder.") for name in own) != freeze
    # the comparison says something
    told = ("query_tokens", "ln_vision.weight", "itm_head.weight", "vision_proj.weight", "temp")
    assert min(other[name].abs().max() for name in told) > 1e-3
    assert not [n for n, p in mine.named_parameters() if p.requires_grad and p.grad is None]  # DDP waits for all of them


# --- similarities and features -------------------------------------------------------------------------------------------


def test_similarity_is_that_of_the_best_query():
    model, samples = ours(), batch(4)
    image, text = features(model, samples)
    _, encoded, _ = model.encode(model.inputs(samples))
    for i in range(4):
        for t in range(4):
            wanted = max(float(image[i, q] @ text[t]) for q in range(reduced.QUERIES))
            assert encoded.sim_i2t[i, t].item() == pytest.approx(wanted, abs=1e-5)
            assert encoded.sim_t2i[t, i].item() == pytest.approx(wanted, abs=1e-5)
    assert len((image @ text.T).argmax(dim=1).unique()) > 1  # not always the same query


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_itc_against_a_loop(smoothing):
    model = ours(itc={"smoothing": smoothing, "smooth_when": "always"})
    keys = torch.tensor([4, 9, 4, 2, 1])
    samples = batch(5, image_key=keys)
    image, text = features(model, samples)
    total = 0.0
    for anchor in range(5):
        same = [float(keys[anchor] == keys[other]) for other in range(5)]
        target = [(1 - smoothing) * s / sum(same) + smoothing / 5 for s in same]
        to_text = torch.stack([(image[anchor] @ text[t]).max() for t in range(5)]) / model.temp
        to_image = torch.stack([(image[i] @ text[anchor]).max() for i in range(5)]) / model.temp
        for logits in (to_text, to_image):
            chance = logits.exp() / logits.exp().sum()
            total -= sum(t * math.log(p) for t, p in zip(target, chance.tolist(), strict=True)) / 10
    assert model(samples).loss_itc.item() == pytest.approx(total, rel=1e-4)


def test_grit_feature_is_the_query_most_similar_to_the_own_text():
    model, samples = ours(), batch(4)
    image, text = features(model, samples)
    output = model(samples)
    for b in range(4):
        best = max(range(reduced.QUERIES), key=lambda q: float(image[b, q] @ text[b]))
        close(output.image_features[b], image[b, best])
        close(output.text_features[b], text[b])
    assert output.image_features.dtype == torch.float32 and not output.image_features.requires_grad
    separate = model.grit_features(samples)
    close(separate[0], output.image_features)
    close(separate[1], output.text_features)


def test_most_similar_query_of_a_known_case():
    image = torch.eye(3)[None].repeat(2, 1, 1)
    text = torch.tensor([[0.1, 0.9, 0.0], [0.7, 0.1, 0.6]])
    assert torch.equal(most_similar_query(image, text), torch.eye(3)[[1, 0]])


def test_features_do_not_depend_on_padding():
    model = ours()
    with torch.no_grad():
        _, _, alone = model.encode(model.inputs(batch(1)))
        _, _, together = model.encode(model.inputs(batch(2)))  # the second caption is longer
    close(alone[0][0], together[0][0])
    close(alone[1][0], together[1][0])


def test_features_are_fp32_under_autocast():
    model = ours()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, encoded, pair = model.encode(model.inputs(batch(4)))
    assert all(x.dtype == torch.float32 for x in (encoded.sim_i2t, encoded.sim_t2i, *pair))
    with torch.no_grad():
        exact = model.encode(model.inputs(batch(4)))[2]
    assert not torch.equal(exact[1], pair[1])  # autocast did act
    close(pair[1], exact[1], atol=0.05)


# --- a step --------------------------------------------------------------------------------------------------------------


def test_captions_of_one_image_are_never_negatives():
    model = ours(itm={"negatives": "random"})
    keys = torch.tensor([7, 3, 7, 5])
    for _ in range(5):
        verdicts = model(batch(4, image_key=keys, index=torch.arange(4))).verdicts
        assert (keys[verdicts["image"]] != keys[verdicts["text"]]).all() and verdicts["exists"].all()
    everything = model(batch(4, image_key=torch.full((4,), 7), index=torch.arange(4)))
    assert not everything.verdicts["exists"].any() and math.isfinite(everything.stats["loss"])


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_batches_of_any_size_without_a_process_group(freeze):
    """One, two, and fewer than before; also in bf16."""
    model = ours(itc=SMOOTH, image_encoder={"freeze": freeze}).train()
    for count, autocast in ((4, False), (3, False), (2, True), (1, False), (1, True)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(batch(count))
        output.loss.backward()
        assert all(math.isfinite(value) for name, value in output.stats.items() if name.startswith("loss"))
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert not [n for n, gradient in trained.items() if gradient is None or not gradient.isfinite().all()]


def test_gradient_checkpointing_changes_nothing():
    plain, careful = (ours(image_encoder=TRAINED | {"gradient_checkpointing": on}).train() for on in (False, True))
    for model in (plain, careful):
        model(batch(3)).loss.backward()
    for (name, one), other in zip(gradients(plain).items(), gradients(careful).values(), strict=True):
        close(one, other, msg=name)


def test_the_temperature_stays_in_its_range():
    model = ours(temperature=0.2)
    assert model.temp.item() == pytest.approx(0.2)
    with torch.no_grad():
        model.temp.fill_(-1.0)
    assert model(batch(2)).stats["temperature"] == pytest.approx(0.001)


# --- ECM -----------------------------------------------------------------------------------------------------------------


def mined(model: Blip2Mafa, samples: dict[str, Any]) -> list[tuple[int, int]]:
    """The pairs that a step asks about, by a run without Con-D."""
    verdicts = model(samples).verdicts
    return list(zip(verdicts["image"].tolist(), verdicts["text"].tolist(), strict=True))


def test_new_positives_enter_itc_and_itm():
    model = ours(ecm={"enabled": False})
    samples = batch(4, index=torch.arange(4))
    pairs = mined(model, samples)
    found = pairs[1]  # image 1 and its hardest text
    model.settings.ecm.enabled = True
    model.set_discriminator(Says(found))
    output = model(samples)

    image, text = features(model, samples)
    similarity = torch.stack([torch.stack([(image[i] @ text[t]).max() for t in range(4)]) for i in range(4)]) / model.temp.detach()
    targets = []
    for side, asked in enumerate((pairs[:4], pairs[4:])):
        rows = torch.eye(4)
        for b, pair in enumerate(asked):
            if pair == found:
                rows[b, pair[1 - side]] = 1.0
        targets.append(rows / rows.sum(dim=1, keepdim=True))
    wanted = (F.cross_entropy(similarity, targets[0]) + F.cross_entropy(similarity.T, targets[1])) / 2
    close(output.loss_itc, wanted)

    shown = [(b, b) for b in range(4)] + pairs
    labels = torch.tensor([1] * 4 + [int(pair == found) for pair in pairs])
    logits = torch.stack([matching(model, samples, i, t) for i, t in shown])
    close(output.loss_itm, F.cross_entropy(logits, labels))
    assert output.stats["new_positive_share"] > 0


def captioning(model: Blip2Mafa, samples: dict[str, Any], image: int, text: int) -> tuple[float, int]:
    """One pair's LM loss by one joint pass of queries and text, LAVIS's other way to read the queries, and its token count."""
    tokens = model.tokenizer(samples["text_input"][text], return_tensors="pt")
    ids = tokens.input_ids.clone()
    ids[:, 0] = model.tokenizer.bos_token_id
    theirs = reduced.in_lavis(model)
    with torch.no_grad():
        output = theirs.Qformer(
            ids,
            query_embeds=theirs.query_tokens,
            attention_mask=torch.ones(1, reduced.QUERIES + ids.shape[1], dtype=torch.long),
            encoder_hidden_states=theirs.ln_vision(theirs.visual_encoder(samples["image"][image : image + 1])),
            return_dict=True,
            labels=ids,
        )
    return output.loss.item(), ids.shape[1] - 1


def test_lm_counts_each_new_positive_once():
    model = ours(ecm={"enabled": False, "use_in": ["itc", "itm", "lm"]})
    samples = batch(4, index=torch.arange(4))
    pairs = mined(model, samples)
    own = [(b, b) for b in range(4)]

    def wanted(rows: list[tuple[int, int]]) -> float:
        losses = [captioning(model, samples, i, t) for i, t in rows]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    assert model(samples).loss_lm.item() == pytest.approx(wanted(own), rel=1e-4)
    model.settings.ecm.enabled = True
    model.set_discriminator(Says(*pairs))  # everything mined is a match, some found from both sides
    with_new = model(samples).loss_lm.item()
    assert with_new == pytest.approx(wanted([*own, *sorted(set(pairs))]), rel=1e-4)
    assert with_new != pytest.approx(wanted(own), rel=1e-4)
    model.settings.ecm.use_in = ["itc", "itm"]
    assert model(samples).loss_lm.item() == pytest.approx(wanted(own), rel=1e-4)


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_lm_of_an_image_that_another_rank_holds(freeze):
    """Of five images two are the batch's own: the others' queries are passed when a pair names them; gradients arrive."""
    model, samples = ours(image_encoder={"freeze": freeze}), batch(5)
    own, more = 2, [(0, 0), (1, 1), (4, 2), (3, 0), (4, 4), (1, 3)]
    ids, mask = model.text_tokens(samples["text_input"])
    embeds = model.ln_vision(model.visual_encoder(samples["image"]))
    image_index, text_index = torch.tensor(more).T

    def run(held: int) -> tuple[Tensor, Tensor]:
        loss = Blip2Pairs(model, embeds, ids, mask, held).lm_loss(image_index, text_index)
        (gradient,) = torch.autograd.grad(loss, embeds, retain_graph=True)
        return loss, gradient

    found, gradient = run(own)
    losses = [captioning(model, samples, i, t) for i, t in more]
    assert found.item() == pytest.approx(sum(v * n for v, n in losses) / sum(n for _, n in losses), rel=1e-4)
    for other, wanted in zip(run(5), (found, gradient), strict=True):  # were all images the batch's own, nothing would change
        close(other, wanted)
    assert gradient[4].abs().max() > 1e-4 and gradient[2].abs().max() == 0


def test_matching_logits_of_any_pair():
    """Also of indices beyond the batch's own, as gathering makes them."""
    model, samples = ours(), batch(5)
    with torch.no_grad():
        embeds = model.ln_vision(model.visual_encoder(samples["image"]))
        pairs = Blip2Pairs(model, embeds, *model.text_tokens(samples["text_input"]), own=2)
        found = pairs.itm_logits(torch.tensor([4, 0, 3]), torch.tensor([1, 3, 3]))
    close(found, torch.stack([matching(model, samples, *pair) for pair in ((4, 1), (0, 3), (3, 3))]))
    assert found.std(dim=0).min() > 1e-3


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [reduced.OfflineStage1, reduced.OfflineMatching])
def test_names_and_sizes_are_those_of_lavis(kind):
    mine, theirs = ours(), reduced.lavis_stage_1(kind=kind)
    sizes = [{name: value.shape for name, value in model.state_dict().items()} for model in (mine, theirs)]
    assert sizes[0] == sizes[1]
    assert {n for n, p in mine.named_parameters() if p.requires_grad} == {n for n, p in theirs.named_parameters() if p.requires_grad}
    added = mine.tokenizer.vocab_size  # [DEC] comes after the vocabulary
    assert mine.tokenizer.bos_token_id == added and len(mine.Qformer.bert.embeddings.word_embeddings.weight) == added + 1


def test_our_checkpoint_gives_the_same_logits_in_lavis(tmp_path):
    mine, samples = ours(), batch(4)
    path = save(mine, tmp_path / "ours.pth")
    stage_1, itm = reduced.lavis_stage_1(), reduced.lavis_matching(2)
    for model in (stage_1, itm):
        report = model.load_from_pretrained(str(path))
        assert not report.missing_keys and not report.unexpected_keys
    with torch.no_grad():
        (ids, mask), text = mine.text_rows(samples["text_input"])
        states, image = mine.image_rows(samples["image"])
        found = mine.match_rows(states, (ids, mask), torch.arange(4), torch.arange(4))
        close(found[:, 1], stage_1.compute_itm(states, ids, mask))
    close(found, torch.stack([matching(itm, samples, b, b) for b in range(4)]))
    wanted = features(stage_1, samples)
    close(image, wanted[0])
    close(text, wanted[1])
    assert found.std(dim=0).min() > 1e-3


def test_lavis_checkpoint_loads_with_and_without_its_image_encoder(tmp_path):
    theirs = reduced.lavis_stage_1(3)
    whole = save(theirs, tmp_path / "whole.pth")
    cut = save(theirs, tmp_path / "cut.pth", without="visual_encoder.")
    vit = tmp_path / "vit.pth"
    torch.save(theirs.visual_encoder.state_dict(), vit)
    for path, init in ((whole, None), (cut, str(vit)), (whole, str(vit))):
        mine = Blip2Mafa(block(image_encoder={"init": init}))
        mine.load_from_pretrained(str(path))
        state = mine.state_dict()
        assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    with pytest.raises(UserError, match="missing: visual_encoder.cls_token"):
        ours().load_from_pretrained(str(cut))
    # the ViT that was frozen may be trained from here on: retrieval fine-tuning starts so
    tuned = Blip2Mafa(block(image_encoder={"init": str(vit), **TRAINED}))
    tuned.load_from_pretrained(str(cut))
    assert torch.equal(tuned.visual_encoder.cls_token, theirs.visual_encoder.cls_token)


@pytest.mark.parametrize("size", [21, 42])
def test_position_embeddings_of_another_image_size_are_interpolated(tmp_path, size):
    from lavis.models.eva_vit import interpolate_pos_embed

    theirs = reduced.lavis_stage_1(3, image_size=size)
    mine = ours()
    mine.load_from_pretrained(str(save(theirs, tmp_path / "other.pth")))
    wanted = {"pos_embed": theirs.visual_encoder.pos_embed.detach()}
    interpolate_pos_embed(mine.visual_encoder, wanted)
    close(mine.visual_encoder.pos_embed.detach(), wanted["pos_embed"])
    assert math.isfinite(mine(batch(2)).loss)


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        (("itm_head.weight", "temp"), {}, r"2 missing: .*itm_head.weight"),
        ((), {"itm_head.weight": torch.zeros(3, 48)}, r"1 other size: itm_head.weight \[3, 48\] \(wanted \[2, 48\]\)"),
        ((), {"another.weight": torch.zeros(1)}, r"1 left over: another.weight"),
        ((), {"query_tokens": torch.zeros(1, 8, 48)}, r"1 other size: query_tokens \[1, 8, 48\] \(wanted \[1, 3, 48\]\)"),
        ((), {"visual_encoder.pos_embed": torch.zeros(1, 17, 8)}, r"1 other size: visual_encoder.pos_embed"),
        (("visual_encoder.blocks.1.attn.q_bias",), {}, r"1 missing: visual_encoder.blocks.1.attn.q_bias"),
    ],
)
def test_load_from_pretrained_lists_what_does_not_fit(tmp_path, without, changes, message):
    path = save(ours(), tmp_path / "bad.pth", without, **changes)
    with pytest.raises(UserError, match=message):
        ours().load_from_pretrained(str(path))


def test_half_of_an_image_encoder_is_never_accepted(tmp_path):
    """All of it may be missing where it has a file of its own; a part missing is a damaged checkpoint."""
    vit = tmp_path / "vit.pth"
    torch.save(ours().visual_encoder.state_dict(), vit)
    path = save(ours(), tmp_path / "bad.pth", without="visual_encoder.blocks.1.")
    with pytest.raises(UserError, match=r"missing: visual_encoder.blocks.1.norm1.weight"):
        ours(image_encoder={"init": str(vit)}).load_from_pretrained(str(path))


def test_from_config_loads_what_is_named_and_nothing_else(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    for target in (
        "lavis.common.dist_utils.download_cached_file",
        "lavis.models.base_model.download_cached_file",
        "lavis.models.base_model.BaseModel.load_checkpoint",
        "lavis.models.base_model.BaseModel.load_checkpoint_from_config",
        "lavis.models.blip2_models.blip2.download_cached_file",
        "lavis.models.eva_vit.download_cached_file",
        "lavis_mafa.models.encoders.download_cached_file",
        "transformers.modeling_utils.PreTrainedModel.from_pretrained",
    ):
        monkeypatch.setattr(target, refuse)
    settings = OmegaConf.create(reduced.SIZES)
    torch.manual_seed(0)
    fresh = Blip2Mafa.from_config(OmegaConf.merge(settings, {"pretrained": None}))
    assert fresh.itm_head.weight.std() > 0 and fresh.discriminator is None
    source = ours(5)
    loaded = Blip2Mafa.from_config(OmegaConf.merge(settings, {"pretrained": str(save(source, tmp_path / "ours.pth"))}))
    assert torch.equal(loaded.itm_head.weight, source.itm_head.weight)


def test_load_model_builds_the_tiny_type():
    from lavis.models import load_model

    model = load_model("blip2_mafa", "tiny")
    assert isinstance(model, Blip2Mafa) and not model.visual_encoder.frozen


# --- first weights -------------------------------------------------------------------------------------------------------


def hub_bert(kind: type, folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 192}
    model = kind(BertConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel])
def test_the_qformer_starts_from_berts_weights(tmp_path, kind):
    source = hub_bert(kind, tmp_path / "bert")
    torch.manual_seed(1)
    model = Blip2Mafa(block(qformer={"init": str(tmp_path / "bert")})).eval()
    ids = torch.randint(5, WORDS, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        bert = source.bert if kind is BertForMaskedLM else source
        states = bert(ids, mask).last_hidden_state
        found = model.Qformer.bert(ids, attention_mask=mask, return_dict=True).last_hidden_state
        close(found[mask.bool()], states[mask.bool()])
        if kind is BertForMaskedLM:  # all tokens but the added one
            close(model.Qformer.cls(states)[..., :WORDS], source.cls(states))
    own = dict(model.named_parameters())
    copies = [name for name in own if "_query" in name]
    assert len(copies) == 3 * (2 + 4)
    assert all(torch.equal(own[name], own[name.replace("_query", "")]) for name in copies)
    state = model.Qformer.state_dict()
    assert torch.equal(state["cls.predictions.decoder.weight"], state["bert.embeddings.word_embeddings.weight"])


def test_the_minilm_init_gives_words_and_nothing_is_downloaded():
    torch.manual_seed(0)
    qformer, queries = build_qformer(QFormer(init=MINILM, width=48, layers=1, heads=2, queries=3, cross_attention_every=2), 32)
    words = F.normalize(qformer.bert.embeddings.word_embeddings.weight.detach(), dim=1)
    tokenizer = blip2_encoders.build_blip2_tokenizer(MINILM)
    dog, cat, seven = tokenizer.convert_tokens_to_ids(["dog", "cat", "seven"])
    assert words[dog] @ words[cat] > words[dog] @ words[seven]
    assert queries.shape == (1, 3, 48) and queries.std() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32, "intermediate_size": 128}, "other size: bert.embeddings.word_embeddings.weight"),
        ({"num_hidden_layers": 2}, "missing: bert.encoder.layer.2.attention.self.query.weight"),
        ({"max_position_embeddings": 64}, "other size: bert.embeddings.position_embeddings.weight"),
        ({"vocab_size": 400}, "other size: bert.embeddings.word_embeddings.weight"),
    ],
)
def test_a_bert_of_another_size_is_refused(tmp_path, changes, message):
    hub_bert(BertForMaskedLM, tmp_path / "bert", **changes)
    with pytest.raises(UserError, match=message):
        Blip2Mafa(block(qformer={"init": str(tmp_path / "bert")}))


def test_a_missing_bert_is_named(tmp_path):
    with pytest.raises(UserError, match="model.qformer.init is '.*nowhere'"):
        build_qformer(QFormer(init=str(tmp_path / "nowhere"), width=48, layers=1, heads=2, queries=3, cross_attention_every=2), 32)


@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
@pytest.mark.parametrize("form", ["fp16", "a larger image"])
def test_an_eva_file_loads_exactly(tmp_path, prefix, form):
    """As EVA's release is: a layer more than is used, a head, and half precision."""
    more = {"depth": reduced.DEPTH + 1} | ({"image_size": 42} if form == "a larger image" else {})
    source = ours(2, image_encoder=more).visual_encoder
    state = {name: value.half() if form == "fp16" else value for name, value in source.state_dict().items()}
    state |= {"norm.weight": torch.ones(reduced.WIDTH), "head.weight": torch.zeros(4, reduced.WIDTH)}
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "eva.pth")
    encoder = build_eva(block(image_encoder={"init": str(tmp_path / "eva.pth")}).image_encoder)
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        if name != "pos_embed" or form == "fp16":
            assert torch.equal(value, state[name].float()), name
    assert encoder.pos_embed.shape[1] == 17


def test_an_eva_file_that_does_not_fit_is_refused(tmp_path):
    torch.save(ours(image_encoder={"depth": 1}).visual_encoder.state_dict(), tmp_path / "short.pth")
    with pytest.raises(UserError, match="model.image_encoder.init: .*missing: blocks.1.norm1.weight"):
        build_eva(block(image_encoder={"init": str(tmp_path / "short.pth")}).image_encoder)
    with pytest.raises(UserError, match="no such file"):
        build_eva(block(image_encoder={"init": str(tmp_path / "none.pth")}).image_encoder)


# --- the frozen image encoder ----------------------------------------------------------------------------------------------


def test_a_frozen_encoder_in_bf16():
    exact = ours()
    fast = reduced.same_as(exact, image_encoder={"precision": "bf16"}).train()
    half = ("qkv.weight", "fc1.bias", "patch_embed.proj.weight")
    kinds = {p.dtype for n, p in fast.visual_encoder.named_parameters() if n.endswith(half)}
    assert kinds == {torch.bfloat16} and fast.ln_vision.weight.dtype == torch.float32
    found, wanted = fast(batch(4)), exact(batch(4))
    for name in ("loss_itc", "loss_itm", "loss_lm"):
        close(getattr(found, name), getattr(wanted, name), atol=0.05, rtol=0.02)
    states = [model.visual_encoder(batch(2)["image"]) for model in (fast, exact)]
    assert states[0].dtype == torch.float32 and not torch.equal(*states)
    close(*states, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_encoder_stays_as_it_is(precision):
    model = ours(image_encoder={"precision": precision, "drop_path": 0.5}).train()
    assert not any(module.training for module in model.visual_encoder.modules())
    assert model.Qformer.training
    before = {n: v.clone() for n, v in model.visual_encoder.state_dict().items()}
    output = model(batch(3))
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.visual_encoder.parameters())
    assert not model.visual_encoder(batch(2)["image"]).requires_grad
    assert model.ln_vision.weight.grad is not None
    assert all(torch.equal(before[n], v) for n, v in model.visual_encoder.state_dict().items())
    trained = ours(image_encoder=TRAINED).train()
    assert trained.visual_encoder.training and trained.visual_encoder(batch(2)["image"]).requires_grad


# --- retrieval and captions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [2, 4])
def test_retrieval_scores_equal_lavis(top_k):
    theirs, gallery = reduced.lavis_stage_1(), reduced.Gallery()
    mine = reduced.same_as(theirs)
    with torch.no_grad():
        wanted = lavis_blip2.compute_sim_matrix(theirs, gallery, k_test=top_k)
    found = mine.compute_sim_matrix(gallery, OmegaConf.create({"k_test": top_k}))
    for one, other in zip(found, wanted, strict=True):
        close(torch.from_numpy(one), torch.from_numpy(other), atol=1e-4)


def test_retrieval_with_a_top_k_beyond_the_gallery():
    """LAVIS fails there."""
    model, gallery = ours(), reduced.Gallery()
    to_text, to_image = model.compute_sim_matrix(gallery, OmegaConf.create({"k_test": 256}))
    assert to_text.shape == (4, 5) and to_image.shape == (5, 4)
    close(torch.from_numpy(to_text.T), torch.from_numpy(to_image))  # every pair was matched
    assert to_text.min() > -100


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"use_nucleus_sampling": True}], ids=["beams", "nucleus"])
def test_lavis_generate_writes_captions(how):
    model = ours()
    captions = model.generate(batch(3), max_length=12, min_length=4, **how)
    assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)


def test_generate_equals_lavis():
    theirs = reduced.lavis_stage_1()
    mine = reduced.same_as(theirs)
    assert mine.generate(batch(3), num_beams=2, max_length=10) == theirs.generate(batch(3), num_beams=2, max_length=10)
