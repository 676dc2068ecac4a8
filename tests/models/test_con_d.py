"""Con-D: it says what the model it was loaded from says, and nothing that is not fully loaded is ever used."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

import families
import reduced
from lavis_mafa.config.schema import con_d_block
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import GroundTruthDiscriminator, as_con_d, build_discriminator
from lavis_mafa.models.vit import resize_images
from lavis_mafa.processors import AlbefImageEvalProcessor

IMAGE, TEXT = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 3, 2, 0, 3])


def block(checkpoint: Path | str | None, arch: str = "albef_retrieval", precision: str = "fp32", **changes):
    con_d = {"arch": arch, "checkpoint": None if checkpoint is None else str(checkpoint), "precision": precision}
    return reduced.block(discriminator=con_d, **changes)


def save(model: torch.nn.Module, path: Path, **changes) -> Path:
    state = {**model.state_dict(), **changes}
    torch.save({"model": {n: v for n, v in state.items() if v is not None}}, path)
    return path


@torch.no_grad()
def of_ours(model, samples) -> torch.Tensor:
    pairs, _, _ = model.encode(model.inputs(samples))
    return pairs.itm_logits(IMAGE, TEXT).softmax(dim=1)[:, 1]


@torch.no_grad()
def of_lavis(model, samples) -> torch.Tensor:
    """As LAVIS's retrieval re-ranks: both modalities through the whole network."""
    text = model.tokenizer(samples["text_input"], padding="max_length", max_length=30, return_tensors="pt")
    images = model.visual_encoder.forward_features(samples["image"])[IMAGE]
    output = model.text_encoder(
        text.input_ids[TEXT],
        attention_mask=text.attention_mask[TEXT],
        encoder_hidden_states=images,
        encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long),
        return_dict=True,
    )
    return model.itm_head(output.last_hidden_state[:, 0]).softmax(dim=1)[:, 1]


@pytest.mark.parametrize("itc", [{}, {"momentum_distillation": {"queue_size": 8}}], ids=["plain", "with a teacher"])
def test_our_checkpoint_gives_the_models_own_probabilities(tmp_path, itc):
    model, samples = reduced.ours(itc=itc), reduced.batch(4)
    con_d = build_discriminator(block(save(model, tmp_path / "ours.pth"), "albef_mafa"))
    found = con_d.match_probability(samples, IMAGE, TEXT)
    torch.testing.assert_close(found, of_ours(model, samples), atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3 and not found.requires_grad


def test_a_lavis_checkpoint_gives_lavis_probabilities(tmp_path):
    model, samples = reduced.lavis_retrieval(), reduced.batch(4)
    con_d = build_discriminator(block(save(model, tmp_path / "lavis.pth")))
    found = con_d.match_probability(samples, IMAGE, TEXT)
    torch.testing.assert_close(found, of_lavis(model, samples), atol=1e-5, rtol=1e-4)


def test_safetensors_are_read_as_well(tmp_path):
    from safetensors.torch import save_model

    model, samples = reduced.lavis_retrieval(), reduced.batch(4)
    save_model(model, str(tmp_path / "lavis.safetensors"))
    found = build_discriminator(block(tmp_path / "lavis.safetensors")).match_probability(samples, IMAGE, TEXT)
    torch.testing.assert_close(found, of_lavis(model, samples), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_another_resolution_is_resized(tmp_path):
    model = reduced.lavis_retrieval(image_size=48)
    con_d = build_discriminator(block(save(model, tmp_path / "larger.pth")))
    assert con_d.match_probability(reduced.batch(4), IMAGE, TEXT).shape == (6,)
    model_block = block(save(model, tmp_path / "larger.pth"))
    model_block.discriminator.image_size = 48
    samples = {**reduced.batch(4), "image": torch.randn(4, 3, 48, 48)}
    found = build_discriminator(model_block).match_probability(samples, IMAGE, TEXT)
    torch.testing.assert_close(found, of_lavis(model, samples), atol=1e-5, rtol=1e-4)


def test_bf16_is_close_to_fp32(tmp_path):
    path, samples = save(reduced.lavis_retrieval(), tmp_path / "lavis.pth"), reduced.batch(4)
    exact = build_discriminator(block(path)).match_probability(samples, IMAGE, TEXT)
    fast = build_discriminator(block(path, precision="bf16"))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = fast.match_probability(samples, IMAGE, TEXT)
        assert found.dtype == torch.float32 and 0 <= found.min() and found.max() <= 1
        torch.testing.assert_close(found, exact, atol=0.03, rtol=0)


def test_con_d_is_no_part_of_the_model_that_uses_it(tmp_path):
    path = save(reduced.lavis_retrieval(), tmp_path / "lavis.pth")
    model = reduced.ours(ecm={"enabled": True, "threshold": 0.5, "ambiguous_from": 0.5})
    names = set(model.state_dict()), len(list(model.parameters())), len(list(model.modules()))
    con_d = build_discriminator(block(path))
    model.set_discriminator(con_d)
    assert names == (set(model.state_dict()), len(list(model.parameters())), len(list(model.modules())))
    before = {n: v.clone() for n, v in con_d.network.state_dict().items()}
    model.train()
    assert not con_d.network.training and not any(p.requires_grad for p in con_d.network.parameters())
    model(reduced.batch(4, index=torch.arange(4))).loss.backward()
    assert all(torch.equal(before[n], v) for n, v in con_d.network.state_dict().items())
    assert all(p.grad is None for p in con_d.network.parameters())


def test_con_d_reads_the_batch_that_the_model_reads(tmp_path):
    """Its verdicts in a step are its probabilities of the pairs that were mined."""
    model = reduced.ours(ecm={"enabled": True})
    con_d = build_discriminator(block(save(reduced.lavis_retrieval(), tmp_path / "lavis.pth")))
    model.set_discriminator(con_d)
    samples = reduced.batch(4, index=torch.tensor([10, 11, 12, 13]))
    verdicts = model(samples).verdicts
    asked = con_d.match_probability(samples, verdicts["image"] - 10, verdicts["text"] - 10)
    torch.testing.assert_close(verdicts["probability"], asked)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itm_head.weight": None, "itm_head.bias": None}, r"no matching head \(itm_head\), so it cannot judge pairs"),
        ({"itm_head.weight": torch.zeros(2, 5)}, r"1 other size: itm_head.weight \[2, 5\] \(wanted \[2, 32\]\)"),
        ({"visual_encoder.blocks.0.norm1.weight": None}, "1 missing: visual_encoder.blocks.0.norm1.weight"),
        ({"visual_encoder.another": torch.zeros(1)}, "1 left over: visual_encoder.another"),
    ],
)
def test_a_partly_matching_checkpoint_lists_the_keys(tmp_path, changes, message):
    path = save(reduced.lavis_retrieval(), tmp_path / "partly.pth", **changes)
    with pytest.raises(UserError, match=message):
        build_discriminator(block(path))


