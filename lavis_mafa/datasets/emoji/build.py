"""Writing the emoji data: images, captions, the truth, a data card."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from lavis_mafa.common.errors import UserError
from lavis_mafa.datasets.emoji.card import write_card, write_sheet
from lavis_mafa.datasets.emoji.drawings import ARTISTS, find_drawings, render, same_pictures
from lavis_mafa.datasets.emoji.packages import package_versions
from lavis_mafa.datasets.emoji.splits import SPLITS, draw_captions, split_drawings
from lavis_mafa.datasets.emoji.texts import Concept, read_concepts, true_pairs

LAYOUT = 1  # counts up when the same packages, size and seed would give other files
DRAWN_CAPTIONS = 8


@dataclass(frozen=True)
class EmojiSummary:
    """What a build holds. ``images``: split -> artist -> number of images; ``sources``: package -> version."""

    size: int
    seed: int
    layout: int
    concepts: int
    texts: dict[str, int]
    true_pairs: int
    images: dict[str, dict[str, int]]
    sources: dict[str, str]


def build_emoji(folder: str | Path, size: int = 72, seed: int = 0, progress: bool = True) -> EmojiSummary:
    """Build the emoji data in ``folder``, once; a complete build with the same settings is left as it is.

    Args:
        folder: absent, empty, or an earlier build.
        size: width and height of the images in pixels.
        seed: of the splits and of the captions that are drawn.
        progress: show a progress bar.

    Raises:
        UserError: a package is missing, ``size`` is too small, or the folder holds something else. Nothing is ever overwritten.

    Example:
        >>> build_emoji("data/emoji").concepts
        1805
    """
    folder = Path(folder)
    if size < 16:
        raise UserError(f"size is {size}; allowed: 16 or more pixels.")
    ready = _earlier_build(folder, size, seed)
    if ready is not None:
        return ready
    sources = package_versions()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last step is a rename: the folder is either absent or complete.
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        summary = _write(partial, size, seed, progress, sources)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _earlier_build(folder: Path, size: int, seed: int) -> EmojiSummary | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder} holds something else; the emoji data need a new or an empty folder.")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    wanted = {"size": size, "seed": seed, "layout": LAYOUT}
    other = [f"{key} {settings.get(key)} instead of {value}" for key, value in wanted.items() if settings.get(key) != value]
    if other:
        raise UserError(f"{folder} holds emoji data with {', '.join(other)}; choose another folder, or delete this one first.")
    return EmojiSummary(**settings)


def _write(folder: Path, size: int, seed: int, progress: bool, sources: dict[str, str]) -> EmojiSummary:
    rng = random.Random(seed)
    drawings = find_drawings()
    twins = same_pictures(drawings)
    concepts = read_concepts(drawings)
    split = split_drawings(concepts, drawings, twins, rng)
    # Shuffled once, here: "the first n concepts" are then a fair sample.
    rng.shuffle(concepts)

    for artist in ARTISTS:
        (folder / "images" / artist.name).mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, "train_captions")}
    images: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    for concept in tqdm(concepts, desc="emoji", unit="concept", disable=not progress):
        for artist_name, file in drawings[concept.code].items():
            image = f"images/{artist_name}/{concept.code}.png"
            render(file, size).save(folder / image)
            part = split[concept.code, artist_name]
            images[part][artist_name] += 1
            row = {"image": image, "image_id": f"{artist_name}-{concept.code}", "concept": concept.name}
            if part == "train":
                drawn = draw_captions(concept, 1 + DRAWN_CAPTIONS, rng)
                rows["train"].append({**row, "caption": drawn[0]})
                rows["train_captions"].append({**row, "caption": drawn[1:]})
            else:
                rows[part].append({**row, "caption": [*concept.texts["name"], *concept.texts["alias"]]})

    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = true_pairs(concepts, twins)
    columns = dict(zip(("text", "kind", "concept"), map(list, zip(*pairs, strict=True)), strict=True))
    pyarrow.parquet.write_table(pa.table(columns), folder / "truth.parquet")

    kinds = Counter(dict(pair[:2] for pair in pairs).values())
    by_split = {name: {artist.name: images[name][artist.name] for artist in ARTISTS} for name in SPLITS}
    summary = EmojiSummary(size, seed, LAYOUT, len(concepts), dict(kinds), len(pairs), by_split, sources)
    write_card(folder, summary)
    write_sheet(folder, _for_sheet(concepts, split))
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _for_sheet(concepts: list[Concept], split: dict[tuple[str, str], str]) -> list[Concept]:
    # Those with a text of each kind, drawn by everyone, show most.
    drawn_by = Counter(code for code, _ in split)
    return [concept for concept in concepts if all(concept.texts.values()) and drawn_by[concept.code] == len(ARTISTS)][:12]
