"""BERT's layers under LAVIS's names: texts without padding, over images whose keys and values are computed once.

Equal to LAVIS's ``med.py`` but for what is not computed: tokens of all texts lie one after another [S, width], so that padding costs
nothing; an image's keys and values serve every text that is read with it; a last layer gives the tokens alone that somebody reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer [K, N, width]
SPREAD = 0.02  # of BERT's first weights
POSITIONS = 512
EPS = 1e-12

# --- where tokens lie ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """S tokens on a grid of rows x width, which attention works on."""

    rows: int
    width: int
    slots: Tensor | None = None  # LongTensor[S], row * width + place; None: they fill the grid in order

    @classmethod
    def of(cls, row_of_token: Sequence[int], rows: int, device: torch.device) -> Grid:
        """Tokens of one row side by side, in the order in which they come; the widest row says how wide the grid is."""
        used, places = [0] * rows, []
        for row in row_of_token:
            places.append(used[row])
            used[row] += 1
        width = max([1, *used])
        slots = [row * width + place for row, place in zip(row_of_token, places, strict=True)]
        return cls(rows, width, None if slots == list(range(rows * width)) else on_device(slots, device))

    def spread(self, states: Tensor) -> Tensor:
        """[S, C] -> [rows, width, C], 0 where no token is."""
        if self.slots is None:
            return states.view(self.rows, self.width, states.shape[-1])
        # index_copy_ would keep the states for its backward, which reads their size alone
        grid = states.new_zeros(self.rows * self.width, states.shape[-1]).index_put_((self.slots,), states)
        return grid.view(self.rows, self.width, states.shape[-1])

    def collect(self, grid: Tensor) -> Tensor:
        """[rows, width, C] -> [S, C]"""
        flat = grid.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True)
class Tokens:
    """What S tokens of P texts attend to: the keys of their own text, and an image.

    ``texts`` has a row a text. ``images`` has a row an image, whose texts lie side by side on it, or several rows where those are many:
    its keys and values are read once for all of them.
    """

    texts: Grid
    seen: Tensor | None = None  # BoolTensor[P, 1, 1 or own tokens, keys]: what may be looked at; None: all
    images: Grid | None = None
    image_of_row: Tensor | None = None  # LongTensor[rows]; None: row k is image k
    chosen: Tensor | None = None  # LongTensor[S]: which of the tokens of a whole layout these are; None: all
    image_seen: Tensor | None = None  # BoolTensor[K, 1, 1, N]: what of the images may be looked at; None: all


@dataclass(frozen=True)
class Layout:
    """P texts on the host: how long each is, and which image each is read with. Nothing here waits for a device."""

    lengths: list[int]  # P
    row_of_text: list[int] | None = None  # P rows of the images' grid
    image_of_row: list[int] | None = None

    @classmethod
    def of(cls, lengths: list[int], image_of_text: list[int] | None = None) -> Layout:
        """Texts of one image share a row, as long as it is no wider than the average image's texts or so."""
        if image_of_text is None:
            return cls(lengths)
        room = max([0, *lengths, round(1.25 * sum(lengths) / max(1, len(set(image_of_text))))])
        row_of_text, image_of_row = [], list[int]()
        open_rows: dict[int, tuple[int, int]] = {}  # of an image: its last row, and how much of that is taken
        for image, length in zip(image_of_text, lengths, strict=True):
            row, taken = open_rows.get(image, (-1, room))
            if taken + length > room:
                row, taken = len(image_of_row), 0
                image_of_row.append(image)
            open_rows[image] = row, taken + length
            row_of_text.append(row)
        return cls(lengths, row_of_text, image_of_row)

    def first_tokens(self) -> list[int]:
        """Where each text begins."""
        return [end - length for end, length in zip(itertools.accumulate(self.lengths), self.lengths, strict=True)]

    def tokens(self, device: torch.device, images: int = 0, chosen: list[int] | None = None) -> Tokens:
        """All S tokens, or those ``chosen`` in ascending order; ``images`` says how many there are to attend to."""
        text_of = [text for text, length in enumerate(self.lengths) for _ in range(length)]
        longest, seen = max(self.lengths, default=0), None
        if chosen is not None:
            text_of = [text_of[token] for token in chosen]  # the keys that they see are those of all
        elif min(self.lengths, default=0) < longest:
            seen = on_device((torch.arange(longest) < torch.tensor(self.lengths)[:, None])[:, None, None], device)
        texts = Grid.of(text_of, len(self.lengths), device)
        grid = image_of_row = None
        if self.row_of_text is not None and self.image_of_row is not None:
            grid = Grid.of([self.row_of_text[text] for text in text_of], len(self.image_of_row), device)
            if self.image_of_row != list(range(images)):
                image_of_row = on_device(self.image_of_row, device)
        return Tokens(texts, seen, grid, image_of_row, None if chosen is None else on_device(chosen, device))


