"""Scenes: things on a coloured ground, what is true of them, and captions that tell part of it.

A scene has *facts*, texts such as ``dog``, ``two dogs``, ``dog on red``, ``dog left of pizza``, ``blue ground``. A caption claims
some. It matches every scene that has all facts it claims, whoever's caption it is: that is the whole truth, exactly.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from lavis_mafa.datasets.scenes.concepts import NOUNS, Noun, with_article
from lavis_mafa.errors import UserError

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

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
PLACES = {"left of": "right of", "above": "below"}  # each with the same place seen from the other side
SIZES = (24, 512)
CLUTTER = 100
SIDE = (0.9, 1.0)  # of a thing, in sides of its cell
APART = 0.2  # of two middles, in sides of the picture, for one thing to be left of or above the other


@dataclass(frozen=True)
class World:
    """What scenes and captions are like.

    Args:
        concepts: sorts of things in all splits. unseen: further sorts, in the split ``unseen`` alone.
        things: fewest and most things of a scene. size: pixels per side.
        clutter: coloured shapes of a scene that no caption names.
        named: fewest and most sorts of things that a caption names.
        relations: share of captions of two sorts that say where one is (``a dog left of a pizza``), where that is plain to see.
        counts: share of captions that say how many there are, where there are several; 0 draws every thing once.
        plates: share that say what colour the plate below a thing has; 0 draws no plates. grounds: and the ground behind all.
        wrong: share of training captions that are another scene's and do not match: false positives.

    Raises:
        UserError: there is no such world.
    """

    concepts: int = 48
    unseen: int = 12
    things: tuple[int, int] = (2, 4)
    size: int = 48
    clutter: int = 0
    named: tuple[int, int] = (2, 2)
    relations: float = 0.0
    counts: float = 0.0
    plates: float = 0.0
    grounds: float = 0.0
    wrong: float = 0.0

    @property
    def cells(self) -> int:
        """Per side of the picture: as many as the most things need, of which each has one for itself."""
        return math.ceil(math.sqrt(self.things[1]))

    def __post_init__(self) -> None:
        low, most = self.things
        if not 1 <= low <= most <= max(NUMBERS):
            raise UserError(f"things is {low} {most}; allowed: the fewest and the most things of a scene, from 1 to {max(NUMBERS)}.")
        if not 1 <= self.named[0] <= self.named[1] <= most:
            named = f"{self.named[0]} {self.named[1]}"
            raise UserError(f"named is {named}; allowed: the fewest and the most that a caption names, from 1 to {most}, of things.")
        if self.concepts <= most:
            raise UserError(f"concepts is {self.concepts}; allowed: at least {most + 1}, more than a scene has things ({most}).")
        if self.unseen < 1:
            raise UserError(f"unseen is {self.unseen}; allowed: at least 1.")
        if (total := self.concepts + self.unseen) > len(NOUNS):
            raise UserError(f"concepts ({self.concepts}) and unseen ({self.unseen}) are {total}; there are {len(NOUNS)}.")
        for name, value, (least, highest) in (("size", self.size, SIZES), ("clutter", self.clutter, (0, CLUTTER))):
            if not least <= value <= highest:
                raise UserError(f"{name} is {value}; allowed: {least} to {highest}.")
        for name in ("relations", "counts", "plates", "grounds", "wrong"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: a share from 0 to 1.")
        if self.relations and self.named[1] < 2:
            raise UserError(f"relations is {self.relations}, but captions name one sort of thing alone; raise named, or leave it 0.")
        if self.counts and most < 2:
            raise UserError(f"counts is {self.counts}, but scenes have one thing alone; raise things, or leave it 0.")


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene: its sort, its artist, where it is (pixels: left, top, right, bottom) and the colour of its plate."""

    noun: Noun
    artist: str
    box: Box
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
    clutter: tuple[tuple[Box, str], ...] = ()
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
            if (place := self.place(one, other)) in PLACES:
                yield f"{one.noun.name} {place} {other.noun.name}"

    def place(self, one: Thing, other: Thing) -> str | None:
        """Where ``one`` is, seen from ``other``: left of, right of, above, below; None where that is not plain to see."""
        across, down = (b - a for a, b in zip(one.middle, other.middle, strict=True))
        if max(abs(across), abs(down)) <= APART * self.size or abs(across) == abs(down):
            return None
        if abs(across) > abs(down):
            return "left of" if across > 0 else "right of"
        return "above" if down > 0 else "below"

    def nouns(self) -> list[Noun]:
        """The sorts of things, each once."""
        return list(dict.fromkeys(thing.noun for thing in self.things))

    def count(self, noun: Noun) -> int:
        """How many things of this sort there are."""
        return sum(thing.noun == noun for thing in self.things)

    @property
    def edge(self) -> int:
        """Pixels by which a plate is wider than its thing, on each side."""
        return max(2, self.size // 24)


def draw_scene(world: World, nouns: Sequence[Noun], artists: Sequence[str], rng: random.Random) -> Scene:
    """A scene of ``world`` with things of ``nouns`` by any of ``artists``; at least as many nouns as things."""
    count = rng.randint(*world.things)
    sorts = rng.sample(nouns, count)
    if world.counts and count > 1 and rng.random() < 0.5:  # one of them is there more than once
        times = rng.randint(2, count)
        sorts[:times] = [sorts[0]] * times
    boxes = _boxes(count, world, rng)
    plates = [rng.choice([*COLOURS]) if world.plates and rng.random() < 0.5 else None for _ in sorts]
    things = [Thing(n, rng.choice(artists), box, plate) for n, box, plate in zip(sorts, boxes, plates, strict=True)]
    small = [_box(world.size, rng.uniform(0.08, 0.16), rng) for _ in range(world.clutter)]
    return Scene(world.size, rng.choice([*COLOURS]), tuple(things), tuple((box, rng.choice([*COLOURS])) for box in small))


def tell(scene: Scene, world: World, rng: random.Random, named: tuple[int, int] | None = None) -> Caption:
    """A caption of ``scene`` that tells as much as ``world`` says, of ``named`` sorts of things (None: the world's)."""
    nouns = scene.nouns()
    low, high = (min(count, len(nouns)) for count in named or world.named)
    chosen = rng.sample(nouns, rng.randint(low, high))
    told = _relation(scene, *chosen) if len(chosen) == 2 and rng.random() < world.relations else None
    text, facts = told or _listed([_phrase(scene, noun, world, rng) for noun in chosen])
    if rng.random() < world.grounds:
        text, facts = f"{text} in front of {with_article(scene.ground)} ground", [*facts, f"{scene.ground} ground"]
    return Caption(text, tuple(sorted(set(facts))))


Told = tuple[str, list[str]]  # words, and the facts that they claim


def _relation(scene: Scene, one: Noun, other: Noun) -> Told | None:
    """``a dog left of a pizza``, where that holds of some two. Nothing more of either: a caption claims each fact by itself, and
    another dog than the one beside the pizza may be on red."""
    for place, opposite in PLACES.items():
        for words, fact in ((place, f"{one.name} {place} {other.name}"), (opposite, f"{other.name} {place} {one.name}")):
            if fact in scene.facts:
                return f"{one.one} {words} {other.one}", [one.name, other.name, fact]
    return None


def _listed(phrases: Sequence[Told]) -> Told:
    """``a dog, two cats and a pizza on red``."""
    *others, last = [words for words, _ in phrases]
    return f"{', '.join(others)} and {last}" if others else last, [fact for _, facts in phrases for fact in facts]


def _phrase(scene: Scene, noun: Noun, world: World, rng: random.Random) -> Told:
    """What a caption says of one sort of things."""
    of_this = [thing for thing in scene.things if thing.noun == noun]
    if len(of_this) > 1 and rng.random() < world.counts:
        several = f"{NUMBERS[len(of_this)]} {noun.plural}"
        return several, [noun.name, several]
    plates = [thing.plate for thing in of_this if thing.plate]
    if plates and rng.random() < world.plates:
        return f"{noun.one} on {plates[0]}", [noun.name, f"{noun.name} on {plates[0]}"]
    return noun.one, [noun.name]


def _boxes(count: int, world: World, rng: random.Random) -> list[Box]:
    """A square for each thing, somewhere in a cell of its own."""
    side = world.size // world.cells
    boxes = []
    for cell in rng.sample(range(world.cells**2), count):
        left, top, right, bottom = _box(side, rng.uniform(*SIDE), rng)
        across, down = cell % world.cells * side, cell // world.cells * side
        boxes.append((left + across, top + down, right + across, bottom + down))
    return boxes


def _box(size: int, share: float, rng: random.Random) -> Box:
    side = max(2, round(share * size))
    left, top = rng.randint(0, size - side), rng.randint(0, size - side)
    return left, top, left + side, top + side