def test_a_checkpoint_without_a_matching_head_is_refused(tmp_path):
    """As BERT's or a ViT's own weights: nothing of it may serve as Con-D."""
    torch.save({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="no matching head"):
        build_discriminator(block(tmp_path / "vit.pth"))


def test_no_checkpoint_is_never_an_untrained_con_d(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        build_discriminator(block(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="checkpoint is null"):
        build_discriminator(block(None))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_file_that_runs_code_is_refused_unread(tmp_path, how):
    mark, path = tmp_path / "it ran", tmp_path / "evil.pth"
    content = {"model": {**reduced.lavis_retrieval().state_dict(), "x": Evil(mark)}}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"x": Evil(mark)}))
    with pytest.raises(UserError, match="cannot be loaded as plain weights"):
        build_discriminator(block(path))
    assert not mark.exists()


def test_a_harmless_object_beside_the_weights_is_refused_with_advice(tmp_path):
    torch.save({"model": {}, "config": argparse.Namespace(a=1)}, tmp_path / "namespace.pth")
    with pytest.raises(UserError, match="save its state dict alone"):
        build_discriminator(block(tmp_path / "namespace.pth"))


# --- texts beyond the batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.REDUCED)
@pytest.mark.parametrize("longest_first", [True, False])
def test_texts_beyond_the_batch_are_judged_as_those_of_it(name, longest_first):
    family = families.REDUCED[name]
    con_d, samples = as_con_d(family.ours(3)), family.batch(4)
    texts = sorted(samples["text_input"], key=len, reverse=longest_first)
    wanted = con_d.match_probability({**samples, "text_input": texts}, IMAGE, TEXT)
    found = con_d.match_probability({**samples, "text_input": texts[:2], "more_texts": texts[2:]}, IMAGE, TEXT)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# --- images of another size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.REDUCED)
def test_a_con_d_of_another_size_sees_smaller_images(tmp_path, name):
    family = families.REDUCED[name]
    side = family.SIZES["image_encoder"]["image_size"] // 2
    judge, samples = family.ours(3, image_encoder={"image_size": side}), family.batch(4, index=torch.arange(4))
    named = {"arch": f"{name}_mafa", "checkpoint": str(save(judge, tmp_path / "small.pth")), "precision": "fp32", "image_size": side}
    model = family.ours(ecm={"enabled": True}, discriminator=named)
    model.set_discriminator(build_discriminator(model.settings, model))
    found = model.discriminator.match_probability(samples, IMAGE, TEXT)
    wanted = of_ours(judge, {**samples, "image": resize_images(samples["image"], side)})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert model(samples).verdicts["probability"].isfinite().all()


