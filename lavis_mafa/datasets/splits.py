"""``run.train_splits``: what is trained on, of one split or several."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lavis_mafa.datasets.annotations import image_keys
from lavis_mafa.datasets.facts import check_facts
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import pc
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.errors import UserError

Splits = dict[str, Any]


def with_training_splits(datasets: dict[str, Splits], wanted: Sequence[str]) -> dict[str, Splits]:
    """The data sets by name and split, with what they have of the ``wanted`` ones joined as their ``train``; the others stay.

    Raises:
        UserError: no data set has such a split, or one has nothing there to train on, or their facts do not fit (``check_facts``).
    """
    wanted = list(dict.fromkeys(wanted))
    there = sorted({split for parts in datasets.values() for split in parts})
    for split in wanted:
        if split not in there:
            raise UserError(f"run.train_splits names {split!r}, but the data sets have: {', '.join(there)}.")
    if wanted in ([], ["train"]):
        return datasets
    joined: dict[str, Splits] = {}
    for name, parts in datasets.items():
        chosen = {split: parts[split] for split in wanted if split in parts}
        joined[name] = {split: part for split, part in parts.items() if split != "train"}
        if chosen:
            joined[name]["train"] = chosen["train"] if [*chosen] == ["train"] else _joined(name, chosen, parts.get("train"))
    return joined


def _joined(name: str, chosen: Splits, train: Any) -> Any:
    """All rows of the chosen splits as training samples, in their order, made as ``train`` makes them."""
    if all(isinstance(part, ImageTextPairs | RetrievalPairs) for part in chosen.values()):
        if not isinstance(train, ImageTextPairs):
            split = next(iter(chosen))
            raise UserError(
                f"run.train_splits is {[*chosen]}, but datasets.{name} has no training split that says how samples are made; name "
                f"the file of {split!r} as build_info.annotations.train.storage instead."
            )
        pairs = copy.copy(train)
        tables = [part.table for part in chosen.values()]
        pairs.table = pa.concat_tables(tables, promote_options="default")
        pairs.image_keys = shared_keys(tables)  # type: ignore[assignment]
        check_facts([(f"datasets.{name}, split {split!r}", part.table) for split, part in chosen.items()])
        if any(part.truth is not train.truth for part in chosen.values()):  # each knows what its own rows say
            pairs.truth = GroundTruth.from_table(pairs.table)
        pairs.concepts = pairs._concepts()
        return pairs
    from lavis.datasets.datasets.base_dataset import ConcatDataset

    parts = []
    for split, part in chosen.items():
        if isinstance(part, IterableDataset):
            raise UserError(f"run.train_splits is {[*chosen]}, but datasets.{name}'s {split!r} is a stream; allowed: [train].")
        if train is not None and part is not train and hasattr(train, "vis_processor"):
            part = copy.copy(part)
            part.vis_processor, part.text_processor = train.vis_processor, train.text_processor
        if lacking := _lacking(part, train):
            raise UserError(
                f"run.train_splits names {split!r}, but datasets.{name} gives no {lacking!r} there ({type(part).__name__}), which "
                "training needs; allowed: [train]."
            )
        parts.append(part)
    return ConcatDataset(parts)


def _lacking(part: Any, train: Any) -> str | None:
    """What a training sample has and these lack."""
    try:
        own, needed = part[0], {"text_input": ""} if train is None else train[0]
    except OSError:  # an image that cannot be read is a bad sample, met later
        return None
    return next((key for key in needed if key not in own and key not in ("instance_id", "image_id")), None)


def shared_keys(tables: Sequence[pa.Table]) -> Tensor:
    """LongTensor[N] over all tables: their own image keys, which mean something within their table alone, except that images
    of one path are one.

    Example:
        >>> shared_keys([pa.table({"image": ["a", "b"]}), pa.table({"image": ["c", "b"]})])
        tensor([0, 1, 2, 1])
    """
    paths = pa.chunked_array([chunk for table in tables for chunk in table["image"].chunks], pa.string())
    numbers = pc.index_in(paths, value_set=pc.unique(paths)).to_numpy()
    key_of_path = np.full(int(numbers.max()) + 1, -1)
    found: list[Tensor] = []
    first = row = 0
    for table in tables:
        own, path = image_keys(table).numpy(), numbers[row : row + table.num_rows]
        keys, seen = np.arange(first, first + int(own.max()) + 1), key_of_path[path]
        np.minimum.at(keys, own[seen >= 0], seen[seen >= 0])  # keys of earlier tables are smaller than all of this one's
        key_of_path[path] = np.where(seen >= 0, seen, keys[own])
        found.append(torch.from_numpy(keys[own]))
        first, row = first + len(keys), row + table.num_rows
    return torch.cat(found)
