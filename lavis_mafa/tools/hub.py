"""A trained model as a folder that its user can share: weights, settings, words, processing and a model card. Nothing is uploaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from lavis.common.registry import registry
from torch import Tensor
from transformers import BlipImageProcessor, BlipProcessor

from lavis_mafa import __version__
from lavis_mafa.config.schema import MODEL_BLOCKS, MafaBlock, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.files import built_folder, write_text
from lavis_mafa.models.hub import CONFIG, HERE, OURS, build_processor
from lavis_mafa.tools.card import model_card
from lavis_mafa.tools.export import blip2_config, blip2_names, hf_config, hf_names, plain
from lavis_mafa.weights import read_checkpoint, read_weights, weight_files

HUB = "hub"
SHARD = "5GB"  # of a larger model's files
# what rebuilds a model; all else is how it was trained, of which the card tells
KEPT = ("arch", "model_type", "max_text_length", "embed_dim", "temperature", "prompt")
PARTS = ("image_encoder", "text_encoder", "qformer", "language_model")
BLIP2 = ("blip2_mafa", "blip2_opt_mafa")
SQUEEZING = ("albef_image_eval", "blip_image_eval")  # whole images into a square, as transformers' BlipImageProcessor
PROCESSING = ("name", "image_size", "mean", "std", "prompt", "max_words")  # settings of a processor that a folder tells
OF_A_PLACE = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file", "auto_map")


def share(checkpoint: Path, folder: Path, key: str, licence: str | None = None) -> list[str]:
    """Write the folder of a run's checkpoint, which :func:`lavis_mafa.models.hub.load_model` reads, whole or not at all.

    The model is built as its run built it, without Con-D, teacher and queue: what would not load is not written. A frozen image
    encoder or language model, which checkpoints leave out, is part of it.

    Args:
        key: the argument that names the checkpoint, for messages.
        licence: for the card, by Hugging Face's name (``apache-2.0``); null: the card asks for one.

    Returns:
        the files of the folder.

    Raises:
        UserError: no checkpoint of a run of a model of ours.
    """
    content = read_checkpoint(weight_files(checkpoint, key)[0], key, names_only=True)
    source, config = f"{key}: {checkpoint}", content.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{source} does not say how its model was built; give a checkpoint of a run, which keeps its settings.")
    if (arch := config["model"].get("arch")) not in MODEL_BLOCKS:
        raise UserError(f"{source} is of model.arch {arch!r}; allowed for {HUB}: {', '.join(MODEL_BLOCKS)}.")
    trained = typed_block("model", config["model"])
    model = _built(trained, checkpoint, key)
    words = getattr(model, "opt_tokenizer", None) or model.tokenizer
    processors = _processors(config, trained.image_encoder.image_size, source)
    image = build_processor(processors["image"], "vis_processor.eval")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    named = hf_names(state) if arch == "blip_mafa" else blip2_names(state) if arch in BLIP2 else state
    shared = {"version": __version__, "epoch": content.get("epoch"), "model": _block(trained), "processors": processors}
    with built_folder(folder) as partial:
        save_torch_state_dict(named, partial, max_shard_size=SHARD, shared_tensors_to_discard=_second_names(named))
        write_text(partial / CONFIG, json.dumps({**_layout(model, words), OURS: shared}, indent=2) + "\n")
        _save_words(words, image, processors["image"], partial, with_blip=arch == "blip_mafa")
        weights = sum(value.numel() for value in model.parameters())
        write_text(partial / "README.md", model_card(folder.resolve().name, trained, content, checkpoint, weights, licence))
        for file in partial.glob("*.safetensors"):  # which are written for their owner alone
            shutil.copymode(partial / CONFIG, file)
    return sorted(path.name for path in folder.iterdir())


def _built(trained: Any, checkpoint: Path, key: str) -> Any:
    """The model of a typed block with the weights of its checkpoint."""
    held = {name.split(".")[0] for name in read_weights(checkpoint, key, names_only=True)}
    changes: dict[str, Any] = {"pretrained": str(checkpoint)}
    for part in ("image_encoder", "text_encoder", "qformer"):
        of_checkpoint = part != "image_encoder" or "visual_encoder" in held
        if hasattr(trained, part) and of_checkpoint:
            changes[part] = dataclasses.replace(getattr(trained, part), init=None)
    if isinstance(trained, MafaBlock):
        itc = dataclasses.replace(trained.itc, momentum_distillation=None)
        itm = dataclasses.replace(trained.itm, synthetic=None)
        changes |= {"itc": itc, "itm": itm, "ecm": dataclasses.replace(trained.ecm, enabled=False)}
        changes |= {"discriminator": None, "language_teacher": None}
    elif hasattr(trained, "momentum_distillation"):
        changes["momentum_distillation"] = None
    return registry.get_model_class(trained.arch).from_config(dataclasses.replace(trained, **changes)).eval()


def _block(trained: Any) -> dict[str, Any]:
    """What ``config.json`` says of a model: whatever rebuilds it, and of no other place than its folder."""
    values = dataclasses.asdict(trained)
    block = {key: values[key] for key in KEPT if key in values} | {"pretrained": HERE}
    if "tokenizer" in values:
        block["tokenizer"] = HERE
    if isinstance(trained, MafaBlock):
        block["ecm"] = {"enabled": False}  # it has no Con-D
    for part in PARTS:
        if part in values:
            own_file = part == "language_model" and values[part]["init"] is not None
            block[part] = {**values[part], "init": HERE if own_file else None}
    return block


def _second_names(state: dict[str, Tensor]) -> list[str]:
    """Of weights that have two names the later ones: safetensors hold a weight once."""
    first: dict[Any, str] = {}
    return [name for name, value in state.items() if first.setdefault((value.data_ptr(), value.shape), name) != name]


def _processors(config: dict[str, Any], size: int, source: str) -> dict[str, Any]:
    """How images and texts are processed in evaluation, as the run's data or else its model's type have it; raises UserError."""
    datasets = config.get("datasets") or {}
    for block in (*datasets.values(), config.get("preprocess") or {}):
        image, text = ((block.get(f"{part}_processor") or {}).get("eval") or {} for part in ("vis", "text"))
        if not (image.get("name") and text.get("name") and image.get("image_size", size) == size):
            continue
        if others := [key for key in (*image, *text) if key not in PROCESSING]:
            raise UserError(f"{source} was trained with processors that set {others[0]}; allowed for {HUB}: {', '.join(PROCESSING)}.")
        return {"image": {**image, "image_size": size}, "text": text}
    return {"image": {"name": SQUEEZING[0], "image_size": size}, "text": {"name": "albef_caption"}}


# --- for transformers --------------------------------------------------------------------------------------------------


def _layout(model: Any, words: Any) -> dict[str, Any]:
    """``config.json`` as transformers' class of such a model reads it; nothing where there is none."""
    if model.settings.arch in BLIP2:
        return blip2_config(model)
    if model.settings.arch != "blip_mafa":
        return {}
    config = hf_config(plain(model.state_dict()), dataclasses.asdict(model.settings), words, "the model")
    config.architectures = ["BlipForImageTextRetrieval"]
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return found


def _save_words(words: Any, image: Any, settings: dict[str, Any], folder: Path, with_blip: bool) -> None:
    """The tokenizer's files, and images' size, mean and deviation, without where they came from."""
    images = None
    if settings["name"] in SQUEEZING:
        size = {"height": settings["image_size"], "width": settings["image_size"]}
        images = BlipImageProcessor(size=size, image_mean=list(image.normalize.mean), image_std=list(image.normalize.std))
    if with_blip and images is not None:
        BlipProcessor(images, words).save_pretrained(folder)
    else:
        words.save_pretrained(folder)
        if images is not None:
            images.save_pretrained(folder)
    for file in folder.glob("*_config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if key not in OF_A_PLACE}
        write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
