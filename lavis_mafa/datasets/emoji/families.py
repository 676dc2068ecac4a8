"""Families of concepts that differ in gender alone, so that no split puts one of them in training and the other in its test."""

from __future__ import annotations

import re

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
GENDERED_WORDS = re.compile(
    r"\b(man|men|woman|women|male|female|boy|girl|lady|guy|bride|groom|mother|father|mrs|mr|prince|princess|king|queen)('s|s)?\b"
)


def family_of(code: str) -> str:
    """The gender-neutral code of the family.

    Example:
        >>> family_of("1F469-200D-1F52C"), family_of("1F3C3-200D-2640")
        ('1F9D1-200D-1F52C', '1F3C3')
    """
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


def mentions_gender(text: str) -> bool:
    """Whether a text speaks of men or women; ``bride with veil`` is given for a neutral drawing but does not hold for a man."""
    return GENDERED_WORDS.search(text) is not None
