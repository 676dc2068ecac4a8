"""Writing scenes: pictures, captions, the truth, boxes, further views, a data card with a picture sheet."""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont

from lavis_mafa.datasets.emoji.drawings import ARTISTS, PACKAGES, package_versions
from lavis_mafa.datasets.scenes.concepts import NOUNS, Drawings, cut_drawings
from lavis_mafa.datasets.scenes.views import CORNERS, VIEWS, Row, corners, image_path
from lavis_mafa.datasets.scenes.world import COLOURS, NUMBERS, Box, Caption, Scene, World, draw_scene, tell
from lavis_mafa.errors import UserError
from lavis_mafa.files import built_folder
from lavis_mafa.progress import Bar

LAYOUT = 1  # counts up when the same packages, world and seed would give other pictures, captions, facts, splits or words
NEW_ARTIST = "twemoji"  # whose drawings are in the split ``test`` alone
CAPTIONS = {"train": 1, "val": 3, "test": 3, "unseen": 3}  # of an image, as web data
CURATED = 4  # captions of an image that tell of more than web data, in ``curated.parquet``
FEWEST = 2  # images of a split: a statement is about two
DRAWN_AT = 72  # pixels at least, before things are brought to their sizes
COVER = (70, 70, 70)  # the colour of a card: no ground's, no plate's
CARD = Path(__file__).with_name("card.md")
TILE = 280  # pixels of a picture on the sheet
BOX = pa.struct([("thing", pa.string()), ("artist", pa.string()), ("plate", pa.string()), *CORNERS])
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "image_id": pa.string(),
        "caption": pa.list_(pa.string()),
        "facts": pa.list_(pa.string()),
        "caption_facts": pa.list_(pa.list_(pa.string())),
        "boxes": pa.list_(BOX),
        "wrong": pa.bool_(),
    }
)
WORDS = """a an and in front of on left right above below one two three four what is are how many the colour ground there yes no . , ?
picture pictures both exactly has have things thing more than leftmost rightmost top bottom side only all not or with it at this"""


@dataclass(frozen=True)
class ScenesSummary:
    """What a build holds. ``images``: split -> number; ``sources``: package -> version; ``views``: view -> split -> rows."""

    world: dict[str, Any]
    seed: int
    layout: int
    images: dict[str, int]
    concepts: list[str]
    unseen: list[str]
    sources: dict[str, str]
    views: dict[str, dict[str, int]] = field(default_factory=dict)


def build_scenes(
    folder: str | Path, world: World | None = None, train: int = 16384, test: int = 1000, seed: int = 0, progress: bool = True
) -> ScenesSummary:
    """Build scenes in ``folder``, once; a complete build with the same settings is left as it is.

    Args:
        folder: absent, empty, or an earlier build.
        world: what scenes and captions are like; None: as the quickstart has them.
        train: images to train on. test: images of each other split.
        seed: of everything that is drawn.
        progress: show a progress bar.

    Raises:
        UserError: a package is missing, there are too few images, no caption can be wrong, or the folder holds something else.
            Nothing is ever overwritten.

    Example:
        >>> build_scenes("data/scenes", World(wrong=0.2)).images
        {'train': 16384, 'val': 1000, 'test': 1000, 'unseen': 1000}
    """
    folder, world = Path(folder), world or World()
    for name, count in (("train", train), ("test", test)):
        if count < FEWEST:
            raise UserError(f"{name} is {count}; allowed: {FEWEST} or more images.")
    counts = {"train": train, "val": test, "test": test, "unseen": test}
    if (ready := _earlier_build(folder, world, counts, seed)) is not None:
        return ready
    sources = package_versions()
    with built_folder(folder) as partial:
        return _write(partial, world, counts, seed, progress, sources)


