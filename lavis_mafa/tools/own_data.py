"""The settings of a pass over one's own pairs, from their files and a checkpoint alone: what nobody has to write a YAML for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.config.checkpoints import OF_MODEL, kind_of, shapes_of, sizes_of
from lavis_mafa.config.data import AnnotationFile, files_of
from lavis_mafa.config.read import at, read_settings
from lavis_mafa.config.schema import FAMILIES, WITH_MATCHING, model_types, type_defaults
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.errors import UserError
from lavis_mafa.named_weights import PREFIX, by_name

BATCH, SPACE = 96, 4_800  # the papers'


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
            return {"arch": arch, "model_type": model_type, **_vocabulary(Path(path), arch, sizes["tokenizer"])}
    known = ", ".join(model_types(arch))
    raise UserError(f"{flag}: {name} has other sizes than {arch}'s ({known}); name it in a YAML, with its sizes.")


def _vocabulary(checkpoint: Path, arch: str, default: str) -> dict[str, Any]:
    """The settings of a run that has another tokenizer than its type, whose word embeddings begin with no BERT's."""
    config = checkpoint.with_name("config.yaml")
    tokenizer = at(read_settings(config, []), "model.tokenizer") if config.is_file() else None
    if tokenizer in (None, default):
        return {}
    return {"tokenizer": tokenizer, "qformer" if arch == "blip2_mafa" else "text_encoder": {"init": None}}
