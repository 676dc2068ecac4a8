"""A BLIP-2 Con-D: it says what LAVIS's matching head says, and runs the model's frozen image encoder when that is its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import reduced as albef
import reduced_blip2 as reduced
from lavis_mafa.errors import UserError
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.con_d import ConD, _trained_side, build_discriminator

batch, ours, save = reduced.batch, reduced.ours, reduced.save
IMAGE, TEXT = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 3, 2, 0, 3])


def build(checkpoint: Path, host: Any = None, arch: str = "blip2", precision: str = "fp32", con_d: Any = None, **changes: Any) -> Any:
    """Con-D for a model with the settings ``changes``; ``con_d`` are more settings of the block itself."""
    named = {"arch": arch, "checkpoint": str(checkpoint), "precision": precision, **(con_d or {})}
    return build_discriminator(reduced.block(discriminator=named, **changes), host)


@torch.no_grad()
def in_step_of(host: Any, con_d: Any, samples: dict[str, Any]) -> Tensor:
    """What it says in a step of ``host``."""
    pairs, _, _ = host.encode(host.inputs(samples))
    return con_d.in_step(False, pairs.vit_states).match_probability(samples, IMAGE, TEXT)


@torch.no_grad()
def of_lavis(model: Any, samples: dict[str, Any]) -> Tensor:
    """LAVIS's two logits, one pair after the other."""
    logits = []
    for image, text in zip(IMAGE, TEXT, strict=True):
        pair = {"image": samples["image"][image : image + 1], "text_input": samples["text_input"][text]}
        logits.append(reduced.OfflineMatching.forward(model, pair)[0])
    return torch.stack(logits).softmax(dim=1)[:, 1]


def close(found: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def matching() -> Any:
    return reduced.lavis_matching()


@pytest.fixture
def checkpoint(tmp_path, matching) -> Path:
    """LAVIS's, whole."""
    return save(matching, tmp_path / "lavis.pth")


@pytest.fixture
def host(matching) -> Blip2Mafa:
    """A model that has Con-D's image encoder, frozen, and a Q-Former of its own."""
    model = ours(5)
    model.visual_encoder.load_state_dict(matching.visual_encoder.state_dict())
    return model


# --- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["blip2", "blip2_image_text_matching"])
def test_a_lavis_checkpoint_gives_lavis_probabilities(checkpoint, matching, arch):
    found = build(checkpoint, arch=arch).match_probability(batch(4), IMAGE, TEXT)
    close(found, of_lavis(matching, batch(4)))
    assert found.std() > 0.02 and found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_our_checkpoint_gives_the_models_own_probabilities(tmp_path, freeze):
    model = ours(image_encoder={"freeze": freeze})
    con_d = build(save(model, tmp_path / "ours.pth"), arch="blip2_mafa", image_encoder={"freeze": freeze})
    found = con_d.match_probability(batch(4), IMAGE, TEXT)
    with torch.no_grad():
        pairs, _, _ = model.encode(model.inputs(batch(4)))
        close(found, pairs.itm_logits(IMAGE, TEXT).softmax(dim=1)[:, 1])


def test_padding_does_not_matter(checkpoint):
    con_d, zero = build(checkpoint), torch.zeros(1, dtype=torch.long)
    alone = con_d.match_probability(batch(1), zero, zero)
    close(con_d.match_probability(batch(4), IMAGE, TEXT)[:1], alone)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["own encoder", "shared"])
def test_bf16_is_close_to_fp32(checkpoint, matching, host, shared, autocast):
    samples = batch(4)
    con_d = build(checkpoint, host if shared else None, precision="bf16")
    assert con_d.shared is shared
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = in_step_of(host, con_d, samples)
    assert found.dtype == torch.float32 and 0 <= found.min() and found.max() <= 1
    wanted = of_lavis(matching, samples)
    close(found, wanted, atol=0.05)
    assert not torch.equal(found, wanted)


def test_verdicts_of_a_step_are_its_probabilities_of_what_was_mined(checkpoint, host):
    alone = build(checkpoint)
    for con_d in (build(checkpoint, host), alone):
        host.settings.ecm.enabled = True
        host.set_discriminator(con_d)
        samples = batch(4, index=torch.tensor([10, 11, 12, 13]))
        verdicts = host(samples).verdicts
        close(verdicts["probability"], alone.match_probability(samples, verdicts["image"] - 10, verdicts["text"] - 10))
        assert samples.keys() == {"image", "text_input", "index"}  # the caller's batch is left as it was


@pytest.mark.parametrize("shared", [False, True], ids=["own encoder", "shared"])
def test_it_is_no_part_of_the_model_that_uses_it(checkpoint, host, shared):
    host.settings.ecm.enabled = True
    names = set(host.state_dict()), len(list(host.parameters())), len(list(host.modules()))
    con_d = build(checkpoint, host if shared else None)
    host.set_discriminator(con_d)
    assert names == (set(host.state_dict()), len(list(host.parameters())), len(list(host.modules())))
    assert (con_d.network.visual_encoder is None) == shared
    parts = [con_d.network]
    before = [{n: v.clone() for n, v in part.state_dict().items()} for part in parts]
    host.train()
    host(batch(4, index=torch.arange(4))).loss.backward()
    for part, old in zip(parts, before, strict=True):
        assert not any(module.training for module in part.modules())
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())
        assert all(torch.equal(old[n], v) for n, v in part.state_dict().items())


