"""Reading weights without running code from the file, however other programs laid them out, and writing files that are never torn."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_mafa.errors import UserError
from lavis_mafa.files import replacing

# of a folder, the first that is there: transformers' and diffusers' names, and accelerate's
IN_FOLDER = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
OTHER_FOLDERS = {  # a file in it -> what such a folder is, and what to do
    ".metadata": "a checkpoint of torch.distributed; join its parts with torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed; join its parts with the zero_to_fp32.py in it",
    "adapter_config.json": "an adapter (LoRA) without its base model; merge the two and save the result",
    "tf_model.h5": "TensorFlow weights alone; save them from PyTorch",
    "flax_model.msgpack": "Flax weights alone; save them from PyTorch",
}
BEGINNINGS = {  # first bytes -> what the file is
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for (run `git lfs pull`)",
    b"<": "a web page or XML, not a checkpoint (was it downloaded by its page's address?)",
    b"GGUF": "a GGUF file; save the weights from PyTorch",
    b"\x89HDF": "an HDF5 file (TensorFlow, Keras); save the weights from PyTorch",
    b"\x93NUMPY": "a NumPy array; save the weights from PyTorch",
    b"{": "a JSON file, not a checkpoint",
}
NESTED = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params")
WRAPPERS = ("module.", "model.", "net.", "network.", "_forward_module.")  # DDP and DataParallel; Lightning; Fabric
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP; anywhere in a name


CHECKPOINTS = Path(__file__).with_name("checkpoints")


def shipped(name: str) -> Path:
    """Weights that come with the package, such as ``scenes_con_d``; ``checkpoints/README.md`` says what they are."""
    return CHECKPOINTS / f"{name}.safetensors"


def weight_files(path: Path, key: str) -> list[Path]:
    """The files that hold a checkpoint's weights: ``path`` itself, or the parts of a sharded one or of a Hugging Face folder.

    Raises:
        UserError: nothing is there, or a folder or an index of something else.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            what = next((what for name, what in OTHER_FOLDERS.items() if (path / name).exists()), None)
            raise UserError(f"{key}: {path} is {what or 'a folder without weights'}; allowed: a file, or a folder with {IN_FOLDER[1]}.")
        path = found
    if not path.is_file():
        hint = " Download it first." if "://" in str(path) or ":/" in str(path) else ""
        raise UserError(f"{key} is {str(path)!r}, but there is no such file.{hint}")
    return _parts(path, key) if path.name.endswith(".index.json") else [path]


def _parts(index: Path, key: str) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(names))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {index} is no index of a sharded checkpoint (it has no weight_map).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{key}: {index} names a part {name!r}; allowed: files beside it.")
        if not (index.parent / name).is_file():
            raise UserError(f"{key}: {index} names a part {name}, but there is no such file beside it.")
    return [index.parent / name for name in names]


def not_a_checkpoint(beginning: bytes) -> str | None:
    """What a file is by its first bytes; None where it may be a checkpoint."""
    return next((what for start, what in BEGINNINGS.items() if beginning.startswith(start)), None)


def state_dict_in(content: dict[Any, Any], source: str) -> dict[Any, Any]:
    """The state dict in a file's content: LAVIS's and ours lie under ``model``, Lightning's under ``state_dict``, ...

    Raises:
        UserError: there are no weights.
    """
    state = content
    for _ in range(4):  # a trainer's file in a framework's; a crafted one may hold itself
        state = _inner(state, source) or state
    if not any(isinstance(value, Tensor) for value in state.values()):
        entries = ", ".join(map(str, list(state)[:6])) or "nothing"
        raise UserError(f"{source} holds no weights; there is: {entries}.")
    return state


