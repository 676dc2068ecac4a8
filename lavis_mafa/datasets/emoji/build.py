"""Writing the emoji data: splits, images, captions, the truth, a data card."""

from __future__ import annotations

import json
import random
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont

from lavis_mafa.datasets.emoji.drawings import ARTISTS, find_drawings, package_versions, render, same_pictures
from lavis_mafa.datasets.emoji.texts import KINDS, Concept, read_concepts, true_pairs
from lavis_mafa.errors import UserError
from lavis_mafa.files import built_folder
from lavis_mafa.progress import Bar

SPLITS = ("train", "seen", "unseen")
UNSEEN_FAMILIES = 0.1
DRAWN_CAPTIONS = 8
LAYOUT = 1  # counts up when the same packages, size and seed would give other files
CARD = Path(__file__).with_name("card.md")
SEEN_CONCEPTS = 0.3  # enough queries for a short run on a few hundred concepts to tell models apart
# Captions as web data would have them: mostly what a thing is called, seldom what sort of thing it is.
CAPTION_WEIGHTS = {"name": 0.50, "alias": 0.20, "keyword": 0.25, "group": 0.05}


def split_drawings(
    concepts: list[Concept], drawings: dict[str, dict[str, Path]], same_pictures: list[set[str]], rng: random.Random
) -> dict[tuple[str, str], str]:
    """(code, artist) -> split.

    - ``unseen``: all drawings of a tenth of the families: concepts that differ in gender alone or are the same picture stay together
    - ``seen``: one drawing of three tenths of the other concepts, whose remaining drawings are in ``train``
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


def write_card(folder: Path, summary: EmojiSummary) -> None:
    """Write ``README.md``."""
    files = {"train": "`train.jsonl`, `train_captions.jsonl`", "seen": "`seen.jsonl`", "unseen": "`unseen.jsonl`"}
    splits = [
        f"| {name} | {files[name]} | {' | '.join(f'{count:,}' for count in by_artist.values())} | {sum(by_artist.values()):,} |"
        for name, by_artist in summary.images.items()
    ]
    licences = [f"| `images/{a.name}` | {a.title} | [{a.licence}]({a.licence_url}) | {a.attribution} |" for a in ARTISTS]
    card = CARD.read_text(encoding="utf-8").format(
        artists=" | ".join(artist.title for artist in ARTISTS),
        ruler="---:|" * len(ARTISTS),
        splits="\n".join(splits),
        concepts=summary.concepts,
        texts=sum(summary.texts.values()),
        kinds=", ".join(f"{summary.texts[kind]:,} {kind}" for kind in KINDS),
        true_pairs=summary.true_pairs,
        drawn=DRAWN_CAPTIONS,
        size=summary.size,
        seed=summary.seed,
        licences="\n".join(licences),
        sources=", ".join(f"{package} {version}" for package, version in summary.sources.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_sheet(folder: Path, concepts: list[Concept], tile: int = 72, text_width: int = 330) -> None:
    """Write ``sheet.png``: a row per concept, the artists' drawings and some of its texts; two rows side by side."""
    gap, head = 10, 26
    width = len(ARTISTS) * (tile + gap) + text_width + gap
    lines = -(-len(concepts) // 2)
    sheet = Image.new("RGB", (2 * width + gap, head + lines * (tile + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    for number, concept in enumerate(concepts):
        x, y = gap + number // lines * width, head + number % lines * (tile + gap)
        for artist in ARTISTS:
            if number % lines == 0:
                draw.text((x, 6), artist.name, "#666666", small)
            with Image.open(folder / "images" / artist.name / f"{concept.code}.png") as image:
                sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
            x += tile + gap
        draw.text((x, y), concept.name, "black", bold)
        rest = "; ".join(text for kind in KINDS[1:] for text in concept.texts[kind][:3])
        draw.multiline_text((x, y + 20), "\n".join(textwrap.wrap(rest, 60)[:4]), "#444444", small, spacing=2)
    sheet.save(folder / "sheet.png")


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
    with built_folder(folder) as partial:
        return _write(partial, size, seed, progress, sources)


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
    for concept in Bar(concepts, desc="emoji", unit="concept", disable=not progress):
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
    # those with a text of each kind, drawn by everyone, show most
    drawn_by = Counter(code for code, _ in split)
    best = [concept for concept in concepts if all(concept.texts.values()) and drawn_by[concept.code] == len(ARTISTS)]
    write_sheet(folder, best[:12])
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary
