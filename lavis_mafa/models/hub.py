"""A model's shared folder: its weights, settings, words and processing in one place, from which it is rebuilt without a YAML.

``lavis-mafa export --for hub`` writes such a folder; beside Hugging Face's own keys its ``config.json`` has a block ``lavis_mafa``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lavis  # noqa: F401 - registers us before a module of ours is half imported
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_mafa.config.schema import MODEL_BLOCKS, typed_block
from lavis_mafa.errors import UserError, did_you_mean

CONFIG, OURS = "config.json", "lavis_mafa"
HERE = "."  # in a shared block: in the folder itself
PLACES = ("pretrained", "stage_1", "tokenizer", "init", "checkpoint")  # settings that say where something is


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Any, Any]:
    """The model of a folder that ``lavis-mafa export --for hub`` wrote, in eval mode. Nothing is downloaded, nor read from elsewhere.

    A CPU, which cannot compute in fp16, gets such weights as fp32.

    Returns:
        the model on ``device``, and its processors: of a PIL RGB image -> [3, H, W], and of a text -> text.

    Raises:
        UserError: it is no such folder, or its weights do not fit its settings.

    Example:
        >>> model, process_image, process_text = load_model("albef-mafa")
        >>> image = process_image(Image.open("dog.jpg").convert("RGB"))[None]
        >>> features = model.extract_features({"image": image, "text_input": [process_text("A dog.")]}, ["image", "text"])
    """
    folder = Path(folder)
    where, shared = f"{folder / CONFIG}: {OURS}", (config_of(folder) or {}).get(OURS)
    if not isinstance(shared, dict):
        raise UserError(f"{folder} has no {CONFIG} with a block {OURS}; allowed: a folder that `lavis-mafa export --for hub` wrote.")
    model, processors = shared_model(folder), shared.get("processors")
    if model is None or not isinstance(processors, dict) or str(model.get("arch")) not in MODEL_BLOCKS:
        raise UserError(f"{where} must have processors, and a model with an arch; allowed: {', '.join(MODEL_BLOCKS)}.")
    for part in model.values() if torch.device(device).type == "cpu" else ():
        if isinstance(part, dict) and part.get("precision") == "fp16":
            part["precision"] = "fp32"
    settings = typed_block("model", model, f"{where}.model")
    network = registry.get_model_class(settings.arch).from_config(settings)
    image, text = (build_processor(processors.get(part), f"{where}.processors.{part}") for part in ("image", "text"))
    return network.eval().to(device), image, text


def shared_model(folder: Path) -> dict[str, Any] | None:
    """The ``model:`` block of a shared folder, whose weights and words are in it; None for any other. Raises UserError.

    What it does not say of places is not left to its model type, whose defaults are downloaded.
    """
    shared = (config_of(folder) or {}).get(OURS)
    model = shared.get("model") if isinstance(shared, dict) else None
    if not isinstance(model, dict):
        return None
    model = _placed(model, folder, f"{folder / CONFIG}: {OURS}.model")
    fields = getattr(MODEL_BLOCKS.get(str(model.get("arch"))), "__dataclass_fields__", {})
    model |= {key: str(folder) for key in ("pretrained", "tokenizer") if key in fields}
    for part in ("image_encoder", "text_encoder", "qformer", "language_model"):
        if part in fields and isinstance(model.get(part, {}), dict):
            model[part] = {"init": None, **model.get(part, {})}
    return model


def config_of(folder: Path) -> dict[str, Any] | None:
    """A folder's ``config.json``; None where it has none. Raises UserError: it is no JSON object."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} holds a {type(content).__name__}, not settings.")
    return content


def _placed(block: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A shared block, whose own folder is this one; raises UserError where it names another place: it may be anybody's."""
    found = {}
    for key, value in block.items():
        if isinstance(value, dict):
            value = _placed(value, folder, f"{where}.{key}")
        elif key in PLACES and value is not None:
            if value != HERE:
                raise UserError(f"{where}.{key} is {value!r}; allowed: {HERE!r}, the folder itself, or null.")
            value = str(folder)
        found[key] = value
    return found


def build_processor(settings: Any, where: str) -> Any:
    """The registered processor of a block ``{name: ..., ...}``; raises UserError where there is none of that name."""
    known = registry.mapping["processor_name_mapping"]
    name = settings.get("name") if isinstance(settings, dict) else None
    if name not in known:
        raise UserError(f"{where}.name is {name!r}, which is not registered.{did_you_mean(str(name), known)}")
    return known[name].from_config(OmegaConf.create({key: value for key, value in settings.items() if key != "name"}))