def _inner(content: dict[Any, Any], source: str) -> dict[Any, Any] | None:
    for key in NESTED:
        value = content.get(key)
        if value is None or (isinstance(value, Tensor) and key not in NESTED[:3]):  # a weight may be named `weights`
            continue
        if not isinstance(value, dict):
            raise UserError(f"{source} holds a {type(value).__name__} as its {key}, not a dictionary of weights.")
        return value
    if any(isinstance(value, Tensor) for value in content.values()):
        return None
    with_weights = [v for v in content.values() if isinstance(v, dict) and any(isinstance(w, Tensor) for w in v.values())]
    return with_weights[0] if len(with_weights) == 1 else None


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names without what wrappers put before or into them; left alone where two would become one.

    Example:
        >>> list(unwrapped({"module.temp": torch.zeros(1), "module._orig_mod.itm_head.bias": torch.zeros(2)}))
        ['temp', 'itm_head.bias']
    """
    for inside in INSIDE:
        state = _renamed(state, lambda name: name.replace(inside, ""))  # noqa: B023 - called at once
    for prefix in WRAPPERS * 2:  # one may be inside another
        state = _renamed(state, lambda name: name.removeprefix(prefix))  # noqa: B023
    return state


def _renamed(state: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(name): value for name, value in state.items()}
    return renamed if len(renamed) == len(state) else state


State = dict[str, Tensor]
VISION = {  # of BLIP and BLIP-2, after `vision_model.`
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.projection.": ".attn.proj.",
    ".self_attn.": ".attn.",
}
VIT = {  # of ViT and DeiT
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
QFORMER = {
    "qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "embeddings.word_embeddings.": "Qformer.bert.embeddings.word_embeddings.",
    "embeddings.position_embeddings.": "Qformer.bert.embeddings.position_embeddings.",
    "vision_projection.": "vision_proj.",
    "text_projection.": "text_proj.",
    "vision_model.post_layernorm.": "ln_vision.",
}
LANGUAGE = {  # how the names of a language model begin -> LAVIS's name of it
    "language_model.model.decoder.": "opt",
    "language_model.encoder.": "t5",
    "language_model.model.layers.": "llm",
}


def lavis_names(state: State) -> State:
    """A state dict of transformers' BLIP, BLIP-2, ViT or DeiT by LAVIS's names; any other as it is."""
    if any(name.startswith("vision_model.encoder.layers.0.self_attn.") for name in state):
        blip2 = "query_tokens" in state
        if blip2 or any(name.startswith(("text_encoder.", "text_decoder.")) for name in state):
            return _of_blip2(state) if blip2 else {_in_vision(name): value for name, value in state.items()}
    key = "encoder.layer.0.attention.attention.query.weight"
    if prefix := next((name.removesuffix(key) or "." for name in state if name.endswith(key) and "qformer" not in name), None):
        return _of_vit(state, prefix.lstrip("."))
    return state


def _in_vision(name: str) -> str:
    if not name.startswith("vision_model."):
        return name
    name = name.removeprefix("vision_model.").replace("post_layernorm.", "norm.")
    return "visual_encoder." + _replaced(name, VISION)


def _replaced(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def _of_blip2(state: State) -> State:
    language = next((ours for theirs, ours in LANGUAGE.items() if any(name.startswith(theirs) for name in state)), None)
    renamed: State = {}
    for name, value in state.items():
        if start := next((start for start in QFORMER if name.startswith(start)), None):
            name = name.replace(start, QFORMER[start], 1)
        elif name.startswith("qformer."):
            name = name.replace("qformer.", "Qformer.bert.", 1).replace("attention.attention.", "attention.self.")
        elif language and name.startswith(("language_projection.", "language_model.")):
            name = name.replace("language_projection.", f"{language}_proj.").replace("language_model.", f"{language}_model.", 1)
        name = _in_vision(name)
        if name.endswith(".attn.qkv.bias"):
            # EVA's keys have no bias, and one would be the same summand in all scores of a query, which softmax ignores
            query, _, of_value = value.chunk(3)
            renamed |= {name.replace("qkv.bias", "q_bias"): query.clone(), name.replace("qkv.bias", "v_bias"): of_value.clone()}
        else:
            renamed[name] = value
    return renamed


def _of_vit(state: State, prefix: str) -> State:
    renamed: State = {}
    for name, value in state.items():
        short = name.removeprefix(prefix)
        if ".attention.attention.query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value") if name.replace("query", part) in state]
            short = short.replace(".attention.attention.query.", ".attn.qkv.")
            renamed[_replaced(short, VIT)] = torch.cat(parts)
        elif ".attention.attention." not in name:
            short = short.replace("layernorm.", "norm.", 1) if short.startswith("layernorm.") else short
            renamed[_replaced(short, VIT)] = value
    return renamed


def read_checkpoint(path: str | Path, key: str = "checkpoint", names_only: bool = False) -> dict[str, Any]:
    """Read a ``.pth``/``.pt``/``.bin`` (``weights_only``) or ``.safetensors`` file onto the CPU.

    Args:
        path: the file.
        key: the setting it was named by, for the message.
        names_only: onto the ``meta`` device: names and shapes, without the values.

    Raises:
        UserError: the file is missing, is no checkpoint, or would have to run code to load.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key} is {str(path)!r}, but there is no such file.")
    if not path.stat().st_size:
        raise UserError(f"{key}: {path} is empty.")
    with open(path, "rb") as file:
        beginning = file.read(32)
    if path.suffix == ".safetensors" or beginning[8:9] == b"{":
        return _read_safetensors(path, key, names_only)
    if (what := not_a_checkpoint(beginning)) is not None:
        raise UserError(f"{key}: {path} is {what}.")
    if not names_only and (wrong := damage(path)) is not None:
        raise UserError(f"{key}: {path} is damaged: {wrong}. Use another checkpoint, or copy it again.")
    try:
        content = torch.load(path, map_location="meta" if names_only else "cpu", weights_only=True)
    except Exception as error:  # a torn pickle can raise anything
        raise UserError(
            f"{key}: {path} cannot be loaded as plain weights{_reason(error)}. Files that hold other Python objects are refused, "
            "since loading them can run code; save its state dict alone, or as safetensors."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def _read_safetensors(path: Path, key: str, names_only: bool) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()} if names_only else load_file(path)
        return _with_second_names(state, metadata)
    except SafetensorError as error:
        raise UserError(f"{key}: {path} is not a readable safetensors file ({error}).") from error


