"""Which image truly matches which text, where the data set knows it.

Data tell it in one of two ways. By concepts: an image shows one, and a text describes one or more, to whose images it is right. By
facts: an image has some, a text claims some, and they match if the image has all that the text claims.
That is what reports measure verdicts, retrieval and false negatives against. It is never shown to a model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch

from lavis_mafa.datasets.ids import pc

PAIRS_AT_ONCE = 1 << 22
NO_TRUTH = "the training data tell no truth (a column `concept`, or `facts` with `caption_facts`), or are several data sets"
Pairs = tuple[torch.Tensor, torch.Tensor]


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

    All images that show the same have one number, their *concept*. A concept has facts, a text claims some, and they match if the
    concept has all of these. Where data tell concepts alone, each text claims one fact, itself, and those concepts have it that it
    describes.

    Args:
        concepts: the names of C concepts. texts: T texts.
        has: [P] concepts and [P] numbers of facts, which these concepts have; pairs with a part that is unknown (-1) are left out.
        claims: [Q] texts and [Q] numbers of facts, which these texts claim.
        facts: their names; None where the data tell concepts.
        kinds: what sort of text it is, where that matters (``name``, ``keyword``, ...).

    Example:
        >>> truth = GroundTruth.from_pairs([("dog", "poodle"), ("dog", "terrier"), ("poodle", "poodle")])
        >>> texts = torch.tensor([truth.text_key("dog"), truth.text_key("poodle")])
        >>> truth.matrix(torch.tensor([truth.concept_id("terrier")]), texts)
        tensor([[ True, False]])
    """

    def __init__(
        self,
        concepts: SortedStrings,
        texts: SortedStrings,
        has: Pairs,
        claims: Pairs,
        facts: SortedStrings | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        self.concepts, self.texts, self.facts = concepts, texts, facts
        self._kinds = dict(kinds or {})
        # A concept with a fact as one number: one sorted array and a binary search answer every question.
        self._facts = 1 + max((int(fact.max()) for _, fact in (has, claims) if len(fact)), default=0)
        self.codes = self._coded(*has)
        claimed = self._coded(*claims)
        self._claims = claimed % self._facts  # those of text t are at [start[t], start[t + 1])
        self._start = torch.searchsorted(claimed, torch.arange(len(texts) + 1) * self._facts)

    def _coded(self, owner: torch.Tensor, fact: torch.Tensor) -> torch.Tensor:
        known = (owner >= 0) & (fact >= 0)
        return (owner[known] * self._facts + fact[known]).unique()

    @classmethod
    def from_concepts(cls, texts: pa.ChunkedArray, concepts: pa.ChunkedArray, kinds: Mapping[str, str] | None = None) -> GroundTruth:
        """From what texts describe.

        Args:
            texts: [R] strings.
            concepts: [R] strings; row r says that ``texts[r]`` describes ``concepts[r]``. Repeats are fine;
                rows with a null are skipped.
            kinds: as above.
        """
        all_texts, all_concepts = SortedStrings(texts), SortedStrings(concepts)
        itself = torch.arange(len(all_texts))
        return cls(all_concepts, all_texts, (all_concepts.find_all(concepts), all_texts.find_all(texts)), (itself, itself), kinds=kinds)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]], kinds: Mapping[str, str] | None = None) -> GroundTruth:
        """From (text, concept)."""
        given = list(pairs)
        texts, concepts = [text for text, _ in given], [concept for _, concept in given]
        return cls.from_concepts(pa.chunked_array([texts], pa.string()), pa.chunked_array([concepts], pa.string()), kinds)

    @classmethod
    def from_facts(cls, images: pa.ChunkedArray, texts: pa.ChunkedArray, claims: pa.ChunkedArray) -> GroundTruth:
        """From what images have and texts claim; order and repeats within a list mean nothing.

        Args:
            images: [N] lists of facts, each what one image has; null where nobody knows.
            texts: [T] strings. claims: [T] lists of facts, what each text claims, null where nobody knows; nothing, and it matches
                every image. A text that is there several times claims all of it.

        Example:
            >>> has, texts = pa.chunked_array([[["dog", "red"], ["dog"]]]), pa.chunked_array([["a dog", "a red dog"]])
            >>> truth = GroundTruth.from_facts(has, texts, pa.chunked_array([[["dog"], ["red", "dog"]]]))
            >>> truth.matrix(truth.images(pa.table({"facts": has})), truth.texts.find_all(texts))
            tensor([[ True,  True],
                    [ True, False]])
        """
        facts = SortedStrings(pc.list_flatten(images))
        shown = set_names(images, facts)
        concepts, known_texts = SortedStrings(shown), SortedStrings(texts.filter(claims.is_valid()))
        (image, has), (row, claimed) = members(images, facts), members(claims, facts)
        pairs = (concepts.find_all(shown)[image], has), (known_texts.find_all(texts)[row], claimed)
        return cls(concepts, known_texts, *pairs, facts=facts)

    @classmethod
    def from_table(cls, table: pa.Table) -> GroundTruth | None:
        """From annotations (see ``read_annotations``), None if they tell nothing.

        With ``facts`` and ``caption_facts``: see :meth:`from_facts`. With ``concept``: a caption describes the concepts of all rows
        that carry it. What only rows without a concept carry is unknown, as is what they show.
        """
        if "facts" in table.column_names:
            told = table.select(["caption", "caption_facts"]).filter(table["caption_facts"].is_valid())
            return cls.from_facts(table["facts"], pc.list_flatten(told["caption"]), pc.list_flatten(told["caption_facts"]))
        if "concept" not in table.column_names:
            return None
        texts, concepts = [], []
        for batch in table.select(["caption", "concept"]).to_batches():
            concept = batch["concept"].take(batch["caption"].value_parent_indices())
            texts.append(batch["caption"].flatten().filter(concept.is_valid()))
            concepts.append(concept.drop_null())
        return cls.from_concepts(pa.chunked_array(texts, pa.string()), pa.chunked_array(concepts, pa.string()))

    def images(self, table: pa.Table) -> torch.LongTensor | None:
        """[rows] concepts of the rows' images, -1 for an unknown one; None where the table does not tell."""
        name = "concept" if self.facts is None else "facts"
        if name not in table.column_names:
            return None
        return self.concepts.find_all(table[name] if self.facts is None else set_names(table[name], self.facts))

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
        match = self.knows(concept, text_key)
        for fact in self._claimed(text_key):
            match = match & self._has(concept, fact)
        return match

    def _claimed(self, text_key: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of each text a fact that it claims, then its next one, until none has any left; -1 for those that have not."""
        if len(self._claims) == 0 or text_key.numel() == 0:
            return
        start, claims = self._start.to(text_key.device), self._claims.to(text_key.device)
        text = text_key.clamp(min=0)
        first, end = start[text], start[text + 1]
        for place in range(int((end - first).max())):
            at = first + place
            yield torch.where(at < end, claims[at.clamp(max=len(claims) - 1)], -1)

    def _has(self, concept: torch.Tensor, fact: torch.Tensor) -> torch.Tensor:
        """Whether it has the fact; no fact (-1) is no reason against it."""
        codes, asked = self.codes.to(concept.device), concept * self._facts + fact
        if len(codes) == 0:
            return (fact < 0).expand(asked.shape)
        return (codes[torch.searchsorted(codes, asked).clamp(max=len(codes) - 1)] == asked) | (fact < 0)

    @staticmethod
    def knows(concept: torch.Tensor, text_key: torch.Tensor) -> torch.Tensor:
        """Whether :meth:`matches` says anything about these pairs: no part is unknown (-1). Bool, of the broadcast shape."""
        return (concept >= 0) & (text_key >= 0)

    def matrix(self, concepts: torch.Tensor, text_keys: torch.Tensor) -> torch.Tensor:
        """Every image against every text: [N] concepts, [T] text keys -> Bool [N, T]."""
        if len(text_keys) == 0:
            return torch.zeros(len(concepts), 0, dtype=torch.bool)
        # Many texts claim the same: each fact is asked for once. In blocks of rows: the numbers behind a big gallery's answer take
        # eight times its size.
        claimed = [torch.full_like(text_keys, -1), *self._claimed(text_keys)]
        facts, places = torch.stack(claimed).unique(return_inverse=True)
        blocks = []
        for block in concepts[:, None].split(max(1, PAIRS_AT_ONCE // max(len(facts), len(text_keys)))):
            has, match = self._has(block, facts), self.knows(block, text_keys)
            for place in places:
                match &= has[:, place]
            blocks.append(match)
        return torch.cat(blocks)


def members(lists: pa.ChunkedArray, facts: SortedStrings) -> Pairs:
    """[N] lists -> row and fact of each entry, in the order of both and without repeats; ``len(facts)`` is what is not in ``facts``."""
    length = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    row, fact = torch.from_numpy(np.repeat(np.arange(len(length)), length)), facts.find_all(pc.list_flatten(lists))
    count = len(facts) + 1
    codes = (row * count + torch.where(fact < 0, len(facts), fact)).unique()
    return codes // count, codes % count


def set_names(lists: pa.ChunkedArray, facts: SortedStrings) -> pa.Array:
    """[N] lists -> [N] strings, equal for lists of the same facts; null where the list is. What is not in ``facts`` counts as one."""
    row, fact = members(lists, facts)
    start = torch.searchsorted(row, torch.arange(len(lists) + 1)).numpy()
    numbers = pa.LargeListArray.from_arrays(start, pa.array(fact.numpy()).cast(pa.large_string()))
    separator, null = (pa.scalar(text, pa.large_string()) for text in (",", None))
    return pc.if_else(lists.is_valid().combine_chunks(), pc.binary_join(numbers, separator), null)


def contradiction(names: pa.ChunkedArray, lists: pa.ChunkedArray) -> tuple[int, int] | None:
    """The first row in which a name has other facts than in an earlier one, and that row; where either is null, it says nothing.

    Example:
        >>> contradiction(pa.chunked_array([["a", "b", "a", "b"]]), pa.chunked_array([[["x", "y"], ["x"], ["y", "x"], ["z"]]]))
        (3, 1)
    """
    said = set_names(lists, SortedStrings(pc.list_flatten(lists)))
    rows = np.flatnonzero(pc.and_(names.is_valid().combine_chunks(), said.is_valid()).to_numpy(zero_copy_only=False))
    name, claim = (pc.index_in(column, value_set=pc.unique(column)).to_numpy()[rows] for column in (names, said))
    _, first, which = np.unique(name, return_index=True, return_inverse=True)
    wrong = np.flatnonzero(claim != claim[first[which]])
    return (int(rows[wrong[0]]), int(rows[first[which[wrong[0]]]])) if len(wrong) else None
