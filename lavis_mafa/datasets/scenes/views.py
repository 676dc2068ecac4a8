"""Further views of scenes, for the tasks downstream: questions, things to be found, sentences about one picture and about two.

A view gives the rows of one split, from its name, its scenes and a random stream of the view's own. What a row says follows from the
things of its scenes. Where a text could tell its label, as in yes or no, each text is there as often with each label.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, product
from typing import Any

import pyarrow as pa

from lavis_mafa.datasets.scenes.concepts import Noun
from lavis_mafa.datasets.scenes.world import Box, Scene, Thing

Row = dict[str, Any]
View = Callable[[str, Sequence[Scene], random.Random], Iterator[Row]]
CORNERS = pa.struct(dict.fromkeys(("left", "top", "right", "bottom"), pa.int32()))
# of each place: the axis of a thing's middle, and the sign of the way there
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
TRIES = 100  # to find scenes for a statement, before that is given up
# Where a sentence holds: with the thing in the left and in the right picture.
STATEMENTS = {
    "the left picture has {}": [(True, False), (True, True)],
    "the right picture has {}": [(False, True), (True, True)],
    "both pictures have {}": [(True, True)],
    "exactly one picture has {}": [(True, False), (False, True)],
}
ANYWHERE = [(left, right) for left in (True, False) for right in (True, False)]


def image_path(folder: str, number: int) -> str:
    """Below the folder of the build."""
    return f"images/{folder}/{number:05d}.png"


def corners(box: Box) -> dict[str, int]:
    """A box as Parquet holds it."""
    return dict(zip(CORNERS.names, box, strict=True))


def only(things: Sequence[Thing], place: str, mark: Thing, scene: Scene) -> Thing | None:
    """The one of ``things`` that is left of (right of, above, below) ``mark``: plainly so, and no other even by a little."""
    axis, sign = SIDES[place]
    there = [thing for thing in things if sign * (thing.middle[axis] - mark.middle[axis]) > 0]
    return there[0] if len(there) == 1 and scene.place(there[0], mark) == place else None


# --- questions -----------------------------------------------------------------------------------------------------------


def questions(split: str, scenes: Sequence[Scene], rng: random.Random) -> Iterator[Row]:
    """Of each picture one of the open questions that have exactly one answer there, and whether some thing is there: each sort of
    thing as often with yes as with no."""
    several = any(len(scene.nouns()) < len(scene.things) for scene in scenes)
    asked = [[rng.choice(rng.choice(_open_questions(scene, several)))] for scene in scenes]
    for pair in _neighbours(scenes):
        if (found := _in_one_alone(scenes, pair, rng)) is not None:
            with_it, without, noun = found
            asked[with_it].append((f"is there {noun.one}?", "yes"))
            asked[without].append((f"is there {noun.one}?", "no"))
    numbers = count()
    for number, pairs in enumerate(asked):
        for question, answer in pairs:
            yield {"image": image_path(split, number), "question": question, "answer": [answer], "question_id": next(numbers)}


def _open_questions(scene: Scene, several: bool) -> list[list[tuple[str, str]]]:
    """(question, answer), by kind; without kinds of which there are none. ``several``: things may be there more than once."""
    single = [thing for thing in scene.things if scene.count(thing.noun) == 1]
    found = [(f"what is {place} the {one.noun.name}?", only(scene.things, place, one, scene)) for one in single for place in SIDES]
    kinds = [
        [(question, thing.noun.name) for question, thing in found if thing is not None],
        [(f"what colour is the {one.noun.name} on?", one.plate) for one in single if one.plate],
        [(f"how many {noun.plural} are there?", str(scene.count(noun))) for noun in scene.nouns() if several],
        [("how many things are there?", str(len(scene.things)))],
        [("what colour is the ground?", scene.ground)],
    ]
    return [kind for kind in kinds if kind]


def _neighbours(scenes: Sequence[Scene]) -> Iterator[tuple[int, int]]:
    """(0, 1), (2, 3), ...: without the last where their number is odd."""
    return ((first, first + 1) for first in range(0, len(scenes) - 1, 2))


def _in_one_alone(scenes: Sequence[Scene], pair: tuple[int, int], rng: random.Random) -> tuple[int, int, Noun] | None:
    """A scene with some thing, the other without it, and what it is; None where both have the same."""
    one, other = rng.sample(pair, 2)
    for with_it, without in ((one, other), (other, one)):
        if nouns := [noun for noun in scenes[with_it].nouns() if not scenes[without].count(noun)]:
            return with_it, without, rng.choice(nouns)
    return None


# --- grounding -----------------------------------------------------------------------------------------------------------


def grounding(split: str, scenes: Sequence[Scene], rng: random.Random) -> Iterator[Row]:
    """Of each thing one of the expressions that hold for it alone, with its box and those of all things of the picture."""
    for number, scene in enumerate(scenes):
        boxes = [corners(thing.box) for thing in scene.things]
        for thing, box in zip(scene.things, boxes, strict=True):
            if texts := list(_expressions(scene, thing)):
                yield {"image": image_path(split, number), "text": rng.choice(texts), "box": box, "boxes": boxes}


def _expressions(scene: Scene, thing: Thing) -> Iterator[str]:
    name, same = thing.noun.name, [other for other in scene.things if other.noun == thing.noun]
    if len(same) == 1:
        yield f"the {name}"
    if thing.plate and [other.plate for other in same].count(thing.plate) == 1:
        yield f"the {name} on {thing.plate}"
    for mark, place in product(scene.things, SIDES):
        if only(same, place, mark, scene) is not thing:
            continue
        if scene.count(mark.noun) == 1:
            yield f"the {name} {place} the {mark.noun.name}"
        if len(same) == 2 and mark in same and place.endswith(" of"):
            yield f"the {place.removesuffix(' of')} {name}"


# --- entailment ----------------------------------------------------------------------------------------------------------


def entailment(split: str, scenes: Sequence[Scene], rng: random.Random) -> Iterator[Row]:
    """Whether a picture entails "there is a dog": entailment, where a dog is to be seen; neutral, where none is, but a card covers
    something; contradiction, where none is and nothing is covered. Of every four pictures one sentence, once with each label.

    ``scene``: the picture's ``image_id``; ``card``: the card's box, where there is one, and then ``image`` is still to be painted.
    """
    painted = count()

    def row(label: str, noun: Noun, number: int, card: Box | None) -> Row:
        image = image_path(split, number) if card is None else image_path(f"entailment_{split}", next(painted))
        scene, box = f"{split}-{number}", None if card is None else corners(card)
        return {"image": image, "sentence": f"there is {noun.one}", "label": label, "scene": scene, "card": box}

    for pair in islice(_neighbours(scenes), 0, None, 2):
        if (found := _in_one_alone(scenes, pair, rng)) is None:
            continue
        with_it, without, noun = found
        only_one = scenes[with_it].count(noun) == 1
        beside = [(with_it, card) for thing, card in _cards(scenes[with_it]) if thing.noun != noun]
        over = [(with_it, card) for thing, card in _cards(scenes[with_it]) if thing.noun == noun and only_one]
        elsewhere = [(without, card) for _, card in _cards(scenes[without])]
        seen = rng.choice(beside) if beside and rng.random() < 0.5 else (with_it, None)
        unknown = rng.choice(over if over and rng.random() < 0.5 else elsewhere)
        yield row("entailment", noun, *seen)
        yield row("neutral", noun, *unknown)
        yield row("contradiction", noun, without, None)


def _cards(scene: Scene) -> Iterator[tuple[Thing, Box]]:
    """Each thing with the card that covers it, and its plate."""
    for thing in scene.things:
        edge = scene.edge + 1 if thing.plate else 1
        left, top, right, bottom = thing.box
        yield thing, (max(0, left - edge), max(0, top - edge), min(scene.size, right + edge), min(scene.size, bottom + edge))


# --- statements ----------------------------------------------------------------------------------------------------------


def statements(split: str, scenes: Sequence[Scene], rng: random.Random) -> Iterator[Row]:
    """Sentences about two pictures, true or false. They come in fours: two sentences about the same two pictures, one true and one
    false, and about two others the other way round. So neither the texts nor the pictures tell by themselves which are true."""
    having: dict[Noun, list[int]] = {}
    for number, scene in enumerate(scenes):
        for noun in scene.nouns():
            having.setdefault(noun, []).append(number)

    def row(pictures: Sequence[int], sentence: str, label: bool) -> Row:
        return {"images": [image_path(split, number) for number in pictures], "sentence": sentence, "label": label}

    def find(one: Noun, other: Noun, has: tuple[bool, bool]) -> int:
        """A scene that has these or has them not; -1 where none was found."""
        among = having[one] if has[0] else having[other] if has[1] else range(len(scenes))
        drawn = (rng.choice(among) for _ in range(TRIES))
        return next((number for number in drawn if (scenes[number].count(one) > 0, scenes[number].count(other) > 0) == has), -1)

    def of_things(words: str) -> list[Row]:
        here = rng.choice(scenes).nouns()
        one = rng.choice(here)
        other = rng.choice([noun for noun in here if noun != one] or [noun for noun in having if noun != one])
        holds, fails = STATEMENTS[words], [where for where in ANYWHERE if where not in STATEMENTS[words]]
        rows = []
        for true, false in ((one, other), (other, one)):
            pictures = [find(true, false, has) for has in zip(rng.choice(holds), rng.choice(fails), strict=True)]
            if -1 in pictures or pictures[0] == pictures[1]:
                return []
            rows += [row(pictures, words.format(noun.one), noun == true) for noun in (true, false)]
        return rows

    def of_numbers() -> list[Row]:
        one, other = rng.sample(range(len(scenes)), 2)
        more = len(scenes[one].things) - len(scenes[other].things)
        pairs = (((one, other), more), ((other, one), -more)) if more else ()
        return [
            row(pair, f"the {s} picture has more things", d > 0) for pair, left in pairs for s, d in (("left", left), ("right", -left))
        ]

    for _ in range(len(scenes) // 4):
        drawn = (rng.choice([*STATEMENTS, None]) for _ in range(TRIES))
        yield from next(filter(None, (of_numbers() if words is None else of_things(words) for words in drawn)), ())


# --- all -----------------------------------------------------------------------------------------------------------------

IMAGE = ("image", pa.string())
VIEWS: dict[str, tuple[View, pa.Schema]] = {
    "questions": (
        questions,
        pa.schema([IMAGE, ("question", pa.string()), ("answer", pa.list_(pa.string())), ("question_id", pa.int64())]),
    ),
    "grounding": (grounding, pa.schema([IMAGE, ("text", pa.string()), ("box", CORNERS), ("boxes", pa.list_(CORNERS))])),
    "entailment": (
        entailment,
        pa.schema([IMAGE, ("sentence", pa.string()), ("label", pa.string()), ("scene", pa.string()), ("card", CORNERS)]),
    ),
    "statements": (
        statements,
        pa.schema([("images", pa.list_(pa.string())), ("sentence", pa.string()), ("label", pa.bool_())]),
    ),
}
