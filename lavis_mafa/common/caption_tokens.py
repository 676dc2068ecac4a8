"""Caption tokens as the COCO caption metrics want them: Penn Treebank rules, lower case, without punctuation.

The official scripts call Stanford's tokeniser, a Java program. These rules give the same tokens on captions, without Java, in the
scripts whose marks and symbols it knows and in those that it cuts up.
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
ODD_WORDS = r"[od]'[^\W\d_]{2,}|[ln]'[^\W\d_]{2,}|ma'am|ne'er|e'er|c'mon|ol'|s'mores|'n'|'em|'cause|'n|'til|'till"
# Two words in one: where the first ends.
JOINED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "more'n": 4, "'tis": 2, "'twas": 2}

# Marks that belong to words, as vowel signs and accents do; Stanford's tokeniser drops those of other scripts, and words end there.
MARKS = (
    r"\u02c2-\u0375\u0384-\u0385\u03f6\u0483-\u0487\u055a-\u055f\u058a\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a"
    r"\u064b-\u065e\u0670\u06d6-\u06fe\u070f-\u07f3\u0900-\u0903\u093c-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u09e3\u0a01-\u0a4d"
    r"\u0a81-\u0acd\u0b82-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd\u1885-\u1886\u2010-\u2011"
)
# Symbols that are tokens; others are dropped.
SYMBOLS = (
    r"!-~\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b8\u00bf-\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3-\u0603\u0606-\u060c\u0614"
    r"\u061b\u061e-\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964-\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2017\u201a\u201e-\u2023"
    r"\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u208e\u20a4\u2100-\u214f\u2190-\u2bff\u3001-\u3002\u3012\u30fb\uff01-\uffe1\uffe5-\uffe6"
)
# Digits as symbols, such as m² and ①: tokens of their own.
SMALL_DIGITS = "²-³¹⁰⁴-⁹₀-₉⅕-⅞①-⒛⓪-⓿❶-➓"

SAME_AS = {ord(digit): f" {digit} " for digit in map(chr, range(0x10000)) if re.match(f"[{SMALL_DIGITS}]", digit)}
SAME_AS |= str.maketrans({"’": "'", "€": "$", "¤": "$", "₠": "$", "£": "#", "¢": " cents ", "\u00ad": ""})
SAME_AS |= str.maketrans({"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

WORDLIKE = rf"[\w{MARKS}]"
LETTER = rf"(?:[^\W\d_]|[{MARKS}])"
PLAIN = r"[^\W_]+(?:_[^\W_]+)*"  # without marks: these alone are joined by hyphens
LATIN = "[a-z0-9]+(?:-[a-z0-9]+)*"
SHORT = rf"(?:s|m|d|ll|re|ve)(?!{WORDLIKE})"
ENDING = rf"'{SHORT}"
TOKEN = re.compile(
    rf"""
      https?://[^\s,;"<>]*\w | www\.[^\s,;"<>]*\w                       # addresses
    | [\w.-]+@\w+(?:\.\w+)* | (?<!{WORDLIKE})@[a-z]\w* | (?<!{WORDLIKE})\#{LETTER}{WORDLIKE}*
    | </?\w+>
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                          # AT&T, but a & b
    | (?<!\w)(?:{"|".join(JOINED)})(?!{WORDLIKE})
    | (?<!\w)(?!\w+'{SHORT})(?:{ODD_WORDS})(?!\w)
    | (?<!{WORDLIKE})(?:[djl]'(?!{SHORT})|qu'(?!{SHORT}|t(?!\w))[a-z]+) | 'n'(?=\w) | (?<!\w)y'(?={LETTER})
    | (?<!{WORDLIKE})(?:[a-z]\.)+[a-z](?!{WORDLIKE})\.? | (?<!\w)ph\.d\.  # u.s., a.m.
    | (?<!{WORDLIKE})(?:{"|".join(ABBREVIATIONS)}|[a-z])\.(?!{WORDLIKE}) | (?<!\w)(?:{"|".join(BEFORE_A_NUMBER)})\.(?=\s*\d)
    | n't(?!{WORDLIKE}) | {ENDING}
    | (?:[a-z]+?)(?=n't(?!{WORDLIKE}))                                  # is n't
    | (?:{LETTER}+[.?!])+{LETTER}+(?:/\w+)*                             # a missing space: the end.next
    | (?<![\w.,])[+-]?\d+(?:[.,:]\d+)+(?:[-/]{PLAIN})* | \.\d+(?:\.\d+)* | (?<!\w)[+-]\d+(?!{WORDLIKE})
    | '\d\ds?(?![\w'"])                                                 # '90s, 5'10
    | {LATIN}(?:/{LATIN})+(?!{WORDLIKE}) | {PLAIN}(?:-{PLAIN})+         # and/or, 1/2, t-shirt
    | [^\W_]+(?:_[^\W_]+)+ | \d[^\W_]* | {LETTER}(?:[^\W_]|[{MARKS}])*
    | [?!]{{2,}} | \*{{1,2}} | _+ | [()\[\]{{}}] | (?![.,:;?!'"`\-–—…“”‘\w])[{SYMBOLS}]
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