# --- one image encoder or two --------------------------------------------------------------------------------------------


def test_equal_frozen_weights_are_shared(checkpoint, matching, host):
    con_d = build(checkpoint, host)
    assert con_d.shared and con_d.network.visual_encoder is None
    with torch.no_grad():
        states = host.visual_encoder(batch(4)["image"])
    in_step = con_d.in_step(False, states)
    found = in_step.match_probability({"text_input": batch(4)["text_input"]}, IMAGE, TEXT)  # no image needed
    assert con_d.vit_states is None  # nothing of a step is kept
    close(found, of_lavis(matching, batch(4)))


def test_from_config_gives_con_d_the_models_encoder(tmp_path, checkpoint, host):
    start = save(host, tmp_path / "start.pth")
    named = {"pretrained": str(start), "discriminator": {"arch": "blip2", "checkpoint": str(checkpoint)}, "ecm": {"enabled": True}}
    model = Blip2Mafa.from_config(OmegaConf.merge(OmegaConf.create(reduced.SIZES), named))
    assert isinstance(model.discriminator, ConD) and model.discriminator.shared
    assert torch.isfinite(model(batch(4)).loss)


def test_weights_that_differ_in_one_value_are_not_shared(checkpoint, matching, host):
    with torch.no_grad():
        host.visual_encoder.blocks[1].mlp.fc2.bias[3] += 1e-3
    con_d = build(checkpoint, host)
    assert not con_d.shared and con_d.network.visual_encoder is not None
    samples = batch(4)
    close(in_step_of(host, con_d, samples), of_lavis(matching, samples))


def test_an_encoder_in_training_is_not_shared(checkpoint, matching):
    model = ours(5, image_encoder={"freeze": False})
    model.visual_encoder.load_state_dict(matching.visual_encoder.state_dict())
    con_d = build(checkpoint, model, image_encoder={"freeze": False})
    assert not con_d.shared
    assert con_d.network.visual_encoder.frozen and not con_d.network.visual_encoder.training
    close(con_d.match_probability(batch(4), IMAGE, TEXT), of_lavis(matching, batch(4)))


def test_equal_in_the_models_precision_is_equal(checkpoint, matching):
    """fp32 weights in the file, bf16 in the model, which was loaded from such a file."""
    model = ours(5, image_encoder={"precision": "bf16"})
    model.visual_encoder.load_state_dict(matching.visual_encoder.state_dict())
    assert build(checkpoint, model, image_encoder={"precision": "bf16"}).shared


def test_a_checkpoint_without_an_encoder_takes_the_frozen_one(tmp_path, matching, host):
    cut = save(matching, tmp_path / "cut.pth", without="visual_encoder.")
    with pytest.raises(UserError, match="none of its size that is frozen as model.image_encoder.init gives it"):
        build(cut, host)  # its weights came from elsewhere: nothing says that Con-D was trained on them
    host.visual_encoder.as_published = True
    con_d = build(cut, host)
    host.visual_encoder.as_published = False
    assert con_d.shared and con_d.network.visual_encoder is None
    samples = batch(4)
    close(in_step_of(host, con_d, samples), of_lavis(matching, samples))


def test_without_any_encoder_its_file_must_be_named(tmp_path, matching):
    cut = save(matching, tmp_path / "cut.pth", without="visual_encoder.")
    for model in (None, ours(image_encoder={"freeze": False}), albef.ours()):
        with pytest.raises(UserError, match="holds no image encoder.*model.discriminator.image_encoder.init"):
            build(cut, model)
    torch.save(matching.visual_encoder.state_dict(), tmp_path / "vit.pth")
    con_d = build(cut, con_d={"image_encoder": {"init": str(tmp_path / "vit.pth")}})
    close(con_d.match_probability(batch(4), IMAGE, TEXT), of_lavis(matching, batch(4)))


def test_an_encoder_that_is_named_is_the_one_that_runs(tmp_path, matching):
    """Also where the model has another frozen one to offer."""
    cut = save(matching, tmp_path / "cut.pth", without="visual_encoder.")
    torch.save(matching.visual_encoder.state_dict(), tmp_path / "vit.pth")
    other = ours(9)
    con_d = build(cut, other, con_d={"image_encoder": {"init": str(tmp_path / "vit.pth")}})
    samples = batch(4)
    close(in_step_of(other, con_d, samples), of_lavis(matching, samples))


