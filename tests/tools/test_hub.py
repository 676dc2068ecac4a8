"""A trained model as a folder to share: it comes back bit for bit, transformers reads it, and its card tells nothing of the machine."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

import reduced
import reduced_blip
import reduced_blip2
import reduced_opt
import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_nlvr import AlbefNlvrMafa
from lavis_mafa.models.albef_ta import AlbefTaMafa
from lavis_mafa.models.albef_ve import AlbefVeMafa
from lavis_mafa.models.albef_vqa import AlbefVqaMafa
from lavis_mafa.models.con_d import as_con_d, load_con_d
from lavis_mafa.models.encoders import build_tokenizer
from lavis_mafa.models.hub import load_model
from lavis_mafa.tools import hub
from lavis_mafa.tools.run_files import last_epoch, read_metrics

VOCABULARY = reduced_blip2.VOCABULARY
BITES = "<b>| a_b](x)\n- `no`"
TEACHER = {"momentum": 0.9}


def downstream(model_class: Any, arch: str, **more: Any) -> Any:
    sizes = {name: reduced.SIZES[name] for name in ("max_text_length", "image_encoder", "text_encoder")}
    torch.manual_seed(3)
    model = model_class(typed_block("model", {"arch": arch, "model_type": "tiny", "tokenizer": VOCABULARY, **sizes, **more}))
    reduced.spread(model)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "albef_mafa": lambda: reduced.ours(3, tokenizer=VOCABULARY, itc={"momentum_distillation": {"queue_size": 8}}),
    "blip_mafa": lambda: reduced_blip.ours(3, tokenizer=VOCABULARY),
    "blip2_mafa": lambda: reduced_blip2.ours(3),
    "blip2_opt_mafa": lambda: reduced_opt.ours(3),
    "albef_ve_mafa": lambda: downstream(AlbefVeMafa, "albef_ve_mafa", momentum_distillation=TEACHER),
    "albef_nlvr_mafa": lambda: downstream(AlbefNlvrMafa, "albef_nlvr_mafa"),
    "albef_ta_mafa": lambda: downstream(AlbefTaMafa, "albef_ta_mafa", embed_dim=16),
    "albef_vqa_mafa": lambda: downstream(AlbefVqaMafa, "albef_vqa_mafa"),
}
CON_DS = ("albef_mafa", "blip_mafa", "blip2_mafa")
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def checkpoint(model: Any, folder: Path, **of_model: Any) -> Path:
    """As a run leaves it in its folder, with its records and with names that no card should tell, or that bite."""
    run_folder.write_run(folder, connections=None)
    block = {**dataclasses.asdict(model.settings), "pretrained": "/home/alice/start.pth", **of_model}
    if hasattr(model.settings, "ecm"):
        block["ecm"]["enabled"] = True
        block["discriminator"] = {"arch": "albef_mafa", "checkpoint": "/home/alice/con_d/checkpoint_best.pth"}
    info = {"annotations": {"train": {"storage": [f"/home/alice/{BITES}.jsonl", "data/b.csv"]}}}
    processors = {
        "vis_processor": {"eval": {"name": "albef_image_eval", "image_size": model.settings.image_encoder.image_size}},
        "text_processor": {"eval": {"name": "albef_caption", "max_words": 7}},
    }
    config = {
        "model": block,
        "datasets": {"own: {pairs": {"build_info": info, **processors}},
        "run": {"output_dir": "/home/alice/output", "batch_size_train": 64, "seed": 42, "dist_url": "tcp://alice-host:1"},
    }
    data = [{"rows": 12345, "columns": {"image": "0a"}}]
    path = folder / "checkpoint_1.pth"
    torch.save({"model": model.state_dict(), "config": config, "epoch": 1, "step": 0, "world_size": 2, "data": data}, path)
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Callable[[str], tuple[Any, Path]]:
    """A model that was trained, and its shared folder, made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def of(arch: str) -> tuple[Any, Path]:
        if arch not in made:
            model, folder = MODELS[arch](), tmp_path_factory.mktemp("shared")
            of_model = {}
            if hasattr(model, "tokenizer"):  # whose files tell where they lay
                build_tokenizer(VOCABULARY).save_pretrained(folder / "words")
                of_model["tokenizer"] = str(folder / "words")
            generator = torch.Generator().manual_seed(0)
            for parameter in (one for one in model.parameters() if one.dim() == 1):  # which all start as 0 or 1
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            checkpoint(model, folder / "run", **of_model)
            assert main(["export", str(folder / "run"), "--for", "hub", "--output", str(folder / arch)]) == 0
            made[arch] = model, folder / arch
        return made[arch]

    return of


