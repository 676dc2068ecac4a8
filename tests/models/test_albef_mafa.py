"""albef_mafa against LAVIS's own ALBEF: the same names, the same numbers; and what is ours alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import BertConfig, BertForMaskedLM

import reduced
from lavis_mafa.config.schema import TextEncoder
from lavis_mafa.errors import UserError
from lavis_mafa.models import albef as albef_pairs
from lavis_mafa.models import momentum as momentum_teacher
from lavis_mafa.models.albef import AlbefMafa
from lavis_mafa.models.encoders import build_text_encoder, fold_token_type
from lavis_mafa.models.transformer import Reading

batch, ours = reduced.batch, reduced.ours
TEACHER = {"momentum_distillation": {"queue_size": 8, "momentum": 0.0}}
OTHER_TEACHER = {"momentum_distillation": {"queue_size": 8, "momentum": 0.9}}
STEP = {"epoch": 3, "iters": 1, "num_iters_per_epoch": 10}


def save(model: torch.nn.Module, path: Path, **changes: torch.Tensor | None) -> Path:
    state = {**model.state_dict(), **changes}
    torch.save({"model": {name: value for name, value in state.items() if value is not None}}, path)
    return path


# --- names -------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_lavis_albef_pretrain():
    own = set(ours(itc=TEACHER).state_dict())
    assert own - set(reduced.lavis_pretrain().state_dict()) == {"idx_queue", "text_queue_keys"}
    assert set(reduced.lavis_pretrain().state_dict()) <= own
    plain = set(ours().state_dict())
    assert plain == {n for n in own if "_m." not in n and "queue" not in n}


def test_a_checkpoint_loads_into_lavis_albef_retrieval_and_scores_the_same(tmp_path):
    mine, theirs = ours(), reduced.lavis_retrieval()
    report = theirs.load_from_pretrained(str(save(mine, tmp_path / "ours.pth")))
    assert all("_m." in name or name.endswith(("queue", "queue_ptr")) for name in report.missing_keys)
    assert all(name.startswith("text_encoder.cls.") for name in report.unexpected_keys)
    samples = batch()
    with torch.no_grad():
        text = theirs.tokenizer(samples["text_input"], padding="max_length", max_length=30, return_tensors="pt")
        image_states = theirs.visual_encoder.forward_features(samples["image"])
        text_states = theirs.text_encoder.forward_text(text).last_hidden_state
        image_feature = F.normalize(theirs.vision_proj(image_states[:, 0]), dim=-1)
        text_feature = F.normalize(theirs.text_proj(text_states[:, 0]), dim=-1)
        fused = theirs.text_encoder(
            encoder_embeds=text_states,
            attention_mask=text.attention_mask,
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long),
            return_dict=True,
            mode="fusion",
        )
        logits = theirs.itm_head(fused.last_hidden_state[:, 0])
        pairs, _, features = mine.encode(mine.inputs(samples))
        own = torch.arange(4)
        torch.testing.assert_close(features[0], image_feature, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[1], text_feature, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pairs.itm_logits(own, own), logits, atol=1e-5, rtol=1e-4)
    assert logits[:, 1].std() > 1e-3  # the comparison says something


def test_retrieval_scores_equal_lavis(tmp_path):
    mine, theirs, gallery = ours(), reduced.lavis_retrieval(), reduced.Gallery()
    theirs.load_from_pretrained(str(save(mine, tmp_path / "ours.pth")))
    task = OmegaConf.create({"k_test": 3, "rank_by": "itm+itc"})
    with torch.no_grad():
        wanted = theirs.compute_sim_matrix(gallery, task)
    found = mine.compute_sim_matrix(gallery, task)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), atol=1e-4, rtol=1e-4)


# --- losses ------------------------------------------------------------------------------------------------------------


def mask_every_second(ids: torch.Tensor, special: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of even number, with padding and without."""
    chosen = ids % 2 == 0
    for token in special:
        chosen &= ids != token
    return torch.where(chosen, 103, ids), torch.where(chosen, ids, -100)


