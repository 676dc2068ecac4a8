"""Which pairs are known to match, and which in-batch pair is the hardest wrong one (ALBEF section 3.2; MAFA Algorithm 1, line 11)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1  # a key that equals no other, not even itself
NO_CANDIDATE = -1


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


@dataclass(frozen=True)
class HardNegatives:
    """Per anchor the hardest and second hardest candidate; -1 where there is none. Each is a LongTensor[B]."""

    text_for_image: Tensor
    text_for_image_2nd: Tensor
    image_for_text: Tensor
    image_for_text_2nd: Tensor


def mine_hard_negatives(sim_i2t: Tensor, sim_t2i: Tensor, known_positive: Tensor | None = None) -> HardNegatives:
    """Pick per anchor the two most similar candidates that are not known to match.

    The argmax of the raw similarity is taken; known positives are set to -inf. There is no softmax, so no temperature can
    make a true candidate underflow to the value of a masked one. Ties go to the lowest index. Nothing is copied to the host.

    Args:
        sim_i2t: [B, K] similarity of image b and text k. Column b is the image's own text; K >= B (more when gathered).
        sim_t2i: [B, K] similarity of text b and image k.
        known_positive: BoolTensor[B, K], True where anchor b and candidate k are known to match (own pair, same image). The own
            pair is always masked. Default: the own pairs alone.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> sims = torch.tensor([[0.9, 0.5, 0.1], [0.4, 0.8, 0.6], [0.0, 0.3, 0.7]])
        >>> mine_hard_negatives(sims, sims.T).text_for_image
        tensor([1, 2, 1])
    """
    rows, columns = sim_i2t.shape
    if sim_t2i.shape != sim_i2t.shape or columns < rows:
        raise ValueError(f"sim_i2t and sim_t2i must be [B, K] with K >= B, not {list(sim_i2t.shape)}, {list(sim_t2i.shape)}")
    mask = torch.eye(rows, columns, dtype=torch.bool, device=sim_i2t.device)
    if known_positive is not None:
        if known_positive.shape != sim_i2t.shape:
            raise ValueError(f"known_positive is {list(known_positive.shape)}, similarities are {list(sim_i2t.shape)}")
        mask = mask | known_positive
    text_1st, text_2nd = _two_best(sim_i2t.detach(), mask)
    image_1st, image_2nd = _two_best(sim_t2i.detach(), mask)
    return HardNegatives(text_1st, text_2nd, image_1st, image_2nd)


def sampling_scores(sim: Tensor, temperature: Tensor | float, how: str = "hardest") -> Tensor:
    """Scores whose argmax is the candidate that ``how`` asks for, so that one miner serves all three ways.

    ``hardest`` returns ``sim`` [B, K] (GRIT-VLP, MAFA). ``sampled`` adds Gumbel noise to ``sim / temperature``: the argmax is then a
    draw from softmax(sim / temperature), the second best a draw without replacement (ALBEF). ``random`` is uniform
    (GRIT-VLP's ITM_rand). Another word is a ValueError.
    """
    if how == "hardest":
        return sim.detach()
    if how == "random":
        return torch.rand_like(sim, dtype=torch.float32)
    if how == "sampled":
        gumbel = -torch.empty_like(sim, dtype=torch.float32).exponential_().log()
        return sim.detach().float() / temperature + gumbel
    raise ValueError(f"negatives is {how!r}, but must be one of hardest, sampled, random")


def _two_best(sim: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    left = sim.masked_fill(mask, float("-inf"))
    first = left.argmax(dim=1)
    rest = left.scatter(1, first[:, None], float("-inf"))
    second = rest.argmax(dim=1)
    return _or_none(left, first), _or_none(rest, second)


def _or_none(scores: Tensor, best: Tensor) -> Tensor:
    value = scores.gather(1, best[:, None]).squeeze(1)
    return torch.where(value == float("-inf"), NO_CANDIDATE, best)


def best_query(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosines of I images and T texts, of BLIP-2's several features an image the largest: [I, (Q,) d], [T, d] -> [I, T]."""
    with torch.autocast(image_features.device.type, enabled=False):
        if image_features.dim() == 2:
            return image_features @ text_features.T
        rows = [(queries @ text_features.T).amax(dim=1) for queries in torch.split(image_features, 64)]  # [64, Q, T] at once
    return torch.cat(rows)


def most_similar_query(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Per image the query most similar to its own text (MAFA section G.7): [B, queries, d], [B, d] -> [B, d]."""
    best = torch.einsum("bqd,bd->bq", image_features, text_features).argmax(dim=1)
    return image_features[torch.arange(len(best), device=best.device), best]
