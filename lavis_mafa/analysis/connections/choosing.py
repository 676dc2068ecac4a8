"""Which of the judged candidates become new pairs, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.ids import pc

MINED = "mined"
NO_CANDIDATE = "no candidate in the batch"
BELOW = "not above the threshold"
MARGIN = "below the margin of the own pair"
KNOWN = "the image has this caption already"
TWICE = "found twice"
OVER = "over the limit per image"
OVER_ALL = "over the limit in all"
OUTCOMES = (MINED, NO_CANDIDATE, BELOW, MARGIN, KNOWN, TWICE, OVER, OVER_ALL)


@dataclass(frozen=True)
class Rules:
    """When a candidate becomes a pair.

    Args:
        threshold: Con-D's probability must be above it.
        margin: and at least this share of the probability of the anchor's own pair; 0 asks for nothing.
        per_image: keep so many captions an image, the most probable ones; None keeps all.
        at_most: keep so many pairs of these, the most probable ones (2M in MAFA section G.8); None keeps all.
    """

    threshold: float = 0.8
    margin: float = 0.0
    per_image: int | None = None
    at_most: int | None = None


def choose(judged: pa.Table, image_keys: np.ndarray, captions: pa.ChunkedArray, rules: Rules) -> np.ndarray:
    """The outcome of each candidate, a number that names one of ``OUTCOMES``.

    The same caption (but for case, punctuation and spaces) is written once an image, with its highest probability, and never where
    the image has it already. All rows of an image (``image_keys``) count as one. Ties go to the lowest rows.

    Args:
        judged: as ``mining.judged`` writes it, R rows.
        image_keys: [N] of the data.
        captions: [N] list<string> of the data.
        rules: what is asked for.

    Returns:
        int8 [R].
    """
    image, text = judged["image"].to_numpy(), judged["text"].to_numpy()
    probability = judged["probability"].to_numpy().astype(np.float64)
    own_probability = judged["own_probability"].to_numpy().astype(np.float64)
    key = np.where(image >= 0, image_keys[np.maximum(image, 0)], -1)
    outcome = np.full(len(image), OUTCOMES.index(MINED), dtype=np.int8)

    def drop(rows: np.ndarray, why: str) -> None:
        outcome[rows & (outcome == 0)] = OUTCOMES.index(why)

    drop((image < 0) | (text < 0), NO_CANDIDATE)
    drop(~(probability > rules.threshold), BELOW)
    drop(probability < rules.margin * own_probability, MARGIN)
    pair, known = _pair_codes(key, judged["caption"], image_keys, captions)
    drop(np.isin(pair, known), KNOWN)
    best_first = np.lexsort((text, image, -probability))
    drop(~_is_among_first(pair, best_first[outcome[best_first] == 0], 1), TWICE)
    if rules.per_image is not None:
        drop(~_is_among_first(key, best_first[outcome[best_first] == 0], rules.per_image), OVER)
    if rules.at_most is not None:
        kept = best_first[outcome[best_first] == 0]
        outcome[kept[rules.at_most :]] = OUTCOMES.index(OVER_ALL)
    return outcome


def _is_among_first(group: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Bool [R]: is a row of ``order`` among the first ``count`` of its group there."""
    by_group = order[np.argsort(group[order], kind="stable")]
    _, start, size = np.unique(group[by_group], return_index=True, return_counts=True)
    place = np.arange(len(by_group)) - np.repeat(start, size)
    among = np.zeros(len(group), dtype=bool)
    among[by_group[place < count]] = True
    return among


def _pair_codes(
    key: np.ndarray, texts: pa.ChunkedArray, image_keys: np.ndarray, captions: pa.ChunkedArray
) -> tuple[np.ndarray, np.ndarray]:
    """(image, caption) as one number, of the candidates and of the data."""
    chunks = [chunk for chunk in captions.chunks if len(chunk)]
    flat = [chunk.flatten() for chunk in chunks]
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
    parents = [chunk.value_parent_indices().to_numpy() + start for chunk, start in zip(chunks, starts, strict=False)]
    own = plain(pa.chunked_array(flat, pa.string()))
    asked = plain(texts.cast(pa.string()))
    distinct = pc.unique(own)
    own_number = pc.index_in(own, value_set=distinct).to_numpy().astype(np.int64)
    number = pc.fill_null(pc.index_in(asked, value_set=distinct), 0).to_numpy().astype(np.int64)
    parent_keys = image_keys[np.concatenate(parents)] if parents else np.empty(0, dtype=np.int64)
    return key * len(distinct) + number, parent_keys * len(distinct) + own_number


def plain(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lower case, words alone with single spaces; a text of nothing but signs stays as it is.

    Example:
        >>> plain(pa.chunked_array([["A dog, running!", "A  dog running", ":)"]])).to_pylist()
        ['a dog running', 'a dog running', ':)']
    """
    lower = pc.utf8_lower(texts)
    words = pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, pattern=r"[^\p{L}\p{M}\p{N}]+", replacement=" "))
    return pc.if_else(pc.equal(words, ""), lower, words)
