"""Scenes: things on a coloured ground, what is true of them, and captions that tell part of it.

A scene has *facts*, texts such as ``dog``, ``two dogs``, ``dog on red``, ``dog left of pizza``, ``blue ground``. A caption claims some. It
matches every scene that has all facts it claims, whoever's caption it is: that is the whole truth, exactly.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from lavis_mafa.datasets.scenes.concepts import Noun

COLOURS = {  # of grounds and plates
    "red": (222, 92, 88),
    "orange": (240, 170, 92),
    "yellow": (246, 226, 120),
    "green": (130, 190, 120),
    "blue": (110, 160, 226),
    "purple": (176, 130, 204),
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
SIDE = (0.8, 1.0)  # of a thing, in sides of its cell
APART = 0.2  # of two middles, in sides of the picture, for one thing to be left of or above the other


@dataclass(frozen=True)
class World:
    """What scenes and captions are like.

    Args:
        concepts: sorts of things in all splits. unseen: further sorts, in the split ``unseen`` alone.
        things: fewest and most things of a scene. size: pixels per side.
        clutter: coloured shapes of a scene that no caption names.
        named: fewest and most sorts of things that a caption names.
        relations: share of captions of two things that say where one is (``a dog left of a pizza``).
        counts: share of captions that say how many there are, where there are several; 0 draws every thing once.
        plates: share that say what colour the plate below a thing has; 0 draws no plates. grounds: and the ground behind all.
        wrong: share of training captions that are another scene's and do not match: false positives.
    """

    concepts: int = 48
    unseen: int = 12
    things: tuple[int, int] = (2, 4)
    size: int = 48
    clutter: int = 0
    named: tuple[int, int] = (1, 2)
    relations: float = 0.0
    counts: float = 0.0
    plates: float = 0.0
    grounds: float = 0.0
    wrong: float = 0.0


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene: its sort, its artist, where it is (pixels: left, top, right, bottom) and the colour of its plate."""

    noun: Noun
    artist: str
    box: tuple[int, int, int, int]
    plate: str | None = None

    @property
    def middle(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Caption:
    """A text and the facts that it claims."""

    text: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """Things on a ground. ``clutter``: (box, colour) of shapes that mean nothing."""

    size: int
    ground: str
    things: tuple[Thing, ...]
    clutter: tuple[tuple[tuple[int, int, int, int], str], ...] = ()
    facts: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", frozenset(self._facts()))

    def _facts(self) -> Iterator[str]:
        yield f"{self.ground} ground"
        for noun, count in Counter(thing.noun for thing in self.things).items():
            yield noun.name
            if count > 1:
                yield f"{NUMBERS[count]} {noun.plural}"
        for thing in self.things:
            if thing.plate:
                yield f"{thing.noun.name} on {thing.plate}"
        for one, other in permutations(self.things, 2):
            if place := self.place(one, other):
                yield f"{one.noun.name} {place} {other.noun.name}"

    def place(self, one: Thing, other: Thing) -> str | None:
        """``left of`` or ``above``, where that is plain to see of ``one``, seen from ``other``."""
        across, down = (b - a for a, b in zip(one.middle, other.middle, strict=True))
        far = APART * self.size
        if across > far and across > abs(down):
            return "left of"
        return "above" if down > far and down > abs(across) else None

    def nouns(self) -> list[Noun]:
        """The sorts of things, each once."""
        return list(dict.fromkeys(thing.noun for thing in self.things))


def draw_scene(world: World, nouns: Sequence[Noun], artists: Sequence[str], rng: random.Random) -> Scene:
    """A scene of ``world`` with things of ``nouns`` by any of ``artists``; at least as many nouns as things."""
    count = rng.randint(*world.things)
    sorts = rng.sample(nouns, count)
    if world.counts and count > 1 and rng.random() < 0.5:  # one of them is there more than once
        times = rng.randint(2, count)
        sorts[:times] = [sorts[0]] * times
    boxes = _boxes(count, world.things[1], world.size, rng)
    plates = [rng.choice([*COLOURS]) if world.plates and rng.random() < 0.5 else None for _ in sorts]
    things = [Thing(n, rng.choice(artists), box, plate) for n, box, plate in zip(sorts, boxes, plates, strict=True)]
    small = [_box(world.size, rng.uniform(0.08, 0.16), rng) for _ in range(world.clutter)]
    return Scene(world.size, rng.choice([*COLOURS]), tuple(things), tuple((box, rng.choice([*COLOURS])) for box in small))


def tell(scene: Scene, world: World, rng: random.Random, named: tuple[int, int] | None = None) -> Caption:
    """A caption of ``scene`` that tells as much as ``world`` says, of ``named`` sorts of things (None: the world's)."""
    nouns, facts = scene.nouns(), list[str]()
    low, high = (min(count, len(nouns)) for count in named or world.named)
    chosen = rng.sample(nouns, rng.randint(low, high))
    phrases = [_phrase(scene, noun, world, rng, facts) for noun in chosen]
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if len(chosen) == 2 and rng.random() < world.relations:
        first, second = ([thing for thing in scene.things if thing.noun == noun] for noun in chosen)
        places = [place for a in first for b in second if (place := scene.place(a, b))]
        if places:
            facts.append(f"{chosen[0].name} {places[0]} {chosen[1].name}")
            text = f"{phrases[0]} {places[0]} {phrases[1]}"
    if rng.random() < world.grounds:
        facts.append(f"{scene.ground} ground")
        text += f" in front of {scene.ground}"
    return Caption(text, tuple(sorted(set(facts))))


def _phrase(scene: Scene, noun: Noun, world: World, rng: random.Random, facts: list[str]) -> str:
    """What a caption says of one sort of things; adds what that claims to ``facts``."""
    facts.append(noun.name)
    of_this = [thing for thing in scene.things if thing.noun == noun]
    if len(of_this) > 1 and rng.random() < world.counts:
        facts.append(f"{NUMBERS[len(of_this)]} {noun.plural}")
        return facts[-1]
    plates = [thing.plate for thing in of_this if thing.plate]
    if plates and rng.random() < world.plates:
        facts.append(f"{noun.name} on {plates[0]}")
        return f"{noun.one} on {plates[0]}"
    return noun.one


def _boxes(count: int, most: int, size: int, rng: random.Random) -> list[tuple[int, int, int, int]]:
    """A square for each thing, somewhere in a cell of its own: the picture has as many cells as ``most`` things need."""
    cells = math.ceil(math.sqrt(most))
    side = size // cells
    boxes = []
    for cell in rng.sample(range(cells * cells), count):
        left, top, right, bottom = _box(side, rng.uniform(*SIDE), rng)
        across, down = cell % cells * side, cell // cells * side
        boxes.append((left + across, top + down, right + across, bottom + down))
    return boxes


def _box(size: int, share: float, rng: random.Random) -> tuple[int, int, int, int]:
    side = max(2, round(share * size))
    left, top = rng.randint(0, size - side), rng.randint(0, size - side)
    return left, top, left + side, top + side
