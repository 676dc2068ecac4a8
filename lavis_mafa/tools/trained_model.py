"""A YAML and a checkpoint, opened to look into them: the model with its weights, the data, and batches in a chosen order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.checkpoints import COVERED
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.datasets.indexed import IndexedDataset, image_source_of
from lavis_mafa.datasets.stored import Source
from lavis_mafa.errors import UserError
from lavis_mafa.progress import Bar
from lavis_mafa.runners.job import prepare
from lavis_mafa.runners.loading import BadSamples


@dataclass
class Opened:
    """``model`` is in eval mode on ``device``; ``datasets`` maps a split to its data set."""

    model: Any
    datasets: dict[str, Any]
    run: RunBlock
    device: torch.device
    checkpoint: Path


def open_checkpoint(name: str, checkpoint: Path, options: list[str], teacher: bool) -> Opened:
    """Build a YAML's data, and its model with the weights of ``checkpoint``; Con-D is left out, and a ``teacher`` where it is False.

    Raises:
        UserError: whatever :func:`lavis_mafa.config.check.check_yaml` finds, or another model than one that trains with MAFA.
    """
    _, cfg = prepare(name, _options(name, checkpoint, options, teacher))

    import lavis.tasks as tasks
    from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split

    task = tasks.setup_task(cfg)
    datasets = concat_datasets(reorg_datasets_by_split(task.build_datasets(cfg)))
    return _opened(task, cfg, datasets, checkpoint)


def open_model(name: str, checkpoint: Path, options: list[str]) -> tuple[Opened, tuple[Any, Any]]:
    """The model of a YAML, whose data need not be there, and the processors of images and texts that it is evaluated with.

    Raises:
        UserError: as :func:`open_checkpoint`; or no data set of the YAML says how it is evaluated.
    """
    _, cfg = prepare(name, _options(name, checkpoint, options, teacher=False), files=False, data=False)

    import lavis.tasks as tasks
    from lavis.common.registry import registry

    for dataset, block in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)(block)
        builder.build_processors()
        if all(OmegaConf.select(block, f"{part}_processor.eval.name") for part in ("vis", "text")):
            processors = builder.vis_processors["eval"], builder.text_processors["eval"]
            return _opened(tasks.setup_task(cfg), cfg, {}, checkpoint), processors
    raise UserError(f"no data set of {name} has processors for evaluation; give one vis_processor.eval and text_processor.eval.")


def _options(name: str, checkpoint: Path, options: list[str], teacher: bool) -> list[str]:
    """What is set for looking into a model."""
    if not checkpoint.exists():
        raise UserError(f"--checkpoint is {str(checkpoint)!r}, but there is no such file.")
    arch = check_yaml(name, options, files=False).model.arch
    if arch not in COVERED:
        raise UserError(f"model.arch is {arch!r}, which has no contrastive loss of ours; allowed here: {', '.join(COVERED)}.")
    ours = [f"model.pretrained={checkpoint}", "model.discriminator=null", "run.evaluate=true", "run.distributed=false"]
    ours += [f"model.{part}.init=null" for part in COVERED[arch]]
    ours += [] if teacher else ["model.itc.momentum_distillation=null"]
    ours += ["model.itc.intra_modal=[]"] if arch == "albef_mafa" else []  # a tool sees each image once
    return [*options, *ours]


def _opened(task: Any, cfg: Any, datasets: dict[str, Any], checkpoint: Path) -> Opened:
    from lavis_mafa.runners.run_block import run_settings
    from lavis_mafa.tasks.task import MafaTask

    run = run_settings(cfg.run_cfg, isinstance(task, MafaTask))
    device = torch.device(run.device if torch.cuda.is_available() else "cpu")
    return Opened(task.build_model(cfg).to(device).eval(), datasets, run, device, checkpoint)


class _PairsOfGallery(Dataset):
    """An evaluation split as pairs: each of its texts, with the first image that it is written for."""

    def __init__(self, gallery: Any) -> None:
        self.gallery = gallery
        self.truth = getattr(gallery, "truth", None) if getattr(gallery, "concepts", None) is not None else None
        self.image_keys = torch.tensor([self._image(text) for text in range(len(gallery.text))])

    def __len__(self) -> int:
        return len(self.gallery.text)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._image(index)
        sample = {"image": self.gallery[image]["image"], "text_input": self.gallery.text[index]}
        if self.truth is not None:
            sample |= {"concept": int(self.gallery.concepts[image]), "text_key": int(self.gallery.text_keys[index])}
        return sample

    def image_path(self, index: int) -> Source | None:
        return image_source_of(self.gallery, self._image(index))

    def _image(self, text: int) -> int:
        image = self.gallery.txt2img[text]
        return image[0] if isinstance(image, list) else image

    def collater(self, samples: list[dict[str, Any]]) -> Any:
        return default_collate(samples)


def open_split(opened: Opened, split: str) -> IndexedDataset:
    """The pairs of a split. Raises UserError: there is no such split, or none of pairs."""
    dataset = _split(opened, split)
    if _is_gallery(dataset):
        dataset = _PairsOfGallery(dataset)
    elif split != "train":
        raise UserError(f"split {split!r} is no gallery of images and captions.")
    return IndexedDataset(dataset, opened.run.seed)


def open_gallery(opened: Opened, split: str) -> Any:
    """A split that is evaluated. Raises UserError: there is no such split, or it is no gallery."""
    dataset = _split(opened, split)
    if not _is_gallery(dataset):
        others = ", ".join(sorted(name for name, one in opened.datasets.items() if _is_gallery(one))) or "none"
        raise UserError(f"split {split!r} is no gallery of images and captions; those of these data: {others}.")
    return dataset


def _split(opened: Opened, split: str) -> Any:
    dataset = opened.datasets.get(split)
    if dataset is None:
        raise UserError(f"the data have no split {split!r}; they have: {', '.join(sorted(opened.datasets))}.")
    if isinstance(dataset, tuple | list | IterableDataset):
        raise UserError(f"split {split!r} is a stream; only data sets with an index can be analysed.")
    return dataset


def _is_gallery(dataset: Any) -> bool:
    return hasattr(dataset, "txt2img") and hasattr(dataset, "text")


@dataclass
class Reader:
    """Batches of a data set with a progress bar; what cannot be read is replaced and counted, as in training."""

    dataset: IndexedDataset
    opened: Opened
    batch_size: int
    output: Path

    def __call__(self, order: Tensor, what: str, drop_last: bool = False) -> Iterator[dict[str, Any]]:
        """The samples of ``order`` (LongTensor[n]), ``batch_size`` at a time."""
        run = self.opened.run
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=order.tolist(),
            num_workers=run.num_workers,
            pin_memory=self.opened.device.type == "cuda",
            collate_fn=self.dataset.collate,
            drop_last=drop_last,
            generator=torch.Generator(),
        )
        bad = BadSamples(self.output / "bad_samples.jsonl", run.max_bad_share)
        for samples in Bar(loader, desc=what, unit="batch"):
            bad.add(samples, self.batch_size)
            yield samples
