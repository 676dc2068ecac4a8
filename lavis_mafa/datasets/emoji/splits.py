"""Which drawing is for training and which for evaluation, and which caption a training image carries."""

from __future__ import annotations

import random
from pathlib import Path

from lavis_mafa.datasets.emoji.texts import Concept

SPLITS = ("train", "seen", "unseen")
UNSEEN_FAMILIES = 0.1
SEEN_CONCEPTS = 0.3  # enough queries for a short run on a few hundred concepts to tell models apart
# Captions as web data would have them: mostly what a thing is called, seldom what sort of thing it is.
CAPTION_WEIGHTS = {"name": 0.50, "alias": 0.20, "keyword": 0.25, "group": 0.05}


def split_drawings(
    concepts: list[Concept], drawings: dict[str, dict[str, Path]], same_pictures: list[set[str]], rng: random.Random
) -> dict[tuple[str, str], str]:
    """(code, artist) -> split.

    - ``unseen``: all drawings of a tenth of the families. Concepts that differ in gender alone or are the same picture stay
      together.
    - ``seen``: one drawing of three tenths of the other concepts, whose remaining drawings are in ``train``.
    """
    family = {concept.code: concept.family for concept in concepts}
    for group in same_pictures:
        codes = sorted(group & family.keys())
        merged = {family[code] for code in codes}
        family.update({code: family[codes[0]] for code in family if family[code] in merged} if codes else {})

    families = sorted(set(family.values()))
    unseen = set(rng.sample(families, round(UNSEEN_FAMILIES * len(families))))
    others = [concept.code for concept in concepts if family[concept.code] not in unseen]
    seen = set(rng.sample(others, round(SEEN_CONCEPTS * len(others))))

    split = {}
    for code in family:
        held_out = rng.choice(list(drawings[code])) if code in seen else None
        for artist in drawings[code]:
            split[code, artist] = "unseen" if family[code] in unseen else "seen" if artist == held_out else "train"
    return split


def draw_captions(concept: Concept, count: int, rng: random.Random) -> list[str]:
    """``count`` captions for one image of the concept, repeats allowed; kinds by ``CAPTION_WEIGHTS`` among those it has."""
    kinds = [kind for kind in CAPTION_WEIGHTS if concept.texts[kind]]
    drawn = rng.choices(kinds, [CAPTION_WEIGHTS[kind] for kind in kinds], k=count)
    return [rng.choice(concept.texts[kind]) for kind in drawn]