@pytest.mark.parametrize("epoch", [0, 3], ids=["alpha 0", "alpha 0.4"])
def test_one_step_equals_lavis_albef_pretrain(tmp_path, monkeypatch, epoch):
    """ITC with a teacher unlike the student and its queue, ITM and MLM. Two samples: one possible negative each; equal masks."""
    theirs = reduced.lavis_pretrain(momentum=0.9)
    mine = ours(itc=OTHER_TEACHER)
    mine.load_state_dict({**theirs.state_dict(), "idx_queue": mine.idx_queue, "text_queue_keys": mine.text_queue_keys})
    mine.train()  # the teacher moves in training only; there is no dropout
    special = [theirs.tokenizer.cls_token_id, theirs.tokenizer.sep_token_id, theirs.tokenizer.pad_token_id]
    monkeypatch.setattr(type(theirs), "mask", lambda self, ids, *_, **__: mask_every_second(ids, special))
    monkeypatch.setattr(albef_pairs, "mask_tokens", lambda ids, *_: mask_every_second(ids, special))
    samples = {**batch(2), **STEP, "epoch": epoch, "iters": 0}
    wanted, found = theirs(samples), mine(samples)
    for name in ("loss_itc", "loss_itm", "loss_mlm", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
    found.loss.backward()
    wanted.loss.backward()
    theirs_grad = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in mine.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs_grad[name], atol=1e-5, rtol=1e-3, msg=name)


def test_without_momentum_itc_is_lavis_itc_of_the_batch():
    """The teacher's momentum is 0, so LAVIS's keys are the student's features; its first columns are the batch."""
    theirs, mine = reduced.lavis_pretrain(), ours()
    mine.load_state_dict({n: v for n, v in theirs.state_dict().items() if n in mine.state_dict()})
    samples = {**batch(4), **STEP}
    sims = theirs(samples).sims
    own = torch.arange(4)
    wanted = (F.cross_entropy(sims.sim_i2t[:, :4], own) + F.cross_entropy(sims.sim_t2i[:, :4], own)) / 2
    torch.testing.assert_close(mine(samples).loss_itc, wanted, atol=1e-5, rtol=1e-5)


def test_every_word_may_be_masked_and_nothing_else(monkeypatch):
    model, seen = ours(mlm={"mask_probability": 1.0}), []
    original = albef_pairs.mask_tokens
    monkeypatch.setattr(albef_pairs, "mask_tokens", lambda *given: seen.append(original(*given)) or seen[-1])
    samples = batch(3)
    model(samples)
    ids, mask = model.words(samples["text_input"])
    ids = ids[mask]  # as the step has them, without padding
    words = (ids != model.tokenizer.cls_token_id) & (ids != model.tokenizer.sep_token_id)
    assert torch.equal(seen[0][1], torch.where(words, ids, -100)) and (~words).sum() == 6