def _reason(error: Exception) -> str:
    """Why torch refused a file. Its own words are left out where they advise to load the file all the same."""
    text = str(error).strip()
    if refused := re.search(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", text, re.IGNORECASE):
        return f" ({refused[1].rstrip('.')} is refused)"
    if "weights_only" in text or not text:
        return ""
    return f" ({text.splitlines()[0].rstrip('.')})"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file: a part whose checksum is not right, or its end missing; None for a good one.

    ``torch.save`` stores a CRC-32 of each tensor that ``torch.load`` never looks at: it takes a flipped bit for a weight. Files
    that are no such archive (safetensors, PyTorch before 1.6) have none, and pass.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return "it ends too early" if file.read(4) == b"PK\x03\x04" or not path.stat().st_size else None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return None if part is None else f"the checksum of {part} is wrong"


def read_weights(path: str | Path, key: str = "checkpoint", names_only: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint by LAVIS's names, however it is laid out.

    Taken are a file of LAVIS, ours, plain torch or Lightning (``model``, ``state_dict``, ... in it; ``module.``, ``model.``, ... before
    the names), a sharded one by its index, and a Hugging Face folder; transformers' names of BLIP, BLIP-2 and ViT become LAVIS's.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    weights: dict[str, Tensor] = {}
    path = Path(path).expanduser()
    for file in weight_files(path, key):
        source = f"{key}: {file}"
        state = state_dict_in(read_checkpoint(file, key, names_only), source)
        part = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        _check_weights(part, source, names_only)
        weights |= part
    index = next((file for file in (path, path / IN_FOLDER[0]) if file.name == IN_FOLDER[0] and file.is_file()), None)
    if index is not None:
        weights = _with_second_names(weights, json.loads(index.read_text(encoding="utf-8")).get("metadata"))
    return lavis_names(unwrapped(weights))


def _with_second_names(state: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """Tied weights by all of their names: safetensors hold them once, and in their metadata ``{second name: the one it is under}``."""
    names = metadata.items() if isinstance(metadata, dict) else ()
    return {**{second: state[name] for second, name in names if isinstance(name, str) and name in state}, **state}


def _check_weights(state: dict[str, Tensor], source: str, names_only: bool = False) -> None:
    """Texts for names, and real numbers in memory for values; raises UserError."""
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{source} names a tensor {name!r}; allowed: texts, such as 'temp'.")
        if value.layout is not torch.strided or value.is_quantized:
            raise UserError(f"{source}: {name} is a sparse or quantized tensor; allowed: dense ones.")
        if value.is_complex():
            raise UserError(f"{source}: {name} is a tensor of {value.dtype}; allowed: real numbers.")
        if value.is_meta and not names_only:
            raise UserError(f"{source}: {name} has a shape but no values (it was saved from the meta device); save real weights.")


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """Save a checkpoint whole or not at all (:func:`lavis_mafa.files.replacing`).

    Raises:
        UserError: it cannot be written; what was there before still is.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch closes its half-written archive on the way out, which fails in its own words
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}. What was saved before is kept.") from error


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...] = ()) -> Any:
    """Load a state dict; anything missing, left over or of another size is an error that lists the keys.

    A tensor with two names (a tied head) may come under one of them, as safetensors store it.

    Args:
        may_miss: parts of names that the source cannot know (cross-attention in a text-only BERT).

    Returns:
        what ``load_state_dict`` says: the names that were missing.

    Raises:
        UserError: what does not fit.
    """
    _check_weights(state, source)
    own = module.state_dict()
    sizes = [
        f"{name} {list(value.shape)} (wanted {list(own[name].shape)})"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    given = {_place(own[name]) for name in state if name in own}
    missing = [
        n
        for n, value in own.items()
        if n not in state and _place(value) not in given and not n.endswith("position_ids") and not any(p in n for p in may_miss)
    ]
    extra = [n for n in state if n not in own and not n.endswith("position_ids")]
    problems = [("other size", sizes), ("missing", missing), ("left over", extra)]
    if any(names for _, names in problems):
        raise UserError(f"{source} does not fit the model: " + "; ".join(_few(k, n) for k, n in problems if n) + ".")
    return module.load_state_dict(state, strict=False)


def _place(value: Tensor) -> tuple[Any, ...]:
    """The same for two names of one tensor."""
    return (value.data_ptr(), *value.shape) if value.numel() and not value.is_meta else (id(value),)


def _few(kind: str, names: list[str], at_most: int = 8) -> str:
    more = f", and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)} {kind}: {', '.join(names[:at_most])}{more}"
