"""Which pairs of a batch are known to match before anybody is asked: of one image, or with one and the same text."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

UNKNOWN = -1  # a key that equals no other, not even itself


def text_key(text: str) -> int:
    """A number that stands for a text on every process and in every run: 63 bits, never negative.

    Texts that differ in white space alone have one key, since no tokenizer of ours tells them apart.

    Example:
        >>> text_key("a red dog") == text_key(" a  red dog "), text_key("a red dog") == text_key("a red cat")
        (True, False)
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def known_positives(keys: Tensor, all_keys: Tensor) -> Tensor:
    """Pairs that match because anchor and candidate have a key in common: one image's captions, one caption's images.

    Not closed: a caption of image 1 and one of image 2 are not known to match because a third caption belongs to both images.

    Args:
        keys: LongTensor[B, n], n keys of each anchor (its image's, its text's); below 0: unknown.
        all_keys: LongTensor[C, n], C >= B, those of the candidates; the first B are the anchors' own.

    Returns:
        BoolTensor[B, C], the own pairs among them; the same for images against texts and for texts against images.

    Example:
        >>> keys = torch.tensor([[1, 5], [1, 6], [2, 6], [-1, -1]])
        >>> known_positives(keys, keys).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 1]], dtype=torch.int32)
    """
    same = ((keys[:, None] == all_keys[None]) & (keys[:, None] >= 0)).any(dim=2)
    return same | torch.eye(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)