def test_a_frozen_encoder_of_another_width_is_not_taken(tmp_path):
    wide = ours(3, image_encoder={"width": 48})
    cut = save(wide, tmp_path / "cut.pth", without="visual_encoder.")
    with pytest.raises(UserError, match="holds no image encoder"):
        build(cut, ours(), con_d={"image_encoder": {"width": 48}})


def test_the_models_encoder_has_the_models_size(tmp_path, checkpoint, matching, host):
    """A smaller Con-D beside a frozen encoder that runs anyway would cost more, not less."""
    cut = save(matching, tmp_path / "cut.pth", without="visual_encoder.")
    host.visual_encoder.as_published = True
    for path in (checkpoint, cut):
        with pytest.raises(UserError, match=r"image_size is 14, but .* another size \(28\) and runs anyway; allowed here: null"):
            build(path, host, con_d={"image_size": 14})


def test_an_encoder_from_its_own_file_is_told_of_when_it_is_resized(tmp_path, matching, caplog):
    cut = save(matching, tmp_path / "cut.pth", without="visual_encoder.")
    torch.save(matching.visual_encoder.state_dict(), tmp_path / "vit.pth")
    con_d = build(cut, con_d={"image_encoder": {"init": str(tmp_path / "vit.pth")}, "image_size": 14})
    [text] = [record.getMessage() for record in caplog.records if "trained on images" in record.getMessage()]
    assert "28 x 28 pixels, but sees 14 x 14" in text
    assert con_d.network.visual_encoder.pos_embed.shape[1] == 1 + 4
    published = dataclasses.replace(con_d.network.settings.image_encoder, init="eva_clip_g", patch_size=14)
    assert _trained_side({}, published) == 16 * 14  # which is not downloaded for that


# --- sizes -----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_resolution_is_resized(tmp_path):
    larger = reduced.lavis_matching(3, image_size=42)
    path = save(larger, tmp_path / "larger.pth")
    resized = build(path)
    assert resized.network.visual_encoder.pos_embed.shape[1] == 17
    assert resized.match_probability(batch(4), IMAGE, TEXT).isfinite().all()
    exact = build(path, image_encoder={"image_size": 42})
    samples = batch(4, size=42)
    close(exact.match_probability(samples, IMAGE, TEXT), of_lavis(larger, samples))
    model = ours()
    model.load_from_pretrained(str(path))  # resized in the same way
    shared = build(path, model)
    assert shared.shared
    samples = batch(4)
    close(in_step_of(model, shared, samples), resized.match_probability(samples, IMAGE, TEXT))


def test_a_qformer_of_another_size_is_refused_with_both_sizes(tmp_path):
    path = save(ours(qformer={"width": 32}), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match=r"other size: .*query_tokens \[1, 3, 32\] \(wanted \[1, 3, 48\]\)"):
        build(path)
    con_d = build(path, con_d={"qformer": {"width": 32}})
    assert con_d.match_probability(batch(4), IMAGE, TEXT).shape == (6,)


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        ("itm_head.", {}, "no matching head"),
        ("ln_vision.bias", {}, "1 missing: ln_vision.bias"),
        ("visual_encoder.blocks.1.norm2.", {}, "2 missing: visual_encoder.blocks.1.norm2.weight, visual_encoder.blocks.1.norm2.bias"),
        ((), {"visual_encoder.another": torch.zeros(1)}, "1 left over: visual_encoder.another"),
    ],
)
def test_a_partly_matching_checkpoint_lists_the_keys(tmp_path, matching, host, without, changes, message):
    path = save(matching, tmp_path / "partly.pth", without, **changes)
    with pytest.raises(UserError, match=message):
        build(path)
    with pytest.raises(UserError, match=message):
        build(path, host)


def test_an_albef_may_ask_a_blip2(tmp_path):
    """Of its own size: another family's defaults, overridden block by block."""
    small = {"image_size": albef.SIZE, "patch_size": 8, "width": 24, "depth": 1, "heads": 2}
    image_encoder = small | {"mlp_ratio": 4.0, "freeze": False}
    judge = ours(4, image_encoder=image_encoder, max_text_length=16, tokenizer=albef.SIZES["tokenizer"])
    named = {
        "arch": "blip2",
        "model_type": "tiny",
        "checkpoint": str(save(judge, tmp_path / "judge.pth")),
        "precision": "fp32",
        "image_encoder": {k: v for k, v in small.items() if k != "image_size"},
        "qformer": {key: reduced.SIZES["qformer"][key] for key in ("width", "layers", "heads", "queries")},
    }
    model = albef.AlbefMafa.from_config(OmegaConf.create({**albef.SIZES, "ecm": {"enabled": True}, "discriminator": named}))
    assert isinstance(model.discriminator, ConD) and not model.discriminator.shared
    samples = albef.batch(4, index=torch.arange(4))
    verdicts = model(samples).verdicts
    with torch.no_grad():
        pairs, _, _ = judge.encode(judge.inputs(samples))
        wanted = pairs.itm_logits(verdicts["image"], verdicts["text"]).softmax(dim=1)[:, 1]
    close(verdicts["probability"], wanted)