def _earlier_build(folder: Path, world: World, counts: dict[str, int], seed: int) -> ScenesSummary | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    file = folder / "summary.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:  # somebody else's
        found = None
    if not isinstance(found, dict) or "world" not in found:
        raise UserError(f"{folder} holds something else; scenes need a new or an empty folder.")

    def flat(world: dict[str, Any], images: dict[str, int], seed: int, layout: int) -> dict[str, Any]:
        return {**world, "train": images["train"], "test": images["test"], "seed": seed, "layout": layout}

    there = flat(found["world"], found["images"], found["seed"], found["layout"])
    wanted = flat(_as_json(world), counts, seed, LAYOUT)
    other = [f"{key} {there.get(key)} instead of {value}" for key, value in wanted.items() if there.get(key) != value]
    if other:
        raise UserError(f"{folder} holds scenes with {', '.join(other)}; choose another folder, or delete this one first.")
    return ScenesSummary(**found)


def _as_json(world: World) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(world)))


def _write(folder: Path, world: World, counts: dict[str, int], seed: int, progress: bool, sources: dict[str, str]) -> ScenesSummary:
    nouns = random.Random(seed).sample(NOUNS, world.concepts + world.unseen)
    known, new = nouns[: world.concepts], nouns[world.concepts :]
    drawings = cut_drawings(nouns, max(DRAWN_AT, world.size // world.cells))
    views: dict[str, dict[str, int]] = {view: {} for view in VIEWS}
    for split, count in counts.items():
        rng = random.Random(f"{seed}/{split}")
        scenes = [draw_scene(world, nouns if split == "unseen" else known, drawn_by(split), rng) for _ in range(count)]
        captions, wrong = [[tell(scene, world, rng) for _ in range(CAPTIONS[split])] for scene in scenes], set[int]()
        if split == "train":
            captions, wrong = _with_wrong(scenes, captions, world.wrong, rng)
            everything = (2, world.things[1])
            curated = [[tell(scene, world, rng, everything) for _ in range(CURATED)] for scene in scenes]
            _write_rows(folder / "curated.parquet", _pairs(split, scenes, curated), SCHEMA)
        _write_rows(folder / f"{split}.parquet", _pairs(split, scenes, captions, wrong), SCHEMA)

        to_paint: list[tuple[str, Scene, Box | None]] = [(image_path(split, n), scene, None) for n, scene in enumerate(scenes)]
        for view, (make, schema) in VIEWS.items():
            rows = list(make(split, scenes, random.Random(f"{seed}/{split}/{view}")))
            views[view][split] = _write_rows(folder / f"{view}_{split}.parquet", rows, schema)
            for row in rows:
                if card := row.get("card"):
                    to_paint.append((row["image"], scenes[int(row["scene"].removeprefix(f"{split}-"))], tuple(card.values())))
        for parent in {(folder / image).parent for image, *_ in to_paint}:
            parent.mkdir(parents=True)
        for image, scene, card in Bar(to_paint, desc=f"scenes, {split}", unit="image", disable=not progress):
            paint(scene, drawings, card).save(folder / image)

    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    names = [noun.name for noun in known], [noun.name for noun in new]
    summary = ScenesSummary(_as_json(world), seed, LAYOUT, counts, *names, sources, views)
    write_card(folder, summary)
    write_sheet(folder, counts)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def drawn_by(split: str) -> list[str]:
    """The artists of a split."""
    return [artist.name for artist in ARTISTS if (artist.name == NEW_ARTIST) == (split == "test")]


def _with_wrong(
    scenes: list[Scene], captions: list[list[Caption]], share: float, rng: random.Random
) -> tuple[list[list[Caption]], set[int]]:
    """A ``share`` of the scenes, whose numbers come second, get the caption of another, which does not match."""
    result, wrong = list(captions), rng.sample(range(len(scenes)), round(share * len(scenes)))
    for number in wrong:
        others = (rng.choice(captions) for _ in range(1000))
        found = next((other for other in others if not set(other[0].facts) <= scenes[number].facts), None)
        if found is None:
            raise UserError(f"wrong is {share}, but the captions of other scenes are true here too; raise concepts or train.")
        result[number] = found
    return result, set(wrong)


def _pairs(split: str, scenes: Sequence[Scene], captions: Sequence[Sequence[Caption]], wrong: Container[int] = ()) -> Iterator[Row]:
    for number, (scene, told) in enumerate(zip(scenes, captions, strict=True)):
        yield {
            "image": image_path(split, number),
            "image_id": f"{split}-{number}",
            "caption": [caption.text for caption in told],
            "facts": sorted(scene.facts),
            "caption_facts": [list(caption.facts) for caption in told],
            "boxes": [{"thing": t.noun.name, "artist": t.artist, "plate": t.plate, **corners(t.box)} for t in scene.things],
            "wrong": number in wrong,
        }


def _write_rows(file: Path, rows: Iterable[Row], schema: pa.Schema) -> int:
    """Returns how many they are."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pyarrow.parquet.write_table(table, file)
    return table.num_rows


def vocabulary() -> list[str]:
    """Every word that a caption may have, as a BERT vocabulary, and letters that spell all others: the same for all worlds.

    A checkpoint's embeddings are numbered by it.
    """
    words = {word for noun in NOUNS for word in (noun.name, noun.plural)} | {*COLOURS, *NUMBERS.values(), *WORDS.split()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*pieces, *sorted(words)])]


def paint(scene: Scene, drawings: Drawings, card: Box | None = None) -> Image.Image:
    """The scene as an RGB picture; ``card``: with a card that covers what is there."""
    picture = Image.new("RGB", (scene.size, scene.size), COLOURS[scene.ground])
    draw = ImageDraw.Draw(picture)
    for box, colour in scene.clutter:
        draw.rectangle(_inclusive(box), fill=COLOURS[colour])
    for thing in scene.things:
        left, top, right, bottom = thing.box
        if thing.plate:
            edge = scene.edge
            draw.ellipse((left - edge, top - edge, right + edge - 1, bottom + edge - 1), fill=COLOURS[thing.plate], outline="black")
        drawing = drawings(thing.noun.name, thing.artist, right - left)
        picture.paste(drawing, (left, top), drawing)
    if card is not None:
        draw.rectangle(_inclusive(card), fill=COVER, outline="white")
    return picture


def _inclusive(box: Box) -> Box:
    """As ``ImageDraw`` takes it."""
    return box[0], box[1], box[2] - 1, box[3] - 1


# --- the data card and its picture sheet -----------------------------------------------------------------------------------

USE = {
    "train": "for training",
    "val": "new scenes of the same sorts and artists",
    "test": "new scenes of the same sorts, drawn by another artist",
    "unseen": "new scenes, also of sorts that are not in training",
}
TOLD = {
    "questions": "A question and its one right answer. Yes and no are as often right for each sort of thing.",
    "grounding": "A text that holds for one thing alone, its box, and the boxes of all things.",
    "entailment": "Does the picture entail the sentence? Entailment: the thing is to be seen. Neutral: it is not, but a dark card "
    "covers something, maybe that. Contradiction: it is not there, and nothing is covered. A third each, for each sentence, too.",
    "statements": "Is the sentence true of the two pictures, left and right? Half are, of each sentence and of each two pictures.",
}


def write_card(folder: Path, summary: ScenesSummary) -> None:
    """Write ``README.md``."""
    artists = {split: [artist for artist in ARTISTS if artist.name in drawn_by(split)] for split in CAPTIONS}
    splits = [
        f"| {split} | {count:,} | {CAPTIONS[split]} | {', '.join(a.title for a in artists[split])} | {USE[split]} |"
        for split, count in summary.images.items()
    ]
    views = [
        f"| `{view}` | {', '.join(f'`{name}`' for name in VIEWS[view][1].names)} | {' | '.join(f'{n:,}' for n in rows.values())} |"
        for view, rows in summary.views.items()
    ]
    licences = [
        f"| {a.title} | {', '.join(s for s in artists if a in artists[s])} | [{a.licence}]({a.licence_url}) | {a.attribution} |"
        for a in ARTISTS
    ]
    world = {key: " to ".join(map(str, value)) if isinstance(value, list) else value for key, value in summary.world.items()}
    card = CARD.read_text(encoding="utf-8").format(
        splits="\n".join(splits),
        world=", ".join(f"{key} {value}" for key, value in world.items()),
        seed=summary.seed,
        wrong=round(summary.world["wrong"] * summary.images["train"]),
        known=", ".join(summary.concepts),
        new=", ".join(summary.unseen),
        size=summary.world["size"],
        curated=CURATED,
        names=" | ".join(summary.images),
        ruler="---:|" * len(summary.images),
        views="\n".join(views),
        told="\n".join(f"- `{view}`: {text}" for view, text in TOLD.items()),
        licences="\n".join(licences),
        sources=", ".join(f"{name} {summary.sources[name]}" for name in dict.fromkeys(PACKAGES[a.package] for a in ARTISTS)),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_sheet(folder: Path, splits: Iterable[str], columns: int = 4) -> None:
    """Write ``sheet.png``: scenes of each split enlarged, with boxes, captions and facts, then rows of each further view."""

    def some(name: str, every: int = 1) -> list[Row]:
        return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()[::every][:columns]

    def tile(row: Row, title: str, rest: str = "", boxes: Sequence[Row] = ()) -> Image.Image:
        return _tile([folder / image for image in row.get("images", [row.get("image")])], boxes, title, rest)

    def told(row: Row) -> str:
        return "\n".join(f"{caption} (wrong)" if row["wrong"] else caption for caption in row["caption"])

    sections = {
        f"{split}: {USE[split]}": [tile(row, told(row), ", ".join(row["facts"]), row["boxes"]) for row in some(split)]
        for split in splits
    }
    sections |= {
        "questions": [tile(row, row["question"], ", ".join(row["answer"])) for row in some("questions_val", 3)],
        "grounding": [tile(row, row["text"], boxes=[row["box"]]) for row in some("grounding_val", 3)],
        "entailment": [tile(row, row["sentence"], row["label"]) for row in some("entailment_val")],
        "statements": [tile(row, row["sentence"], "true" if row["label"] else "false") for row in some("statements_val", 5)],
    }
    gap, head = 14, 36
    heights = {name: head + max(tile.height for tile in tiles) for name, tiles in sections.items() if tiles}
    sheet = Image.new("RGB", (gap + columns * (TILE + gap), sum(heights.values()) + gap), "white")
    y = 0
    for name, height in heights.items():
        ImageDraw.Draw(sheet).text((gap, y + 10), name, "black", ImageFont.load_default(size=17))
        for column, picture in enumerate(sections[name]):
            sheet.paste(picture, (gap + column * (TILE + gap), y + head))
        y += height
    sheet.save(folder / "sheet.png")


def _tile(images: Sequence[Path], boxes: Sequence[Row], title: str, rest: str) -> Image.Image:
    """A picture, or several side by side, the ``boxes`` of the first outlined, with a title and smaller text below."""
    side = (TILE - 8 * (len(images) - 1)) // len(images)
    texts = [(textwrap.wrap(line, 40), 14) for line in title.splitlines()] + [(textwrap.wrap(rest, 50), 11)]
    tile = Image.new("RGB", (TILE, side + 12 + sum(len(lines) * (size + 5) for lines, size in texts)), "white")
    draw, y = ImageDraw.Draw(tile), side + 5
    for number, file in enumerate(images):
        with Image.open(file) as image:
            scale = side / image.width
            tile.paste(image.resize((side, side), Image.Resampling.NEAREST), (number * (side + 8), 0))
    for box in boxes:
        draw.rectangle([round(box[edge] * scale) for edge in CORNERS.names], outline="black", width=2)
    for lines, size in texts:
        for line in lines:
            draw.text((0, y), line, "black" if size > 11 else "#555555", ImageFont.load_default(size=size))
            y += size + 5
    return tile
