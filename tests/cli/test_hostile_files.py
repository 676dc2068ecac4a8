"""Files made to run code, or to hold what no run writes: one message, exit code 2, and nothing of theirs was executed."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lavis_mafa.config.check import check_yaml

pytestmark = pytest.mark.slow

# --- payloads ----------------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def torch_zip(path: Path, mark: Path) -> None:
    torch.save({"model": Evil(mark)}, path)


def raw_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Evil(mark)}))


def legacy(path: Path, mark: Path) -> None:
    """The layout before torch 1.6: several pickles in a row."""
    torch.save({"model": Evil(mark)}, path, _use_new_zipfile_serialization=False)


def by_hand(path: Path, mark: Path) -> None:
    """A good archive whose ``data.pkl`` was replaced."""
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, pickle.dumps({"model": Evil(mark)}, protocol=2) if name.endswith("data.pkl") else part)


def hidden(path: Path, mark: Path) -> None:
    """Good weights, and among them one that is none."""
    torch.save({"model": {"weight": torch.zeros(2), "bias": Evil(mark)}, "optimizer": {}, "epoch": 0}, path)


def script(path: Path, mark: Path) -> None:
    """A TorchScript archive, which torch.load hands on to torch.jit.load."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))


def huge_header(path: Path, mark: Path) -> None:
    """Safetensors: a header that claims to be eight exabytes."""
    path.write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")


def wrong_offsets(path: Path, mark: Path) -> None:
    """Safetensors: a tensor that reaches far behind the file."""
    header = b'{"weight": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)


PICKLES = [torch_zip, raw_pickle, legacy, by_hand, hidden, script]
SAFETENSORS = [huge_header, wrong_offsets, raw_pickle]

KEYS = {
    "model.pretrained": "model.pretrained={}",
    "model.discriminator.checkpoint": "model.discriminator={{arch: albef_mafa, checkpoint: {}}}",
    "model.image_encoder.init": "model.image_encoder.init={}",
    "run.resume_ckpt_path": "run.resume_ckpt_path={}",
}
STAGE_2 = [
    "model.image_encoder={image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}",
    "model.qformer={init: null, width: 16, layers: 2, heads: 1, queries: 2}",
    "model.language_model={width: 16, layers: 1, heads: 1}",
]
STAGE_2 += [f"datasets.grit_emoji.vis_processor.{use}.image_size=16" for use in ("train", "eval")]


def train(yaml: Path | str, *options: str) -> list[object]:
    return ["train", "--cfg-path", yaml, *(["--options", *options] if options else [])]


@pytest.fixture
def mark(tmp_path):
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "code from a file was run"


@pytest.mark.parametrize("write", PICKLES)
def test_the_payloads_bite_where_nobody_is_careful(write, tmp_path):
    """Else the tests below would pass whatever we did."""
    mark = tmp_path / "bitten"
    write(tmp_path / "file.pth", mark)
    if write is not script:
        torch.load(tmp_path / "file.pth", weights_only=False) if write is not raw_pickle else pickle.loads(
            (tmp_path / "file.pth").read_bytes()
        )
        assert mark.exists()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("write", PICKLES)
def test_no_pickle_runs(refused, run_yaml, tmp_path, mark, key, write):
    file = tmp_path / "evil.pth"
    write(file, mark)
    said = refused(*train(run_yaml, KEYS[key].format(file)))
    assert key in said and str(file) in said


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("write", SAFETENSORS)
def test_no_safetensors_fill_the_memory(refused, run_yaml, tmp_path, mark, key, write):
    file = tmp_path / "evil.safetensors"
    write(file, mark)
    said = refused(*train(run_yaml, KEYS[key].format(file)))
    assert key in said and str(file) in said


@pytest.mark.parametrize("key", ["model.stage_1", "model.pretrained"])
@pytest.mark.parametrize("write", [torch_zip, by_hand])
def test_no_pickle_runs_in_stage_2(refused_early, tmp_path, monkeypatch, mark, key, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "evil.pth", mark)
    said = refused_early(*train("mafa/quickstart/blip2/stage_2.yaml", *STAGE_2, f"{key}=evil.pth"))
    assert key in said and "evil.pth" in said


# --- LAVIS's own models ------------------------------------------------------------------------------------------------


def of_lavis(run_yaml: Path, **model: Any) -> Path:
    """A LAVIS model on our pairs, as a YAML of LAVIS names it."""
    config = OmegaConf.load(run_yaml)
    config.model = {"arch": "albef_retrieval", "model_type": "coco", **model}
    config.run = {"task": "retrieval", "runner": "runner_mafa", "device": "cpu", "max_epoch": 1, "batch_size_train": 4}
    OmegaConf.save(config, run_yaml)
    return run_yaml


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("write", PICKLES)
def test_lavis_own_models_run_nothing_either(refused_early, run_yaml, tmp_path, mark, command, write):
    """LAVIS's ``load_checkpoint`` leaves it to torch's default whether code may run, so the file is looked at before."""
    file = tmp_path / "evil.pth"
    write(file, mark)
    for key, more in (("finetuned", {}), ("pretrained", {"load_finetuned": False})):
        said = refused_early(command, "--cfg-path", of_lavis(run_yaml, **{key: str(file)}, **more))
        assert f"model.{key}" in said and str(file) in said


