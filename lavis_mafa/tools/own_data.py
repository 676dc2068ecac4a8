"""Settings for one's own pairs, from their files and perhaps a checkpoint: a YAML whose sizes fit the data and the machine, and what a
pass over them needs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lavis_mafa.config.checkpoints import OF_MODEL, check_embeddings, kind_of, shapes_of, sizes_of
from lavis_mafa.config.data import AnnotationFile, files_of
from lavis_mafa.config.read import at, read_settings
from lavis_mafa.config.schema import FAMILIES, MODEL_DEFAULTS, WITH_MATCHING, model_types, type_defaults
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.stored import image_source
from lavis_mafa.errors import UserError
from lavis_mafa.files import write_text
from lavis_mafa.named_weights import PREFIX, by_name

BATCH, SPACE = 96, 4_800  # the papers'
NAMES = {"albef": "ALBEF", "blip": "BLIP", "blip2": "BLIP-2 (stage 1)"}
SIZES = ("tiny", "base")
FIXED_GB = {"albef": 6, "blip": 7, "blip2": 11}  # on a GPU beside the pairs, at base size: weights, AdamW, Con-D, 2 GB left free
GB_A_PAIR = 0.17  # `lavis-mafa plan` computes 0.13 to 0.16 for the three
LEAST = 8  # rows of which a run can be made

# --- a YAML to train with -----------------------------------------------------------------------------------------------


def write_yaml(
    data: Sequence[Path],
    images: Path,
    output: Path,
    *,
    model: str,
    size: str,
    con_d: str | None = None,
    columns: Mapping[str, str] | None = None,
    val: Sequence[Path] | None = None,
    test: Sequence[Path] | None = None,
) -> Written:
    """Write a YAML whose sizes fit one's data and this machine; with a ``con_d`` it trains with MAFA. See :func:`lavis_mafa.api.init`.

    Raises:
        UserError: no new .yaml; files that cannot be trained on; a checkpoint that is none of a Con-D.
    """
    for flag, value, allowed in (("--model", model, tuple(NAMES)), ("--size", size, SIZES)):
        if value not in allowed:
            raise UserError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}.")
    _check_output(output)
    judge = None if con_d is None else _con_d(con_d, model, size)
    columns, files = dict(columns or {}), {"data": data, "val": val or (), "test": test or ()}
    rows = len(_read(files, images, columns))
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None
    fit = fitted(rows, model, size, memory, len(os.sched_getaffinity(0)))
    written = Written(output, f"output/{output.stem}", rows, fit, gpu)
    arch = f"{model}_mafa"
    image_encoder = type_defaults(arch, size)["model"]["image_encoder"]
    loader = FileSystemLoader(MODEL_DEFAULTS.parent)
    page = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - no HTML
    page.filters["pad"] = lambda text: text.ljust(29)
    text = page.get_template("own.yaml.jinja").render(
        title=f"{NAMES[model]}{' with MAFA' if judge else ''}",
        data=[" ".join(str(path).split()) for path in data],
        output=output,
        folder=_text(written.folder),
        latest=shlex.quote(f"{written.folder}/latest"),
        rows=rows,
        arch=arch,
        size=size,
        half_on_cpu=not gpu and image_encoder.get("precision") == "fp16",
        con_d=judge,
        words={key: _text(value) for key, value in judge["own"].items()} if judge else {},
        pretrained=judge["checkpoint"] if judge and size == "tiny" and not judge["sizes"] else None,
        splits={"train" if flag == "data" else flag: _texts(of_flag) for flag, of_flag in files.items() if of_flag},
        images=_text(str(images)),
        columns=_text(columns) if columns else "",
        pixels=image_encoder["image_size"],
        fit=fit,
        gpu=gpu,
    )
    write_text(output, text)
    return written


@dataclass(frozen=True)
class Written:
    """A YAML that was written: ``folder`` is where its runs go, ``rows`` are those to train on."""

    path: Path
    folder: str
    rows: int
    fit: Fit
    gpu: bool


def _check_output(output: Path) -> None:
    """Before anything is read; raises UserError."""
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output is {str(output)!r}; allowed: a file that ends in .yaml.")
    if os.path.lexists(output):
        raise UserError(f"--output: {output} exists already and is never overwritten; choose another name.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output is {str(output)!r}, but there is no folder {output.parent}.")


def _read(files: Mapping[str, Sequence[Path]], images: Path, columns: Mapping[str, str]) -> pa.Table:
    """The rows to train on; all files and every row of them are looked at, as training will; raises UserError."""
    if not images.is_dir():
        raise UserError(f"--images is {str(images)!r}, but there is no such folder.")
    tables = {}
    for flag, of_flag in files.items():
        paths = [path for given in of_flag for path in files_of(given, f"--{flag}")]
        if paths:
            tables[flag] = read_annotations([AnnotationFile(path, columns=columns) for path in paths])
    rows = tables["data"]
    if len(rows) < LEAST:
        raise UserError(f"--data has {len(rows)} rows; a run takes at least {LEAST}.")
    if not any(image_source(images, rows, row).is_file() for row in range(min(10, len(rows)))):
        first = rows["image"][0].as_py()
        raise UserError(f"--images: {images} has none of the first ten rows' images, such as {first!r}; is it their folder?")
    return rows


@dataclass(frozen=True)
class Fit:
    """Sizes for N rows on a machine. ``steps``: of an epoch."""

    batch: int
    space: int
    queue: int
    steps: int
    epochs: int
    warmup: int
    log_freq: int
    save_every: int | None
    precision: str
    workers: int


def fitted(rows: int, model: str, size: str, gpu_memory: float | None, cores: int) -> Fit:
    """What the papers have, as far as the data and the machine allow.

    B is theirs (96) where the GPU has room and there are sixteen batches. M is 50 B, but at most a tenth of the rows, and L 10 M, but
    at most all rows, so that small data are grouped at all. A run has thousands of steps, in 10 to 50 epochs.

    Args:
        gpu_memory: GB, None for a CPU. cores: of the machine.

    Example:
        >>> fitted(5_000_000, "albef", "base", 80.0, 16).queue
        48000
    """
    room = 64 if size == "tiny" else 8 if gpu_memory is None else max(2, min(96, int((gpu_memory - FIXED_GB[model]) / GB_A_PAIR)))
    batch = max(2, min(room, rows // 16))
    batch -= batch % 8 if batch > 8 else 0
    space = batch * min(50, max(2, rows // (10 * batch)))
    steps = rows // batch
    epochs = min(50, max(10, -(-(2_000 if size == "tiny" else 20_000) // steps)))
    return Fit(
        batch=batch,
        space=space,
        queue=space * min(10, rows // space),
        steps=steps,
        epochs=epochs,
        warmup=max(1, min(1_000, epochs * steps // 10)),
        log_freq=max(1, min(50, steps // 5)),
        save_every=2_000 if steps > 4_000 else None,
        precision="fp32" if gpu_memory is None else "bf16",
        workers=min(8, max(1, cores - 1)) if gpu_memory is not None else min(4, cores // 2),
    )


def _con_d(name: str, model: str, size: str) -> dict[str, Any]:
    """The ``discriminator`` block of a Con-D by name: its family, and its sizes where they are not the model's; raises UserError."""
    found = con_d_block(name, "--con-d")
    arch, kind, sizes = found["arch"], found["model_type"], {}
    if (arch, kind) != (f"{model}_mafa", size):
        sizes = {"model_type": kind}
        if kind != size:
            sizes["image_size"] = type_defaults(arch, kind)["model"]["image_encoder"]["image_size"]
    own = {key: value for key, value in found.items() if key not in ("arch", "model_type")}
    return {"arch": arch, "checkpoint": json.dumps(name), "sizes": sizes, "own": own}


