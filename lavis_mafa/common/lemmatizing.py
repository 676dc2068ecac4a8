"""Answers in base form, as BLIP-2 does for OK-VQA."""

from __future__ import annotations

from collections.abc import Callable

from lavis_mafa.common.errors import UserError

MODEL = "en_core_web_sm"


def load_lemmatizer(key: str) -> Callable[[str], str]:
    """A function that puts an answer's nouns and verbs into their base form: ``dogs playing`` -> ``dog play``.

    Args:
        key: the setting that asks for it, for the message.

    Raises:
        UserError: spaCy's English model is not installed.
    """
    import spacy

    if not spacy.util.is_package(MODEL):
        raise UserError(f"{key} is true, but spaCy's {MODEL} is not installed; install it with: python -m spacy download {MODEL}")
    model = spacy.load(MODEL)

    def lemmatized(answer: str) -> str:
        return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in model(answer))

    return lemmatized
