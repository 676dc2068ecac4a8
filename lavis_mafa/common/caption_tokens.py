"""Caption tokens as the COCO caption metrics want them: Penn Treebank rules, lower case, without punctuation.

The official scripts call Stanford's tokeniser, a Java program. These rules give the same tokens on captions, without Java.
"""

from __future__ import annotations

import re

# A full stop belongs to these words and to single letters.
ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc attys aug ave bancorp bldg blvd brig bros calif capt cf cie co col colo conn corp cos
cpl ct dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun
kan kans ky lieut lt ltd maj mar md messrs mich minn mme mo mon mont mr mrs ms mt natl neb nev nov oct okla penn pfc ph plc pres
prof profs pte pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues
univ va vs vt wed wis wisc wm wyo
""".split()
BEFORE_A_NUMBER = "art ca fig figs no nos op pp prop".split()
ODD_WORDS = r"[od]'[^\W\d_]{2,}|l'[^\W\d_]{2,}|ma'am|ne'er|e'er|c'mon|ol'|s'mores|'n'|'em|'cause|'n|'til|'till"
# Two words in one: where the first ends.
JOINED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "more'n": 4, "'tis": 2, "'twas": 2}

SAME_AS = str.maketrans({"’": "'", "€": "$", "£": "#", "¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

LETTER = r"[^\W\d_]"
WORD = r"[^\W_]+(?:_[^\W_]+)*"
ENDING = r"'(?:s|m|d|ll|re|ve)(?!\w)"
TOKEN = re.compile(
    rf"""
      https?://[^\s,;"<>]*\w | www\.[^\s,;"<>]*\w                       # addresses
    | [\w.-]+@\w+(?:\.\w+)* | (?<!\w)[@\#]{LETTER}\w*
    | </?\w+>
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                          # AT&T, but a & b
    | (?<!\w)(?:{"|".join(JOINED)})(?!\w)
    | (?<!\w)(?:{ODD_WORDS})(?!\w) | 'n'(?=\w) | (?<!\w)y'(?={LETTER})
    | (?<!\w)(?:{LETTER}\.)+{LETTER}(?!\w)\.? | (?<!\w)ph\.d\.          # u.s., a.m.
    | (?<!\w)(?:{"|".join(ABBREVIATIONS)}|{LETTER})\.(?!\w) | (?<!\w)(?:{"|".join(BEFORE_A_NUMBER)})\.(?=\s*\d)
    | n't(?!\w) | {ENDING}
    | (?:{LETTER}+?)(?=n't(?!\w))                                       # is n't
    | (?:{LETTER}+[.?!])+{LETTER}+(?:/\w+)*                             # a missing space: the end.next
    | (?<![\w.,])[+-]?\d+(?:[.,:]\d+)+(?:[-/]{WORD})* | \.\d+(?:\.\d+)* | (?<!\w)[+-]\d+(?!\w)
    | '\d\ds?(?![\w'"])                                                 # '90s, 5'10
    | {WORD}(?:[-/]{WORD})*                                             # t-shirt, and/or, 1/2
    | [?!]{{2,}} | \*{{1,2}} | _+ | [()\[\]{{}}] | (?![.,:;?!'"`\-–—…“”‘])[^\w\s]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def caption_tokens(caption: str) -> list[str]:
    """The caption's tokens: lower case, contractions taken apart, punctuation left out.

    Example:
        >>> caption_tokens("Two men aren't near St. Mark's well-known dog, (or cat).")
        ['two', 'men', 'are', "n't", 'near', 'st.', 'mark', "'s", 'well-known', 'dog', '-lrb-', 'or', 'cat', '-rrb-']
    """
    tokens: list[str] = []
    for match in TOKEN.finditer(caption.translate(SAME_AS)):
        token = match[0].lower()
        if token in JOINED:
            tokens += [token[: JOINED[token]], token[JOINED[token] :]]
        elif token <= "\uffff":  # an emoji is no token
            tokens.append(BRACKETS.get(token, token))
    return tokens