@dataclass(frozen=True)
class Reading:
    """P of B texts, about to be read: alone, or each with an image.

    Which texts and images these are may be known to the host or to the device alone. Then nobody waits for it: padding and an image's
    keys and values are read again for each text.
    """

    rows: Tensor  # LongTensor[S], where the tokens are among B * T
    positions: Tensor  # LongTensor[S] in their text, on the device
    tokens: Tokens
    first: Tokens  # of each text the first one alone
    layout: Layout | None = None  # None: the host does not know it
    images: int = 0

    @classmethod
    def of(
        cls, mask: Tensor, device: torch.device, text_index: Tensor | None = None, image_index: Tensor | None = None, images: int = 0
    ) -> Reading:
        """BoolTensor[B, T] on the host; LongTensor[P] each (None: all texts; no images), of which there are ``images``."""
        if text_index is not None and text_index.device.type != "cpu":
            return cls.padded(on_device(mask, device).index_select(0, text_index), text_index, image_index)
        texts = list(range(len(mask))) if text_index is None else numbers(text_index, len(mask))
        of_all, width = lengths_of(mask), mask.shape[1]
        lengths = [of_all[text] for text in texts]
        layout = Layout.of(lengths, None if image_index is None else numbers(image_index, images))
        rows = [text * width + place for text, length in zip(texts, lengths, strict=True) for place in range(length)]
        positions = on_device([place for length in lengths for place in range(length)], device)
        first = layout.tokens(device, images, chosen=layout.first_tokens())
        return cls(torch.tensor(rows, dtype=torch.long), positions, layout.tokens(device, images), first, layout, images)

    @classmethod
    def padded(cls, mask: Tensor, text_index: Tensor, image_index: Tensor | None = None) -> Reading:
        """BoolTensor[P, T] of the texts that are read, LongTensor[P] each; all on the device."""
        (count, width), device = mask.shape, mask.device
        places = torch.arange(width, device=device)
        grid, one = Grid(count, width), Grid(count, 1)
        starts = torch.arange(count, device=device) * width
        return cls(
            (text_index[:, None] * width + places).flatten(),
            places.repeat(count),
            Tokens(grid, mask[:, None, None], grid, image_index),
            Tokens(one, None, one, image_index, starts),
        )

    def over(self, mask: Tensor) -> Reading:
        """The same, where the K images have padding: BoolTensor[K, N] on the host, what may be looked at."""
        if mask.all():
            return self
        seen = on_device(mask[:, None, None], self.positions.device)
        return replace(self, tokens=replace(self.tokens, image_seen=seen), first=replace(self.first, image_seen=seen))

    def tokens_at(self, places: Tensor) -> Tokens:
        """Some of the S tokens alone: LongTensor on the host, ascending."""
        assert self.layout is not None, "a reading that the host does not know"
        return self.layout.tokens(self.positions.device, self.images, numbers(places, len(self.rows)))

    def followed(self) -> Tensor:
        """LongTensor[N] on the device: the tokens that are not the last ones of their text."""
        assert self.layout is not None, "a reading that the host does not know"
        ends = itertools.accumulate(self.layout.lengths)
        last = set(end - 1 for end in ends)
        return on_device([token for token in range(len(self.rows)) if token not in last], self.positions.device)

    def take(self, values: Tensor) -> Tensor:
        """Of all texts' [B, T, ...], on the host or the device, those that are read: -> [S, ...] on the device."""
        flat, rows, device = values.flatten(0, 1), self.rows, self.positions.device
        if flat.device != rows.device:
            flat, rows = on_device(flat, device), on_device(rows, device)
        return on_device(flat.index_select(0, rows), device)


