"""Checkpoints as other programs lay them out: which files hold the weights, under which key, behind which prefix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_mafa.common.errors import UserError

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
