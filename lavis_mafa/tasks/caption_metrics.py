"""BLEU, CIDEr, ROUGE-L, METEOR and SPICE of generated captions, in the scale that papers print.

The scorers are pycocoevalcap's. The first three need neither Java nor a network; the other two are left out where they cannot run.
Tokens follow Penn Treebank rules, lower case, without punctuation: the official scripts call Stanford's tokeniser, a Java program;
these rules give the same tokens on captions, in the scripts whose marks and symbols it knows and in those that it cuts up.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.progress import Bar

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


logger = logging.getLogger(__name__)

Id = int | str
Texts = dict[Id, list[str]]
NAMES = ("bleu", "cider", "rouge_l", "meteor", "spice")
BY_JAVA = ("meteor", "spice")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_DOWNLOAD = 'python -c "from pycocoevalcap.spice.get_stanford_models import *; get_stanford_models()"'


def caption_metrics(references: Mapping[Id, list[str]], captions: Mapping[Id, str], names: Sequence[str] = NAMES) -> dict[str, float]:
    """Corpus metrics of one caption an image, times 100.

    Only the captioned images count: references of others are left out, and one log line tells how many.

    Args:
        references: image -> its human captions. captions: image -> its generated one.
        names: of ``bleu``, ``cider``, ``rouge_l``, ``meteor`` (needs Java) and ``spice`` (needs Java and Stanford CoreNLP). One
            that cannot run here is skipped; one log line tells how to get it.

    Returns:
        ``bleu_1`` to ``bleu_4``, ``cider``, ``rouge_l``, ``meteor``, ``spice``, as far as asked for.

    Raises:
        UserError: an unknown name, no captions, or a caption without references.

    Example:
        >>> caption_metrics({1: ["a dog runs"]}, {1: "A dog runs."}, ["rouge_l"])
        {'rouge_l': 100.0}
    """
    return metrics_by_domain(references, captions, {}, names)


def metrics_by_domain(
    references: Mapping[Id, list[str]], captions: Mapping[Id, str], domains: Mapping[Id, str], names: Sequence[str] = NAMES
) -> dict[str, float]:
    """``caption_metrics`` of all images, and of each domain's alone with a prefix such as ``in_domain_`` (NoCaps).

    Args:
        domains: image -> ``in-domain``, ``near-domain`` or ``out-domain``; an image without one counts in the total only.
    """
    names = runnable(names)
    if not captions:
        raise UserError("There are no captions to score.")
    if lost := [image for image in captions if not references.get(image)]:
        raise UserError(
            f"{len(lost)} of {len(captions)} captions have no reference, the first of image {lost[0]!r}; is it the right file?"
        )
    if len(references) > len(captions):
        logger.info("%d of %d images have a caption; the metrics are of these.", len(captions), len(references))
    kept, made = _tokens({image: references[image] for image in captions}), _tokens({i: [text] for i, text in captions.items()})
    results = _scores(kept, made, names)
    for domain in sorted({domains[image] for image in made if image in domains}):
        of_domain = [image for image in made if domains.get(image) == domain]
        scores = _scores({i: kept[i] for i in of_domain}, {i: made[i] for i in of_domain}, names)
        results |= {f"{domain.replace('-', '_')}_{name}": score for name, score in scores.items()}
    return results


def runnable(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that can run here; the others are logged, a line each. UserError for an unknown name."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"run.caption_metrics holds '{name}'; allowed: {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    return [name for name in names if name not in BY_JAVA or _has_java(name)]


def _has_java(name: str) -> bool:
    if shutil.which("java") is None:
        logger.warning("%s is skipped: it needs Java; install a Java runtime (such as default-jre-headless).", name)
        return False
    if name == "spice":
        from pycocoevalcap.spice import spice

        # Its constructor would download them into site-packages.
        if not all((Path(spice.__file__).parent / "lib" / jar).is_file() for jar in SPICE_JARS):
            logger.warning("spice is skipped: it needs Stanford CoreNLP 3.6; download it once with: %s", SPICE_DOWNLOAD)
            return False
    return True


def _tokens(texts: Texts) -> Texts:
    return {image: [" ".join(caption_tokens(text)) for text in of_image] for image, of_image in texts.items()}


def _scores(references: Texts, captions: Texts, names: Sequence[str]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name in Bar(names, desc="caption metrics", unit="metric", delay=1):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the scorers print their counts
                score: Any = _spice(references, captions) if name == "spice" else _scorer(name).compute_score(references, captions)[0]
        except (subprocess.CalledProcessError, BrokenPipeError, ValueError) as error:
            if name not in BY_JAVA:
                raise
            # A program that died leaves a broken pipe, or nothing where a number should be.
            logger.warning("%s is skipped: its Java program failed (%s).", name, error)
            continue
        values = {f"bleu_{n}": value for n, value in enumerate(score, 1)} if name == "bleu" else {name: score}
        scores |= {key: 100 * float(value) for key, value in values.items()}
    return scores


def _scorer(name: str) -> Any:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    return {"bleu": Bleu, "cider": Cider, "rouge_l": Rouge, "meteor": Meteor}[name]()


def _spice(references: Texts, captions: Texts) -> float:
    from pycocoevalcap.spice import spice

    with tempfile.TemporaryDirectory() as folder:
        # Else both are folders in site-packages.
        spice.TEMP_DIR, spice.CACHE_DIR = f"{folder}/tmp", f"{folder}/cache"
        return spice.Spice().compute_score(references, captions)[0]


def read_references(path: str | Path, key: str) -> tuple[dict[Id, list[str]], dict[Id, str]]:
    """References of captioning, such as COCO's ``captions_val2014.json`` or NoCaps' ``nocaps_val_4500_captions.json``.

    Returns:
        Image id -> its captions, and image id -> its domain where the file has domains (NoCaps).

    Raises:
        UserError: naming the setting ``key``: there is no such file, or it is not of that format.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: there is no file {path}; allowed: COCO's captions JSON, or null.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} is not JSON: {error}") from error
    form = "allowed: COCO's captions JSON with 'images' and 'annotations'."
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}; {form}")
    for name, needed in (("images", ("id",)), ("annotations", ("image_id", "caption"))):
        if not isinstance(content.get(name), list):
            raise UserError(f"{key}: {path} has no list '{name}', but {', '.join(content) or 'nothing'}; {form}")
        for number, entry in enumerate(content[name]):
            for field in needed:
                if not isinstance(entry, dict) or not isinstance(entry.get(field), str if field == "caption" else int | str):
                    raise UserError(f"{key}: {path}, {name}[{number}] has no '{field}'; {form}")
    references: dict[Id, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    domains = {image["id"]: image["domain"] for image in content["images"] if image.get("domain")}
    return references, domains
