"""Every image that a run will evaluate is read once before its first step: a torn one is found now and not after an epoch.

It costs what reading them for one evaluation costs, without the model: about 10 ms an image of COCO's size, shared by ranks and
workers.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lavis_mafa.datasets.images import BROKEN
from lavis_mafa.datasets.indexed import REASON, UNREADABLE, image_path, of_a_decoder, seeded
from lavis_mafa.datasets.pairs import ImageQuestions
from lavis_mafa.datasets.splits import RetrievalPairs
from lavis_mafa.distributed import gather_objects, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.signals import patient_worker

logger = logging.getLogger(__name__)
SHOWN = 5  # in the message; the file has all
FEW = 200  # images that one process reads sooner than workers are started
SECONDS_BETWEEN_LINES = 30.0


def check_evaluation_images(datasets: dict[str, Any], splits: Sequence[str], workers: int, folder: Path) -> None:
    """Read each image of the splits as evaluation will; every rank takes a part.

    Args:
        datasets: by split.
        splits: that will be evaluated; each is read once.
        workers: of each rank.
        folder: for ``bad_evaluation_images.jsonl``.

    Raises:
        UserError: on all ranks: some cannot be used, with the first of them.
    """
    bad = [{"split": split, **image} for split in dict.fromkeys(splits) for image in unreadable(datasets[split], split, workers)]
    everywhere = list(itertools.chain(*gather_objects(bad)))
    if not everywhere:
        return
    path = folder / "bad_evaluation_images.jsonl"
    if rank() == 0:
        path.write_text("".join(json.dumps(image) + "\n" for image in everywhere))
    shown = "; ".join(f"{image['split']}: {image['reason']}" for image in everywhere[:SHOWN])
    more = f" (and {len(everywhere) - SHOWN} more, all in {path})" if len(everywhere) > SHOWN else ""
    raise UserError(
        f"{len(everywhere)} of the images to evaluate cannot be used, and evaluation replaces none: {shown}{more}. Repair them, or "
        "leave them out: `lavis-mafa check-data --annotations FILE --images FOLDER --clean clean.jsonl`."
    )


def unreadable(dataset: Any, split: str, workers: int) -> list[dict[str, Any]]:
    """This rank's part of the images that cannot be used: ``reason`` and, where it is known, ``image``."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return []
    rows = one_row_an_image(dataset)[rank() :: world_size()]
    many = len(rows) > FEW
    loader = DataLoader(
        _Tried(dataset),
        batch_size=16,
        sampler=rows,
        num_workers=workers if many else 0,
        collate_fn=list,
        worker_init_fn=patient_worker,
        generator=torch.Generator(),
    )
    found, done, told = [], 0, time.monotonic()
    if many:
        logger.info("%s: reading its %d images once before training", split, len(rows))
    for results in loader:
        found += [result for result in results if result is not None]
        done += len(results)
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logger.info("%s: %d of %d images are read", split, done, len(rows))
    return found


def one_row_an_image(dataset: Any) -> list[int]:
    """A row for each file; all rows where the data set does not tell its files. Five questions about an image read it once."""
    first: dict[Any, int] = {}
    for row in range(len(dataset)):
        path = _file(dataset, row)
        first.setdefault(row if path is None else path, row)
    return [*first.values()]


class _Tried(Dataset):
    """None for a row that can be read, else what is wrong with it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any] | None:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS's own data sets would fill the rest of a torn image with grey
        try:
            with seeded(0, 0, row):
                self.dataset[row]
            return None
        except UNREADABLE as error:
            reason = str(error)
        except BROKEN as error:
            if not of_a_decoder(error):
                raise
            reason = str(error)
        path, words = _file(self.dataset, row), " ".join(reason[:REASON].split())
        return {"image": path, "reason": words if path is None or path in words else f"{path}: {words}"}


def _file(dataset: Any, row: int) -> str | None:
    """Where the image of a row is; None where the data set does not tell."""
    if isinstance(dataset, RetrievalPairs):
        return dataset.image[row]
    if isinstance(dataset, ImageQuestions):
        return str(dataset.vis_root / dataset.image[row])
    return image_path(dataset, row)
