"""Twenty pictures that are made in a moment, and a run on them that takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.runners import job

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange", "brown", "grey"]


def write_pairs(folder: Path, count: int = 20) -> Path:
    """``folder/images`` and ``folder/pairs.jsonl``; the concept is the colour."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (16, 16), colour).save(folder / f"images/{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"a {colour} square", "concept": colour})
    return write_rows(folder, rows)


def write_rows(folder: Path, rows: list[dict]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RUN = """
model:
  arch: albef_mafa
  model_type: tiny
  ecm: {enabled: true}
  discriminator: {arch: ground_truth}
  image_encoder: {image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}
  text_encoder: {init: null, width: 16, layers: 2, fusion_layer: 1, heads: 1}
  embed_dim: 8
datasets:
  grit_pairs:
    build_info:
      annotations: {train: {storage: DATA/pairs.jsonl}}
      images: {storage: DATA/images}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_pretrain
  runner: runner_mafa
  max_epoch: 2
  batch_size_train: 4
  warmup_steps: 2
  num_workers: 0
  grit: {queue_size: 16, search_space: 8}
  log_freq: 1
  k_test: 4
  device: cpu
"""


@pytest.fixture(scope="session")
def written_pairs() -> Callable[[Path], Path]:
    """:func:`write_pairs`, for other files of tests."""
    return write_pairs


@pytest.fixture(scope="session")
def run_of() -> Callable[[Path], str]:
    """The YAML of a run on the data in a folder."""
    return lambda data: RUN.replace("DATA", str(data))


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> Path:
    """A data folder to break; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run_yaml(tmp_path, pairs) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("DATA", str(pairs)))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that saved a checkpoint in the middle of its first epoch."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "data")
    (folder / "run.yaml").write_text(RUN.replace("DATA", str(folder / "data")))
    options = ["run.max_steps=3", f"run.output_dir={folder}/output"]
    assert main(["train", "--cfg-path", str(folder / "run.yaml"), "--options", *options]) == 0
    return next((folder / "output").glob("2*"))


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with exactly one message; the message."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert code == 2, said
        assert len(said.splitlines()) == 1 and said.startswith(f"lavis-mafa {arguments[0]}: "), said
        return said

    return run


@pytest.fixture
def refused_early(refused, monkeypatch):
    """The same, of a mistake that must be found before LAVIS is imported, which takes seconds."""

    def not_yet() -> None:
        raise AssertionError("LAVIS was imported before the mistake was found")

    monkeypatch.setattr(job, "_quiet_imports", not_yet)
    return refused
