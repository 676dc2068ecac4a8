"""A checkpoint of ours in each of LAVIS's classes, and in transformers: every weight arrives, and the two say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, BlipForImageTextRetrieval

import lavis_downstream
import reduced
import reduced_blip
import reduced_blip2
from lavis_mafa.cli.export import TARGETS
from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import typed_block
from lavis_mafa.models.albef_ve import AlbefVeMafa
from lavis_mafa.models.encoders import MINILM
from lavis_mafa.models.transformer import Reading
from lavis_mafa.tools import export
from lavis_mafa.weights import lavis_names, read_weights

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
TWELVE = {"text_encoder": {"layers": 12, "fusion_layer": 6}}  # as LAVIS's albef_vqa and albef_nlvr have them
OURS = {"albef": reduced.ours, "blip": reduced_blip.ours, "blip2": reduced_blip2.ours}
LAVIS = {
    "albef_pretrain": reduced.lavis_pretrain,
    "albef_retrieval": reduced.lavis_retrieval,
    "albef_classification": lavis_downstream.albef_classification,
    "albef_vqa": lavis_downstream.albef_vqa,
    "albef_nlvr": lavis_downstream.albef_nlvr,
    "blip_pretrain": reduced_blip.lavis_pretrain,
    "blip_retrieval": reduced_blip.lavis_retrieval,
    "blip_caption": reduced_blip.lavis_caption,
    "blip_vqa": lavis_downstream.blip_vqa,
    "blip_classification": lavis_downstream.blip_classification,
    "blip_nlvr": lavis_downstream.blip_nlvr,
    "blip2": reduced_blip2.lavis_stage_1,
}


def ours_for(target: str, seed: int = 3) -> Any:
    return OURS[target.split("_")[0]](seed, **(TWELVE if target in ("albef_vqa", "albef_nlvr") else {}))


def exported(model: Any, target: str, folder: Path, *more: str) -> Path:
    """By the command."""
    torch.save({"model": model.state_dict()}, folder / "ours.pth")
    if export.TARGETS[target].queue:
        more = ("--queue-size", "8", *more)
    assert main(["export", str(folder / "ours.pth"), "--for", target, "--output", str(folder / "theirs.pth"), *more]) == 0
    return folder / "theirs.pth"


def in_lavis(model: Any, target: str, folder: Path, *more: str) -> Any:
    """LAVIS's class with the exported weights, by its own way of loading."""
    path, theirs = exported(model, target, folder, *more), LAVIS[target]()
    how = "load_checkpoint" if export.TARGETS[target].given_as == export.FINETUNED else "load_from_pretrained"
    return loaded(theirs, path, how, **({"rename_text_keys": False} if target == "albef_pretrain" else {}))


def loaded(model: Any, path: Path, how: str = "load_from_pretrained", **more: Any) -> Any:
    """LAVIS asks for all names and weights again at each name, which takes it half a minute."""
    with mock.patch.object(model, "state_dict", return_value=model.state_dict()):
        getattr(model, how)(str(path), **more)
    return model


def taught_as_students(state: State) -> bool:
    """Is each weight of a teacher the student's?"""
    students = {name: re.sub(r"^(\w+)_m\.", r"\1.", name) for name in state}
    return all(torch.equal(state[name], state[student]) for name, student in students.items())


def test_the_command_lists_what_there_is():
    assert TARGETS == (*export.TARGETS, export.HF_BLIP) and set(LAVIS) == set(export.TARGETS)


@pytest.mark.parametrize("target", LAVIS)
def test_nothing_is_missing_or_random_in_lavis_class(target, tmp_path, capsys):
    theirs = in_lavis(ours_for(target), target, tmp_path)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(str(tmp_path / "theirs.pth")) and export.TARGETS[target].given_as in said
    written = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    found = theirs.state_dict()
    new = export.TARGETS[target].may_have if "_" in target else ()
    starts = {name for name in found if name.startswith((*new, *(f"{part}_m" for part in new)))} if new else set()
    assert set(written) == set(found) - starts
    assert all(torch.equal(found[name], value) for name, value in written.items())
    assert taught_as_students(found)
    for name in {"image_queue", "text_queue"} & set(written):
        torch.testing.assert_close(written[name].norm(dim=0), torch.ones(8))
    assert bool((written.get("idx_queue", torch.tensor(-100)) == -100).all())
    assert not new or "cls_head starts as LAVIS's class makes it" in said


def fused(model: Any, images: list[Tensor]) -> Tensor:
    """[CLS] or [ENC] of captions that LAVIS's text encoder reads with their images."""
    text, images = model.tokenizer(reduced.CAPTIONS, padding="longest", return_tensors="pt"), [i.contiguous() for i in images]
    if hasattr(model.tokenizer, "enc_token_id"):
        text.input_ids[:, 0] = model.tokenizer.enc_token_id
    masks: Any = [torch.ones(image.shape[:2], dtype=torch.long) for image in images]
    image = images if len(images) > 1 else images[0]
    encoder = getattr(model.text_encoder, "bert", model.text_encoder)
    mask = {"attention_mask": text.attention_mask, "encoder_attention_mask": masks if len(images) > 1 else masks[0]}
    return encoder(text.input_ids, encoder_hidden_states=image, **mask, return_dict=True).last_hidden_state[:, 0]


@pytest.mark.parametrize("target", [name for name in LAVIS if name not in ("albef_nlvr", "blip_caption", "blip2")])
@torch.no_grad()
def test_images_and_captions_are_read_as_by_ours(target, tmp_path):
    mine, samples = ours_for(target), reduced.batch(4)
    theirs = in_lavis(mine, target, tmp_path)
    images = theirs.visual_encoder.forward_features(samples["image"])
    found = mine.extract_features(samples, ["image", "multimodal"])
    torch.testing.assert_close(images, found.image_embeds, atol=1e-5, rtol=0)
    twice = [images] * (2 if target == "blip_nlvr" else 1)  # the mean of what both images say, which is one image's
    torch.testing.assert_close(fused(theirs, twice), found.multimodal_embeds[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_of_two_images_each_fusion_layer_reads_both(tmp_path):
    """ALBEF's text layers, and then each of its fusion layers once for the first image and once for the second."""
    mine = ours_for("albef_nlvr")
    theirs = in_lavis(mine, "albef_nlvr", tmp_path)
    first, second = (mine.image_states(reduced.batch(4, seed)["image"]) for seed in (0, 1))
    ids, mask = mine.words(reduced.CAPTIONS)
    pairs, bert = torch.arange(4), mine.text_encoder.bert
    reading = Reading.of(mask, mine.device, pairs, pairs, 4)
    states = reading.take(mine.text_states(ids, mask))
    for layer in range(6, 12):
        for images in (first, second):
            states = bert(states, reading.tokens, mine.keys_values(images), layers=slice(layer, layer + 1))
    torch.testing.assert_close(fused(theirs, [first, second]), states[reading.positions == 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_captions_are_written_as_by_ours(tmp_path):
    mine = ours_for("blip_caption")
    theirs = in_lavis(mine, "blip_caption", tmp_path)
    torch.testing.assert_close(theirs(reduced.batch(4)).loss, mine(reduced.batch(4)).loss_lm, atol=1e-5, rtol=0)


def test_the_decoder_of_answers_is_what_lavis_makes_of_a_checkpoint_with_a_teacher(tmp_path):
    mine = reduced.ours(3, itc={"momentum_distillation": {"queue_size": 8}}, **TWELVE)
    found = in_lavis(mine, "albef_vqa", tmp_path)
    expected = loaded(lavis_downstream.albef_vqa(), tmp_path / "ours.pth")
    expected.text_decoder_m.load_state_dict(expected.text_decoder.state_dict())  # which LAVIS leaves at random
    of_lavis = expected.state_dict()
    assert all(torch.equal(value, of_lavis[name]) for name, value in found.state_dict().items())


def test_image_sizes_are_changed_as_by_lavis(tmp_path):
    mine, size = ours_for("albef_retrieval"), 2 * reduced.SIZE
    path = exported(mine, "albef_retrieval", tmp_path, "--image-size", str(size))
    larger = loaded(reduced.lavis_retrieval(image_size=size), tmp_path / "ours.pth")
    found = torch.load(path, weights_only=True)["model"]
    for name in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        torch.testing.assert_close(found[name], larger.state_dict()["visual_encoder.pos_embed"])


def test_what_was_trained_for_one_task_goes_on_with_that_alone(tmp_path):
    for target in ("albef_vqa", "albef_nlvr", "albef_classification", "blip_nlvr", "blip_classification"):
        state = LAVIS[target](5).state_dict()
        assert export.fitting(state) == [target]
        found = export.exported(state, target, "file")
        assert found.keys() == state.keys() and all(torch.equal(found[n], v) for n, v in state.items() if "_m." not in n)


@torch.no_grad()
def test_a_classifier_of_ours_tells_in_lavis_what_it_tells_here(tmp_path):
    sizes = {name: reduced.SIZES[name] for name in ("tokenizer", "max_text_length", "image_encoder", "text_encoder")}
    torch.manual_seed(3)
    mine = AlbefVeMafa(typed_block("model", {"arch": "albef_ve_mafa", **sizes, "momentum_distillation": {"momentum": 0.9}}))
    reduced.spread(mine)  # not its teacher, which then is another one
    theirs = in_lavis(mine, "albef_classification", tmp_path)
    samples = reduced.batch(4, label=torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(theirs.predict(samples)["predictions"], mine.eval().predict(samples)["predictions"], atol=1e-5, rtol=0)
    assert taught_as_students(theirs.state_dict())


# --- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> tuple[Any, Path]:
    folder, mine = tmp_path_factory.mktemp("hf"), reduced_blip.ours(3)
    config = {"model": {**reduced_blip.SIZES, "tokenizer": MINILM}}
    torch.save({"model": mine.state_dict(), "config": config}, folder / "ours.pth")
    assert main(["export", str(folder / "ours.pth"), "--for", "hf-blip", "--output", str(folder / "blip")]) == 0
    return mine, folder / "blip"


@torch.no_grad()
def test_transformers_blip_says_the_same(hf):
    mine, folder = hf
    theirs, info = BlipForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for module in theirs.vision_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = theirs.config.vision_config.layer_norm_eps  # transformers 4.26 has 1e-5 here, whatever its config says
    processor, samples, own = AutoProcessor.from_pretrained(folder), reduced.batch(4), torch.arange(4)
    text = processor.tokenizer(samples["text_input"], padding=True, return_tensors="pt")
    inputs = {"attention_mask": text.attention_mask, "pixel_values": samples["image"]}
    cosines = theirs.eval()(text.input_ids, **inputs, use_itm_head=False).itm_score
    images, texts = mine.grit_features(samples)
    torch.testing.assert_close(cosines, images @ texts.T, atol=1e-5, rtol=0)
    text.input_ids[:, 0] = processor.tokenizer.additional_special_tokens_ids[0]  # [ENC], which a caption to be matched starts with
    rows, captions = mine.image_rows(samples["image"])[0], mine.text_tokens(samples["text_input"])
    expected = mine.match_rows(rows, captions, own, own)
    torch.testing.assert_close(theirs(text.input_ids, **inputs).itm_score, expected, atol=1e-5, rtol=1e-5)
    assert processor.image_processor.size == {"height": reduced.SIZE, "width": reduced.SIZE}


def test_the_folder_comes_back_whole(hf):
    mine, folder = hf
    state = {name: value for name, value in export.plain(mine.state_dict()).items() if not name.startswith(("text_decoder", "temp"))}
    assert lavis_names(export.hf_names(state)).keys() == state.keys()
    found = read_weights(folder)
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


# --- what cannot be exported -------------------------------------------------------------------------------------------


def file_of(state: State, folder: Path) -> str:
    torch.save({"model": state}, folder / "ours.pth")
    return str(folder / "ours.pth")


WRONG = {
    "another kind": (
        lambda: reduced_blip.ours().state_dict(),
        "albef_vqa",
        (),
        "is a BLIP checkpoint, which gives no albef_vqa; allowed with it: blip",
    ),
    "without its language head": (
        lambda: reduced.lavis_retrieval().state_dict(),
        "albef_vqa",
        (),
        "has no text_decoder, which albef_vqa needs; allowed with it: albef_retrieval, albef_classification, albef_nlvr.",
    ),
    "of another task": (
        lambda: lavis_downstream.albef_classification().state_dict(),
        "albef_nlvr",
        (),
        "is an ALBEF checkpoint for albef_classification alone, which gives no albef_nlvr; allowed with it: albef_classification.",
    ),
    "LoRA": (lambda: {"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, "albef_vqa", (), "is an adapter (LoRA) without its base"),
    "no words like these": (
        lambda: reduced_blip.ours().state_dict(),
        "hf-blip",
        ("--tokenizer", reduced_blip2.VOCABULARY),
        "has embeddings of 30524 words, but --tokenizer",
    ),
    "no heads": (lambda: reduced_blip.ours().state_dict(), "hf-blip", ("--tokenizer", MINILM), "does not tell how many heads"),
    "a size without whole patches": (
        lambda: reduced.ours().state_dict(),
        "albef_vqa",
        ("--image-size", "33"),
        "be a multiple of 8",
    ),
    "queues of a class without": (
        lambda: {},
        "albef_vqa",
        ("--queue-size", "8"),
        "has no queues; allowed with: albef_pretrain",
    ),
    "a tokenizer for LAVIS": (lambda: {}, "albef_vqa", ("--tokenizer", MINILM), "allowed with: hf-blip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_and_flags_are_one_message(case, tmp_path, capsys):
    make, target, more, message = WRONG[case]
    output = tmp_path / ("folder" if target == "hf-blip" else "x.pth")
    assert main(["export", file_of(make(), tmp_path), "--for", target, "--output", str(output), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("lavis-mafa export: ")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pth"]


def test_files_that_are_missing_or_there_are_one_message(tmp_path, capsys):
    file, there = file_of(reduced.ours().state_dict(), tmp_path), tmp_path / "there.pth"
    there.write_text("mine")
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    for arguments, message in (
        ([str(tmp_path / "gone.pth"), "--output", str(tmp_path / "x.pth")], "gone.pth', but there is no such file"),
        ([str(tmp_path / "code.pth"), "--output", str(tmp_path / "x.pth")], "loading them can run code"),
        ([file, "--output", str(there)], "exists already and is not overwritten"),
        ([file, "--output", str(tmp_path / "x.safetensors")], "give a name that ends in .pth"),
        ([file, "--output", str(tmp_path / "none" / "x.pth")], "cannot write"),
    ):
        assert main(["export", *arguments, "--for", "albef_classification"]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert there.read_text() == "mine" and not (tmp_path / "x.pth").exists()
