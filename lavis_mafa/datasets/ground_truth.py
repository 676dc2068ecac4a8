"""Which image truly matches which text, where the data set knows it.

An image shows one concept; a text describes one or more. An image of concept c matches text t if c is among the concepts of t.
That is what reports measure verdicts, retrieval and false negatives against. It is never shown to a model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import torch

from lavis_mafa.datasets.ids import pc

PAIRS_AT_ONCE = 1 << 22


class SortedStrings:
    """Distinct strings, numbered from 0 in their sorted order. Held by Arrow: millions cost little, and workers share them.

    Example:
        >>> SortedStrings(pa.chunked_array([["b", "a", "b"]])).find("b")
        1
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        distinct = pc.unique(column.cast(pa.large_string())).drop_null()
        self.values = distinct.take(pc.sort_indices(distinct))

    def __len__(self) -> int:
        return len(self.values)

    def find(self, name: str) -> int:
        """The string's number, -1 if it is not here."""
        # Arrow sorts by UTF-8 bytes, Python by code points: the same order.
        position = bisect_left(range(len(self)), name, key=lambda i: self.values[i].as_py())
        return position if position < len(self) and self.values[position].as_py() == name else -1

    def find_all(self, column: pa.ChunkedArray) -> torch.LongTensor:
        """[N] strings -> [N] numbers, -1 for an unknown or missing one."""
        numbers = pc.fill_null(pc.index_in(column.cast(pa.large_string()), value_set=self.values, skip_nulls=True), -1)
        return torch.from_numpy(numbers.to_numpy().astype(np.int64))  # type: ignore[return-value]


