"""The data of a YAML, opened for tools that look at them without training: as files, as annotations, as samples, with a Con-D.

``split_files`` names the annotation files of a split, ``read_annotated`` reads those of training (no processor, no image, nothing
downloaded), ``training_set`` builds samples, ``open_pass`` adds what a pass over them needs: settings, device, Con-D.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import IterableDataset

from lavis_mafa.config.check import ALBEF, BLIP, STAGE_1, kind_of
from lavis_mafa.config.data_settings import SPLITS, TRAINING_FILES, allows_absolute_paths, own_files
from lavis_mafa.config.read import find_yaml
from lavis_mafa.config.schema import RUN_BLOCKS, MafaBlock, RunBlock, typed_block
from lavis_mafa.config.storage import AnnotationFile
from lavis_mafa.datasets.annotations import TEXTS, read_annotations
from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth
from lavis_mafa.datasets.formats import pc
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.distributed import init_process_group
from lavis_mafa.errors import UserError
from lavis_mafa.files import digest
from lavis_mafa.runners import job
from lavis_mafa.weights import load_exactly, read_weights

# --- as files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFiles:
    """The annotation files of a split, which share an image folder."""

    files: list[AnnotationFile]
    root: Path
    allow_absolute_paths: bool = False  # image paths may leave the folder
    select: Callable[[pa.Table], pa.Table] = lambda rows: rows  # those that max_images keeps


def split_files(name: str, block: Any, split: str, base: Path = Path()) -> SplitFiles | None:
    """Where a data set of a YAML finds a split; None where it has no such split.

    Args:
        name: of the data set. block: below ``datasets.<name>``. split: train, val or test.
        base: where relative paths start from (a finished run's: the folder it was started in).

    Raises:
        UserError: a wrong form, or a pattern without files; of LAVIS's data sets one without images in files.
    """
    where, info = f"datasets.{name}.build_info", block.build_info
    if name in SPLITS:
        info = _from(base, info)
    if name == "grit_emoji":
        root, captions = Path(info.root).expanduser(), TRAINING_FILES[info.get("captions", "fixed")]
        file = {"train": captions, "val": "seen.jsonl", "test": "unseen.jsonl"}.get(split)
        return None if file is None else SplitFiles([AnnotationFile(root / file)], root)
    if name in SPLITS:
        files, root, select = own_files(where, info, SPLITS[name])
        return SplitFiles(files[split], root, allows_absolute_paths(where, info), select) if split in files else None
    lavis_cache(base)
    from lavis.common.utils import get_cache_path

    images, storage = (OmegaConf.select(info, key) for key in ("images.storage", f"annotations.{split}.storage"))
    if images is None:
        raise UserError(f"{where} names no images.storage, which this command needs.")
    if storage is None:
        return None
    names = [storage] if isinstance(storage, str) else list(storage)
    # in evaluation, further files are others: lists of answers, the questions in their original form
    files = [AnnotationFile(Path(get_cache_path(file))) for file in (names if split == "train" else names[:1])]
    return SplitFiles(files, Path(get_cache_path(images)), allow_absolute_paths=True)


def lavis_cache(base: Path = Path()) -> Path:
    """Tell LAVIS, and the caller, which folder relative paths of LAVIS's data sets start from."""
    from lavis.common.registry import registry

    cache = os.environ.get("LAVIS_CACHE", str(base.absolute() / ".lavis_cache"))
    registry.mapping["paths"]["cache_root"] = cache
    return Path(cache)


def _from(base: Path, info: DictConfig) -> DictConfig:
    """The same ``build_info``, its relative paths starting from ``base``."""

    def below(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: below(one) for key, one in value.items()}
        if isinstance(value, list):
            return [below(one) for one in value]
        return str(base / Path(value).expanduser()) if isinstance(value, str) else value

    if base == Path():
        return info
    plain: Any = OmegaConf.to_container(info, resolve=True)
    return OmegaConf.create({key: below(value) if key in ("annotations", "images", "root") else value for key, value in plain.items()})


# --- as annotations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotated:
    """The training rows of one data set as they were written.

    Attributes:
        root: the folder that image paths start from. table: ``image`` string, ``caption`` list<string>, ``concept`` where known.
        truth: which image matches which text, where known.
    """

    root: Path
    table: pa.Table
    truth: GroundTruth | None = None

    def __len__(self) -> int:
        return self.table.num_rows


def annotated(dataset: Any) -> Annotated:
    """Of a data set that was built, ours or LAVIS's (a list of dicts with ``image`` and ``caption``).

    Raises:
        UserError: it keeps no images and captions.
    """
    table = getattr(dataset, "table", None)
    if table is None:
        rows = getattr(dataset, "annotation", None)
        if not isinstance(rows, list) or not rows or not all(isinstance(r.get("image"), str) and "caption" in r for r in rows):
            kind = type(dataset).__name__
            raise UserError(f"the data set {kind} keeps no list of images and captions; give the data as grit_pairs.")
        captions = [row["caption"] if isinstance(row["caption"], list) else [row["caption"]] for row in rows]
        table = pa.table({"image": pa.array([row["image"] for row in rows], pa.string()), "caption": pa.array(captions, TEXTS)})
    return Annotated(Path(dataset.vis_root), table, getattr(dataset, "truth", None))


def read_annotated(name: str, block: Any, base: Path = Path()) -> Annotated | None:
    """The training rows of a data set of a YAML, or of a run's ``config.yaml``; None where it trains on nothing.

    Args:
        name, block, base: as for :func:`split_files`.

    Raises:
        UserError: they are not there, or not readable, or no images with captions.
    """
    if name in SPLITS:
        found = split_files(name, block, "train", base)
        if found is None:
            return None
        table = found.select(read_annotations(found.files, allow_absolute_paths=found.allow_absolute_paths))
        if name != "grit_emoji":
            return Annotated(found.root, table, GroundTruth.from_table(table))
        first = block.build_info.get("max_concepts")
        table = table.filter(pc.is_in(table["concept"], value_set=first_concepts(read_truth(found.root), first)))
        return Annotated(found.root, table, load_emoji_truth(found.root, first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lavis.tasks  # noqa: F401 - fills the registry
        from lavis.common.registry import registry

        lavis_cache(base)
        builder = registry.get_builder_class(name)
        if builder is None:
            raise UserError(f"datasets.{name} is not registered with LAVIS.")
        config: Any = OmegaConf.create(OmegaConf.to_container(block))
        config.build_info.annotations = {"train": files} if (files := block.build_info.annotations.get("train")) else {}
        dataset = builder(config).build().get("train")  # not build_datasets, which downloads
    return None if dataset is None else annotated(dataset)


# --- as samples ---------------------------------------------------------------------------------------------------------


def training_set(datasets: Any) -> Any:
    """The training split of all data sets of a YAML as one map-style data set; every row of the annotations is looked at.

    Images are seen whole, by ``vis_processor.eval`` where there is one (a random crop may cut off what a caption speaks of), and
    captions too, whatever ``prefix_lm`` is.

    Args:
        datasets: the ``datasets`` block of LAVIS's ``Config``.

    Raises:
        UserError: a data set cannot be read, or has no training split that can be read by number.
    """
    from lavis.common.registry import registry
    from lavis.datasets.datasets.base_dataset import ConcatDataset

    from lavis_mafa.datasets.lavis_rows import check_rows, explained

    parts = []
    for name in map(str, datasets):
        builder = registry.get_builder_class(name)(datasets[name])
        with explained(OmegaConf.create({name: datasets[name]})):
            part = builder.build_datasets().get("train")
        check_rows({name: {"train": part}})
        if part is None or isinstance(part, IterableDataset) or not hasattr(part, "__len__"):
            raise UserError(f"datasets.{name} has no training split of pairs that can be read by number, which this pass needs.")
        if builder.vis_processors.get("eval") is not None and datasets[name].get("vis_processor", {}).get("eval") is not None:
            part.vis_processor = builder.vis_processors["eval"]
        if getattr(part, "prefix_lm", False):
            part.prefix_lm = False
        parts.append(part)
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


# --- with a Con-D -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """What a pass works with."""

    con_d: Any  # one of our models with a matching head
    miner: Any  # another one, or None
    dataset: Any  # see training_set
    run: RunBlock
    device: torch.device
    model_settings: str  # digests of the `model` and `datasets` blocks
    data_settings: str


def check_pass(name: str, options: list[str], con_d: str, miner: str | None = None) -> Any:
    """The YAML, checked as far as this needs no LAVIS: what only training asks for (its own Con-D, a start) is not asked for.

    Raises:
        UserError: a mistake in it, an architecture without a matching head, or no such checkpoint.
    """
    config = job.check_yaml(name, options, files=False)
    if config.model.arch not in KINDS:
        allowed = ", ".join(KINDS)
        raise UserError(f"model.arch is {config.model.arch}, but Con-D needs a matching head; allowed: {allowed}. ({find_yaml(name)})")
    for flag, path in (("--con-d", con_d), ("--miner", miner)):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{flag} is {path!r}, but there is no such file.")
    return config


def open_pass(config: Any, name: str, options: list[str], con_d: str, miner: str | None = None) -> Opened:
    """Build data and Con-D; under torchrun, join the process group.

    The ``model`` block is Con-D's. With a ``miner`` it is the miner's, and Con-D is what ``model.discriminator`` describes, where there
    is such a block: any of the three families.

    Args:
        config: what :func:`check_pass` returned.

    Raises:
        UserError: from the data, the names in the YAML or the checkpoint.
    """
    _, cfg = job.prepare(name, options, files=False, joins=True)
    from lavis_mafa.config.check import con_d_block
    from lavis_mafa.runners.run_block import run_settings

    run = run_settings(cfg.run_cfg, config.run.task in RUN_BLOCKS)
    on_gpu = run.device.startswith("cuda") and torch.cuda.is_available()
    init_process_group(cfg.run_cfg)
    device = torch.device(f"cuda:{cfg.run_cfg.get('gpu') or 0}" if on_gpu else "cpu")
    if not on_gpu and run.precision == "fp16":
        raise UserError("run.precision is fp16, but the pass runs on a CPU; allowed there: fp32, bf16.")
    dataset = training_set(cfg.datasets_cfg)
    block: Any = typed_block("model", config.model)
    judges = miner is not None and block.discriminator is not None and block.discriminator.arch != "ground_truth"
    model = load_con_d(con_d_block(block) if judges else block, con_d, device, mines=miner is None)
    mines = None if miner is None else load_con_d(block, miner, device, "--miner")
    data_settings = digest(OmegaConf.to_container(cfg.datasets_cfg, resolve=True))
    return Opened(model, mines, dataset, run, device, digest(asdict(model.settings)), data_settings)


KINDS = {"albef_mafa": ALBEF, "blip_mafa": BLIP, "blip2_mafa": STAGE_1}
LANGUAGE = ("text_encoder.cls.", "text_encoder.pooler.", "text_encoder.bert.pooler.", "text_decoder.", "Qformer.cls.")
PROJECTIONS = ("vision_proj.", "text_proj.")
VIT = "visual_encoder."


def load_con_d(block: Any, path: str, device: torch.device, flag: str = "--con-d", mines: bool = True) -> Any:
    """The model of a YAML's ``model:`` block with the weights of ``path``: in eval mode, without gradients.

    What does not score (language-model heads and decoders, a momentum teacher, queues, the temperature) may be missing from the
    checkpoint or left over in it; all else must fit exactly.

    Args:
        block: a typed block of albef_mafa, blip_mafa or blip2_mafa. Its encoders' ``init`` is not read, except for the frozen image
            encoder that a BLIP-2 checkpoint leaves out.
        path: a checkpoint of ours or LAVIS's (pre-training, retrieval, image-text matching).
        device: where it shall work.
        flag: what named the file.
        mines: are its features used; if not, its projections need not fit either.

    Raises:
        UserError: the file is missing, is of another kind, has no matching head, or does not fit (the message lists the keys).
    """
    from lavis.common.registry import registry

    from lavis_mafa.models.bert import fold_token_type, with_bert
    from lavis_mafa.models.blip2_encoders import resize_positions
    from lavis_mafa.models.encoders import fit_position_embeddings
    from lavis_mafa.models.momentum import TEACHERS

    state = read_weights(path, flag)
    kind = kind_of({name: list(value.shape) for name, value in state.items()})
    if kind is not None and kind != KINDS[block.arch]:
        raise UserError(f"{flag}: {path} is {kind}, but model.arch {block.arch} needs {KINDS[block.arch]}.")
    if not any(name.startswith("itm_head.") for name in state):
        raise UserError(
            f"{flag}: {path} has no matching head (itm_head), so it cannot judge pairs; give a checkpoint of pre-training, "
            "retrieval or image-text matching."
        )
    stored_vit = any(name.startswith(VIT) for name in state)
    if not stored_vit and block.arch == "blip2_mafa" and block.image_encoder.init is None:
        raise UserError(f"{flag}: {path} holds no image encoder; name its file in model.image_encoder.init.")
    model = registry.get_model_class(block.arch)(_sizes_alone(block, stored_vit or block.arch != "blip2_mafa"))
    if block.arch == "blip2_mafa":
        state = resize_positions(state, model.visual_encoder)
    else:
        state = fold_token_type(with_bert(state) if block.arch == "albef_mafa" else state)
        state = fit_position_embeddings(state, model.visual_encoder)
    may_miss = (*LANGUAGE, *TEACHERS, "temp", *(() if mines else PROJECTIONS))  # mining takes raw cosines
    state = {name: value for name, value in state.items() if not name.startswith(may_miss)}
    frozen_elsewhere = block.arch == "blip2_mafa" and not stored_vit
    may_miss = (*may_miss, VIT) if frozen_elsewhere else may_miss
    own = model.state_dict()  # full names: `may_miss` of load_exactly looks for parts of names anywhere
    load_exactly(model, state, f"{flag}: {path}", may_miss=tuple(name for name in own if name.startswith(may_miss)))
    return model.eval().requires_grad_(False).to(device)


def _sizes_alone(block: MafaBlock, vit_from_checkpoint: bool) -> Any:
    """The same sizes, without what would be loaded only to be overwritten, and without a teacher and a Con-D of its own."""
    parts: Any = {
        name: replace(getattr(block, name), init=None)
        for name in ("image_encoder", "text_encoder", "qformer")
        if hasattr(block, name) and (name != "image_encoder" or vit_from_checkpoint)
    }
    itc, ecm = replace(block.itc, momentum_distillation=None), replace(block.ecm, enabled=False)
    return replace(block, pretrained=None, discriminator=None, itc=itc, ecm=ecm, **parts)
