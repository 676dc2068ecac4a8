"""Settings every test shares: no network, few threads, a small emoji set built once."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
from filelock import FileLock

import launched

LONGEST = ("test_plugin.py", "test_plan.py", "test_saving.py", "test_project_yamls.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then all others with slow tests, so that no core waits for another at the end; the very first one needs
    no emoji, which another process builds meanwhile."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ranks")}

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        name = item.path.name
        return name != LONGEST[0], item.path.parent.name != "runs" and name not in LONGEST, item.path not in slow

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()  # or it visits all that was imported again and again


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """The whole emoji set, as `lavis-mafa build-emoji --size 24` writes it; one for all of xdist's processes."""
    from lavis_mafa.datasets.emoji import build_emoji

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emoji"
    with FileLock(folder.with_suffix(".lock")):
        build_emoji(folder, size=24, progress=False)  # which leaves a complete one as it is
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A few scenes of the quickstart's world, as `lavis-mafa build-scenes` writes them: 64 to train on, 24 of each other split."""
    from lavis_mafa.datasets.scenes.build import build_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(folder, train=64, test=24, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory, emoji) -> Path:
    """A MAFA run on 60 concepts that takes seconds: the same blocks as the paper's YAML."""
    path = tmp_path_factory.mktemp("yaml") / "tiny.yaml"
    path.write_text(
        f"""
model:
  arch: albef_mafa
  model_type: tiny
  ecm: {{enabled: true}}
  discriminator: {{arch: ground_truth}}
  image_encoder: {{width: 48, depth: 2, heads: 2}}
  text_encoder: {{init: null, width: 48, layers: 3, fusion_layer: 1, heads: 2}}
  embed_dim: 32
datasets:
  grit_emoji:
    build_info: {{root: {emoji}, max_concepts: 60}}
    vis_processor:
      train: {{name: albef_image_train, image_size: 48, min_scale: 0.6, flip: false, randaugment: null}}
      eval: {{name: albef_image_eval, image_size: 48}}
run:
  task: mafa_pretrain
  runner: runner_mafa
  max_epoch: 2
  batch_size_train: 16
  batch_size_eval: 32
  warmup_steps: 2
  init_lr: 1.0e-3
  num_workers: 0
  grit: {{queue_size: 64, search_space: 32}}
  log_freq: 1
  k_test: 8
  device: cpu
  output_dir: output
  test_splits: [val]
"""
    )
    return path


@pytest.fixture
def run_cli(tmp_path):
    """Run `lavis-mafa ...` in a fresh folder, in a process of its own; ``processes`` > 1 train together with gloo."""

    def run(*arguments, processes: int = 1, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: int = 300):
        return launched.run("-m", "lavis_mafa", *arguments, cwd=cwd or tmp_path, processes=processes, env=env, timeout=timeout)

    return run