def test_lavis_itself_runs_nothing_with_the_torch_we_ask_for(tmp_path, mark):
    """Behind our check is torch's own default since 2.6, which setup.py asks for."""
    from lavis.models.base_model import BaseModel

    torch_zip(tmp_path / "evil.pth", mark)
    with pytest.raises(pickle.UnpicklingError):
        BaseModel().load_checkpoint(str(tmp_path / "evil.pth"))


def test_a_lavis_checkpoint_that_is_not_there_or_no_pth(refused_early, run_yaml, tmp_path):
    assert "model.finetuned is 'none.pth'" in refused_early(*train(of_lavis(run_yaml, finetuned="none.pth")))
    (tmp_path / "weights.safetensors").touch()
    assert "must be a .pth file" in refused_early(*train(of_lavis(run_yaml, finetuned="weights.safetensors")))


@pytest.mark.parametrize("value", ["1", "true", "Y"])
def test_an_environment_that_lets_files_run_code_is_refused(refused_early, run_yaml, monkeypatch, value):
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(name, value)
    for command in ("train", "evaluate"):
        said = refused_early(command, "--cfg-path", run_yaml)
        assert f"{name} is {value}" in said and "unset it" in said
    monkeypatch.setenv(name, "0")
    check_yaml(str(run_yaml), [])


# --- checkpoints and the states beside them ----------------------------------------------------------------------------

NAME = "checkpoint_0_3"


@pytest.fixture
def own(trained, tmp_path) -> Path:
    """A copy of a saved run to spoil."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in trained.glob(f"{NAME}*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("write", PICKLES)
def test_no_pickle_runs_beside_a_good_checkpoint(refused, run_yaml, own, mark, write):
    file = own / f"{NAME}.rank0.pth"
    write(file, mark)
    said = refused(*train(run_yaml, f"run.resume_ckpt_path={own}/{NAME}.pth"))
    assert "run.resume_ckpt_path" in said and file.name in said


def at(*path_and_value: Any) -> Callable[[dict], None]:
    *path, last, value = path_and_value

    def edit(content: dict) -> None:
        for name in path:
            content = content[name]
        content[last] = value

    return edit


def without(*path: str) -> Callable[[dict], None]:
    def edit(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return edit


SAMPLER, QUEUE = ("feed", "sampler"), ("feed", "queue")
OF_A_RANK = [
    (at(*SAMPLER, "order", torch.zeros(20, dtype=torch.long)), "not a permutation"),
    (at(*SAMPLER, "order", "shuffled"), "order"),
    (at(*SAMPLER, "epoch", 5), "epoch 5"),
    (at(*SAMPLER, "start_step", 6), "step 6"),
    (at(*SAMPLER, "global_batch", 0), "batches of 0"),
    (without(*SAMPLER, "grouped"), "is damaged: KeyError: 'grouped'"),
    (at(*QUEUE, "index", torch.arange(3)), "do not fit"),
    (at(*QUEUE, "text_features", torch.zeros(1).expand(12, 10**11)), "text_features is no contiguous tensor"),
    (at(*QUEUE, "index", torch.arange(12) + 2**40), "outside the data set"),
    (at(*QUEUE, "epoch", None), "is damaged: TypeError"),
    (without("feed"), "is damaged: KeyError: 'feed'"),
    (at("random", "torch", torch.zeros(7, dtype=torch.uint8)), "is damaged: RuntimeError"),
    (at("random", "numpy", "rest", [10**9, 0, 0.0]), "numpy's generator has position 1000000000"),
    (at("random", "python", "numbers", torch.zeros(3, dtype=torch.long)), NAME),
]
OF_THE_RUN = [
    (at("next_epoch", -1), "epoch -1"),
    (without("step"), "is damaged: KeyError: 'step'"),
    (at("best_metric", [1]), "is damaged: TypeError"),
    (at("optimizer", {}), "is damaged: KeyError"),
    (at("optimizer", "state", 0, "exp_avg", torch.zeros(1)), "not of this model's sizes"),
]


def spoil(file: Path, edit: Callable[[dict], None]) -> None:
    content = copy.deepcopy(torch.load(file, weights_only=True))
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize(("edit", "words"), OF_A_RANK, ids=[row[1] for row in OF_A_RANK])
def test_values_that_no_rank_saves(refused, run_yaml, own, edit, words):
    file = own / f"{NAME}.rank0.pth"
    spoil(file, edit)
    said = refused(*train(run_yaml, f"run.resume_ckpt_path={own}/{NAME}.pth"))
    assert words in said and NAME in said and "run.resume_ckpt_path" in said


@pytest.mark.parametrize(("edit", "words"), OF_THE_RUN, ids=[row[1] for row in OF_THE_RUN])
def test_values_that_no_run_saves(refused, run_yaml, own, edit, words):
    spoil(own / f"{NAME}.pth", edit)
    said = refused(*train(run_yaml, f"run.resume_ckpt_path={own}/{NAME}.pth"))
    assert words in said and NAME in said and "run.resume_ckpt_path" in said
