"""BLIP-2's Q-Former under LAVIS's names: queries that look at an image, alone, together with a text, or before one.

Equal to LAVIS's ``Qformer.py`` but for what is not computed, as in :mod:`lavis_mafa.models.transformer`. Where queries and texts are
read together, all queries come first, then all words: [P * Q + S, width].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lavis_mafa.models.transformer import (
    AddNorm,
    BertLayer,
    BertWithHead,
    Embeddings,
    Encoder,
    Grid,
    Inner,
    KeysValues,
    Layout,
    Reading,
    Tokens,
    numbers,
    start,
)


def together(mask: Tensor, queries: int, device: torch.device, text_index: Tensor, image_index: Tensor, images: int = 0) -> Reading:
    """P of B texts, each about to be read with the ``queries`` of an image: see :meth:`Reading.of`.

    Returns:
        a reading whose ``tokens`` are all queries, then all words, and whose ``first`` are the queries alone.
    """
    words = Reading.of(mask, device, text_index)
    grid, seen = words.tokens.texts, words.tokens.seen
    slots = torch.arange(grid.rows * grid.width, device=device) if grid.slots is None else grid.slots
    width = queries + grid.width
    of_queries = torch.arange(grid.rows, device=device)[:, None] * width + torch.arange(queries, device=device)
    both = torch.cat([of_queries.flatten(), slots + (slots // grid.width + 1) * queries])
    tokens = Tokens(Grid(grid.rows, width, both), None if seen is None else F.pad(seen, (queries, 0), value=True))
    if words.layout is None:
        own, every = Grid(grid.rows, queries), torch.arange(grid.rows * queries, device=device)
        first = Tokens(own, None, own, image_index, every)
    else:
        layout = Layout.of([queries] * grid.rows, numbers(image_index, images))
        first = layout.tokens(device, images, chosen=list(range(grid.rows * queries)))
    return replace(words, tokens=tokens, first=first)


class QueryLayer(BertLayer):
    """A layer whose queries have dense layers of their own, and alone look at the image, where they do."""

    def __init__(self, width: int, heads: int, dropout: float, image_width: int | None) -> None:
        super().__init__(width, heads, dropout, image_width)
        self.intermediate_query, self.output_query = Inner(width), AddNorm(4 * width, width, dropout)

    def dense(self, states: Tensor, queries: Tokens, images: tuple[Tensor, Tensor] | None) -> Tensor:
        """What follows self-attention: [P * Q + S, width] -> the same."""
        count = queries.texts.rows * queries.texts.width
        looked, words = states[:count], states[count:]
        if images is not None:
            looked = self.look(looked, queries, images)
        looked = self.output_query(self.intermediate_query(looked), looked)
        return torch.cat([looked, self.output(self.intermediate(words), words)]) if len(words) else looked


class QueryBert(nn.Module):
    """A BERT for texts and for queries, which in the first of every so many layers look at images.

    Example:
        >>> bert, queries = QueryBert(words=50, width=32, layers=2, heads=2, image_width=16), torch.randn(1, 4, 32)
        >>> images = bert.keys_values(torch.randn(3, 10, 16))
        >>> states, before = bert.look(queries, images)
        >>> states.shape
        torch.Size([3, 4, 32])
        >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[True, True, True], [True, True, False]])
        >>> reading = together(mask, 4, torch.device("cpu"), torch.tensor([0, 1]), torch.tensor([2, 2]), images=3)
        >>> bert.match(queries, ids, reading, images).shape
        torch.Size([2, 4, 32])
    """

    def __init__(
        self, words: int, width: int, layers: int, heads: int, image_width: int, cross_attention_every: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.every, self.dropout = cross_attention_every, dropout
        self.embeddings = Embeddings(words, width, dropout)
        widths = [image_width if number % self.every == 0 else None for number in range(layers)]
        self.encoder = Encoder([QueryLayer(width, heads, dropout, of_images) for of_images in widths])
        self.apply(start)

    def keys_values(self, images: Tensor) -> KeysValues:
        """[K, N, image width] -> keys and values of each layer that looks at images."""
        layers: Any = self.encoder.layer[:: self.every]
        return [layer.crossattention.self.keys_values(images) for layer in layers]

    def look(self, queries: Tensor, images: KeysValues) -> tuple[Tensor, KeysValues]:
        """Queries [1 or B, Q, width] alone over each of B images: states [B, Q, width], and what :meth:`follow` reads of each layer."""
        count, size = len(images[0][0]), queries.shape[1]
        states = self._embedded(queries, count)
        grid, before = Grid(count, size), KeysValues()
        tokens = Tokens(grid, None, grid)
        for number, layer in self._layers():
            if number == 0 and len(queries) == 1 and not self._drops:  # before they have seen an image all are alike
                states, of_one = layer.attend(states[:size], Tokens(Grid(1, size)))
                states = states.repeat(count, 1)
                before.append((of_one[0].expand(count, -1, -1), of_one[1].expand(count, -1, -1)))
            else:
                states, keys_values = layer.attend(states, tokens)
                before.append(keys_values)
            states = layer.dense(states, tokens, self._seen(images, number))
        return states.view(count, size, -1), before

    def match(self, queries: Tensor, ids: Tensor, reading: Reading, images: KeysValues) -> Tensor:
        """Queries [1 or P, Q, width] together with texts of LongTensor[B, T], by :func:`together`, over images: [P, Q, width]."""
        count = reading.first.texts.rows
        words = self.embeddings(reading.take(ids), reading.positions)
        states = torch.cat([self._embedded(queries, count), words])
        last = len(self.encoder.layer) - 1
        for number, layer in self._layers():
            states, _ = layer.attend(states, reading.tokens, reading.first if number == last else None)
            states = layer.dense(states, reading.first, self._seen(images, number))
        return states.view(count, queries.shape[1], states.shape[-1])

    def read(self, ids: Tensor, reading: Reading, chosen: Tokens | None = None) -> Tensor:
        """Texts alone: LongTensor[B, T] -> [S, width], or of the ``chosen`` tokens."""
        states = self.embeddings(reading.take(ids), reading.positions)
        last = len(self.encoder.layer) - 1
        for number, layer in self._layers():
            states = layer(states, reading.tokens, chosen=chosen if number == last else None)
        return states

    def follow(self, words: Tensor, texts: Grid, before: KeysValues) -> tuple[Tensor, KeysValues]:
        """Words, each of which sees those before it and all that came before its text: the queries, and words that were read earlier.

        Args:
            words: [S, width], embedded. texts: where they lie, a row a text.
            before: of each layer keys and values [P, keys, width], of :meth:`look` or of this method.

        Returns:
            [S, width], and the keys and values with these words' own, of use where no text is shorter than another.
        """
        first, after = before[0][0].shape[1], KeysValues()
        seen = torch.ones(texts.width, first + texts.width, dtype=torch.bool, device=words.device).tril(first)
        tokens = Tokens(texts, None if texts.width == 1 else seen)
        for number, layer in self._layers():
            words, keys_values = layer.attend(words, tokens, before=before[number])
            words = layer.output(layer.intermediate(words), words)
            after.append(keys_values)
        return words, after

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _embedded(self, queries: Tensor, count: int) -> Tensor:
        """[1 or P, Q, width] -> [P * Q, width], with noise of its own for each of the P."""
        return self.embeddings.dropout(self.embeddings.LayerNorm(queries).expand(count, -1, -1)).flatten(0, 1)

    def _layers(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.encoder.layer))

    def _seen(self, images: KeysValues, number: int) -> tuple[Tensor, Tensor] | None:
        return images[number // self.every] if number % self.every == 0 else None


class LavisBert(QueryBert):
    """Called as LAVIS calls its own."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPast:
        """Queries alone, a text alone, or both together; images [B, N, width] have no padding.

        ``last_hidden_state``: [B, Q, width], or [B, T, width] of texts alone. Of queries and text together LAVIS reads the queries'.
        """
        images = None if encoder_hidden_states is None else self.keys_values(encoder_hidden_states)
        if input_ids is None:
            assert query_embeds is not None and images is not None, "queries without an image"
            return BaseModelOutputWithPast(self.look(query_embeds, images)[0])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        every = torch.arange(len(input_ids), device=input_ids.device)
        if query_embeds is None:
            states = self.read(input_ids, Reading.padded(mask.bool(), every)).view(*input_ids.shape, -1)
        else:
            assert images is not None, "queries without an image"
            reading = together(mask.bool(), query_embeds.shape[1], input_ids.device, every, every)
            states = self.match(query_embeds, input_ids, reading, images)
        return BaseModelOutputWithPast(states)


class QFormerWords:
    """What a Q-Former has read of R images' queries and the words after them: see :class:`lavis_mafa.models.generation.Reader`."""

    def __init__(self, qformer: BertWithHead, queries: Tensor, images: Tensor) -> None:
        """Queries [1, Q, width] over images [R, N, image width]."""
        self.qformer, self.queries = qformer, queries.shape[1]
        self.before: KeysValues = qformer.bert.look(queries, qformer.bert.keys_values(images))[1]

    def read(self, ids: Tensor) -> Tensor:
        bert, (count, width) = self.qformer.bert, ids.shape
        done = self.before[0][0].shape[1] - self.queries
        positions = torch.arange(done, done + width, device=ids.device).repeat(count)
        states, self.before = bert.follow(bert.embeddings(ids.flatten(), positions), Grid(count, width), self.before)
        return self.qformer.cls(states.view(count, width, -1)[:, -1])

    def take(self, rows: Tensor) -> None:
        self.before = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.before]
