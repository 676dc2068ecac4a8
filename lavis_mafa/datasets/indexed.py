"""The training set as GRIT sees it: global indices, image keys, per-sample seeds, and unreadable images that change no batch."""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from lavis_mafa.datasets.annotations import says_something, shortened
from lavis_mafa.datasets.images import BROKEN
from lavis_mafa.datasets.lavis_rows import image_keys as image_keys_of_rows
from lavis_mafa.datasets.pixels import normalised, with_bytes
from lavis_mafa.datasets.stored import Source
from lavis_mafa.errors import EmptyCaption

LOOK_AHEAD = 32  # rows, for a stand-in from outside of a batch that is bad altogether
REASON = 400  # characters of a reason: a caption may be long
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, EmptyCaption, SyntaxError)


class BadSample(dict):
    """Takes the place of a sample that could not be read, until a neighbour is found for it."""


class IndexedDataset(Dataset):
    """Wraps any map-style caption data set of LAVIS or ours.

    Each sample gets ``index`` (its place in the whole training set) and ``image_key`` (equal for captions of one image). Random
    augmentation and caption choice are seeded by (seed, epoch, index): a sample does not depend on workers, ranks or on whether
    the run was resumed.

    An unreadable sample is replaced by the next readable one of the same batch, or of the rows that follow, where the batch has none
    (GRIT serves what it has not seen, so bad samples come together). A batch without either is collated to its ``bad_samples``
    alone: the runner, which counts them, ends the run with one message.

    Args:
        two_views: each sample also has ``image_second_view``, its image processed once more with other random draws; it is read twice.
        bytes_if_possible: images are uint8 where :func:`with_bytes` can have them so, and whoever iterates calls :meth:`normalised`.
    """

    def __init__(self, dataset: Any, seed: int = 0, bytes_if_possible: bool = False, two_views: bool = False) -> None:
        self.dataset, self._normalise = with_bytes(dataset) if bytes_if_possible else (dataset, None)
        self.seed, self.two_views = seed, two_views
        # in shared memory: workers outlive an epoch
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.image_keys = image_keys(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Captions and augmentations of this epoch from now on, in this process and in all workers."""
        self._epoch.fill_(epoch)

    def normalised(self, samples: dict[str, Any]) -> dict[str, Any]:
        """A batch on its device with images as the model takes them, equal to those of a data set without bytes to the bit."""
        return samples if self._normalise is None else normalised(samples, self._normalise)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with generators_kept():
            return self._sample(index)

    def _sample(self, index: int) -> Any:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS's own data sets would fill the rest of a torn image with grey
        seed_generators(self.seed, int(self._epoch), index)
        sample = self.dataset[index]
        if isinstance(sample, dict):
            sample = {**sample, "index": index, "image_key": int(self.image_keys[index])}
            if self.two_views:
                sample["image_second_view"] = self.dataset[index]["image"]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        tried = self._tried(indices)
        stand_ins = [s for s in tried if not isinstance(s, BadSample)]
        stand_ins = stand_ins or [s for index in indices if (s := self._readable_after(index)) is not None]
        if not stand_ins:
            return tried
        samples = []
        for place, sample in enumerate(tried):
            if isinstance(sample, BadSample):
                readable = (s for s in tried[place:] + tried[:place] if not isinstance(s, BadSample))
                sample = {**next(readable, stand_ins[place % len(stand_ins)]), "bad_samples": [sample]}
            samples.append(sample)
        return samples

    def _readable_after(self, index: int) -> Any:
        with generators_kept():
            rows = (self._try((index + step) % len(self)) for step in range(1, LOOK_AHEAD + 1))
            return next((s for s in rows if not isinstance(s, BadSample)), None)

    def collate(self, samples: list[Any]) -> Any:
        """The data set's own collater, plus ``bad_samples``: what could not be read, and why."""
        if all(isinstance(s, BadSample) for s in samples):
            return {"bad_samples": [dict(s) for s in samples]}
        bad = [b for s in samples if isinstance(s, dict) for b in s.pop("bad_samples", [])]
        extra = {}
        if samples and isinstance(samples[0], dict):
            extra = {key: torch.tensor([s[key] for s in samples]) for key in ("index", "image_key")}
            samples = [{k: v for k, v in s.items() if k not in extra} for s in samples]
        batch = self.dataset.collater(samples)
        if isinstance(batch, dict):
            batch.update(extra)
            if bad:
                batch["bad_samples"] = [dict(b) for b in bad]
        return batch

    def _tried(self, indices: Sequence[int]) -> list[Any]:
        with generators_kept():  # once: numpy takes 0.1 ms to tell its state and to take it back
            return [self._try(index) for index in indices]

    def _try(self, index: int) -> Any:
        try:
            sample = self._sample(index)
            _check_caption(sample, getattr(_innermost(self.dataset, index)[0], "text_processor", None))
            return sample
        except (*UNREADABLE, *BROKEN) as error:
            if not isinstance(error, UNREADABLE) and not of_a_decoder(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}"[:REASON].splitlines())
            path = image_path(self.dataset, index)
            return BadSample(index=index, reason=reason, **({} if path is None else {"image": path}))


def of_a_decoder(error: BaseException) -> bool:
    """PIL raised it while it opened or decoded a file; anywhere else, the same error is one of the program."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name == "PIL.ImageFile" or (name.startswith("PIL.") and name.endswith("Plugin")) for name in modules)


def _check_caption(sample: Any, process: Any) -> None:
    """LAVIS's own data sets take any text: EmptyCaption where ``text_input`` and the ``text_output`` split from it say nothing."""
    text = sample.get("text_input") if isinstance(sample, dict) else None
    if isinstance(text, str) and not any(says_something(part, process) for part in (text, str(sample.get("text_output", "")))):
        raise EmptyCaption(f"The caption {shortened(text)} holds no word.")


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators start from (seed, epoch, index) inside, and go on as before outside."""
    with generators_kept():
        seed_generators(seed, epoch, index)
        yield


def seed_generators(seed: int, epoch: int, index: int) -> None:
    number = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on outside as if nothing had been."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def image_path(dataset: Any, index: int) -> str | None:
    """What sample ``index``'s image is called, of two images both; None where the data set does not tell."""
    source = image_source_of(dataset, index)
    return None if source is None else str(source)


def image_source_of(dataset: Any, index: int) -> Source | None:
    """Where it is; None likewise. Two images are named as one path, which is none."""
    dataset, index = _innermost(dataset, index)
    if hasattr(dataset, "image_path"):
        source = dataset.image_path(index)
        return Path(source) if isinstance(source, str) else source
    annotation = getattr(dataset, "annotation", None)
    row = annotation[index] if isinstance(annotation, list) else None
    names = row.get("images", [row.get("image")]) if isinstance(row, dict) else []
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return Path(" and ".join(os.path.join(getattr(dataset, "vis_root", None) or "", name) for name in names))


def captions_of(dataset: Any, index: int) -> list[str]:
    """Those of sample ``index``, as they were written; none where the data set does not tell."""
    dataset, index = _innermost(dataset, index)
    if hasattr(dataset, "captions"):
        return dataset.captions(index)
    annotation = getattr(dataset, "annotation", None)
    row = annotation[index] if isinstance(annotation, list) else None
    return [row["caption"]] if isinstance(row, dict) and isinstance(row.get("caption"), str) else []


def _innermost(dataset: Any, index: int) -> tuple[Any, int]:
    """Of concatenated data sets the one that holds sample ``index``, and the sample's number there."""
    while hasattr(dataset, "datasets"):
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        index -= dataset.cumulative_sizes[number - 1] if number else 0
        dataset = dataset.datasets[number]
    return dataset, index


def image_keys(dataset: Any) -> Tensor:
    """LongTensor[N]: rows that show the same image share a key; keys of concatenated data sets never collide."""
    if hasattr(dataset, "datasets"):
        keys, offset = [], 0
        for child in dataset.datasets:
            own = image_keys(child)
            keys.append(own + offset)
            offset += int(own.max()) + 1 if len(own) else 0
        return torch.cat(keys)
    if hasattr(dataset, "image_keys"):
        return dataset.image_keys
    annotation = getattr(dataset, "annotation", None)
    if isinstance(annotation, list) and annotation and isinstance(annotation[0], dict) and {"image", "image_id"} & annotation[0].keys():
        return image_keys_of_rows(annotation, type(dataset).__name__)
    return torch.arange(len(dataset))
