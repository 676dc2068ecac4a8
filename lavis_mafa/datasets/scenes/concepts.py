"""The things that scenes are made of: emoji that show what one plain English noun says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

Drawings = Callable[[str, str, int], Image.Image]  # noun, artist, side -> square RGBA

# code: noun, with its plural where that is not noun + s
_NOUNS = """
1F436 dog                      1F431 cat                      1F42D mouse/mice               1F430 rabbit
1F98A fox/foxes                1F43B bear                     1F43C panda                    1F428 koala
1F42F tiger                    1F981 lion                     1F42E cow                      1F437 pig
1F438 frog                     1F435 monkey                   1F427 penguin                  1F989 owl
1F434 horse                    1F984 unicorn                  1F41D bee                      1F41B caterpillar
1F98B butterfly/butterflies    1F40C snail                    1F41E beetle                   1F422 turtle
1F40D snake                    1F419 octopus/octopuses        1F980 crab                     1F433 whale
1F42C dolphin                  1F418 elephant                 1F42A camel                    1F992 giraffe
1F34E apple                    1F34C banana                   1F34A orange                   1F34B lemon
1F349 melon                    1F353 strawberry/strawberries  1F34D pineapple                1F951 avocado
1F346 aubergine                1F955 carrot                   1F33D cob                      1F35E loaf/loaves
1F355 pizza                    1F354 burger                   1F32E taco                     1F369 doughnut
1F36A cookie                   1F382 cake                     2615 coffee                    1F37A beer
1F697 car                      1F695 taxi                     1F68C bus/buses                1F69C tractor
1F6B2 bicycle                  1F682 locomotive               1F681 helicopter               1F680 rocket
26F5 sailboat                  1F6A2 ship                     26BD football                  1F3C0 basketball
1F3B8 guitar                   1F3BA trumpet                  1F3BB violin                   1F941 drum
1F4F7 camera                   1F4FA television               1F4BB laptop                   1F511 key
1F528 hammer                   1F4D6 book                     270F pencil                    231A watch/watches
23F0 clock                     1F4A1 bulb                     1F56F candle                   2602 umbrella
1F451 crown                    1F45F shoe                     1F452 hat                      1F381 present
1F388 balloon                  1F3E0 house                    26FA tent                      1F335 cactus/cactuses
1F333 tree                     1F33B sunflower                1F339 rose                     1F344 mushroom
2B50 star                      1F319 moon                     2601 cloud                     1F308 rainbow
26C4 snowman/snowmen           1F525 flame                    1F480 skull                    1F47B ghost
1F916 robot                    1F3C6 trophy/trophies          1F9C0 cheese                   1F996 dinosaur
"""


@dataclass(frozen=True)
class Noun:
    """One thing: the code of its drawings (see ``emoji.drawings.code_of``), and what it is called."""

    code: str
    name: str
    plural: str

    @property
    def one(self) -> str:
        """``a dog``, ``an apple``."""
        return with_article(self.name)


def with_article(words: str) -> str:
    """``a unicorn``, ``an umbrella``, ``an orange ground``."""
    return f"{'an' if words[0] in 'aeio' or words.startswith('umbrella') else 'a'} {words}"


def _read() -> tuple[Noun, ...]:
    words = _NOUNS.split()
    nouns = []
    for code, noun in zip(words[::2], words[1::2], strict=True):
        name, _, plural = noun.partition("/")
        nouns.append(Noun(code, name, plural or f"{name}s"))
    return tuple(nouns)


NOUNS = _read()


def cut_drawings(nouns: Sequence[Noun], side: int) -> Drawings:
    """Of each noun what every artist drew, without the margin, which is each artist's own. ``side``: pixels, before it is sized."""
    from lavis_mafa.datasets.emoji.drawings import cutout, find_drawings  # not above: `build-scenes --help` waits for no library

    files = find_drawings()
    cut = {(noun.name, artist): _without_margin(cutout(file, side)) for noun in nouns for artist, file in files[noun.code].items()}

    @lru_cache(maxsize=1200)  # as many as the quickstart's scenes have: a third of what they take
    def sized(noun: str, artist: str, side: int) -> Image.Image:
        return cut[noun, artist].resize((side, side), Image.Resampling.LANCZOS)

    return sized


def _without_margin(drawing: Image.Image) -> Image.Image:
    """The smallest square around what is drawn."""
    left, top, right, bottom = drawing.getchannel("A").getbbox() or (0, 0, *drawing.size)
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square
