"""How many pairs an epoch of a YAML has, read from its own data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.errors import UserError


def training_rows(config: DictConfig) -> int | None:
    """Rows of the training split of all data sets together; None where the files of one are not on this machine.

    Raises:
        UserError: they are, but cannot be read.
    """
    from lavis.common.registry import registry

    from lavis_mafa.plugin import register

    register()
    total = 0
    for name in map(str, config.datasets):
        builder = registry.get_builder_class(name)
        if builder is None:
            return None
        info = OmegaConf.merge(OmegaConf.load(builder.default_config_path()).datasets[name], config.datasets[name])
        rows = (_of_own if builder.__module__.startswith("lavis_mafa.") else _of_lavis)(name, builder, info)
        if rows is None:
            return None
        total += rows
    return total or None


def _of_own(name: str, builder: Any, block: Any) -> int | None:
    from lavis_mafa.config.data import missing_files

    try:
        missing = missing_files(name, block)
    except UserError:  # no file is named
        return None
    return None if missing else len(builder(block).build_datasets().get("train", ()))


def _of_lavis(name: str, builder: Any, block: Any) -> int | None:
    """LAVIS's caption data sets are JSON lists of pairs, below its cache."""
    storage = OmegaConf.select(block, "build_info.annotations.train.storage")
    cache = Path(os.environ.get("LAVIS_CACHE", ".lavis_cache"))
    files = [cache / file for file in ([storage] if isinstance(storage, str) else storage or [])]
    if not files or not all(file.is_file() and file.suffix == ".json" for file in files):
        return None
    return sum(len(json.loads(file.read_text(encoding="utf-8"))) for file in files)