def named_images(images: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """Of K images [K, N, width] those that pairs name, and the pairs' LongTensor[P] among them.

    Of all ranks' images a rank's pairs name few. Where the device alone knows which, it is one a pair, if that is fewer.
    """
    if not image_index.is_cpu:
        if len(images) <= len(image_index):
            return images, image_index
        return images.index_select(0, image_index), torch.arange(len(image_index), device=images.device)
    index = numbers(image_index, len(images))
    named = sorted(set(index))
    if len(named) == len(images):
        return images, image_index
    place = {image: number for number, image in enumerate(named)}
    return images.index_select(0, on_device(named, images.device)), torch.tensor([place[image] for image in index], dtype=torch.long)


def numbers(index: Tensor, below: int) -> list[int]:
    """What the host knows: an index into ``below`` things."""
    return index.tolist()


def lengths_of(mask: Tensor) -> list[int]:
    """BoolTensor[B, T] on the host -> words of each text."""
    return mask.sum(dim=1).tolist()


def on_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host, without waiting for the device."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.long)
    if host.device == device:
        return host
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and host.is_cpu else host.to(device)


# --- layers ----------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Queries, keys and values of an attention."""

    def __init__(self, width: int, keys_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(keys_width, width), nn.Linear(keys_width, width)
        self.heads, self.dropout = heads, dropout
        self.save_attention = False  # keep the next attention's probabilities, with their graph, in attention_map
        self.attention_map: Tensor | None = None

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(states), self.value(states)

    def product(self, states: Tensor, *names: str) -> Tensor:
        """Several of the three in one product: [.., width] -> [.., width each]."""
        parts = [getattr(self, name) for name in names]
        return F.linear(states, torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None, causal: bool = False) -> Tensor:
        """[R, Q, width], [R, K, width], [R, K, width] -> [R, Q, width]"""
        query, key, value = (states.unflatten(-1, (self.heads, -1)).transpose(1, 2) for states in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if self.save_attention:
            states = F.dropout(self._map(query, key, seen, causal), dropout) @ value
        else:
            states = F.scaled_dot_product_attention(query, key, value, seen, dropout, causal)
        return states.transpose(1, 2).flatten(2)

    def _map(self, query: Tensor, key: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
        """[R, heads, Q, K], as Grad-CAM wants it (ALBEF section 6)."""
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
        self.attention_map = scores.softmax(dim=-1)
        return self.attention_map


class AddNorm(nn.Module):
    """A product, dropout, and the norm of its sum with what came before."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + before)


class Attention(nn.Module):
    """``self`` and ``output``, as BERT names them."""

    def __init__(self, width: int, keys_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = Projections(width, keys_width, heads, dropout)
        self.output = AddNorm(width, width, dropout)


class Inner(nn.Module):
    """The wide layer between two attentions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 4 * width)

    def forward(self, states: Tensor) -> Tensor:
        return F.gelu(self.dense(states))


class BertLayer(nn.Module):
    """Self-attention, cross-attention where there is one, and two dense layers."""

    def __init__(self, width: int, heads: int, dropout: float, image_width: int | None) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        if image_width is not None:
            self.crossattention = Attention(width, image_width, heads, dropout)
        self.intermediate, self.output = Inner(width), AddNorm(4 * width, width, dropout)

    def forward(
        self,
        states: Tensor,
        tokens: Tokens,
        images: tuple[Tensor, Tensor] | None = None,
        chosen: Tokens | None = None,
        causal: bool = False,
    ) -> Tensor:
        """[S, width] -> [S, width], or of the tokens that are ``chosen``: the others are looked at, and go no further.

        ``images``: keys and values [K, N, width], without which the texts are read alone. ``causal``: each token sees those before it.
        """
        states, _ = self.attend(states, tokens, chosen, causal)
        if images is not None:
            states = self.look(states, chosen or tokens, images)
        return self.output(self.intermediate(states), states)

    def attend(
        self,
        states: Tensor,
        tokens: Tokens,
        chosen: Tokens | None = None,
        causal: bool = False,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Self-attention alone, and its keys and values [P, keys, width], led by those that came ``before``."""
        asking, own = chosen or tokens, self.attention.self
        if asking.chosen is None:
            query, key, value = tokens.texts.spread(own.product(states, "query", "key", "value")).chunk(3, dim=-1)
        else:
            key, value = tokens.texts.spread(own.product(states, "key", "value")).chunk(2, dim=-1)
            states = states.index_select(0, asking.chosen)
            query = asking.texts.spread(own.query(states))
        if before is not None:
            key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
        # padding comes after every word of its text, which a causal attention does not see anyway
        attended = own.attend(query, key, value, None if causal else tokens.seen, causal)
        return self.attention.output(asking.texts.collect(attended), states), (key, value)

    def look(self, states: Tensor, tokens: Tokens, images: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention of S tokens."""
        assert tokens.images is not None, "a layout without images"
        (key, value), seen = images, tokens.image_seen
        if tokens.image_of_row is not None:
            key, value = key.index_select(0, tokens.image_of_row), value.index_select(0, tokens.image_of_row)
            seen = None if seen is None else seen.index_select(0, tokens.image_of_row)
        cross = self.crossattention.self
        attended = cross.attend(tokens.images.spread(cross.query(states)), key, value, seen)
        return self.crossattention.output(tokens.images.collect(attended), states)


class Embeddings(nn.Module):
    """Words and their places."""

    def __init__(self, words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(POSITIONS, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(POSITIONS).expand(1, -1))  # for the checkpoint's names alone

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """LongTensor[S], LongTensor[S] -> [S, width]"""
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions)))


class Encoder(nn.Module):
    """``layer``, as BERT names them."""

    def __init__(self, layers: list[BertLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Bert(nn.Module):
    """A BERT whose layers from ``fusion_layer`` on look at images.

    Example:
        >>> bert = Bert(words=50, width=32, layers=2, heads=2, image_width=16)
        >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[True, True, True], [True, True, False]])
        >>> one_image = torch.tensor([0, 0])
        >>> reading = Reading.of(mask, torch.device("cpu"), torch.tensor([0, 1]), one_image, images=1)
        >>> states = bert.embeddings(reading.take(ids), reading.positions)
        >>> bert(states, reading.tokens, bert.keys_values(torch.randn(1, 10, 16))).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        words: int,
        width: int,
        layers: int,
        heads: int,
        image_width: int,
        fusion_layer: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fusion_layer = fusion_layer
        self.embeddings = Embeddings(words, width, dropout)
        widths = [None if number < fusion_layer else image_width for number in range(layers)]
        self.encoder = Encoder([BertLayer(width, heads, dropout, of_images) for of_images in widths])
        self.apply(start)

    def read(self, ids: Tensor, reading: Reading, **how: Any) -> Tensor:
        """LongTensor[B, T] of all texts; see :meth:`forward`."""
        return self(self.embeddings(reading.take(ids), reading.positions), reading.tokens, **how)

    def keys_values(self, images: Tensor) -> KeysValues:
        """[K, N, image width] -> keys and values of each fusion layer."""
        layers: Any = self.encoder.layer[self.fusion_layer :]
        return [layer.crossattention.self.keys_values(images) for layer in layers]

    def forward(
        self,
        states: Tensor,
        tokens: Tokens,
        images: KeysValues | None = None,
        chosen: Tokens | None = None,
        layers: slice = slice(None),
        causal: bool = False,
    ) -> Tensor:
        """[S, width] -> [S, width], of the last layer the ``chosen`` tokens alone.

        Args:
            states: embedded, or what the layers before ``layers`` made of it.
            images: of :meth:`keys_values`; None reads the texts alone.
            layers: which to run.
        """
        run = list(enumerate(self.encoder.layer))[layers]
        for number, layer in run:
            seen = images[number - self.fusion_layer] if images is not None and number >= self.fusion_layer else None
            states = layer(states, tokens, seen, chosen if number == run[-1][0] else None, causal)
        return states


class Transform(nn.Module):
    """The layer before words are told apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=EPS)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(states)))


class Predictions(nn.Module):
    """Words from states, with the embeddings as weights."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        words, width = embedding.weight.shape
        self.transform = Transform(width)
        self.decoder = nn.Linear(width, words)
        self.bias = self.decoder.bias  # under both names, as in BERT
        self.apply(start)
        self.decoder.weight = embedding.weight

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.transform(states))


class Head(nn.Module):
    """``cls.predictions``: states [N, width] -> logits [N, words]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.predictions = Predictions(embedding)

    def forward(self, states: Tensor) -> Tensor:
        return self.predictions(states)


class BertWithHead(nn.Module):
    """``bert`` and ``cls``, as LAVIS's text encoder of ALBEF, decoder of BLIP and Q-Former of BLIP-2 name them."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert, self.cls = bert, Head(bert.embeddings.word_embeddings)


def start(module: nn.Module) -> None:
    """BERT's first weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=SPREAD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
