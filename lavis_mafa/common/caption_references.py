"""Human captions from a file of COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavis_mafa.common.caption_metrics import Id
from lavis_mafa.common.errors import UserError


def read_references(path: str | Path, key: str) -> tuple[dict[Id, list[str]], dict[Id, str]]:
    """References of captioning, such as COCO's ``captions_val2014.json`` or NoCaps' ``nocaps_val_4500_captions.json``.

    Args:
        path: JSON with ``images`` (``id``, optionally ``domain``) and ``annotations`` (``image_id``, ``caption``).
        key: the setting that names the file, for messages.

    Returns:
        Image id -> its captions, and image id -> its domain where the file has domains (NoCaps).

    Raises:
        UserError: there is no such file, or it is not of that format.
    """
    content = _read(Path(path), key)
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


def _read(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}; allowed: COCO's captions JSON, or null.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} is not JSON: {error}") from error
