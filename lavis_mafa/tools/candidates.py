"""A pass over the data with a Con-D: blocks of M samples, each encoded once; the hardest negatives in their batches; Con-D's word.

Main memory is one block, ``M * (N * w * b + T * t * b + 2 * d * 4) + 8 * M^2`` bytes, whatever the size of the data, beside their order
and annotations: N image tokens of width w, T text tokens of t numbers (1 for BLIP and BLIP-2, which read a text together with its
image), b bytes a number (by ``run.precision``), d numbers a feature (Q * d an image for BLIP-2's Q queries), and the similarities of
the grouping, of which none are kept above M = 9600. ALBEF of the paper's size with M = 4800 in bf16: 2.4 GB.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_mafa.datasets.indexed import BadSample, IndexedDataset
from lavis_mafa.errors import UserError
from lavis_mafa.grit import group_by_similarity
from lavis_mafa.grit.sampler import seeded_generator
from lavis_mafa.objectives import mine_hard_negatives
from lavis_mafa.objectives.itm import candidate_pairs
from lavis_mafa.objectives.mining import best_query, most_similar_query
from lavis_mafa.progress import Bar
from lavis_mafa.tools.features import Features

KEEP = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_MATRIX = 9600  # 737 MB of similarities
PAIRS_AT_ONCE = 512
WITHOUT_NEWS = 5.0  # seconds that scoring a block may take without a bar of its own
COLUMNS, TRUTH = ("image_features", "text_features", "index", "image_key"), ("concept", "text_key")
Progress = Callable[[int], object]
Blocks = Sequence[tuple[int, Tensor]]  # number, LongTensor[m] of data set rows


def shuffled(count: int, seed: int, at_most: int | None = None) -> Tensor:
    """LongTensor: a random order of ``count`` samples, or the first ``at_most`` of it, which are a fair part of the data."""
    return torch.randperm(count, generator=seeded_generator("offline pass", seed))[:at_most]


def blocks_of(order: Tensor, size: int) -> Blocks:
    """An order in blocks of ``size``."""
    return list(enumerate(order.split(size)))


class ReadableRows(IndexedDataset):
    """As :class:`IndexedDataset`, but each sample counts once: a batch becomes smaller by its unreadable ones, and lists them.

    Args:
        batch_size: in which the encoders see them; bounds the device's memory. workers: that read images ahead.
    """

    def __init__(self, dataset: Any, seed: int = 0, batch_size: int = 64, workers: int = 0) -> None:
        super().__init__(dataset, seed)
        self.batch_size, self.workers = batch_size, workers

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return self._tried(indices)

    def collate(self, samples: list[Any]) -> Any:
        """A batch, or nothing but ``bad_samples`` where nothing could be read."""
        bad = [dict(s) for s in samples if isinstance(s, BadSample)]
        readable = [s for s in samples if not isinstance(s, BadSample)]
        return {**(super().collate(readable) if readable else {}), "bad_samples": bad}


@dataclass(frozen=True)
class Block:
    """n encoded samples in main memory; everything below has one row a sample."""

    number: int
    index: Tensor  # LongTensor[n], rows of the data set
    image_key: Tensor  # LongTensor[n], equal where the image is the same
    captions: list[str]  # as the model reads them
    images: Tensor  # [n, N, w]
    texts: tuple[Tensor, ...]  # [n, T, ...], the last one is the mask
    image_features: Tensor  # [n, d] or [n, Q, d], fp32
    text_features: Tensor  # [n, d], fp32
    truth: dict[str, Tensor] = field(default_factory=dict)  # `concept` and `text_key` LongTensor[n] where known
    bad_samples: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)


class Encoder:
    """Con-D's two encoders, in a precision.

    Args:
        con_d: a model with ``image_rows``, ``text_rows`` and ``match_rows``, in eval mode. device: its device.
        precision: ``run.precision``; token states are kept in it, features always in fp32, since they decide what is mined.
        miner: another such model, or features that are given, one row a row of the data: what decides what is mined; None: Con-D's own.
    """

    judge_name, margin = "Con-D", None

    def __init__(self, con_d: Any, device: torch.device, precision: str = "fp32", miner: Any = None) -> None:
        self.con_d, self.device, self.miner = con_d, device, miner
        self.dtype = KEEP[precision]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def blocks(self, rows: ReadableRows, blocks: Blocks, progress: Progress = lambda _: None) -> Iterator[Block]:
        """:func:`encoded_blocks`."""
        return encoded_blocks(self, rows, blocks, progress)

    def probabilities(self, block: Block, image: Tensor, text: Tensor) -> Tensor:
        """:func:`match_probabilities`."""
        return match_probabilities(self, block, image, text)

    @torch.no_grad()
    def rows(self, image: Tensor, captions: list[str], index: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """Image states, text rows, image features, text features; on the device. ``index``: of the data set, which rows these are."""
        image = image.to(self.device)
        with self.autocast():
            if self.miner is None:
                states, image_features = self.con_d.image_rows(image)
                texts, text_features = self.con_d.text_rows(captions)
            else:  # then Con-D has no projections
                own = self.con_d.image_states(self.con_d.at_own_size(image))
                states, texts = self.con_d.image_tokens(own), self.con_d.text_tokens(captions)
                if isinstance(self.miner, Features):
                    image_features, text_features = self.miner.rows(index)
                else:
                    image_features, text_features = self.miner.image_rows(image)[1], self.miner.text_rows(captions)[1]
        texts = tuple(part.to(self.dtype) if part.is_floating_point() else part for part in texts)
        return states.to(self.dtype), texts, image_features.float(), text_features.float()


def encoded_blocks(encoder: Encoder, rows: ReadableRows, blocks: Blocks, progress: Progress = lambda _: None) -> Iterator[Block]:
    """Encode one block after the other, each freed when the caller lets go of it; ``progress`` is told how many samples were taken.

    Raises:
        UserError: a feature is not finite; the message names the samples.
    """
    parts = [[part.tolist() for part in indices.split(rows.batch_size)] for _, indices in blocks]
    sampler, generator = list(itertools.chain(*parts)), torch.Generator()
    batches = iter(DataLoader(rows, batch_sampler=sampler, num_workers=rows.workers, collate_fn=rows.collate, generator=generator))
    for (number, indices), own in zip(blocks, parts, strict=True):
        yield _encoded(encoder, number, len(indices), itertools.islice(batches, len(own)), progress)


def _encoded(encoder: Encoder, number: int, size: int, batches: Iterator[dict[str, Any]], progress: Progress) -> Block:
    """A block from its batches. The image states, which are nearly all of it, are written to their place at once."""
    from lavis_mafa.models.retrieval import joined_texts  # here: a pass over features that are given needs no LAVIS

    images = torch.empty(0)
    captions: list[str] = []
    texts: list[tuple[Tensor, ...]] = []
    bad: list[dict[str, Any]] = []
    columns: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, *TRUTH)}
    for batch in batches:
        new = list(batch["text_input"]) if "image" in batch else []
        if new:
            states, rows, batch["image_features"], batch["text_features"] = encoder.rows(batch["image"], new, batch["index"])
            _check_finite(batch, "--con-d" if encoder.miner is None else "--miner")
            if not captions:
                images = torch.empty(size, *states.shape[1:], dtype=states.dtype)
            images[len(captions) : len(captions) + len(new)] = states.cpu()
            texts.append(tuple(part.cpu() for part in rows))
            for name in columns.keys() & batch.keys():
                columns[name].append(batch[name].cpu())
        captions += new
        bad += batch["bad_samples"]
        progress(len(new) + len(batch["bad_samples"]))
    joined = {name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.long) for name, parts in columns.items()}
    truth = {name: joined.pop(name) for name in TRUTH}
    return Block(
        number=number,
        captions=captions,
        images=images[: len(captions)],
        texts=tuple(joined_texts(column) for column in zip(*texts, strict=True)),
        truth={name: column for name, column in truth.items() if len(captions) == len(column) > 0},
        bad_samples=bad,
        **joined,
    )


def _check_finite(batch: dict[str, Any], source: str) -> None:
    good = [batch[name].flatten(1).isfinite().all(dim=1).cpu() for name in ("image_features", "text_features")]
    bad = batch["index"][~(good[0] & good[1])].tolist()
    if bad:
        listed = ", ".join(map(str, bad[:10]))
        raise UserError(f"{source} gives features that are not finite for {len(bad)} samples; data set rows: {listed}.")


@dataclass(frozen=True)
class Candidates:
    """2n pairs by row of the block: (each image, its hardest text), then (the hardest image of each text, that text)."""

    image: Tensor  # LongTensor[2n]
    text: Tensor  # LongTensor[2n]
    exists: Tensor  # BoolTensor[2n], False where a batch has nothing but known positives of the anchor
    similarity: Tensor  # Tensor[2n], cosine

    def __len__(self) -> int:
        return len(self.image)


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


def grouped_order(block: Block, search_space: int, seed: int) -> Tensor:
    """GRIT's order of a block: cut into parts of M = ``search_space`` (the last may be shorter), each walked by similarity.

    Like GRIT's queue: the block's samples come in random order, and each part's start is random.
    """
    features = block.image_features
    if features.dim() == 3:
        features = most_similar_query(features, block.text_features)
    parts = [torch.empty(0, dtype=torch.long)]
    for number, rows in enumerate(torch.arange(len(block)).split(search_space) if len(block) else ()):
        start = torch.randint(len(rows), (), generator=seeded_generator("offline grouping", seed, block.number, search_space, number))
        memory = "matrix" if len(rows) <= LARGEST_MATRIX else "rows"
        parts.append(rows[group_by_similarity(features[rows], block.text_features[rows], int(start), memory=memory)])  # type: ignore[arg-type]
    return torch.cat(parts)


def batches_of(order: Tensor, batch_size: int, search_space: int | None = None) -> list[Tensor]:
    """Rows batch by batch. No batch crosses from one part of M into the next, so that each part's last one may be smaller."""
    return [batch for part in order.split(search_space or max(len(order), 1)) for batch in part.split(batch_size) if len(batch)]


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