# --- first weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path) -> tuple[BertForMaskedLM, Path]:
    """transformers' BERT with random weights and token types, in a folder."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_()
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def test_folding_the_token_type_row_is_exact(bert):
    source, folder = bert
    settings = TextEncoder(init=str(folder), width=32, layers=3, fusion_layer=2, heads=2, dropout=0.0)
    encoder = build_text_encoder(settings, encoder_width=32).eval()
    ids = torch.randint(1000, 2000, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        wanted = source.bert(ids, mask, output_hidden_states=True).hidden_states[2]  # after the two text layers
        found = encoder.bert.read(ids, Reading.of(mask.bool(), ids.device), layers=slice(0, 2))
        torch.testing.assert_close(found, wanted[mask.bool()], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.cls(wanted), source.cls(wanted), atol=1e-5, rtol=1e-5)
    assert "embeddings.token_type_embeddings.weight" not in encoder.bert.state_dict()


def test_the_fusion_layers_start_from_berts_upper_layers(bert):
    source, folder = bert
    encoder = build_text_encoder(TextEncoder(init=str(folder), width=32, layers=3, fusion_layer=2, heads=2), encoder_width=32)
    name = "encoder.layer.2.attention.self.query.weight"
    assert torch.equal(encoder.bert.state_dict()[name], source.bert.state_dict()[name])


def test_folding_leaves_weights_without_token_types_alone():
    state = {"a.embeddings.position_embeddings.weight": torch.ones(3, 2)}
    assert fold_token_type(state)["a.embeddings.position_embeddings.weight"].sum() == 6


def test_load_from_pretrained_takes_a_checkpoint_with_or_without_a_teacher(tmp_path):
    source = ours(3, itc=TEACHER)
    for name, target in (("plain", ours(4)), ("teacher", ours(4, itc=TEACHER))):
        target.load_from_pretrained(str(save(source, tmp_path / f"{name}.pth")))
        assert torch.equal(target.itm_head.weight, source.itm_head.weight)
    assert torch.equal(target.vision_proj_m.weight, source.vision_proj.weight)
    assert not torch.equal(target.image_queue, source.image_queue)  # another run's features are no negatives of this one


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


# --- a step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("itc", [{"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2}, TEACHER], ids=["smooth", "teacher"])
@pytest.mark.parametrize("count", [1, 4])
def test_losses_and_gradients_are_finite(count, itc, autocast):
    model = ours(itc=itc, mlm={"mask_probability": 0.5}).train()
    for negatives in ("hardest", "sampled", "random"):
        model.settings.itm.negatives = negatives
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(batch(count, **STEP))
        output.loss.backward()
        assert all(math.isfinite(value) for name, value in output.stats.items() if name.startswith("loss"))
        assert output.image_features.dtype == torch.float32 and not output.image_features.requires_grad
    # every one: DDP waits for all of them, find_unused_parameters is off
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None or not torch.isfinite(gradient).all()]


def test_the_temperature_stays_in_its_range():
    model = ours()
    with torch.no_grad():
        model.temp.fill_(0.0)
    assert model(batch(2)).stats["temperature"] == pytest.approx(0.001)


def test_features_do_not_depend_on_padding():
    model = ours()
    alone, together = batch(1), batch(2)  # the second caption is longer
    with torch.no_grad():
        _, _, one = model.encode(model.inputs(alone))
        pairs, _, two = model.encode(model.inputs(together))
        assert pairs.text_ids.shape[1] > 5
        torch.testing.assert_close(one[1][0], two[1][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one[0][0], two[0][0], atol=1e-6, rtol=1e-5)
        short, _, _ = model.encode(model.inputs(alone))
        own = torch.zeros(1, dtype=torch.long)
        torch.testing.assert_close(short.itm_logits(own, own), pairs.itm_logits(own, own), atol=1e-5, rtol=1e-4)
        features = model.grit_features(together)
    assert torch.equal(features[0], two[0]) and torch.equal(features[1], two[1])


def test_captions_of_one_image_are_known_positives():
    model = ours()
    keys = torch.tensor([7, 3, 7, 5])
    _, encoded, _ = model.encode(model.inputs(batch(4, image_key=keys)))
    assert torch.equal(encoded.known_positive, keys[:, None] == keys[None, :])
    output = model(batch(4, image_key=keys, index=torch.arange(4)))
    asked = {(int(i), int(t)) for i, t in zip(output.verdicts["image"], output.verdicts["text"], strict=True)}
    assert (0, 2) not in asked and (2, 0) not in asked
    model.settings.ecm.same_image = False
    assert torch.equal(model.encode(model.inputs(batch(4, image_key=keys)))[1].known_positive, torch.eye(4, dtype=torch.bool))
    model.settings.ecm.same_image = True
    assert torch.equal(model.encode(model.inputs(batch(4)))[1].known_positive, torch.eye(4, dtype=torch.bool))  # nothing is known


def test_without_same_image_a_repeated_sample_is_still_known_to_match():
    """The stand-in of an unreadable sample is another row of its batch once more."""
    model = ours(ecm={"same_image": False})
    index, keys = torch.tensor([7, 3, 7, 5]), torch.tensor([1, 1, 1, 2])
    _, encoded, _ = model.encode(model.inputs(batch(4, index=index, image_key=keys)))
    assert torch.equal(encoded.known_positive, index[:, None] == index[None, :])


@pytest.mark.parametrize("itc", [{}, TEACHER], ids=["plain", "teacher"])
def test_similarities_are_fp32_under_autocast(itc):
    model = ours(itc=itc)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, encoded, features = model.encode(model.inputs(batch(4, **STEP)))
    similarities = [encoded.sim_i2t, encoded.sim_t2i, *([encoded.teacher_i2t, encoded.teacher_t2i] if itc else [])]
    assert all(s.dtype == torch.float32 for s in (*similarities, *features))
    if not itc:  # and nothing was rounded on the way from the features
        torch.testing.assert_close(encoded.sim_i2t.double(), features[0].double() @ features[1].double().T, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(model.encode(model.inputs(batch(4, **STEP)))[2][0], features[0])  # autocast did act


def test_smoothing_follows_smooth_when():
    def losses(when: str) -> list[float]:
        model = ours(itc={"smoothing": 0.5, "smooth_when": when})
        return [model(batch(4, grouped=grouped)).loss_itc.item() for grouped in (False, True)]

    random_order, grouped = losses("grouped")
    assert losses("always") == [pytest.approx(grouped)] * 2
    assert losses("never") == [pytest.approx(random_order)] * 2
    assert random_order != pytest.approx(grouped)


# --- the momentum teacher ------------------------------------------------------------------------------------------------


def test_the_teacher_follows_slowly_and_is_not_trained():
    model = ours(itc={"momentum_distillation": {"queue_size": 8, "momentum": 0.9}}).train()
    before = model.vision_proj_m.weight.clone()
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
    model(batch(4, **STEP)).loss.backward()
    torch.testing.assert_close(model.vision_proj_m.weight, 0.9 * before + 0.1 * model.vision_proj.weight.detach())
    of_teacher = [p for n, p in model.named_parameters() if "_m." in n]
    assert of_teacher and all(p.grad is None and not p.requires_grad for p in of_teacher)


def test_the_queue_takes_the_teachers_features_in_turn():
    model = ours(itc={"momentum_distillation": {"queue_size": 6, "momentum": 0.995}}).train()
    first = model.image_queue.clone()
    model(batch(4, **STEP, image_key=torch.tensor([1, 2, 3, 4])))
    assert int(model.queue_ptr) == 4
    assert model.idx_queue.tolist() == [[1, 2, 3, 4, -100, -100]]
    assert torch.equal(model.image_queue[:, 4:], first[:, 4:])
    assert not torch.isclose(model.image_queue[:, :4], first[:, :4]).all()
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(6))
    model(batch(4, **STEP, image_key=torch.tensor([5, 6, 7, 8])))  # runs over the end of the ring
    assert int(model.queue_ptr) == 2 and model.idx_queue.tolist() == [[7, 8, 3, 4, 5, 6]]
    _, encoded, _ = model.eval().encode(model.inputs(batch(2, **STEP, image_key=torch.tensor([4, 9]))))
    # further back in the queue: the same image, and the same texts, whose last batch lies in columns 4, 5, 0, 1
    assert encoded.known_positive[:, 2:].nonzero().tolist() == [[0, 3], [0, 4], [1, 5]]
    assert encoded.candidates == 2 and int(model.queue_ptr) == 2  # evaluation enqueues nothing
    model.settings.ecm.same_text = False
    _, encoded, _ = model.encode(model.inputs(batch(2, **STEP, image_key=torch.tensor([4, 9]))))
    assert encoded.known_positive[:, 2:].nonzero().tolist() == [[0, 3]]


def test_the_queue_takes_the_features_of_all_ranks_in_their_order(monkeypatch):
    """Else the ranks' queues would differ."""
    monkeypatch.setattr(momentum_teacher, "gather_in_rank_order", lambda own: torch.cat([own, own.flip(0)]))  # the other rank's
    model = ours(itc={"momentum_distillation": {"queue_size": 6, "momentum": 0.995}}).train()
    model(batch(2, **STEP, image_key=torch.tensor([7, 9])))
    assert model.idx_queue.tolist() == [[7, 9, 9, 7, -100, -100]] and int(model.queue_ptr) == 4
    for queue in (model.image_queue, model.text_queue):
        assert torch.equal(queue[:, :2], queue[:, [3, 2]]) and not torch.isclose(queue[:, 0], queue[:, 1]).all()


def test_a_queue_smaller_than_the_batch_is_refused():
    model = ours(itc={"momentum_distillation": {"queue_size": 3}}).train()
    with pytest.raises(UserError, match="queue_size is 3, smaller than a global batch"):
        model(batch(4, **STEP))


def test_load_model_builds_the_tiny_type():
    """Also here, where a module of ours came first and imported LAVIS."""
    from lavis.models import load_model

    assert isinstance(load_model("albef_mafa", "tiny"), AlbefMafa)
