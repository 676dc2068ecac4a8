"""What a model is handed: one caption may be a text, and images and captions must go together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lavis_mafa.common.errors import UserError


def checked(samples: dict[str, Any], image_size: int, *keys: str) -> dict[str, Any]:
    """The samples with ``text_input`` as a list; a single text is a list of one.

    Args:
        samples: of LAVIS's form: ``image`` [B, 3, H, W], ``text_input`` list of B texts.
        image_size: H and W of the model.
        keys: what is needed of the two.

    Raises:
        UserError: one is missing or of another form, or there are not as many texts as images.
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
    if "text_input" not in keys:
        return samples
    texts = samples["text_input"]
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise UserError(f"samples['text_input'] holds {wrong!r}; needed: a list of texts, one an image.")
    if "image" in keys and len(texts) != len(samples["image"]):
        raise UserError(f"samples has {len(samples['image'])} images and {len(texts)} texts (text_input); needed: one text an image.")
    return {**samples, "text_input": texts}
