"""Where each word of a text looks in an image, for one image and one text: Grad-CAM of the matching logit (ALBEF section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavis_mafa.config.schema import SoftMask
from lavis_mafa.datasets.annotations import clean_caption
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.errors import EmptyCaption, UserError
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives.soft_mask import soft_mask
from lavis_mafa.tools.pictures import WordMap


@dataclass(frozen=True)
class TextMaps:
    """Of one image, as the model took it, and one text."""

    image: Tensor  # [3, H, W]
    caption: str  # as the model read it
    probability: float  # that they match
    whole: WordMap  # the mean of all tokens but [SEP]
    words: list[WordMap]  # in order; pieces of a word joined


def open_pair(path: Path, text: str, processors: tuple[Any, Any]) -> tuple[Tensor, str]:
    """An image [3, H, W] and a text as the processors of an evaluation give them; UserError where one is no good."""
    see, read = processors
    try:
        picture: Image.Image = load_rgb(path)
    except OSError as error:
        raise UserError(f"--image is {str(path)!r}: {error}") from error
    try:
        return see(picture), clean_caption(read, text)
    except EmptyCaption as error:
        raise UserError(f"--text is {text!r}: {error}") from error


@torch.no_grad()
def text_maps(model: Any, image: Tensor, caption: str, how: SoftMask) -> TextMaps:
    """The maps of all words of a text in one image, and the soft masks made of them.

    Args:
        model: of ALBEF's or BLIP's kind, in eval mode. image: [3, H, W].
        how: which layer, by what, and how much a mask takes.

    Raises:
        UserError: there is no such layer.
    """
    ids, mask = model.words([caption])
    pair = torch.zeros(1, dtype=torch.long)
    reading = Reading.of(mask, model.device, pair, pair, 1)
    tokens = model.image_tokens(model.image_states(image[None].to(model.device)))
    texts = model.text_tokens([caption])
    cams = word_maps(model, model.keys_values(tokens), texts, reading, how.layer, how.by).cpu()
    logits = model.match_rows(tokens, texts, pair, pair)
    pieces = model.tokenizer.convert_ids_to_tokens(ids[0, : len(cams)].tolist())
    words = [WordMap(word, cam, soft_mask(cam, how.share)) for word, cam in joined(pieces[1:-1], cams[1:-1])]
    mean = cams[:-1].mean(dim=0)
    read = " ".join(word.word for word in words)  # a long text is cut
    whole = WordMap(read, mean, soft_mask(mean, how.share))
    return TextMaps(image, read, float(logits.float().softmax(dim=1)[0, 1]), whole, words)


def joined(pieces: list[str], cams: Tensor) -> list[tuple[str, Tensor]]:
    """Words out of their pieces, each with the greatest of its pieces' maps: T pieces and [T, N] -> words with [N].

    Example:
        >>> joined(["a", "uni", "##corn"], torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]))
        [('a', tensor([1., 0.])), ('unicorn', tensor([3., 2.]))]
    """
    words: list[tuple[str, Tensor]] = []
    for piece, cam in zip(pieces, cams, strict=True):
        if piece.startswith("##") and words:
            word, before = words[-1]
            words[-1] = word + piece.removeprefix("##"), torch.maximum(before, cam)
        else:
            words.append((piece, cam))
    return words