def test_resized_images_are_nearly_what_the_processors_make():
    """Of a picture with edges, by PIL's own filter; bilinear ones are several times as far off."""
    picture = Image.fromarray((torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    picture = picture.resize((256, 256), Image.Resampling.NEAREST)
    small, large = AlbefImageEvalProcessor(32)(picture), AlbefImageEvalProcessor(64)(picture)
    assert (resize_images(large[None], 32)[0] - small).pow(2).mean().sqrt() < 0.05
    assert resize_images(small[None], 32).data_ptr() == small.data_ptr()


@pytest.mark.parametrize("trained", [16, 48, 32])
def test_a_con_d_that_was_trained_at_another_size_is_told_of(tmp_path, caplog, trained):
    """At 32, which it sees: nothing to tell."""
    path = save(reduced.ours(image_encoder={"image_size": trained}), tmp_path / "con_d.pth")
    build_discriminator(block(path, "albef_mafa"))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if trained == 32:
        assert said == []
        return
    [text] = said
    assert str(path) in text and f"trained on images of {trained} x {trained} pixels, but sees 32 x 32" in text
    assert f"model.discriminator.image_size: {trained}" in text


def test_its_size_has_one_key(tmp_path):
    settings = block(tmp_path / "con_d.pth")
    settings.discriminator.image_encoder = {"image_size": 16}
    with pytest.raises(UserError, match="image_encoder.image_size is 16, but .* is model.discriminator.image_size"):
        con_d_block(settings)
    settings.discriminator.image_encoder, settings.discriminator.image_size = None, 16
    assert con_d_block(settings).image_encoder.image_size == 16 and settings.image_encoder.image_size == 32
    settings.discriminator.model_type = "tiny"
    assert con_d_block(settings).image_encoder.image_size == 16


# --- ground truth ------------------------------------------------------------------------------------------------------


def test_ground_truth_is_the_truth():
    truth = GroundTruth.from_pairs([("dog", "poodle"), ("dog", "terrier"), ("poodle", "poodle"), ("cat", "tabby")])
    concepts, texts = ["poodle", "terrier", "tabby", "unknown"], ["dog", "poodle", "cat", "never seen"]
    samples = {
        "concept": torch.tensor([truth.concept_id(c) for c in concepts]),
        "text_key": torch.tensor([truth.text_key(t) for t in texts]),
    }
    image, text = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    found = GroundTruthDiscriminator(truth).match_probability(samples, image, text).view(4, 4)
    assert found.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    samples["text_key"], samples["more_texts"] = samples["text_key"][:2], ["cat", "a cat"]  # one is a caption of the data
    found = GroundTruthDiscriminator(truth).match_probability(samples, image, text).view(4, 4)
    assert found.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert build_discriminator(block(None, "ground_truth")) is None  # the task sets it: it knows the data


# --- every architecture's file ---------------------------------------------------------------------------------------------

BLIP, BLIP2 = families.REDUCED["blip"], families.REDUCED["blip2"]
ARCHS = {  # who writes such a file, and a weight of the text side as the file names it and as the message does
    "albef_retrieval": (reduced, reduced.lavis_retrieval, "text_encoder.encoder.layer.2.crossattention.self.key.weight"),
    "albef_mafa": (reduced, reduced.ours, "text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"),
    "blip_image_text_matching": (BLIP, BLIP.lavis_itm, "text_encoder.encoder.layer.1.crossattention.self.key.weight"),
    "blip_retrieval": (BLIP, BLIP.lavis_retrieval, "text_encoder.encoder.layer.1.crossattention.self.key.weight"),
    "blip_mafa": (BLIP, BLIP.ours, "text_encoder.encoder.layer.1.crossattention.self.key.weight"),
    "blip2": (BLIP2, BLIP2.lavis_stage_1, "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"),
    "blip2_image_text_matching": (BLIP2, BLIP2.lavis_matching, "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"),
    "blip2_mafa": (BLIP2, BLIP2.ours, "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"),
}


def test_no_architecture_is_forgotten():
    from lavis_mafa.config.schema import FAMILIES

    assert ARCHS.keys() == FAMILIES.keys() - {"ground_truth"}


@pytest.mark.parametrize("arch", ARCHS)
def test_what_does_not_fit_is_named_with_its_size(tmp_path, arch):
    family, write, name = ARCHS[arch]
    state = write().state_dict()
    assert name in state
    wanted = list(state[name].shape)
    shown = name.replace("text_encoder.encoder.", "text_encoder.bert.encoder.") if family is reduced else name
    another = name.replace("key", "another")
    broken = {
        f"1 missing: {shown}.": {n: v for n, v in state.items() if n != name},
        f"1 other size: {shown} [7, 5] (wanted {wanted}).": {**state, name: torch.zeros(7, 5)},
        f"1 left over: {shown.replace('key', 'another')}.": {**state, another: torch.zeros(1)},
        "2 other size: itm_head.weight": {**state, "itm_head.weight": torch.zeros(3, 5), "itm_head.bias": torch.zeros(3)},
        "has no matching head (itm_head)": {n: v for n, v in state.items() if not n.startswith("itm_head.")},
    }
    for message, content in broken.items():
        path = tmp_path / "broken.pth"
        torch.save({"model": content}, path)
        with pytest.raises(UserError) as refused:
            build_discriminator(family.block(discriminator={"arch": arch, "checkpoint": str(path), "precision": "fp32"}))
        assert message in str(refused.value) and str(path) in str(refused.value)
