from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji data, built once for all tests."""
    from lavis_mafa.datasets.emoji import build_emoji

    folder = tmp_path_factory.mktemp("data") / "emoji"
    build_emoji(folder, size=24, progress=False)
    return folder