def _texts(files: Sequence[Path]) -> str:
    texts = [_text(str(file)) for file in files]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- a pass without a YAML ----------------------------------------------------------------------------------------------


def pass_settings(
    files: Sequence[Path], images: Path, columns: Mapping[str, str], con_d: str, miner: str | None = None, samples: int | None = None
) -> dict[str, Any]:
    """The three blocks with which a pair of commands looks at these pairs: sizes are the papers', as far as there are pairs.

    The model is Con-D's, or a ``miner``'s with Con-D as its ``discriminator``.

    Raises:
        UserError: a checkpoint whose model is not known, files that cannot be read, or a single pair.
    """
    block = con_d_block(con_d, "--con-d")
    if miner is None:
        block |= {"ecm": {"enabled": False}, "itc": {"smoothing": 0}}
    else:
        judge = {"arch": block["arch"], "model_type": block["model_type"], "checkpoint": con_d}
        block = {**con_d_block(miner, "--miner"), "discriminator": judge}
    on_gpu = torch.cuda.is_available()
    sizes = type_defaults(block["arch"], block["model_type"])["model"]["image_encoder"]
    block |= {"image_encoder": {"precision": "fp32"}} if sizes.get("precision") == "fp16" and not on_gpu else {}
    named = [AnnotationFile(file, columns=columns) for path in files for file in files_of(path, "--annotations")]
    rows = len(read_annotations(named))
    if rows < 2:
        raise UserError(f"--annotations has {rows} row, but a batch with negatives has at least 2.")
    pairs = min(samples or rows, rows)
    batch = min(BATCH, max(2, pairs // 4))
    space = max(batch, min(SPACE, pairs // 2))
    info = {"annotations": {"train": {"storage": list(map(str, files))}}, "images": {"storage": str(images)}}
    info |= {"columns": dict(columns)} if columns else {}
    processor = {"eval": {"name": "albef_image_eval", "image_size": sizes["image_size"]}}
    processor["train"] = {**processor["eval"], "name": "albef_image_train"}
    run = {"task": "mafa_pretrain", "batch_size_train": batch, "grit": {"search_space": space, "queue_size": space}}
    run |= {"num_workers": 2, "precision": "bf16" if on_gpu else "fp32", "device": "cuda" if on_gpu else "cpu"}
    return {"model": block, "datasets": {"grit_pairs": {"build_info": info, "vis_processor": processor}}, "run": run}


def con_d_block(name: str, flag: str) -> dict[str, Any]:
    """The ``model`` block of a checkpoint with a matching head: ``arch`` and ``model_type`` by its names and shapes, or where LAVIS's
    is still to be downloaded by its name; and of a run with a vocabulary of its own that. Raises UserError."""
    path = by_name(name, flag)
    if path.startswith(PREFIX):
        lavis = path.removeprefix(PREFIX).split("/")[0]
        if not FAMILIES.get(lavis):
            allowed = ", ".join(f"{PREFIX}{arch}/..." for arch in FAMILIES if FAMILIES[arch] and arch not in WITH_MATCHING)
            raise UserError(f"{flag}: {name} has no matching head; allowed: {allowed}.")
        return {"arch": FAMILIES[lavis], "model_type": "base"}
    shapes = shapes_of(path, flag)
    kind, own = kind_of(shapes), sizes_of(shapes)
    arch = next((arch for arch in WITH_MATCHING if OF_MODEL[arch] == kind), None)
    if arch is None:
        allowed = ", ".join(OF_MODEL[arch] for arch in WITH_MATCHING)
        raise UserError(f"{flag}: {name} is {kind or 'something else'}; allowed: {allowed}.")
    for model_type in model_types(arch):
        sizes = type_defaults(arch, model_type)["model"]
        if all(sizes.get(part, {}).get(key) == value for part, of_part in own.items() for key, value in of_part.items()):
            words = _vocabulary(Path(path), arch, sizes["tokenizer"])
            check_embeddings(shapes, arch, words.get("tokenizer", sizes["tokenizer"]), f"{flag}: {name}")
            return {"arch": arch, "model_type": model_type, **words}
    known = ", ".join(model_types(arch))
    raise UserError(f"{flag}: {name} has other sizes than {arch}'s ({known}); name it in a YAML, with its sizes.")


def _vocabulary(checkpoint: Path, arch: str, default: str) -> dict[str, Any]:
    """The settings of a run that has another tokenizer than its type, whose word embeddings begin with no BERT's."""
    config = checkpoint.with_name("config.yaml")
    tokenizer = at(read_settings(config, []), "model.tokenizer") if config.is_file() else None
    if tokenizer in (None, default):
        return {}
    return {"tokenizer": tokenizer, "qformer" if arch == "blip2_mafa" else "text_encoder": {"init": None}}
