"""Writing scenes: pictures, captions, the truth, boxes, a data card."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw
from tqdm import tqdm

from lavis_mafa.datasets.emoji.drawings import ARTISTS, cutout, find_drawings, package_versions
from lavis_mafa.datasets.scenes.concepts import NOUNS, Noun
from lavis_mafa.datasets.scenes.world import COLOURS, NUMBERS, Caption, Scene, World, draw_scene, tell
from lavis_mafa.errors import UserError

LAYOUT = 1  # counts up when the same packages, world and seed would give other files
NEW_ARTIST = "twemoji"  # whose drawings are in the split ``test`` alone
CAPTIONS = {"train": 1, "val": 3, "test": 3, "unseen": 3}  # of an image, as web data
CURATED = 4  # captions of an image that tell of more than web data, in ``curated.parquet``
BOX = pa.struct({"thing": pa.string(), **dict.fromkeys(("left", "top", "right", "bottom"), pa.int32())})
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "image_id": pa.string(),
        "caption": pa.list_(pa.string()),
        "facts": pa.list_(pa.string()),
        "caption_facts": pa.list_(pa.list_(pa.string())),
        "boxes": pa.list_(BOX),
    }
)
WORDS = "a an and in front of on left right above below two three four what is how many the colour ground there yes no . , ?"


@dataclass(frozen=True)
class ScenesSummary:
    """What a build holds; ``images``: split -> number; ``sources``: package -> version."""

    world: dict[str, Any]
    seed: int
    layout: int
    images: dict[str, int]
    concepts: list[str]
    unseen: list[str]
    sources: dict[str, str]


def build_scenes(
    folder: str | Path, world: World | None = None, train: int = 8192, test: int = 1000, seed: int = 0, progress: bool = True
) -> ScenesSummary:
    """Build scenes in ``folder``, once; a complete build with the same settings is left as it is.

    Args:
        folder: absent, empty, or an earlier build.
        world: what scenes and captions are like; None: as the quickstart has them.
        train: images to train on. test: images of each other split.
        seed: of everything that is drawn.
        progress: show a progress bar.

    Raises:
        UserError: a package is missing, the world is impossible, or the folder holds something else. Nothing is ever overwritten.
    """
    folder, world = Path(folder), world or World()
    counts = {"train": train, "val": test, "test": test, "unseen": test}
    settings = {"world": json.loads(json.dumps(asdict(world))), "seed": seed, "layout": LAYOUT, "images": counts}
    if (ready := _earlier_build(folder, settings)) is not None:
        return ready
    sources = package_versions()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last step is a rename: the folder is either absent or complete.
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        summary = _write(partial, world, counts, seed, progress, sources)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _earlier_build(folder: Path, settings: dict[str, Any]) -> ScenesSummary | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder} holds something else; scenes need a new or an empty folder.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [f"{key} {found.get(key)} instead of {value}" for key, value in settings.items() if found.get(key) != value]
    if other:
        raise UserError(f"{folder} holds scenes with {', '.join(other)}; choose another folder, or delete this one first.")
    return ScenesSummary(**found)


def _write(folder: Path, world: World, counts: dict[str, int], seed: int, progress: bool, sources: dict[str, str]) -> ScenesSummary:
    nouns = random.Random(seed).sample(NOUNS, world.concepts + world.unseen)
    known, unseen = nouns[: world.concepts], nouns[world.concepts :]
    painter = Painter(nouns)
    for split, count in counts.items():
        rng = random.Random(f"{seed}/{split}")
        artists = [artist.name for artist in ARTISTS if (artist.name == NEW_ARTIST) == (split == "test")]
        (folder / "images" / split).mkdir(parents=True)
        scenes = []
        for number in tqdm(range(count), desc=f"scenes, {split}", unit="image", disable=not progress):
            scene = draw_scene(world, nouns if split == "unseen" else known, artists, rng)
            painter.paint(scene).save(folder / _image(split, number))
            scenes.append(scene)
        captions = [[tell(scene, world, rng) for _ in range(CAPTIONS[split])] for scene in scenes]
        if split == "train":
            captions = _with_wrong(scenes, captions, world.wrong, rng)
            everything = (2, world.things[1])
            curated = [[tell(scene, world, rng, everything) for _ in range(CURATED)] for scene in scenes]
            _write_rows(folder / "curated.parquet", split, scenes, curated)
        _write_rows(folder / f"{split}.parquet", split, scenes, captions)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    names = [[noun.name for noun in part] for part in (known, unseen)]
    summary = ScenesSummary(json.loads(json.dumps(asdict(world))), seed, LAYOUT, counts, *names, sources)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _image(split: str, number: int) -> str:
    return f"images/{split}/{number:05d}.png"


def _with_wrong(scenes: list[Scene], captions: list[list[Caption]], share: float, rng: random.Random) -> list[list[Caption]]:
    """A ``share`` of the scenes get the caption of another, which does not match."""
    result = list(captions)
    for number in rng.sample(range(len(scenes)), round(share * len(scenes))):
        others = (rng.choice(captions) for _ in range(1000))
        result[number] = next(other for other in others if not set(other[0].facts) <= scenes[number].facts)
    return result


def _write_rows(file: Path, split: str, scenes: Sequence[Scene], captions: Sequence[Sequence[Caption]]) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for number, (scene, told) in enumerate(zip(scenes, captions, strict=True)):
            yield {
                "image": _image(split, number),
                "image_id": f"{split}-{number}",
                "caption": [caption.text for caption in told],
                "facts": sorted(scene.facts),
                "caption_facts": [list(caption.facts) for caption in told],
                "boxes": [dict(zip(BOX.names, (thing.noun.name, *thing.box), strict=True)) for thing in scene.things],
            }

    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows()), schema=SCHEMA), file)


def vocabulary() -> list[str]:
    """Every word that a scene's texts may have, as a BERT vocabulary: the same for all worlds."""
    words = {word for noun in NOUNS for word in (noun.name, noun.plural)} | {*COLOURS, *NUMBERS.values(), *WORDS.split()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*pieces, *sorted(words)])]


class Painter:
    """Draws scenes of ``nouns`` from the artists' drawings, each of which is opened once."""

    def __init__(self, nouns: Sequence[Noun], side: int = 72) -> None:
        drawings = find_drawings()
        self._drawings = {
            (noun.name, artist): _without_margin(cutout(file, side)) for noun in nouns for artist, file in drawings[noun.code].items()
        }

    def paint(self, scene: Scene) -> Image.Image:
        """The scene as an RGB picture."""
        picture = Image.new("RGB", (scene.size, scene.size), COLOURS[scene.ground])
        draw = ImageDraw.Draw(picture)
        for box, colour in scene.clutter:
            draw.rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=COLOURS[colour])
        for thing in scene.things:
            left, top, right, bottom = thing.box
            if thing.plate:
                draw.ellipse((left - 2, top - 2, right + 1, bottom + 1), fill=COLOURS[thing.plate], outline="black")
            drawing = self._drawings[thing.noun.name, thing.artist].resize((right - left, bottom - top), Image.Resampling.LANCZOS)
            picture.paste(drawing, (left, top), drawing)
        return picture


def _without_margin(drawing: Image.Image) -> Image.Image:
    """The smallest square around what is drawn: artists leave different margins."""
    left, top, right, bottom = drawing.getchannel("A").getbbox()
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square
