"""Checkpoints as people have them: taken whole by every way of loading, or named by what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import BlipForImageTextRetrieval

import families
import reduced_opt as STAGE_2
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import ImageEncoder
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import build_discriminator, load_con_d
from lavis_mafa.models.encoders import build_image_encoder
from lavis_mafa.weights import read_weights
from releases import hf_blip2

pytestmark = pytest.mark.slow

ALBEF, BLIP, BLIP2 = (families.REDUCED[name] for name in ("albef", "blip", "blip2"))
MODELS = {"albef": ALBEF.ours, "blip": BLIP.ours, "blip2": BLIP2.ours, "opt": STAGE_2.ours}
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def as_file(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def sharded(state: State, folder: Path, kind: str) -> Path:
    """As transformers and accelerate write what exceeds a size: parts, and an index of them."""
    names = sorted(state)
    parts = {f"part-{i}-of-2.{kind}": names[i::2] for i in range(2)}
    for part, own in parts.items():
        tensors = {name: state[name].clone().contiguous() for name in own}
        save_file(tensors, folder / part) if kind == "safetensors" else torch.save(tensors, folder / part)
    index = folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}))
    return index


def folder_of(state: State, folder: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder


LAYOUTS = {
    "ours, LAVIS's": lambda state, folder: as_file({"model": state, "optimizer": {"state": {0: {}}}, "epoch": 3}, folder),
    "the state dict alone": as_file,
    "DDP": lambda state, folder: as_file({"model": prefixed("module.", state)}, folder),
    "plain torch": lambda state, folder: as_file({"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}}, folder),
    "Lightning": lambda state, folder: as_file({"state_dict": prefixed("model.", state), "hyper_parameters": {}, "loops": {}}, folder),
    "compiled, below DDP": lambda state, folder: as_file(prefixed("module._orig_mod.", state), folder),
    "a trainer's own key": lambda state, folder: as_file({"weights_of_epoch_3": state, "step": 7}, folder),
    "sharded safetensors": lambda state, folder: sharded(state, folder, "safetensors"),
    "sharded bin": lambda state, folder: sharded(state, folder, "bin"),
    "a folder": folder_of,
    "a folder of parts": lambda state, folder: sharded(prefixed("model.module.", state), folder, "safetensors").parent,
    "safetensors by another name": lambda state, folder: (
        folder_of(state, folder) and (folder / "model.safetensors").rename(folder / "a.bin")
    ),
}


def loaded(family: str, how: str, path: Path) -> Any:
    model = MODELS[family](11)
    getattr(model, how)(str(path))
    return model


def same(model: Any, state: State) -> bool:
    return all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", MODELS)
def test_every_way_of_loading_takes_every_weight_or_refuses(tmp_path, family):
    state, target = MODELS[family](2).state_dict(), MODELS[family](11)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    lost = "opt_proj.weight" if family == "opt" else "itm_head.weight"
    other, what = ("albef", "is an ALBEF") if family != "albef" else ("blip2", "is a BLIP-2 stage-1")
    for wrong, message in (
        ({n: v for n, v in state.items() if n != lost}, f"missing: {lost}"),
        ({**state, "another.weight": torch.zeros(1)}, "left over: another.weight"),
        ({**state, lost: torch.zeros(7, 5)}, rf"other size: {lost} \[7, 5\]"),
        (MODELS[other](2).state_dict(), what),
        ({"weight": torch.zeros(2)}, "is something else, .* It has weight."),
    ):
        path = str(as_file({"model": wrong}, tmp_path))
        for load in (target.load_from_pretrained, target.load_checkpoint):
            with pytest.raises(UserError, match=message):
                load(path)
        assert same(target, before), "nothing of a refused file may stay"
    path = as_file({"model": state}, tmp_path)
    assert same(loaded(family, "load_from_pretrained", path), state) and same(loaded(family, "load_checkpoint", path), state)


def test_lavis_load_model_takes_a_checkpoint_whole_or_not_at_all(tmp_path):
    from lavis.models import load_model

    with pytest.raises(UserError, match="is an ALBEF checkpoint, but blip2_mafa needs"):
        load_model("blip2_mafa", "tiny", checkpoint=str(as_file({"model": ALBEF.ours().state_dict()}, tmp_path)))
    with pytest.raises(UserError, match="holds no weights; there is: epoch"):
        load_model("blip2_mafa", "tiny", checkpoint=str(as_file({"epoch": 3}, tmp_path)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["albef", "opt"])
def test_layouts_that_people_have(tmp_path, family, layout):
    state = MODELS[family](2).state_dict()
    path = LAYOUTS[layout](state, tmp_path)
    assert same(loaded(family, "load_checkpoint", path), state)
    names_only = read_weights(path, names_only=True)
    assert {n: v.shape for n, v in names_only.items()} == {n: v.shape for n, v in state.items()}
    assert all(value.is_meta for value in names_only.values())


@pytest.mark.parametrize("layout", ["Lightning", "sharded safetensors"])
def test_each_place_that_reads_a_checkpoint_knows_the_layouts(tmp_path, layout):
    state = ALBEF.lavis_retrieval().state_dict()
    path = LAYOUTS[layout](state, tmp_path)
    con_d = build_discriminator(ALBEF.block(discriminator={"arch": "albef_retrieval", "checkpoint": str(path), "precision": "fp32"}))
    assert torch.equal(con_d.network.itm_head.weight, state["itm_head.weight"])
    assert torch.equal(load_con_d(ALBEF.block(), str(path), torch.device("cpu")).itm_head.weight, state["itm_head.weight"])
    encoder = build_image_encoder(ImageEncoder(**{**ALBEF.SIZES["image_encoder"], "init": str(path)}))
    assert torch.equal(encoder.cls_token, state["visual_encoder.cls_token"])
    first = LAYOUTS[layout](BLIP2.lavis_stage_1().state_dict(), tmp_path)
    assert loaded("opt", "load_stage_1", first) is not None


def test_of_a_tied_weight_one_name_is_enough(tmp_path):
    """safetensors leave the second name out."""
    state = BLIP.ours(2).state_dict()
    one = {name: value for name, value in state.items() if not name.startswith("text_decoder.bert.embeddings.")}
    assert len(one) < len(state) and same(loaded("blip", "load_checkpoint", as_file(one, tmp_path)), state)


# --- fine-tuned for one job ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "theirs", "head"),
    [("albef", ALBEF.lavis_retrieval, "text_encoder.cls"), ("blip", BLIP.lavis_retrieval, "text_decoder")],
)
def test_a_file_for_retrieval_serves_all_that_needs_no_language_head(tmp_path, caplog, family, theirs, head):
    caplog.set_level("INFO")
    state = theirs().state_dict()
    path = as_file({"model": state}, tmp_path)
    model = loaded(family, "load_checkpoint", path)
    assert head in caplog.text and "keeps its first values" in caplog.text
    assert torch.equal(model.itm_head.weight, state["itm_head.weight"])
    samples = ALBEF.batch(2)
    feature = torch.nn.functional.normalize(model.vision_proj(model.visual_encoder.forward_features(samples["image"])[:, 0]), dim=-1)
    torch.testing.assert_close(model.grit_features(samples)[0], feature)
    block = families.REDUCED[family].block(pretrained=str(path))
    check_kinds(block, evaluate=True)
    with pytest.raises(UserError, match=f"has no .*{re.escape(head)}.*at random"):
        check_kinds(block)
    if family == "albef":
        block.mlm.mask_probability = 0.0
        check_kinds(block)
    half = {**state, f"{head}.half": torch.zeros(1)}
    with pytest.raises(UserError, match="does not fit"):
        loaded(family, "load_checkpoint", as_file(half, tmp_path))


def test_a_stage_1_without_its_frozen_image_encoder(tmp_path):
    state = {n: v for n, v in BLIP2.lavis_stage_1().state_dict().items() if not n.startswith("visual_encoder.")}
    path = as_file({"model": state}, tmp_path)
    for family, how in (("blip2", "load_checkpoint"), ("opt", "load_stage_1")):
        with pytest.raises(UserError, match="name that encoder's file in model.image_encoder.init"):
            loaded(family, how, path)


# --- Hugging Face ----------------------------------------------------------------------------------------------------------


def hf_blip() -> BlipForImageTextRetrieval:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    text = {**sizes, "vocab_size": 30524, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {**sizes, "image_size": ALBEF.SIZE, "patch_size": ALBEF.PATCH, "layer_norm_eps": 1e-6}
    torch.manual_seed(4)
    config = BlipConfig.from_text_vision_configs(*map(BlipConfig_part, ("text", "vision"), (text, vision)), image_text_hidden_size=16)
    return BlipForImageTextRetrieval(config).eval()


def BlipConfig_part(which: str, sizes: dict[str, Any]) -> Any:  # noqa: N802
    from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

    return (BlipTextConfig if which == "text" else BlipVisionConfig)(**sizes)


def test_transformers_blip_matches_as_it_does_there(tmp_path):
    theirs = hf_blip()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    theirs.save_pretrained(tmp_path)
    samples, mine = ALBEF.batch(3), BLIP.ours(5)
    mine.load_from_pretrained(str(tmp_path))
    ids, mask = mine.words(samples["text_input"])
    with torch.no_grad():
        own = torch.arange(3)
        found = mine.encode(mine.inputs(samples))[0].itm_logits(own, own)
        ids[:, 0] = mine.tokenizer.enc_token_id
        wanted = theirs(ids, samples["image"], attention_mask=mask, use_itm_head=True)[0]
    torch.testing.assert_close(found, wanted.view_as(found), atol=1e-5, rtol=1e-4)
    con_d = build_discriminator(BLIP.block(discriminator={"arch": "blip_retrieval", "checkpoint": str(tmp_path), "precision": "fp32"}))
    torch.testing.assert_close(con_d.match_probability(samples, own, own), found.softmax(dim=1)[:, 1], atol=1e-5, rtol=1e-4)


def test_a_vit_of_transformers_as_image_encoder(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128, "layer_norm_eps": 1e-6}
    torch.manual_seed(4)
    theirs = ViTModel(ViTConfig(**sizes, image_size=ALBEF.SIZE, patch_size=ALBEF.PATCH)).eval()
    theirs.save_pretrained(tmp_path)
    mine = build_image_encoder(ImageEncoder(**{**ALBEF.SIZES["image_encoder"], "init": str(tmp_path)})).eval()
    image = ALBEF.batch(2)["image"]
    with torch.no_grad():
        torch.testing.assert_close(mine.forward_features(image), theirs(image).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_an_image_encoder_of_more_layers_is_not_cut_down(tmp_path):
    sizes = ALBEF.SIZES["image_encoder"]
    deeper = build_image_encoder(ImageEncoder(**{**sizes, "depth": 3})).state_dict()
    with pytest.raises(UserError, match="left over: blocks.2.norm1.weight"):
        build_image_encoder(ImageEncoder(**{**sizes, "init": str(as_file(deeper, tmp_path))}))
    with_head = {**{n: v for n, v in deeper.items() if not n.startswith("blocks.2.")}, "head.weight": torch.zeros(5, 32)}
    assert same(
        build_image_encoder(ImageEncoder(**{**sizes, "init": str(as_file(with_head, tmp_path))})), {"norm.bias": deeper["norm.bias"]}
    )


def test_blip_2_of_transformers(tmp_path, caplog):
    caplog.set_level("INFO")
    state = {n: torch.randn_like(v) if n.endswith(("q_bias", "v_bias")) else v for n, v in BLIP2.ours(2).state_dict().items()}
    theirs = {n: v for n, v in hf_blip2(state).items() if not n.startswith("Qformer.cls.") and n != "temp"}
    assert len(theirs) > 60 and not any(n.startswith(("visual_encoder.", "Qformer.")) for n in theirs)
    path = str(folder_of({n: v for n, v in theirs.items() if "position_ids" not in n}, tmp_path))
    kept = {n: v for n, v in state.items() if not n.startswith("Qformer.cls.") and n != "temp"}
    assert same(loaded("blip2", "load_from_pretrained", Path(path)), kept) and "Qformer.cls" in caplog.text
    block = BLIP2.block(ecm={"enabled": True}, discriminator={"arch": "blip2", "checkpoint": path, "precision": "fp32"})
    check_kinds(block)
    con_d = build_discriminator(block)
    assert torch.equal(con_d.network.query_tokens, state["query_tokens"])
    second = MODELS["opt"](2).state_dict()
    folder = tmp_path / "opt"
    folder.mkdir()
    path = str(folder_of({n: v for n, v in hf_blip2(second).items() if "position_ids" not in n}, folder))
    assert same(loaded("opt", "load_from_pretrained", Path(path)), second)
    with pytest.raises(UserError, match="is a BLIP-2 stage-2 checkpoint, but blip2_opt_mafa needs a BLIP-2 stage-1.*model.pretrained"):
        check_kinds(STAGE_2.block(stage_1=path))


# --- what cannot be used is named by what it is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["query_tokens", "visual_encoder.class_embedding"], "CLIP's ViT-L .LAVIS's clip_L, pretrain_vitL"),
        (["query_tokens", "t5_proj.weight"], "BLIP-2 checkpoint with T5"),
        (
            ["query_tokens", "qformer.layernorm.weight", "vision_model.encoder.layers.0.self_attn.qkv.weight"]
            + ["language_projection.weight", "language_model.encoder.block.0.weight"],
            "BLIP-2 checkpoint with T5",
        ),
        (["visual_projection.weight", "logit_scale"], "is a CLIP checkpoint"),
        (["base_model.model.q.lora_A.weight"], "is an adapter .LoRA. without its base model"),
        (["model.decoder.embed_tokens.weight"], "is a language model"),
        (["bert.embeddings.word_embeddings.weight"], "is a BERT"),
        (["blocks.0.attn.qkv.weight", "cls_token"], "is an image encoder alone"),
        (["text_encoder.encoder.layer.0.attention.self.key.weight", "text_decoder.bert.x"], "is an ALBEF checkpoint"),
    ],
)
def test_others_are_named(tmp_path, names, message):
    path = as_file({name: torch.zeros(1, 2, 3) for name in names}, tmp_path)
    with pytest.raises(UserError, match=message):
        check_kinds(BLIP.block(pretrained=str(path)))
    with pytest.raises(UserError, match=message):
        BLIP.ours().load_checkpoint(str(path))


def test_a_vit_l_without_its_image_encoder_is_named_by_its_width(tmp_path):
    state = {n: v for n, v in BLIP2.ours().state_dict().items() if not n.startswith("visual_encoder.")}
    path = as_file({**state, "ln_vision.weight": torch.zeros(1024)}, tmp_path)
    with pytest.raises(UserError, match=r"pretrain_vitL.*image_encoder.width is 32"):
        check_kinds(BLIP2.block(pretrained=str(path)))


@pytest.mark.parametrize("family", ["albef", "blip", "blip2"])
def test_another_size_is_found_from_shapes_alone(tmp_path, family):
    model = families.REDUCED[family]
    path = as_file({"model": model.ours().state_dict()}, tmp_path)
    wide = {"image_encoder": {**model.SIZES["image_encoder"], "depth": 5}}
    with pytest.raises(UserError, match="it has an image encoder of 2 layers of width 32, but 5 layers of width 32 is set"):
        check_kinds(model.block(pretrained=str(path), **wide))
    con_d = {"arch": f"{family}_mafa", "checkpoint": str(path)}
    with pytest.raises(UserError, match="discriminator.image_encoder, or another model_type in model.discriminator"):
        check_kinds(model.block(ecm={"enabled": True}, discriminator=con_d, **wide))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'{"metadata": {}}', "a JSON file"),
        (b"\x89HDF\r\n\x1a\n12345678", "an HDF5 file"),
    ],
)
def test_files_that_are_no_checkpoint_are_named(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_weights(tmp_path / "file.pth", "model.pretrained")
    assert "code" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("zero_to_fp32.py", "DeepSpeed"),
        (".metadata", "torch.distributed"),
        ("adapter_config.json", "LoRA"),
        ("other", "without weights"),
    ],
)
def test_folders_of_something_else_are_named(tmp_path, file, message):
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path, "model.pretrained")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.bin"}}, "names a part gone.bin, but there is no such file"),
        ({"weight_map": {"a": "../file.bin"}}, "allowed: files beside it"),
        ({"weights": {}}, "no index of a sharded checkpoint"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path, "model.pretrained")


def test_a_part_without_what_the_index_promises(tmp_path):
    state = ALBEF.ours().state_dict()
    index = sharded(state, tmp_path, "bin")
    part = torch.load(tmp_path / "part-1-of-2.bin", weights_only=True)
    lost = part.popitem()[0]
    torch.save(part, tmp_path / "part-1-of-2.bin")
    with pytest.raises(UserError, match=re.escape(lost)):
        ALBEF.ours().load_checkpoint(str(index))