class GroundTruth:
    """What every image shows and every text claims, as integers.

    Of images that show the same, all have one number, their *concept*. A text claims some facts, and a concept matches it if it has
    all of them. Where data tell concepts alone, the one fact that a text claims is itself, which the concepts have that it describes.

    Args:
        texts: [R] strings.
        concepts: [R] strings; row r says that ``texts[r]`` describes ``concepts[r]``. Repeats are fine;
            rows with a null are skipped.
        kinds: what sort of text it is, where that matters (``name``, ``keyword``, ...).

    Example:
        >>> truth = GroundTruth.from_pairs([("dog", "poodle"), ("dog", "terrier"), ("poodle", "poodle")])
        >>> texts = torch.tensor([truth.text_key("dog"), truth.text_key("poodle")])
        >>> truth.matrix(torch.tensor([truth.concept_id("terrier")]), texts)
        tensor([[ True, False]])
    """

    def __init__(self, texts: pa.ChunkedArray, concepts: pa.ChunkedArray, kinds: Mapping[str, str] | None = None) -> None:
        self.concepts = SortedStrings(concepts)
        self.texts = SortedStrings(texts)
        self._kinds = dict(kinds or {})
        concept, text = self.concepts.find_all(concepts), self.texts.find_all(texts)
        self._claims = torch.arange(len(self.texts))[:, None]
        self._hold(concept, text, len(self.texts))

    def _hold(self, concept: torch.Tensor, fact: torch.Tensor, facts: int) -> None:
        # A concept with a fact as one number: one sorted array and a binary search answer every question.
        self._facts = facts
        codes = concept * facts + fact
        self.codes = codes[(concept >= 0) & (fact >= 0)].unique(sorted=True)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]], kinds: Mapping[str, str] | None = None) -> GroundTruth:
        given = list(pairs)
        texts, concepts = [text for text, _ in given], [concept for _, concept in given]
        return cls(pa.chunked_array([texts], pa.string()), pa.chunked_array([concepts], pa.string()), kinds)

    @classmethod
    def from_facts(cls, images: pa.ChunkedArray, texts: pa.ChunkedArray, claims: pa.ChunkedArray) -> GroundTruth:
        """From what images have and texts claim.

        Args:
            images: [N] lists of facts, each what one image has; null where nobody knows.
            texts: [T] strings. claims: [T] lists of facts, what each text claims; a text that claims nothing matches every image.

        Example:
            >>> has, texts = pa.chunked_array([[["dog", "red"], ["dog"]]]), pa.chunked_array([["a dog", "a red dog"]])
            >>> truth = GroundTruth.from_facts(has, texts, pa.chunked_array([[["dog"], ["dog", "red"]]]))
            >>> truth.matrix(truth.images(pa.table({"facts": has})), truth.texts.find_all(texts))
            tensor([[ True,  True],
                    [ True, False]])
        """
        truth = cls.__new__(cls)
        truth._kinds = {}
        shown = _joined(images)
        truth.concepts, truth.texts = SortedStrings(shown), SortedStrings(texts)
        facts = SortedStrings(pc.list_flatten(images))
        first = pc.index_in(truth.concepts.values, value_set=shown.cast(pa.large_string()).combine_chunks())
        lists = images.combine_chunks().take(first)
        truth._hold(torch.from_numpy(pc.list_parent_indices(lists).to_numpy().astype(np.int64)), facts.find_all(lists.flatten()), len(facts) + 1)
        number = truth.texts.find_all(texts)
        rows, order = np.unique(number.numpy(), return_index=True)
        lists = claims.combine_chunks().take(pa.array(order))
        parent, claimed = pc.list_parent_indices(lists).to_numpy(), facts.find_all(lists.flatten())
        place = np.arange(len(parent)) - np.searchsorted(parent, parent)
        truth._claims = torch.full((len(truth.texts), int(place.max(initial=0)) + 1), -1)
        # a fact that no image has: its number is nobody's
        truth._claims[torch.from_numpy(rows[parent]), torch.from_numpy(place)] = torch.where(claimed < 0, len(facts), claimed)
        return truth

    @classmethod
    def from_table(cls, table: pa.Table) -> GroundTruth | None:
        """From annotations (see ``read_annotations``), None if they tell nothing.

        With ``facts`` and ``caption_facts``: see :meth:`from_facts`. With ``concept``: a caption describes the concepts of all rows
        that carry it. What only rows without a concept carry is unknown, as is what they show.
        """
        if "facts" in table.column_names:
            return cls.from_facts(table["facts"], pc.list_flatten(table["caption"]), pc.list_flatten(table["caption_facts"]))
        if "concept" not in table.column_names:
            return None
        texts, concepts = [], []
        for batch in table.select(["caption", "concept"]).to_batches():
            concept = batch["concept"].take(batch["caption"].value_parent_indices())
            texts.append(batch["caption"].flatten().filter(concept.is_valid()))
            concepts.append(concept.drop_null())
        return cls(pa.chunked_array(texts, pa.string()), pa.chunked_array(concepts, pa.string()))

    def images(self, table: pa.Table) -> torch.LongTensor | None:
        """[rows] concepts of the rows' images, -1 for an unknown one; None where the table does not tell."""
        if "facts" in table.column_names:
            return self.concepts.find_all(_joined(table["facts"]))
        return self.concepts.find_all(table["concept"]) if "concept" in table.column_names else None

    def concept_id(self, name: str) -> int:
        """Its number, -1 if it is unknown."""
        return self.concepts.find(name)

    def text_key(self, text: str) -> int:
        """Its number, -1 if it is unknown."""
        return self.texts.find(text)

    def concept_name(self, concept: int) -> str:
        return self.concepts.values[concept].as_py()

    def text(self, key: int) -> str:
        return self.texts.values[key].as_py()

    def text_kind(self, key: int) -> str | None:
        """What sort of text it is; None if it is unknown or nobody said."""
        return self._kinds.get(self.text(key)) if key >= 0 else None

    def matches(self, concept: torch.Tensor, text_key: torch.Tensor) -> torch.Tensor:
        """Whether image p, showing ``concept[p]``, truly matches text p. Unknown numbers (-1) match nothing.

        Both int64 [P], or of any shapes that broadcast; Bool of that shape.
        """
        concept, text_key = torch.broadcast_tensors(concept, text_key)
        match = self.knows(concept, text_key)
        if len(self._claims) == 0:
            return torch.zeros_like(match)
        codes, claims = self.codes.to(concept.device), self._claims.to(concept.device)
        for claimed in claims[text_key].unbind(dim=-1):
            match = match & (_among(codes, concept * self._facts + claimed) | (claimed < 0))
        return match

    @staticmethod
    def knows(concept: torch.Tensor, text_key: torch.Tensor) -> torch.Tensor:
        """Whether :meth:`matches` says anything about these pairs: no part is unknown (-1). Bool, of the broadcast shape."""
        return (concept >= 0) & (text_key >= 0)

    def matrix(self, concepts: torch.Tensor, text_keys: torch.Tensor) -> torch.Tensor:
        """Every image against every text: [N] concepts, [T] text keys -> Bool [N, T]."""
        # In blocks of rows: the numbers behind a big gallery's answer take eight times its size.
        rows = max(1, PAIRS_AT_ONCE // max(1, len(text_keys)))
        return torch.cat([self.matches(block[:, None], text_keys[None, :]) for block in concepts.split(rows)])


def _among(codes: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Which of ``asked`` are in ``codes``, which are sorted."""
    if len(codes) == 0:
        return torch.zeros_like(asked, dtype=torch.bool)
    return codes[torch.searchsorted(codes, asked).clamp(max=len(codes) - 1)] == asked


def _joined(facts: pa.ChunkedArray) -> pa.ChunkedArray:
    """[N] lists -> [N] strings that are equal for equal lists; null where the list is."""
    return pc.binary_join(facts.cast(pa.list_(pa.string())), "\x1f")