def shuffled_pairs(block: Block) -> tuple[Tensor, Tensor]:
    """LongTensor[m] rows of images and of texts: each image with the text of the sample after it (a block comes in random order),
    unless image or caption are the same."""
    rows = torch.arange(len(block))
    after = rows.roll(-1)
    other_text = torch.tensor([block.captions[a] != c for a, c in zip(after.tolist(), block.captions, strict=True)], dtype=torch.bool)
    other = (block.image_key != block.image_key[after]) & other_text
    return rows[other], after[other]


@torch.no_grad()
def match_probabilities(encoder: Encoder, block: Block, image: Tensor, text: Tensor, pairs_at_once: int = PAIRS_AT_ONCE) -> Tensor:
    """Con-D's probability that image ``image[p]`` matches text ``text[p]``: [P] rows, [P] rows -> [P] fp32.

    Each distinct pair is scored once, in the order of its image, so that token states travel to the device once or twice an image.

    Raises:
        UserError: a probability is NaN; the message names the samples.
    """
    if not len(image):
        return torch.empty(0)
    distinct, place = torch.unique(image * len(block) + text, return_inverse=True)
    parts = []
    with Bar(total=len(distinct), desc="Con-D", unit="pair", delay=WITHOUT_NEWS, leave=False) as bar:
        for part in distinct.split(pairs_at_once):
            parts.append(_probability(encoder, block, part // len(block), part % len(block)))
            bar.update(len(part))
    probability = torch.cat(parts)
    if bool(probability.isnan().any()):
        first = int(distinct[probability.isnan()][0])
        pair = f"image {int(block.index[first // len(block)])}, text {int(block.index[first % len(block)])}"
        raise UserError(f"--con-d gives NaN as a match probability; the first data set rows: {pair}.")
    return probability[place]


def _probability(encoder: Encoder, block: Block, image: Tensor, text: Tensor) -> Tensor:
    rows, which = torch.unique(image, return_inverse=True)
    words, of_text = torch.unique(text, return_inverse=True)
    states, (*texts, mask) = block.images[rows].to(encoder.device), (part[words] for part in block.texts)
    with encoder.autocast():
        logits = encoder.con_d.match_rows(states, (*(part.to(encoder.device) for part in texts), mask), which, of_text)
    return logits.float().softmax(dim=1)[:, 1].cpu()


def reason_of(bad: dict[str, Any]) -> str:
    """Why a sample could not be read, without its path: ``UnidentifiedImageError``."""
    return str(bad["reason"]).split(":")[0]


@contextlib.contextmanager
def progress_bar(samples: int) -> Iterator[Progress]:
    """The rate is the mean so far, since a block scores after encoding."""
    with Bar(total=samples, desc="pairs", unit="pair", smoothing=0) as bar:
        yield bar.update
