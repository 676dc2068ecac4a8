"""BLEU, CIDEr, ROUGE-L, METEOR and SPICE of generated captions, in the scale that papers print.

The scorers are pycocoevalcap's. The first three need neither Java nor a network; the other two are left out where they cannot run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_mafa.common.caption_tokens import caption_tokens
from lavis_mafa.common.errors import UserError, did_you_mean

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
        references: image -> its human captions.
        captions: image -> its generated caption.
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
    names = runnable(names)
    kept = _matched(references, captions)
    return _scores(_tokens(kept), _tokens({image: [text] for image, text in captions.items()}), names)


def metrics_by_domain(
    references: Mapping[Id, list[str]], captions: Mapping[Id, str], domains: Mapping[Id, str], names: Sequence[str] = NAMES
) -> dict[str, float]:
    """``caption_metrics`` of all images, and of each domain's alone with a prefix such as ``in_domain_`` (NoCaps).

    Args:
        domains: image -> ``in-domain``, ``near-domain`` or ``out-domain``; an image without one counts in the total only.
    """
    names = runnable(names)
    kept, made = _tokens(_matched(references, captions)), _tokens({image: [text] for image, text in captions.items()})
    results = _scores(kept, made, names)
    for domain in sorted({domains[image] for image in made if image in domains}):
        of_domain = [image for image in made if domains.get(image) == domain]
        scores = _scores({i: kept[i] for i in of_domain}, {i: made[i] for i in of_domain}, names)
        results |= {f"{domain.replace('-', '_')}_{name}": score for name, score in scores.items()}
    return results


def runnable(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that can run here; the others are logged, a line each.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"run.caption_metrics holds '{name}'; allowed: {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    return [name for name in names if not _is_missing(name)]


def _is_missing(name: str) -> bool:
    if name not in BY_JAVA:
        return False
    if shutil.which("java") is None:
        logger.warning("%s is skipped: it needs Java; install a Java runtime (such as default-jre-headless).", name)
        return True
    if name == "spice":
        from pycocoevalcap.spice import spice

        # Its constructor would download them into site-packages.
        if not all((Path(spice.__file__).parent / "lib" / jar).is_file() for jar in SPICE_JARS):
            logger.warning("spice is skipped: it needs Stanford CoreNLP 3.6; download it once with: %s", SPICE_DOWNLOAD)
            return True
    return False


def _matched(references: Mapping[Id, list[str]], captions: Mapping[Id, str]) -> Texts:
    if not captions:
        raise UserError("There are no captions to score.")
    lost = [image for image in captions if not references.get(image)]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(captions)} captions have no reference, the first of image {lost[0]!r}; is it the right file?"
        )
    if len(references) > len(captions):
        logger.info("%d of %d images have a caption; the metrics are of these.", len(captions), len(references))
    return {image: references[image] for image in captions}


def _tokens(texts: Texts) -> Texts:
    return {image: [" ".join(caption_tokens(text)) for text in of_image] for image, of_image in texts.items()}


def _scores(references: Texts, captions: Texts, names: Sequence[str]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name in names:
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
