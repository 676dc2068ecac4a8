"""A few pictures of a training for its trackers: what the model is given, and the surest connections of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from lavis.processors.blip_processors import BlipImageBaseProcessor
from PIL import Image
from torch import Tensor

from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.indexed import captions_of, image_source_of
from lavis_mafa.runners.trackers import Picture

AT_MOST = 4
SIDE = 256  # pixels


def samples_given(samples: dict[str, Any]) -> list[Picture]:
    """The first images of a batch as the model gets them, and their captions; none where a sample has another form."""
    images, texts = samples.get("image"), samples.get("text_input")
    if not isinstance(images, Tensor) or images.dim() != 4 or texts is None:
        return []
    given = zip(images[:AT_MOST].cpu(), texts, strict=False)
    return [Picture(_image(image), str(text)) for image, text in given]


def surest_connections(recorded: Path, dataset: Any) -> list[Picture]:
    """Of an epoch's record the new positives that Con-D is surest of: the image, its own captions, and the one that was found."""
    table = pq.read_table(recorded, filters=[("verdict", "=", "positive")]).sort_by([("probability", "descending")])
    return list(_distinct(table.select(["image", "text", "probability"]).to_pylist(), dataset))


def _distinct(rows: list[dict[str, Any]], dataset: Any) -> Iterator[Picture]:
    """Each caption is shown once."""
    known: set[str] = set()
    for row in rows:
        own, found = (" / ".join(captions_of(dataset, row[side])) for side in ("image", "text"))
        source = image_source_of(dataset, row["image"])
        if found in known or len(known) == AT_MOST or source is None:
            continue
        known.add(found)
        image = load_rgb(source)
        image.thumbnail((SIDE, SIDE))
        yield Picture(image, f"{own} | found: {found} ({row['probability']:.3f})")


def _image(image: Tensor) -> Image.Image:
    """[3, H, W], bytes or normalised as LAVIS's processors do without settings of their own."""
    if image.dtype != torch.uint8:
        usual = BlipImageBaseProcessor().normalize
        mean, std = (torch.tensor(values)[:, None, None] for values in (usual.mean, usual.std))
        image = ((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture
