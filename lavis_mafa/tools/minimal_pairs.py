"""Minimal pairs: does a model score an image's own caption above one that differs in a single word and is not true of the image?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.errors import UserError
from lavis_mafa.grit.sampler import seeded_generator
from lavis_mafa.models.retrieval import joined_texts
from lavis_mafa.objectives.mining import best_query
from lavis_mafa.progress import Bar
from lavis_mafa.tools.candidates import shuffled
from lavis_mafa.tools.significance import Accuracy

SCORES = {"itm": "ITM", "itc": "ITC"}
PARTNERS = 3  # of a caption at most: a caption of common words has hundreds
PAIRS_AT_ONCE, TEXTS_AT_ONCE = 512, 256
CHANCE = 0.5
EXAMPLES = 5  # of each kind


# --- which ------------------------------------------------------------------------------------------------------------


class OneWordApart:
    """Which of T texts differ in exactly one word: those that are the same with word k left out.

    A table of what is left finds them, so time and memory grow as the texts' words do. Single words are apart from every other one
    and have no partners.

    Example:
        >>> OneWordApart(["a red car", "a blue car", "a red cat", "a car"]).of(0)
        [1, 2]
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._words = [tuple(text.split()) for text in texts]
        self._with_rest: dict[str, list[int]] = defaultdict(list)
        for number, words in enumerate(self._words):
            for rest in _rests(words):
                self._with_rest[rest].append(number)

    def of(self, text: int) -> list[int]:
        """The partners of a text, ascending; never those that say the same."""
        own = self._words[text]
        return sorted(other for rest in _rests(own) for other in self._with_rest[rest] if self._words[other] != own)


def _rests(words: tuple[str, ...]) -> Iterator[str]:
    """The text without each of its words; two spaces are where it was, which no split text has."""
    for place in range(len(words) if len(words) > 1 else 0):
        yield " ".join([*words[:place], "", *words[place + 1 :]])


@dataclass(frozen=True)
class MinimalPairs:
    """C captions with their image, and N other captions that differ in one word from one of them and are not true of its image."""

    image: Tensor  # LongTensor[C]
    text: Tensor  # LongTensor[C]
    other: Tensor  # LongTensor[N], texts
    caption: Tensor  # LongTensor[N], which of the C captions each is compared with
    possible: int  # how many pairs there are, of which N were drawn

    def __len__(self) -> int:
        return len(self.image)

    def scored(self) -> tuple[Tensor, Tensor]:
        """The C + N images and texts to score."""
        return torch.cat([self.image, self.image[self.caption]]), torch.cat([self.text, self.other])


def right_texts(gallery: Any) -> Tensor:
    """Bool [I, T], which text is right for which image: by the data's truth where they tell one, else the image's own ones."""
    if hasattr(gallery, "relevant"):
        return gallery.relevant
    right = torch.zeros(len(gallery.image), len(gallery.text), dtype=torch.bool)
    for image, texts in gallery.img2txt.items():
        right[image, texts] = True
    return right


def find_pairs(gallery: Any, seed: int, max_captions: int | None = None) -> MinimalPairs:
    """The minimal pairs of a gallery: of each caption that is right for its image up to three, drawn by (seed, image, text).

    Args:
        gallery: with ``text``, ``img2txt`` and perhaps ``relevant``, as :class:`lavis_mafa.datasets.pairs.RetrievalPairs` has them.
        max_captions: a random so many of the captions that have partners.

    Raises:
        UserError: no two captions differ in one word.
    """
    apart, right = OneWordApart(gallery.text), right_texts(gallery)
    found: list[tuple[int, int, Tensor]] = []
    for image, texts in gallery.img2txt.items():
        for text in texts:
            others = torch.tensor(apart.of(text) if right[image, text] else [], dtype=torch.long)
            others = others[~right[image, others]]
            if len(others):
                found.append((image, text, others))
    if not found:
        raise UserError(
            f"no two of the {len(gallery.text)} captions differ in exactly one word, such that the other is not true of the image "
            "too: there are no minimal pairs; give another --split."
        )
    chosen = [found[place] for place in sorted(shuffled(len(found), seed, max_captions).tolist())]
    drawn = [others[_permutation(len(others), seed, image, text)[:PARTNERS]] for image, text, others in chosen]
    return MinimalPairs(
        image=torch.tensor([image for image, _, _ in chosen]),
        text=torch.tensor([text for _, text, _ in chosen]),
        other=torch.cat(drawn),
        caption=torch.arange(len(drawn)).repeat_interleave(torch.tensor(list(map(len, drawn)))),
        possible=sum(len(others) for _, _, others in chosen),
    )


def _permutation(count: int, *seed: int) -> Tensor:
    return torch.randperm(count, generator=seeded_generator("minimal pairs", *seed))


