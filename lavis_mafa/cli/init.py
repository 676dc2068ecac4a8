"""``lavis-mafa init --data pairs.csv --images images --model albef --size tiny --output my.yaml``: a YAML whose sizes fit one's data
and machine."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.options import add_columns, named_columns
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = {"albef": "ALBEF", "blip": "BLIP", "blip2": "BLIP-2 (stage 1)"}
FIXED_GB = {"albef": 6, "blip": 7, "blip2": 11}  # on a GPU beside the pairs, at base size: weights, AdamW, Con-D, 2 GB left free
GB_A_PAIR = 0.17  # `lavis-mafa plan` computes 0.13 to 0.16 for the three
LEAST = 8  # rows of which a run can be made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Without --con-d the YAML trains without MAFA: what comes of it can be Con-D."
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="FILE", help="pairs: .csv, .tsv, .json, .jsonl, .parquet, .arrow")
    add("--images", type=Path, required=True, metavar="DIR", help="the folder that image paths start from")
    add_columns(parser)
    for split, what in (("val", "after each epoch"), ("test", "at the end")):
        add(f"--{split}", type=Path, nargs="+", metavar="FILE", help=f"pairs to evaluate retrieval on, {what}")
    add("--model", choices=tuple(NAMES), required=True)
    add("--size", choices=("tiny", "base"), required=True, help="tiny: for a CPU, from scratch; base: the paper's, for a GPU")
    add(
        "--con-d",
        metavar="CHECKPOINT",
        help="MAFA with this Con-D: a file, a run's folder, or a name such as lavis:albef_retrieval/coco",
    )
    add("--output", type=Path, required=True, metavar="YAML", help="a new file")


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    _check_output(output)
    columns = named_columns(arguments.columns)
    con_d = None if arguments.con_d is None else _con_d(arguments.con_d, arguments.model, arguments.size)
    rows = _read(arguments, columns)
    import torch

    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None
    fit = fitted(len(rows), arguments.model, arguments.size, memory, len(os.sched_getaffinity(0)))
    text = _yaml(arguments, columns, con_d, len(rows), fit, gpu)
    from lavis_mafa.files import write_text

    write_text(output, text)
    of_steps = f"{fit.epochs} epochs of {fit.steps:,} steps with {fit.batch} pairs"
    print(f"{output}: {NAMES[arguments.model]}, {arguments.size}, {len(rows):,} rows: {of_steps}")
    if arguments.size == "base" and not gpu:
        print("No GPU is visible here, so it is for this CPU, on which this size takes very long; --size tiny is for trials.")
    name = shlex.quote(str(output))
    print(f"Next: lavis-mafa validate {name}; lavis-mafa train --cfg-path {name}")
    if con_d is None:
        print(f"Then MAFA, with what comes of it as Con-D: lavis-mafa init ... --con-d {_folder(output)}/latest --output mafa.yaml")
    return 0


def _check_output(output: Path) -> None:
    """Before anything is read; raises UserError."""
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output is {str(output)!r}; allowed: a file that ends in .yaml.")
    if os.path.lexists(output):
        raise UserError(f"--output: {output} exists already and is never overwritten; choose another name.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output is {str(output)!r}, but there is no folder {output.parent}.")


def _read(arguments: argparse.Namespace, columns: dict[str, str]) -> pa.Table:
    """The rows to train on; all files and every row of them are looked at, as training will; raises UserError."""
    from lavis_mafa.config.data import AnnotationFile, files_of
    from lavis_mafa.datasets.annotations import read_annotations
    from lavis_mafa.datasets.stored import image_source

    if not arguments.images.is_dir():
        raise UserError(f"--images is {str(arguments.images)!r}, but there is no such folder.")
    tables = {}
    for flag in ("data", "val", "test"):
        paths = [path for given in getattr(arguments, flag) or () for path in files_of(given, f"--{flag}")]
        if paths:
            tables[flag] = read_annotations([AnnotationFile(path, columns=columns) for path in paths])
    rows = tables["data"]
    if len(rows) < LEAST:
        raise UserError(f"--data has {len(rows)} rows; a run takes at least {LEAST}.")
    if not any(image_source(arguments.images, rows, row).is_file() for row in range(min(10, len(rows)))):
        first = rows["image"][0].as_py()
        raise UserError(f"--images: {arguments.images} has none of the first ten rows' images, such as {first!r}; is it their folder?")
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
    from lavis_mafa.config.schema import type_defaults
    from lavis_mafa.tools.own_data import con_d_block

    found = con_d_block(name, "--con-d")
    arch, kind, sizes = found["arch"], found["model_type"], {}
    if (arch, kind) != (f"{model}_mafa", size):
        sizes = {"model_type": kind}
        if kind != size:
            sizes["image_size"] = type_defaults(arch, kind)["model"]["image_encoder"]["image_size"]
    own = {key: value for key, value in found.items() if key not in ("arch", "model_type")}
    return {"arch": arch, "checkpoint": json.dumps(name), "sizes": sizes, "own": own}


def _folder(output: Path) -> str:
    return f"output/{output.stem}"


def _yaml(arguments: argparse.Namespace, columns: dict[str, str], con_d: dict[str, Any] | None, rows: int, fit: Fit, gpu: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from lavis_mafa.config.schema import MODEL_DEFAULTS, type_defaults

    arch = f"{arguments.model}_mafa"
    image_encoder = type_defaults(arch, arguments.size)["model"]["image_encoder"]
    splits = {"train": arguments.data, "val": arguments.val, "test": arguments.test}
    loader = FileSystemLoader(MODEL_DEFAULTS.parent)
    page = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - no HTML
    page.filters["pad"] = lambda text: text.ljust(29)
    return page.get_template("own.yaml.jinja").render(
        title=f"{NAMES[arguments.model]}{' with MAFA' if con_d else ''}",
        data=[" ".join(str(path).split()) for path in arguments.data],
        output=arguments.output,
        folder=json.dumps(_folder(arguments.output), ensure_ascii=False),
        rows=rows,
        arch=arch,
        size=arguments.size,
        half_on_cpu=not gpu and image_encoder.get("precision") == "fp16",
        con_d=con_d,
        words={key: json.dumps(value, ensure_ascii=False) for key, value in con_d["own"].items()} if con_d else {},
        pretrained=con_d["checkpoint"] if con_d and arguments.size == "tiny" and not con_d["sizes"] else None,
        splits={split: _written(files) for split, files in splits.items() if files},
        images=json.dumps(str(arguments.images), ensure_ascii=False),
        columns=json.dumps(columns, ensure_ascii=False) if columns else "",
        pixels=image_encoder["image_size"],
        fit=fit,
        gpu=gpu,
    )


def _written(files: list[Path]) -> str:
    texts = [json.dumps(str(file), ensure_ascii=False) for file in files]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
