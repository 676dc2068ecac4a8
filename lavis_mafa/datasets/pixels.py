"""Training images that travel from workers to the device as bytes, a quarter of what floats are, and are normalised there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.stored import StoredImage

if TYPE_CHECKING:
    from lavis_mafa.processors import AlbefImageTrainProcessor

MAKERS = ("lavis", "lavis_mafa")  # whose data sets put a processed image into a sample, and do nothing else with it
Normalise = Callable[[Tensor], Tensor]


class Bytes:
    """``albef_image_train`` but for its last step: uint8 [3, image_size, image_size].

    Given a file, it decodes no more of a large photograph than the crop needs.
    """

    def __init__(self, processor: AlbefImageTrainProcessor) -> None:
        self.crop, *rest = processor.transform.transforms[:-1]
        self.augment = Compose(rest)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.augment(self.crop(image))

    def read(self, source: str | PathLike[str] | StoredImage) -> Tensor:
        """Raises what ``load_rgb`` does."""
        return self.augment(self.crop.resized(load_rgb(source, self.crop.box, min(self.crop.size))))


def with_bytes(dataset: Any) -> tuple[Any, Normalise | None]:
    """A training set with images of bytes, and what makes a batch's images what they were; the one given stays as it is.

    It comes back unchanged, with None, where one of its parts has another processor than ``albef_image_train`` or another mean or
    std, or is of a kind that is neither ours nor LAVIS's and may do more with an image than hand it on.
    """
    processors: list[AlbefImageTrainProcessor | None] = []
    of_bytes = _copied(dataset, processors)
    scales = {None if p is None else (*p.normalize.mean, *p.normalize.std) for p in processors}
    if len(scales) != 1 or processors[0] is None:
        return dataset, None
    return of_bytes, processors[0].normalised


def normalised(samples: dict[str, Any], normalise: Normalise) -> dict[str, Any]:
    """A batch with its images, uint8 [B, 3, H, W], as the model takes them."""
    return {key: normalise(value) if _of_bytes(value) else value for key, value in samples.items()}


def _copied(dataset: Any, processors: list[AlbefImageTrainProcessor | None]) -> Any:
    """The data set, or those it is concatenated of, with ``Bytes``; appends each one's processor, None if it has to stay."""
    # here: processors import LAVIS, which registers all that we have, this half imported file too
    from lavis_mafa.processors import AlbefImageTrainProcessor

    copied = copy.copy(dataset)
    if hasattr(dataset, "datasets"):
        copied.datasets = [_copied(part, processors) for part in dataset.datasets]
        return copied
    process, maker = getattr(dataset, "vis_processor", None), type(dataset).__module__.partition(".")[0]
    if type(process) is AlbefImageTrainProcessor and maker in MAKERS:  # a subclass may do anything
        copied.vis_processor = Bytes(process)
        processors.append(process)
    else:
        processors.append(None)
    return copied


def _of_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 4