every_model = pytest.mark.parametrize("arch", MODELS)


@torch.no_grad()
def said(model: Any, arch: str, seed: int = 0) -> list[Tensor]:
    """What a model says of two images and two texts, by all of its parts that it has alone."""
    side = model.settings.image_encoder.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    samples: dict[str, Any] = {"image": images, "text_input": ["a red dog", "two birds on the roof"]}
    if arch in CON_DS:
        (tokens, image_features), (words, text_features) = model.image_rows(images), model.text_rows(samples["text_input"])
        pairs = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
        losses = [] if arch == "albef_mafa" else [model(samples).loss_lm]  # ALBEF's is with its teacher
        return [image_features, text_features, model.match_rows(tokens, words, *pairs), *losses]
    if arch == "blip2_opt_mafa":
        return [model(samples).loss, model._queries(images)]
    if arch == "albef_vqa_mafa":
        return [model(samples | {"answer": ["a dog", "the roof"]}).loss]
    if arch == "albef_ta_mafa":
        torch.manual_seed(0)  # of the labels
        return [model(samples | {"image": images[[0, 1, 0]], "text_input": ["a red dog"] * 3}).loss]
    return [model.logits(samples | {"image0": images, "image1": images.flip(0)})]


@every_model
def test_a_shared_model_comes_back_bit_for_bit(arch, shared):
    model, folder = shared(arch)
    found, process_image, process_text = load_model(folder)
    own = {name: value for name, value in model.state_dict().items() if "_m." not in name and "queue" not in name}
    assert found.state_dict().keys() == own.keys() and not found.training
    assert all(torch.equal(value, own[name]) for name, value in found.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(said(found, arch), said(model, arch), strict=True))
    side = model.settings.image_encoder.image_size
    assert process_image(Image.new("RGB", (50, 40))).shape == (3, side, side)
    assert process_text("One, two three four five six seven eight!") == "one two three four five six seven"
    words, its = (getattr(one, "opt_tokenizer", None) or one.tokenizer for one in (found, model))
    assert words("a red dog, [DEC]").input_ids == its("a red dog, [DEC]").input_ids


@every_model
def test_the_snippets_of_a_card_run_in_a_fresh_copy_of_the_folder(arch, shared, tmp_path, monkeypatch, capsys):
    shutil.copytree(shared(arch)[1], tmp_path / "downloaded")
    monkeypatch.chdir(tmp_path / "downloaded")
    snippets = SNIPPET.findall(Path("README.md").read_text())
    assert len(snippets) == (3 if arch in ("blip_mafa", "blip2_mafa", "blip2_opt_mafa") else 2)
    for snippet in snippets:
        wanted = re.search(r"Blip2For\w+", snippet)
        if wanted is None or hasattr(transformers, wanted[0]):
            exec(compile(snippet, "README.md", "exec"), {})
    if arch in CON_DS:
        assert re.search(r"cosines tensor\(\[\[.*match probability tensor\(\[", capsys.readouterr().out, re.DOTALL)


@every_model
def test_a_folder_tells_nothing_of_the_machine(arch, shared):
    _, folder = shared(arch)
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}
    for name, text in texts.items():
        for secret in ("alice", str(folder.parent), Path(VOCABULARY).parent.name + "/", "/home"):
            assert secret not in text, (name, secret)
    assert {"README.md", "config.json", "preprocessor_config.json", "tokenizer_config.json"} <= texts.keys()