# --- scored -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_pairs(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], captions: Sequence[str], image: Tensor, text: Tensor, scores: Sequence[str]
) -> dict[str, Tensor]:
    """The scores of P pairs, each image encoded once.

    Args:
        model: with ``image_rows``, ``text_rows`` and ``match_rows``, in eval mode.
        batches: LongTensor[B] ascending numbers of images, and the images [B, 3, H, W]; together all that pairs name.
        captions: all texts. image, text: LongTensor[P] each.
        scores: ``itm``: logit "matches" less logit "does not"; ``itc``: the cosine.

    Returns:
        fp32 [P] each, on the CPU.

    Raises:
        UserError: a score is not finite.
    """
    used, text = text.unique(return_inverse=True)
    named = [captions[number] for number in used.tolist()]
    starts = Bar(range(0, len(named), TEXTS_AT_ONCE), desc="texts", unit="batch", delay=1)
    parts = [model.text_rows(named[start : start + TEXTS_AT_ONCE]) for start in starts]
    texts, text_features = tuple(map(joined_texts, zip(*(rows for rows, _ in parts), strict=True))), torch.cat([f for _, f in parts])
    found = {name: torch.empty(len(image)) for name in scores}
    with Bar(total=len(image), desc="minimal pairs", unit="pair") as bar:
        for numbers, pixels in batches:
            tokens, features = model.image_rows(pixels.to(model.device))
            pairs = torch.isin(image, numbers).nonzero().flatten()
            for part in pairs.split(PAIRS_AT_ONCE):
                row, column = torch.searchsorted(numbers, image[part]), text[part]
                if "itm" in scores:
                    logits = model.match_rows(tokens, texts, row, column).float()
                    found["itm"][part] = (logits[:, 1] - logits[:, 0]).cpu()
                if "itc" in scores:
                    columns, place = column.unique(return_inverse=True)
                    cosines = best_query(features, text_features[columns.to(text_features.device)])
                    found["itc"][part] = cosines.float().cpu()[row, place]
                bar.update(len(part))
    for name, values in found.items():
        bad = int((~values.isfinite()).sum())
        if bad:
            broken = "The model's weights are broken, or too large for run.precision."
            raise UserError(f"{bad} of {len(values)} scores by {SCORES[name]} are NaN or infinite. {broken}")
    return found


def preferred(own: Tensor, other: Tensor, caption: Tensor) -> Tensor:
    """How often each caption scores higher than the others it is compared with: shares [C]; an equal score is half a win, as by chance.

    Args:
        own: [C] scores of images with their own captions. other: [N] of the same images with the others.
        caption: LongTensor[N], which of the C captions each is compared with; at least one a caption.

    Example:
        >>> preferred(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0, 0.0]), torch.tensor([0, 0, 1]))
        tensor([0.5000, 0.5000])
    """
    margin = own[caption] - other
    wins = (margin > 0).float() + 0.5 * (margin == 0).float()
    return torch.zeros_like(own).index_add(0, caption, wins) / torch.bincount(caption, minlength=len(own))


# --- said -------------------------------------------------------------------------------------------------------------


def accuracies(pairs: MinimalPairs, scores: dict[str, Tensor]) -> dict[str, Accuracy]:
    """By each score of :func:`score_pairs`."""
    count = len(pairs)
    return {name: Accuracy.of(preferred(s[:count], s[count:], pairs.caption), pairs.image) for name, s in scores.items()}


def examples(gallery: Any, pairs: MinimalPairs, scores: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The pairs that the first score gets most wrong, then those that it gets most right; ``margin``: own score less other."""
    count, found = len(pairs), []
    margins = {name: s[:count][pairs.caption] - s[count:] for name, s in scores.items()}
    first = next(iter(margins.values()))
    order = first.argsort()
    wrong, right = order[first[order] < 0], order[first[order] > 0].flip(0)
    for place in torch.cat([wrong[:EXAMPLES], right[:EXAMPLES]]).tolist():
        caption = int(pairs.caption[place])
        image, own, other = (int(number) for number in (pairs.image[caption], pairs.text[caption], pairs.other[place]))
        texts = {"image": str(gallery.image[image]), "own": gallery.text[own], "other": gallery.text[other]}
        found.append({**texts, "margin": {name: float(margin[place]) for name, margin in margins.items()}})
    return found


def format_results(found: dict[str, Accuracy], shown: list[dict[str, Any]]) -> str:
    """A line a score, in per cent, then the examples."""
    lines = [f"{'own caption above the other (%)':34}{'accuracy':>9}   95 % interval"]
    for name, one in found.items():
        ends = "" if one.low is None or one.high is None else f"   {100 * one.low:.1f} to {100 * one.high:.1f}"
        lines.append(f"{SCORES[name]:34}{100 * one.accuracy:9.1f}{ends}")
    lines += [f"{'chance':34}{100 * CHANCE:9.1f}", ""]
    lines += ["the most wrong and the most right: own caption | other caption | own score - other score"]
    for pair in shown:
        margins = ", ".join(f"{SCORES[name]} {value:+.2f}" for name, value in pair["margin"].items())
        lines.append(f"  {pair['own']} | {pair['other']} | {margins}")
    return "\n".join(lines)
