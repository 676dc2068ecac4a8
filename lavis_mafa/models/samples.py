"""What a model is handed: one caption may be a text, and images and captions must go together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_mafa.common.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def checked(samples: dict[str, Any], image_size: int, *keys: str) -> dict[str, Any]:
    """The samples with ``text_input`` as a list; a single text is a list of one.

    Args:
        samples: of LAVIS's form: ``image`` [B, 3, H, W], ``text_input`` list of B texts.
        image_size: H and W of the model.
        keys: what is needed of the two.

    Raises:
        UserError: one is missing or of another form, or there are not as many texts (or keys, or indices) as images.
    """
    for key in keys:
        if samples.get(key) is None:
            raise UserError(f"samples has no {key!r}; needed: {' and '.join(keys)}.")
    if "image" in keys:
        image = samples["image"]
        if not isinstance(image, Tensor) or image.dim() != 4 or tuple(image.shape[1:]) != (3, image_size, image_size):
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            hint = "; give one image as image.unsqueeze(0)" if isinstance(image, Tensor) and image.dim() == 3 else ""
            raise UserError(f"samples['image'] is {found}; needed: a tensor [B, 3, {image_size}, {image_size}]{hint}.")
        if not len(image):
            raise UserError("samples['image'] has no image; needed: at least one.")
        if image.dtype not in FLOATS:
            raise UserError(f"samples['image'] is {image.dtype}; needed: torch.float32, normalised as an image processor gives it.")
    if "text_input" not in keys:
        return samples
    texts = samples["text_input"]
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise UserError(f"samples['text_input'] holds {wrong[0] if wrong else 'nothing'!r}; needed: a list of texts, one an image.")
    if "image" in keys and len(texts) != len(samples["image"]):
        raise UserError(f"samples has {len(samples['image'])} images and {len(texts)} texts (text_input); needed: one text an image.")
    for key in ("index", "image_key"):
        if samples.get(key) is not None and (not isinstance(samples[key], Tensor) or samples[key].shape != (len(texts),)):
            raise UserError(f"samples[{key!r}] is {samples[key]!r}; needed: a LongTensor [{len(texts)}], a number a text.")
    return {**samples, "text_input": texts}


def check_lengths(shortest: int, longest: int, beams: int, lines: int = 1, sampled: bool = False) -> None:
    """What is generated can be: 1 to ``longest`` tokens, and at least one line, which a search takes from its beams.

    Raises:
        UserError: it cannot.
    """
    if longest < 1 or shortest > longest:
        raise UserError(
            f"min_length is {shortest} and max_length {longest}; allowed: a max_length of 1 or more, and at least min_length."
        )
    if beams < 1 and not sampled:
        raise UserError(f"num_beams is {beams}; allowed: 1 or more.")
    if lines < 1:
        raise UserError(f"num_captions is {lines}; allowed: 1 or more.")
    if lines > beams and not sampled:
        raise UserError(f"num_captions is {lines}, but num_beams is {beams}; allowed: at most as many.")