def test_a_card_is_read_by_hugging_face_and_shows_names_as_they_are(shared):
    text = (shared("albef_mafa")[1] / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown" and front["datasets"] == ["own: {pairs"] and "albef" in front["tags"]
    card = ModelCard(text)
    assert card.data.model_name == "albef_mafa" and card.data.pipeline_tag == "feature-extraction"
    (result,) = [one for one in card.data.eval_results if one.metric_type == "tr_r1"]
    assert (result.dataset_split, result.metric_value) == ("val", 40.5)
    end = last_epoch(read_metrics(shared("albef_mafa")[1].parent / "run"))
    for line in (
        "| own: {pairs | \\<b\\>\\| a\\_b\\](x) - \\`no\\`.jsonl, b.csv | 12,345 | ",
        "Started from start.pth; Con-D, which judges the hard negatives, is checkpoint\\_best.pth. These are the weights of epoch 1",
        "| samples a process and step | 64 |\n| processes | 2 |",
        f"loss {end['loss']:.4g}, loss\\_itc {end['loss_itc']:.4g}, ",
        f"- {end['false_negative_share']:.1%} of the chosen hard negatives are false",
        "| tr\\_r1 | 40.5 |",
        "**No licence is stated yet**",
    ):
        assert line in text, line


def test_a_file_without_its_run_has_a_shorter_card(shared, tmp_path):
    shutil.copy(shared("albef_mafa")[1].parent / "run/checkpoint_1.pth", tmp_path / "mine.pth")
    arguments = ["--for", "hub", "--license", "cc-by-4.0", "--output", str(tmp_path / "shared")]
    assert main(["export", str(tmp_path / "mine.pth"), *arguments]) == 0
    text = (tmp_path / "shared/README.md").read_text()
    assert "None are recorded of these weights." in text and "Where the curves ended" not in text
    assert "license: cc-by-4.0" in text and "Licence of these weights: cc-by-4.0" in text and "model-index" not in text


def test_figures_are_of_the_shared_weights(tmp_path):
    """Not of an epoch after them, nor of others' last."""
    path = checkpoint(MODELS["albef_ve_mafa"](), tmp_path / "run")
    records = [("val", 0, 1.5), ("val", 1, 2.5), ("val", 2, 3.5), ("test", "best", 4.5)]
    lines = [json.dumps({"split": split, "epoch": epoch, "accuracy": value}) for split, epoch, value in records]
    (tmp_path / "run/evaluation.jsonl").write_text("\n".join(lines))
    later = json.dumps({"epoch": 2, "step": 9, "samples_seen": 144, "loss": 123.5})
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("\n".join([*metrics.read_text().splitlines()[:-1], later]))
    assert main(["export", str(path), "--for", "hub", "--output", str(tmp_path / "one")]) == 0
    path = path.rename(path.with_name("checkpoint_best.pth"))
    assert main(["export", str(tmp_path / "run"), "--for", "hub", "--output", str(tmp_path / "best")]) == 0
    one, best = ((tmp_path / name / "README.md").read_text() for name in ("one", "best"))
    assert "| accuracy | 2.5 |" in one and "| accuracy | 2.5 | 4.5 |" in best and "3.5" not in one + best  # nor 123.5


def test_large_models_come_in_parts(shared, tmp_path, monkeypatch):
    model, folder = shared("blip_mafa")
    monkeypatch.setattr(hub, "SHARD", "50KB")
    assert main(["export", str(folder.parent / "run"), "--for", "hub", "--output", str(tmp_path / "parts")]) == 0
    assert (tmp_path / "parts/model.safetensors.index.json").is_file() and not (tmp_path / "parts/model.safetensors").exists()
    found, _, _ = load_model(tmp_path / "parts")
    assert torch.equal(said(found, "blip_mafa")[2], said(model, "blip_mafa")[2])


# --- wherever a checkpoint is asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CON_DS)
@torch.no_grad()
def test_a_folder_is_a_start_and_a_con_d(arch, shared):
    model, folder = shared(arch)
    block = dataclasses.replace(model.settings, pretrained=str(folder))
    check_kinds(block)
    started = type(model).from_config(block).eval()
    assert torch.equal(said(started, arch)[2], said(model, arch)[2])
    con_d = load_con_d(model.settings, str(folder), torch.device("cpu"))
    side, pairs = model.settings.image_encoder.image_size, torch.tensor([0, 1])
    samples = {"image": torch.randn(2, 3, side, side), "text_input": ["a red dog", "the roof"]}
    probabilities = [as_con_d(network).match_probability(samples, pairs, pairs) for network in (con_d, model)]
    assert torch.equal(*probabilities)


EXPORTS = ("albef_mafa", "albef_pretrain"), ("blip_mafa", "blip_caption"), ("blip_mafa", "hf-blip"), ("blip2_mafa", "blip2")


@pytest.mark.parametrize(("arch", "target"), EXPORTS)
def test_a_folder_is_exported_as_its_checkpoint_is(arch, target, shared, tmp_path):
    """Also where heads and words have to be known."""
    folder = shared(arch)[1]
    ends = [".pth", ""][target == "hf-blip"]
    for name, source in (("one", folder), ("other", folder.parent / "run")):
        assert main(["export", str(source), "--for", target, "--output", str(tmp_path / f"{name}{ends}")]) == 0
    one, other = (hub.read_weights(tmp_path / f"{name}{ends}") for name in ("one", "other"))
    one, other = ({n: v for n, v in state.items() if not n.endswith("position_ids")} for state in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_opt_of_its_own_comes_along(tmp_path):
    """One whose sizes no setting tells; and `language_model.init` finds it in the folder."""
    own = reduced_opt.ours(4, language_model={"init": None, "precision": "fp32", "width": 16, "layers": 1, "heads": 2})
    own.opt_model.save_pretrained(tmp_path / "opt", safe_serialization=False)
    own.opt_tokenizer.save_pretrained(tmp_path / "opt")
    language_model = {"init": str(tmp_path / "opt"), "freeze": True, "precision": "fp32"}
    model = reduced_opt.ours(5, language_model=language_model)
    path = checkpoint(model, tmp_path / "run")
    content = torch.load(path, weights_only=True)
    content["model"] = {name: value for name, value in content["model"].items() if not name.startswith("opt_model.")}
    torch.save(content, path)
    model.opt_model.load_state_dict(own.opt_model.state_dict())  # reduced_opt makes them larger
    assert main(["export", str(path), "--for", "hub", "--output", str(tmp_path / "shared")]) == 0
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "shared").glob("*.json"))
    shutil.rmtree(tmp_path / "opt")
    found, _, _ = load_model(tmp_path / "shared")
    assert all(torch.equal(one, other) for one, other in zip(said(found, "blip2_opt_mafa"), said(model, "blip2_opt_mafa"), strict=True))
    again = reduced_opt.block(language_model={**language_model, "init": str(tmp_path / "shared")})
    taken = type(model)(again).opt_model.state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in own.opt_model.state_dict().items())


