"""Within a block: its batches, the hardest negatives in them, and what Con-D says about those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_mafa.analysis.connections.blocks import Block, Encoder
from lavis_mafa.errors import UserError
from lavis_mafa.grit import group_by_similarity, seeded_generator
from lavis_mafa.models.blip2 import most_similar_query
from lavis_mafa.models.retrieval import best_query
from lavis_mafa.objectives import mine_hard_negatives
from lavis_mafa.objectives.itm import candidate_pairs

LARGEST_MATRIX = 9600  # 737 MB of similarities


@dataclass(frozen=True)
class Candidates:
    """2n pairs by row of the block: (each image, its hardest text), then (the hardest image of each text, that text)."""

    image: Tensor  # LongTensor[2n]
    text: Tensor  # LongTensor[2n]
    exists: Tensor  # BoolTensor[2n], False where a batch has nothing but known positives of the anchor
    similarity: Tensor  # Tensor[2n], cosine

    def __len__(self) -> int:
        return len(self.image)


def grouped_order(block: Block, search_space: int, seed: int) -> Tensor:
    """GRIT's order of a block: cut into parts of M = ``search_space`` (the last may be shorter), each walked by similarity.

    Like GRIT's queue: the block's samples come in random order, and each part's start is random.
    """
    features = block.image_features
    if features.dim() == 3:
        features = most_similar_query(features, block.text_features)
    parts: list[Tensor] = []
    if not len(block):
        return torch.empty(0, dtype=torch.long)
    for number, rows in enumerate(torch.arange(len(block)).split(search_space)):
        start = torch.randint(len(rows), (), generator=seeded_generator("offline grouping", seed, block.number, search_space, number))
        memory = "matrix" if len(rows) <= LARGEST_MATRIX else "rows"
        parts.append(rows[group_by_similarity(features[rows], block.text_features[rows], int(start), memory=memory)])  # type: ignore[arg-type]
    return torch.cat(parts)


def batches_of(order: Tensor, batch_size: int, search_space: int | None = None) -> list[Tensor]:
    """Rows batch by batch. No batch crosses from one part of M into the next, so that each part's last one may be smaller."""
    return [batch for part in order.split(search_space or max(len(order), 1)) for batch in part.split(batch_size) if len(batch)]


@dataclass(frozen=True)
class Known:
    """What else than its own pair an anchor is known to match, so that it is no negative: ``model.ecm.same_image``, ``same_text``."""

    same_image: bool = True  # samples of one image (``image_key``)
    same_text: bool = False  # samples with the very same caption, white space aside

    def keys(self, block: Block) -> list[Tensor]:
        """LongTensor[n] each: rows with an equal number are no negatives of each other."""
        captions = [" ".join(caption.split()) for caption in block.captions]
        number = {caption: row for row, caption in enumerate(captions)}
        text = torch.tensor([number[caption] for caption in captions], dtype=torch.long)
        return [*([block.image_key] if self.same_image else []), *([text] if self.same_text else [])]


SAME_IMAGE = Known()


def shuffled_pairs(block: Block) -> tuple[Tensor, Tensor]:
    """Each image with the text of the sample after it (a block comes in random order), unless image or caption are the same.

    Returns:
        LongTensor[m], LongTensor[m]: image and text rows of the block.
    """
    rows = torch.arange(len(block))
    after = rows.roll(-1)
    other_text = torch.tensor([block.captions[a] != c for a, c in zip(after.tolist(), block.captions, strict=True)], dtype=torch.bool)
    other = (block.image_key != block.image_key[after]) & other_text
    return rows[other], after[other]


def hardest_negatives(block: Block, batches: Sequence[Tensor], known: Known = SAME_IMAGE) -> Candidates:
    """Per anchor the most similar candidate of its batch that is not known to match, as a training step mines it."""
    count = len(block)
    keys = known.keys(block)
    image, text, exists = (torch.zeros(2 * count, dtype=torch.long) for _ in range(3))
    similarity = torch.zeros(2 * count)
    for rows in batches:
        match = torch.eye(len(rows), dtype=torch.bool)
        for key in keys:
            match |= key[rows][:, None] == key[rows][None, :]
        cosines = best_query(block.image_features[rows], block.text_features[rows])
        pairs = candidate_pairs(mine_hard_negatives(cosines, cosines.T, match))
        anchors = torch.cat([rows, count + rows])
        image[anchors], text[anchors] = rows[pairs.image_index], rows[pairs.text_index]
        exists[anchors] = pairs.exists.long()
        similarity[anchors] = cosines[pairs.image_index, pairs.text_index]
    return Candidates(image, text, exists.bool(), similarity)


@torch.no_grad()
def match_probabilities(encoder: Encoder, block: Block, image: Tensor, text: Tensor, pairs_at_once: int = 512) -> Tensor:
    """Con-D's probability that image ``image[p]`` matches text ``text[p]``: [P] rows, [P] rows -> [P] fp32.

    Each distinct pair is scored once, in the order of its image, so that token states travel to the device once or twice an image.

    Raises:
        UserError: a probability is NaN; the message names the samples.
    """
    if not len(image):
        return torch.empty(0)
    distinct, place = torch.unique(image * len(block) + text, return_inverse=True)
    scores = [_chunk(encoder, block, part // len(block), part % len(block)) for part in distinct.split(pairs_at_once)]
    probability = torch.cat(scores)
    if bool(probability.isnan().any()):
        first = int(distinct[probability.isnan()][0])
        pair = f"image {int(block.index[first // len(block)])}, text {int(block.index[first % len(block)])}"
        raise UserError(f"--con-d gives NaN as a match probability; the first data set rows: {pair}.")
    return probability[place]


def _chunk(encoder: Encoder, block: Block, image: Tensor, text: Tensor) -> Tensor:
    rows, which = torch.unique(image, return_inverse=True)
    length = int(block.texts[-1][text].sum(dim=1).max())  # no longer than these texts need
    texts = tuple(part[text, :length].to(encoder.device) for part in block.texts)
    states = block.images[rows].to(encoder.device)
    with encoder.autocast():
        logits = encoder.con_d.match_rows(states if len(rows) == len(image) else states[which.to(encoder.device)], texts)
    return logits.float().softmax(dim=1)[:, 1].cpu()
