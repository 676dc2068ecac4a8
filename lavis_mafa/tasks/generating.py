"""What the tasks that generate text share: going through a split, joining what the ranks made, and writing it down."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from tqdm import tqdm

from lavis_mafa.common.distributed import gather_objects, rank

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


def batches(loader: Any, what: str, cuda_enabled: bool) -> Iterator[dict[str, Any]]:
    """The loader's batches on their device; rank 0 shows progress."""
    for samples in tqdm(loader, desc=what, unit="batch", disable=rank() != 0):
        yield prepare_sample(samples, cuda_enabled=cuda_enabled)


def as_id(value: Any) -> int | str:
    """A batch's id as plain Python: a tensor's number, digits as a number, other text as it is.

    Example:
        >>> as_id("000000391895")
        391895
    """
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def joined_on_rank_0(made: dict[int | str, Made]) -> dict[int | str, Made] | None:
    """All ranks' results by id, which drops what a sampler gave out twice; None on the other ranks. Call it on every rank."""
    parts = gather_objects(made)
    if rank() != 0:
        return None
    return {name: value for part in parts for name, value in part.items()}


def write_result(name: str, records: list[dict[str, Any]]) -> Path:
    """Write ``<name>.json`` into the run's ``result`` folder, in the form of COCO's results."""
    path = Path(registry.get_path("result_dir")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)
    logger.info("%d results are in %s", len(records), path)
    return path