def test_fp16_is_fp32_on_a_cpu(tmp_path):
    model = reduced_blip2.ours(3, image_encoder={"precision": "fp16"})
    checkpoint(model, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--for", "hub", "--output", str(tmp_path / "shared")]) == 0
    found, own = load_model(tmp_path / "shared")[0].state_dict(), model.state_dict()
    assert not any(value.dtype == torch.float16 for value in found.values())
    assert all(torch.equal(value, own[name].to(value.dtype)) for name, value in found.items())
    assert any(value.dtype == torch.float16 for value in hub.read_weights(tmp_path / "shared").values())


# --- transformers --------------------------------------------------------------------------------------------------------


def of_transformers(name: str, folder: Path) -> Any:
    """The model by transformers with nothing missing; skipped where transformers is older than that."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    found, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    unused = {key.split(".")[0] for key in info["unexpected_keys"]}
    assert not info["missing_keys"] and not info["mismatched_keys"] and unused <= {"text_decoder", "temp", "Qformer"}
    for module in found.vision_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = found.config.vision_config.layer_norm_eps  # 4.26 has 1e-5, whatever its config says
    return found.eval()


@pytest.mark.parametrize(("arch", "name"), [("blip_mafa", "BlipForImageTextRetrieval"), ("blip2_mafa", "Blip2ForImageTextRetrieval")])
@torch.no_grad()
def test_transformers_matches_as_ours(arch, name, shared):
    model, folder = shared(arch)
    theirs, words = of_transformers(name, folder), transformers.AutoTokenizer.from_pretrained(folder)
    side = model.settings.image_encoder.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    text = words("two birds on the roof", return_tensors="pt")
    (tokens, image_features), (ids, text_features) = model.image_rows(image), model.text_rows(["two birds on the roof"])
    cosine = (image_features @ text_features.T).flatten().max()
    match = model.match_rows(tokens, ids, torch.tensor([0]), torch.tensor([0]))
    if arch == "blip_mafa":
        found = theirs(text.input_ids, image, attention_mask=text.attention_mask, use_itm_head=False)[0]
        text.input_ids[:, 0] = words.convert_tokens_to_ids("[ENC]")
        matching = theirs(text.input_ids, image, attention_mask=text.attention_mask)[0]
    else:
        found = theirs(image, text.input_ids, text.attention_mask).logits_per_image
        matching = theirs(image, text.input_ids, text.attention_mask, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(found.flatten()[0], cosine, atol=1e-5, rtol=0)
    torch.testing.assert_close(matching, match, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_transformers_writes_what_ours_writes(shared):
    model, folder = shared("blip2_opt_mafa")
    theirs, side = of_transformers("Blip2ForConditionalGeneration", folder), model.settings.image_encoder.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    places = [theirs.config.image_token_index] * theirs.config.num_query_tokens
    if not hasattr(transformers, "Blip2ForImageTextRetrieval"):
        places = []  # older versions put the queries before the text themselves
    ids = torch.tensor([[*places, model.opt_tokenizer.bos_token_id]] * 2)
    lines = theirs.generate(pixel_values=images, input_ids=ids, max_new_tokens=6, min_new_tokens=6)[:, -6:]
    wanted = model.generate({"image": images}, num_beams=1, max_length=6, min_length=6)
    assert [line.strip() for line in model.opt_tokenizer.batch_decode(lines, skip_special_tokens=True)] == wanted


# --- what cannot be shared -----------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_is_one_message(shared, tmp_path, capsys):
    model, folder = shared("albef_ve_mafa")
    bare, lavis = tmp_path / "bare.pth", tmp_path / "lavis.pth"
    torch.save({"model": model.state_dict()}, bare)
    torch.save({"model": model.state_dict(), "config": {"model": {"arch": "albef_classification"}}}, lavis)
    content, new = torch.load(folder.parent / "run/checkpoint_1.pth", weights_only=True), str(tmp_path / "new")
    content["config"]["datasets"]["own: {pairs"]["text_processor"]["eval"]["words_from"] = "/home/alice/words.txt"
    torch.save(content, tmp_path / "words.pth")
    for arguments, message in (
        ([bare, "--for", "hub", "--output", new], "does not say how its model was built; give a checkpoint of a run"),
        ([folder, "--for", "hub", "--output", new], "does not say how its model was built"),
        ([lavis, "--for", "hub", "--output", new], "is of model.arch 'albef_classification'; allowed for hub: albef_mafa, "),
        ([tmp_path / "words.pth", "--for", "hub", "--output", new], "with processors that set words_from; allowed for hub: name, "),
        ([bare, "--for", "hub", "--output", folder], "exists already and is not overwritten"),
        ([bare, "--for", "hub", "--output", new, "--license", "My Own"], "--license is 'My Own'; allowed: a name of Hugging Face's"),
        ([bare, "--for", "hub", "--output", new, "--image-size", "64"], "--image-size is given, but hub writes"),
        ([bare, "--for", "hub", "--output", new, "--tokenizer", "x"], "--tokenizer is given, but hub takes none"),
        ([bare, "--for", "hub", "--output", new, "--queue-size", "8"], "--queue-size is given, but hub has no queues"),
        ([bare, "--for", "albef_vqa", "--output", f"{new}.pth", "--license", "mit"], "--license is given, but albef_vqa has no model"),
        ([tmp_path, "--for", "hub", "--output", new], "a folder without weights"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1
    assert not Path(new).exists()


def test_what_a_folder_does_not_say_is_not_fetched(shared, tmp_path):
    """The defaults of `base` are DeiT and a hub's BERT."""
    model, folder = shared("albef_mafa")
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    block = config["lavis_mafa"]["model"]
    block["model_type"] = "base"
    for key in ("pretrained", "tokenizer", "ecm"):
        del block[key]
    del block["image_encoder"]["init"], block["text_encoder"]["init"]
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    found, _, _ = load_model(tmp_path / "copy")
    assert torch.equal(said(found, "albef_mafa")[2], said(model, "albef_mafa")[2])


def test_a_folder_that_is_none_or_points_elsewhere_is_one_message(shared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shared("albef_ve_mafa")[1], folder)
    content = json.loads((folder / "config.json").read_text())

    def changed(*keys: str, value: Any) -> str:
        new = json.loads(json.dumps(content))
        block = new
        for key in keys[:-1]:
            block = block[key]
        block[keys[-1]] = value
        return json.dumps(new)

    ours = ("lavis_mafa", "model")
    for text, message in (
        (changed(*ours, "pretrained", value="/etc/passwd"), r"model.pretrained is '/etc/passwd'; allowed: '.'"),
        (changed(*ours, "discriminator", value={"checkpoint": "x.pth"}), r"discriminator.checkpoint is 'x.pth'; allowed: '.'"),
        (changed(*ours, "image_encoder", "init", value="deit"), r"image_encoder.init is 'deit'; allowed: '.'"),
        (changed(*ours, "arch", value=["os"]), "a model with an arch; allowed: albef_mafa"),
        (changed(*ours, "depht", value=3), r"config.json: lavis_mafa.model.depht is not a setting"),
        (changed("lavis_mafa", "processors", "image", value={"name": "x"}), r"processors.image.name is 'x', which is not registered"),
        ("{}", "a folder that `lavis-mafa export --for hub` wrote"),
        ("[]", "holds a list, not settings"),
        ("{", "is not readable as JSON"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            load_model(folder)
    with pytest.raises(UserError, match="has no config.json"):
        load_model(tmp_path / "nowhere")
