"""Which files an annotation storage names: a file, a folder, a pattern, or a block that gives a file its own image folder.

Imports nothing that is slow, so that a YAML is checked in a moment.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_mafa.errors import UserError, did_you_mean

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
FORMS = "a path or a list of paths, also of folders and patterns (shards/*.parquet), or {annotations: PATH, images: FOLDER} in it"
BLOCK = ("annotations", "images")


class AnnotationFile(NamedTuple):
    """A file of annotations, and the folder that its image paths start from where that is not the data set's."""

    path: Path
    images: Path | None = None

    def __str__(self) -> str:
        return str(self.path)


def check_storage(key: str, storage: Any) -> None:
    """The form alone, not whether the files are there; raises UserError."""
    for entry in _entries(storage):
        block = isinstance(entry, DictConfig | dict)
        texts = [entry.get(name) for name in BLOCK] if block else [entry]
        unknown = [str(name) for name in entry if name not in BLOCK] if block else []
        if unknown or not all(isinstance(text, str) and text for text in texts):
            shown = OmegaConf.to_container(storage) if OmegaConf.is_config(storage) else storage
            raise UserError(f"{key} is {shown!r}; allowed: {FORMS}.{did_you_mean(unknown[0], BLOCK) if unknown else ''}")


def storage_files(key: str, storage: Any) -> list[AnnotationFile]:
    """All files that a storage names, in its order; those of a folder or a pattern sorted by name.

    Raises:
        UserError: the form is wrong, a pattern matches nothing, or a folder holds no annotations or several kinds of them.
    """
    check_storage(key, storage)
    found = []
    for entry in _entries(storage):
        block = isinstance(entry, DictConfig | dict)
        images = Path(entry["images"]).expanduser() if block else None
        found += [AnnotationFile(path, images) for path in files_of(Path(entry["annotations"] if block else entry), key)]
    return found


def files_of(path: Path, key: str) -> list[Path]:
    """The file itself; of a folder the annotation files in it, and of a pattern (``*``, ``?``, ``**``) those that match."""
    path = path.expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if ending(file) in ENDINGS and file.is_file())
        kinds = sorted({ending(file) for file in files})
        if not files:
            raise UserError(f"{key}: the folder {path} holds no annotation file; allowed: {', '.join(ENDINGS)}.")
        if len(kinds) > 1:
            raise UserError(f"{key}: the folder {path} holds {' and '.join(kinds)} files; name one kind, such as {path}/*{kinds[0]}.")
        return files
    if glob.has_magic(str(path)) and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"{key}: no file matches {str(path)!r}.")
        return files
    return [path]


def ending(path: Path) -> str:
    """What says how to read a file: its ending in lower case, without the ``.gz`` of a compressed one."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def annotation_file(file: str | Path | AnnotationFile) -> AnnotationFile:
    """A path without an image folder of its own, where it is a path alone."""
    return file if isinstance(file, AnnotationFile) else AnnotationFile(Path(file))


def _entries(storage: Any) -> Iterable[Any]:
    return storage if isinstance(storage, ListConfig | list | tuple) and not isinstance(storage, AnnotationFile) else [storage]
