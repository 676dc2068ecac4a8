"""The data of a YAML, opened for tools that look at them without training: as files, as annotations, as samples, with a Con-D.

``split_files`` names the annotation files of a split, ``read_annotated`` reads those of training (no processor, no image, nothing
downloaded), ``training_set`` builds samples, ``opened_pass`` adds what a pass over them needs: settings, device, Con-D. Who only reads
annotations waits for no torch.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.data import (
    SCENE_FILES,
    SPLITS,
    TRAINING_FILES,
    AnnotationFile,
    allows_absolute_paths,
    kept,
    missing_files,
    own_files,
)
from lavis_mafa.config.read import find_yaml, plain
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.ids import pc
from lavis_mafa.datasets.stored import Source, image_source
from lavis_mafa.errors import UserError
from lavis_mafa.files import digest

if TYPE_CHECKING:
    import torch

    from lavis_mafa.config.schema import RunBlock
    from lavis_mafa.datasets.ground_truth import GroundTruth

# --- as files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFiles:
    """The annotation files of a split, which share an image folder."""

    files: list[AnnotationFile]
    root: Path
    allow_absolute_paths: bool = False  # image paths may leave the folder
    select: Callable[[pa.Table], pa.Table] = lambda rows: rows  # those that max_images keeps


def split_files(name: str, block: Any, split: str, base: Path = Path()) -> SplitFiles | None:
    """Where a data set of a YAML (``block`` is what stands below its name) finds a split; None where it has no such split.

    Relative paths start from ``base``: those of a finished run from the folder it was started in.

    Raises:
        UserError: a wrong form, a pattern without files, or a folder without scenes; of LAVIS's data sets one without images in files.
    """
    where, info = f"datasets.{name}.build_info", block.build_info
    if name in SPLITS:
        info = _from(base, info)
    if name == "grit_emoji":
        root, captions = Path(info.root).expanduser(), TRAINING_FILES[info.get("captions", "fixed")]
        file = {"train": captions, "val": "seen.jsonl", "test": "unseen.jsonl"}.get(split)
        return None if file is None else SplitFiles([AnnotationFile(root / file)], root)
    if name == "grit_scenes":
        if missing := missing_files(name, {"build_info": info}):
            raise UserError(missing[0])
        root, limits = Path(info.root).expanduser(), {"train": info.get("max_images")}
        of_split = {other: f"{other}.parquet" for other in SPLITS[name]} | {"train": SCENE_FILES[info.get("captions", "web")]}
        keep = partial(kept, limit=limits.get(split), seed=None)
        return SplitFiles([AnnotationFile(root / of_split[split])], root, select=keep) if split in of_split else None
    if name in SPLITS:
        own, root, select = own_files(where, info, SPLITS[name])
        return SplitFiles(own[split], root, allows_absolute_paths(where, info), select) if split in own else None
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
            return {key: one if key == "columns" else below(one) for key, one in value.items()}
        if isinstance(value, list):
            return [below(one) for one in value]
        return str(base / Path(value).expanduser()) if isinstance(value, str) else value

    if base == Path():
        return info
    paths = ("annotations", "images", "root")
    return OmegaConf.create({key: below(value) if key in paths else value for key, value in plain(info).items()})


# --- as annotations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotated:
    """The training rows of one data set as they were written."""

    root: Path  # where image paths start from
    table: pa.Table  # ``image`` string, ``caption`` list<string> and, where known, ``concept`` or ``facts``
    find_truth: Callable[[], GroundTruth | None] = lambda: None

    def __len__(self) -> int:
        return self.table.num_rows

    def image(self, row: int) -> Source:
        return image_source(self.root, self.table, row)

    @cached_property
    def truth(self) -> GroundTruth | None:
        return self.find_truth()


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
    return Annotated(Path(dataset.vis_root), table, lambda: getattr(dataset, "truth", None))


def read_annotated(name: str, block: Any, base: Path = Path()) -> Annotated | None:
    """The training rows of a data set of a YAML, or of a run's ``config.yaml`` (see :func:`split_files`); None if there are none.

    Raises:
        UserError: they are not there, or not readable, or no images with captions.
    """
    if name in SPLITS:
        found = split_files(name, block, "train", base)
        if found is None:
            return None
        table = found.select(read_annotations(found.files, allow_absolute_paths=found.allow_absolute_paths))
        if name != "grit_emoji":
            return Annotated(found.root, table, partial(_truth_of, table))
        from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth

        first = block.build_info.get("max_concepts")
        table = table.filter(pc.is_in(table["concept"], value_set=first_concepts(read_truth(found.root), first)))
        return Annotated(found.root, table, partial(load_emoji_truth, found.root, first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lavis.tasks  # noqa: F401 - fills the registry
        from lavis.common.registry import registry

        lavis_cache(base)
        builder = registry.get_builder_class(name)
        if builder is None:
            raise UserError(f"datasets.{name} is not registered with LAVIS.")
        config: Any = OmegaConf.create(plain(block))
        config.build_info.annotations = {"train": files} if (files := block.build_info.annotations.get("train")) else {}
        dataset = builder(config).build().get("train")  # not build_datasets, which downloads
    return None if dataset is None else annotated(dataset)


def _truth_of(table: pa.Table) -> GroundTruth | None:
    from lavis_mafa.datasets.ground_truth import GroundTruth

    return GroundTruth.from_table(table)


# --- as samples ---------------------------------------------------------------------------------------------------------


def training_set(datasets: Any) -> Any:
    """The training split of all data sets in the ``datasets`` block of LAVIS's ``Config``, as one; each row is looked at.

    Images are seen whole, by ``vis_processor.eval`` where there is one (a random crop may cut off what a caption speaks of), and
    captions too, whatever ``prefix_lm`` is.

    Raises:
        UserError: a data set cannot be read, or has no training split that can be read by number.
    """
    from lavis.common.registry import registry
    from lavis.datasets.datasets.base_dataset import ConcatDataset
    from torch.utils.data import IterableDataset

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
    model: Any  # the typed `model` block
    device: torch.device
    model_settings: str  # digests of the `model` and `datasets` blocks
    data_settings: str


def check_pass(name: str, options: list[str], con_d: str, miner: str | None = None) -> Any:
    """The YAML, checked as far as this needs no LAVIS: what only training asks for (its own Con-D, a start) is not asked for.

    Raises:
        UserError: a mistake in it, an architecture without a matching head, or no such checkpoint.
    """
    from lavis_mafa.config.check import check_yaml
    from lavis_mafa.config.schema import WITH_MATCHING

    config = check_yaml(name, options, files=False)
    if config.model.arch not in WITH_MATCHING:
        allowed = ", ".join(WITH_MATCHING)
        raise UserError(f"model.arch is {config.model.arch}, but Con-D needs a matching head; allowed: {allowed}. ({find_yaml(name)})")
    for flag, path in (("--con-d", con_d), ("--miner", miner)):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{flag} is {path!r}, but there is no such file.")
    return config


@contextlib.contextmanager
def opened_pass(
    config: Any, name: str, options: list[str], con_d: str, miner: str | None = None, features: Any = None
) -> Iterator[Opened]:
    """Build data and Con-D for what :func:`check_pass` returned; under torchrun, join the process group, and leave none behind.

    The ``model`` block is Con-D's. With a ``miner`` it is the miner's, and Con-D is what ``model.discriminator`` describes, where there
    is such a block: any of the three families. With ``features`` that are given, Con-D needs no projections either.

    Raises:
        UserError: from the data, the names in the YAML or the checkpoint.
    """
    import torch

    from lavis_mafa.distributed import init_process_group
    from lavis_mafa.runners import job

    _, cfg = job.prepare(name, options, files=False, joins=True)
    try:
        init_process_group(cfg.run_cfg)
        yield _open(cfg, config, con_d, miner, projects=miner is None and features is None)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _open(cfg: Any, config: DictConfig, con_d: str, miner: str | None, projects: bool) -> Opened:
    import torch

    from lavis_mafa.config.schema import RUN_BLOCKS, con_d_block, typed_block
    from lavis_mafa.models.con_d import load_con_d
    from lavis_mafa.runners.run_block import run_settings

    run = run_settings(cfg.run_cfg, config.run.task in RUN_BLOCKS)
    on_gpu = run.device.startswith("cuda") and torch.cuda.is_available()
    device = torch.device(f"cuda:{cfg.run_cfg.get('gpu') or 0}" if on_gpu else "cpu")
    if not on_gpu and run.precision == "fp16":
        raise UserError("run.precision is fp16, but the pass runs on a CPU; allowed there: fp32, bf16.")
    dataset = training_set(cfg.datasets_cfg)
    block: Any = typed_block("model", config.model)
    judges = miner is not None and block.discriminator is not None and block.discriminator.arch != "ground_truth"
    model = load_con_d(con_d_block(block) if judges else block, con_d, device, mines=projects)
    mines = None if miner is None else load_con_d(block, miner, device, "--miner")
    data_settings = digest(plain(cfg.datasets_cfg))
    return Opened(model, mines, dataset, run, block, device, digest(asdict(model.settings)), data_settings)
