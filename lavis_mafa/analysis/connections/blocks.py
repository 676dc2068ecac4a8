"""Walking through the data in blocks, each encoded once.

Main memory of a pass is one block of M samples, whatever the size of the data:

    M * (N * w * b  +  T * t * b  +  2 * d * 4)  +  8 * M^2  bytes

N image tokens of width w (ALBEF at 256 px: 257, 768), T text tokens of t numbers (ALBEF: 768; BLIP and BLIP-2: 1, since they read a
text together with its image), b bytes a number (2 under ``run.precision`` bf16 and fp16, 4 under fp32), d numbers a feature (Q * d an
image for BLIP-2's Q queries), and the similarity matrices of the grouping, of which none are made above M = 9600.
ALBEF of the paper's size with M = 4800 in bf16: 2.4 GB. To this the order of the data (8 bytes a sample) and the annotations are added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.analysis.connections.reading import ReadableRows, read_batches
from lavis_mafa.errors import UserError

KEEP = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int], object]


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
        con_d: a RetrievalModel in eval mode.
        device: its device.
        precision: ``run.precision``; token states are kept in it, features always in fp32, since they decide what is mined.
        miner: another RetrievalModel whose features decide what is mined; None for Con-D's own.
    """

    def __init__(self, con_d: Any, device: torch.device, precision: str = "fp32", miner: Any = None) -> None:
        self.con_d, self.device, self.miner = con_d, device, miner
        self.dtype = KEEP[precision]

    def autocast(self) -> torch.autocast:
        """The precision as a context."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def rows(self, image: Tensor, captions: list[str]) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """image states, text rows, image features, text features; on the device."""
        with self.autocast():
            states, image_features = self.con_d.image_rows(image.to(self.device))
            texts, text_features = self.con_d.text_rows(captions)
            if self.miner is not None:
                _, image_features = self.miner.image_rows(image.to(self.device))
                _, text_features = self.miner.text_rows(captions)
        texts = tuple(self._kept(part) for part in texts)
        return self._kept(states), texts, image_features.float(), text_features.float()

    def _kept(self, states: Tensor) -> Tensor:
        return states.to(self.dtype) if states.is_floating_point() else states


def encoded_blocks(
    encoder: Encoder,
    rows: ReadableRows,
    blocks: Sequence[tuple[int, Tensor]],
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = lambda _: None,
) -> Iterator[Block]:
    """Encode blocks one after the other; a block is freed when the caller lets go of it.

    Args:
        encoder: Con-D.
        rows: the data.
        blocks: (number, LongTensor[m] of data set rows) each.
        batch_size: of the encoders, bounds the device's memory.
        workers: that read images.
        progress: told how many samples were taken.

    Raises:
        UserError: a feature is not finite; the message names the samples.
    """
    batches = read_batches(rows, [indices for _, indices in blocks], batch_size, workers)
    for position, group in itertools.groupby(batches, key=lambda item: item[0]):
        number, indices = blocks[position]
        block = _Filling(number, len(indices))
        for _, batch in group:
            taken = len(batch["bad_samples"]) + len(batch.get("text_input", ()))
            block.add(encoder, batch)
            progress(taken)
        yield block.finished()


class _Filling:
    """A block on its way: the image states, which are nearly all of it, are written to their place at once."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size, self.count = number, size, 0
        self.images = torch.empty(0)
        self.texts: list[tuple[Tensor, ...]] = []
        self.columns: dict[str, list[Tensor]] = {"image_features": [], "text_features": [], "index": [], "image_key": []}
        self.captions: list[str] = []
        self.bad: list[dict[str, Any]] = []

    def add(self, encoder: Encoder, batch: dict[str, Any]) -> None:
        self.bad += batch["bad_samples"]
        if "image" not in batch:
            return
        captions = list(batch["text_input"])
        states, texts, image_features, text_features = encoder.rows(batch["image"], captions)
        _check_finite(image_features, text_features, batch["index"], "--con-d" if encoder.miner is None else "--miner")
        if not self.captions:
            self.images = torch.empty(self.size, *states.shape[1:], dtype=states.dtype)
        self.images[self.count : self.count + len(captions)] = states.cpu()
        self.count += len(captions)
        self.captions += captions
        self.texts.append(tuple(part.cpu() for part in texts))
        self.columns["image_features"].append(image_features.cpu())
        self.columns["text_features"].append(text_features.cpu())
        for name in ("index", "image_key", "concept", "text_key"):
            if name in batch:
                self.columns.setdefault(name, []).append(batch[name])

    def finished(self) -> Block:
        joined = {name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.long) for name, parts in self.columns.items()}
        return Block(
            number=self.number,
            index=joined["index"],
            image_key=joined["image_key"],
            captions=self.captions,
            images=self.images[: self.count],
            texts=tuple(_stack(column) for column in zip(*self.texts, strict=True)),
            image_features=joined["image_features"],
            text_features=joined["text_features"],
            truth={name: joined[name] for name in ("concept", "text_key") if len(joined.get(name, ())) == self.count > 0},
            bad_samples=self.bad,
        )


def _stack(parts: tuple[Tensor, ...]) -> Tensor:
    """Texts of several batches, padded with 0 to the longest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1])) for part in parts])


def _check_finite(image_features: Tensor, text_features: Tensor, index: Tensor, source: str) -> None:
    bad = ~(image_features.flatten(1).isfinite().all(dim=1) & text_features.isfinite().all(dim=1)).cpu()
    if bool(bad.any()):
        listed = ", ".join(map(str, index[bad].tolist()[:10]))
        raise UserError(f"{source} gives features that are not finite for {int(bad.sum())} samples; data set rows: {listed}.")
