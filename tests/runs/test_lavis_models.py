"""LAVIS's own models, tasks, builders and YAMLs through ``runner_mafa``, on a CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lavis
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import launched

pytestmark = pytest.mark.slow

OF_LAVIS = Path(lavis.__file__).parent / "projects" / "albef"
WORDS = "a red blue green small large dog cat car tree house boat sitting standing near under the old new bright".split()

# LAVIS's albef_pretrain at a size for a CPU: its own forward, with encoders and tokenizer that need no download
TINY = """
import sys
import lavis.tasks
from lavis.common.registry import registry
from lavis.common.utils import get_abs_path
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.med import BertForMaskedLM
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig
from lavis_mafa.cli.main import main
from lavis_mafa.models.encoders import MINILM, build_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}

class Tiny(AlbefPretrain):
    @classmethod
    def init_tokenizer(cls):
        return build_tokenizer(MINILM)

    @classmethod
    def from_config(cls, cfg=None):
        image = VisionTransformerEncoder(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        image.vision_width = 32
        config = BertConfig.from_json_file(get_abs_path("configs/models/med_config_albef.json"))
        config.update({**SIZES, "fusion_layer": 1, "encoder_width": 32})
        text = BertForMaskedLM(config)
        return cls(image, text, queue_size=cfg.queue_size, embed_dim=16, mlm_mask_prob=0.5, max_txt_len=cfg.max_txt_len)

registry.mapping["model_name_mapping"]["albef_pretrain"] = Tiny
sys.exit(main(sys.argv[1:]))
"""

OURS = {
    "arch": "albef_mafa",
    "model_type": "tiny",
    "ecm": {"enabled": False},
    "itc": {"smoothing": 0.5},
    "image_encoder": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
    "text_encoder": {"init": None, "width": 32, "layers": 2, "fusion_layer": 1, "heads": 2},
    "embed_dim": 16,
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder in the form of LAVIS's COCO: 12 images of two captions for training, 6 of three for testing."""
    folder = tmp_path_factory.mktemp("coco")
    draw = random.Random(0)

    def caption() -> str:
        return " ".join(draw.choices(WORDS, k=8))

    def image(number: int) -> str:
        name = f"val2014/COCO_val2014_{number:012d}.jpg"
        (folder / "val2014").mkdir(exist_ok=True)
        Image.new("RGB", (40, 36), tuple(draw.choices(range(256), k=3))).save(folder / name)
        return name

    train = [{"image": image(n), "image_id": f"coco_{n}"} for n in range(12)]
    (folder / "train.json").write_text(json.dumps([{**row, "caption": caption()} for row in train for _ in range(2)]))
    test = [{"image": image(100 + n), "caption": [caption() for _ in range(3)]} for n in range(6)]
    (folder / "test.json").write_text(json.dumps(test))
    return folder


def builder(folder: Path) -> dict:
    """The builder's block: annotations that are there already, so that nothing is downloaded."""
    files = {split: str(folder / f"{'train' if split == 'train' else 'test'}.json") for split in ("train", "val", "test")}
    annotations = {split: {"url": file, "storage": file} for split, file in files.items()}
    return {"build_info": {"annotations": annotations, "images": {"storage": str(folder)}}}


def launch(arguments: list, cwd: Path, script: Path | None = None, processes: int = 1) -> subprocess.CompletedProcess:
    done = launched.run(*([script] if script else ["-m", "lavis_mafa"]), *arguments, cwd=cwd, processes=processes, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def only_run(folder: Path) -> Path:
    (run,) = [p.parent for p in folder.rglob("config.yaml")]
    return run


def test_lavis_albef_pretrain_trains_from_lavis_yaml(coco, tmp_path):
    config = OmegaConf.load(OF_LAVIS / "train" / "pretrain.yaml")
    config.datasets = {"coco_caption": OmegaConf.merge(config.datasets.coco_caption, builder(coco))}
    config.datasets.coco_caption.vis_processor.train.image_size = 32
    OmegaConf.save(config, tmp_path / "pretrain.yaml")
    (tmp_path / "tiny.py").write_text(TINY)
    options = ["run.runner=runner_mafa", "run.device=cpu", "run.batch_size_train=8", "run.max_epoch=2", "run.warmup_steps=2"]
    options += ["run.log_freq=1", "run.num_workers=0", "model.queue_size=32"]
    arguments = ["train", "--cfg-path", tmp_path / "pretrain.yaml", "--options", *options]
    launch(arguments, tmp_path, tmp_path / "tiny.py")
    run = only_run(tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"]) for r in records] == [(e, s) for e in (0, 1) for s in (1, 2, 3)]
    assert all(r["loss"] == r["loss"] for r in records)
    # LAVIS's scheduler: warm-up, then its own decay per epoch
    assert records[2]["learning_rate"] == pytest.approx(3e-4)
    assert records[-1]["learning_rate"] == pytest.approx(3e-4 * 0.9)
    state = torch.load(run / "checkpoint_1.pth", weights_only=True)["model"]
    assert "visual_encoder_m.cls_token" in state  # LAVIS itself leaves it out and cannot resume

    again = launch([*arguments, "run.max_epoch=3", f"run.resume_ckpt_path={run}/checkpoint_1.pth"], tmp_path, tmp_path / "tiny.py")
    assert "resuming" in again.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from lavis_mafa.models.albef import AlbefMafa

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "ours.pth"
    default = OmegaConf.load(AlbefMafa.default_config_path("tiny")).model
    torch.save({"model": AlbefMafa.from_config(OmegaConf.merge(default, OURS)).state_dict()}, path)
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_lavis_retrieval_task_evaluates_our_model(coco, checkpoint, tmp_path, processes):
    config = OmegaConf.load(OF_LAVIS / "eval" / "ret_coco_eval.yaml")
    config.model = {**OURS, "pretrained": str(checkpoint)}
    config.datasets.coco_retrieval = OmegaConf.merge(config.datasets.coco_retrieval, builder(coco))
    config.datasets.coco_retrieval.vis_processor.eval.image_size = 32
    OmegaConf.save(config, tmp_path / "eval.yaml")
    options = ["run.runner=runner_mafa", "run.device=cpu", "run.num_workers=0", "run.k_test=18"]
    launch(["train", "--cfg-path", tmp_path / "eval.yaml", "--options", *options], tmp_path, processes=processes)
    run = only_run(tmp_path)
    (of_runner,) = (run / "evaluation.jsonl").read_text().splitlines()
    (of_lavis,) = (run / "evaluate.txt").read_text().splitlines()
    result = json.loads(of_runner)
    assert {k: result[k] for k in json.loads(of_lavis)} == json.loads(of_lavis)

    # our task on the same scores: one right image a text, several right texts an image
    ours = tmp_path / "ours"
    ours.mkdir()
    launch(
        ["evaluate", "--cfg-path", tmp_path / "eval.yaml", "--options", *options, "run.task=mafa_pretrain"], ours, processes=processes
    )
    (line,) = (only_run(ours) / "evaluation.jsonl").read_text().splitlines()
    mine = json.loads(line)
    for k in (1, 5, 10):
        assert mine[f"tr_r{k}"] == pytest.approx(result[f"txt_r{k}"])
        assert mine[f"ir_r{k}"] == pytest.approx(result[f"img_r{k}"])


def test_mafa_trains_on_lavis_coco_captions(coco, tmp_path):
    processors = {
        "vis_processor": {"train": {"name": "albef_image_train", "image_size": 32}},
        "text_processor": {"train": {"name": "albef_caption"}},
    }
    run = {"task": "mafa_pretrain", "device": "cpu", "batch_size_train": 8, "max_epoch": 2, "num_workers": 0, "log_freq": 1}
    run |= {"warmup_steps": 1, "grit": {"queue_size": 24, "search_space": 24}}
    config = OmegaConf.create({"model": OURS, "datasets": {"coco_caption": {**processors, **builder(coco)}}, "run": run})
    OmegaConf.save(config, tmp_path / "train.yaml")
    launch(["train", "--cfg-path", tmp_path / "train.yaml"], tmp_path)
    folder = only_run(tmp_path)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 6 and all(r["loss_itc"] > 0 for r in records)
    assert not list(folder.glob("connections/*.parquet"))  # without Con-D there is nothing to record
    state = torch.load(folder / "checkpoint_1.rank0.pth", weights_only=True)["feed"]["sampler"]
    assert "order" in state and sorted(state["order"].flatten().tolist()) == list(range(24))


def test_captions_of_one_lavis_image_share_their_key(coco):
    from lavis.datasets.builders import load_dataset  # noqa: F401 - fills the registry
    from lavis.datasets.datasets.base_dataset import ConcatDataset
    from lavis.datasets.datasets.caption_datasets import CaptionDataset

    from lavis_mafa.datasets.indexed import IndexedDataset

    one = CaptionDataset(lambda image: torch.zeros(3, 4, 4), str, str(coco), [str(coco / "train.json")])
    indexed = IndexedDataset(ConcatDataset([one, one]))
    batch = indexed.collate(indexed.__getitems__([0, 1, 2, 24, 25]))
    assert batch["index"].tolist() == [0, 1, 2, 24, 25]
    keys = batch["image_key"].tolist()
    assert keys[0] == keys[1] != keys[2] and keys[3] == keys[4] and keys[3] not in keys[:3]


def test_missing_annotations_of_a_lavis_builder_are_one_message(coco, tmp_path):
    block = builder(coco)
    block["build_info"]["annotations"]["train"] = {"url": "nowhere.json", "storage": "elsewhere.json"}
    config = {"model": OURS, "datasets": {"coco_caption": block}, "run": {"task": "mafa_pretrain", "device": "cpu"}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "train.yaml")
    done = launched.run("-m", "lavis_mafa", "train", "--cfg-path", "train.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "datasets.coco_caption.build_info.annotations.train.storage is 'elsewhere.json'" in done.stderr


def test_lavis_stage_2_trains_on_our_stage_1(coco, tmp_path):
    """blip2_opt from LAVIS's YAML on captions, blip2_t5 on captions that are cut in two."""
    from lavis_mafa.config.schema import typed_block
    from lavis_mafa.models.blip2 import Blip2Mafa
    from lavis_mafa.models.encoders import MINILM

    vit = {"init": None, "image_size": 24, "patch_size": 12, "width": 32, "depth": 2, "heads": 2, "freeze": False, "precision": "fp32"}
    block = {"arch": "blip2_mafa", "tokenizer": MINILM, "image_encoder": vit, "ecm": {"enabled": False}}
    qformer = {"init": None, "width": 32, "layers": 2, "heads": 2, "queries": 3}
    stage_1 = Blip2Mafa(typed_block("model", {**block, "qformer": qformer}))
    torch.save({"model": stage_1.state_dict()}, tmp_path / "stage_1.pth")

    opt = OmegaConf.load(OF_LAVIS.parent / "blip2" / "train" / "pretrain_stage2.yaml")
    opt.datasets = {"coco_caption": OmegaConf.merge(opt.datasets.coco_caption, builder(coco))}
    opt.datasets.coco_caption.vis_processor.train.image_size = 24
    run = {
        "runner": "runner_mafa",
        "device": "cpu",
        "amp": False,
        "batch_size_train": 4,
        "max_epoch": 1,
        "num_workers": 0,
        "log_freq": 1,
    }
    part = {"pretrained": str(tmp_path / "stage_1.pth"), "image_size": 24, "vit_precision": "fp32", "num_query_token": 3}
    opt.run.update({**run, "output_dir": "output/opt"})
    opt.model.update({**part, "freeze_vit": False, "opt_model": str(tmp_path / "opt")})
    OmegaConf.save(opt, tmp_path / "opt.yaml")
    t5 = OmegaConf.merge(opt, {"model": {"arch": "blip2_t5", "model_type": "pretrain_flant5xl", "t5_model": str(tmp_path / "t5")}})
    files = {"train": {"storage": str(coco / "train.json")}}
    pairs = {"build_info": {"annotations": files, "images": {"storage": str(coco)}, "prefix_lm": True}}
    t5.datasets = {"grit_pairs": {**pairs, "vis_processor": {"train": {"name": "blip_image_train", "image_size": 24}}}}
    t5.run.output_dir = "output/t5"
    OmegaConf.save(t5, tmp_path / "t5.yaml")

    alone = {"arch": "blip2", "model_type": "pretrain", "pretrained": str(tmp_path / "stage_1.pth")}
    stage_1_yaml = OmegaConf.merge(opt, {"run": {"output_dir": "output/blip2"}})
    stage_1_yaml.model = {**alone, "image_size": 24, "vit_precision": "fp32", "num_query_token": 3, "freeze_vit": False}
    OmegaConf.save(stage_1_yaml, tmp_path / "blip2.yaml")

    done = launch([tmp_path], tmp_path, Path(__file__).with_name("lavis_stage_2.py"))
    (folder,) = (tmp_path / "output" / "blip2").glob("2*")  # one process gathers from itself
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and all(0 < loss < 100 for loss in losses)
    for name in ("opt", "t5"):
        (folder,) = (tmp_path / "output" / name).glob("2*")
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 6 and all(0 < loss < 100 for loss in losses)
        before, after = stage_1.state_dict(), torch.load(folder / "checkpoint_0.pth", weights_only=True)["model"]
        assert torch.allclose(before["query_tokens"], after["query_tokens"], atol=1e-2), "it started from stage 1"
        assert not torch.equal(before["query_tokens"], after["query_tokens"]), "and trained"
    said = [line for line in done.stderr.splitlines() if "weights taken from" in line]
    assert len(said) == 3 and all("28 left over (" in line and "itm_head 2" in line for line in said[:2]), done.stderr
    assert "opt_proj 2)" in said[0] and "t5_proj 2)" in said[1]


def test_no_more_candidates_are_asked_for_than_a_gallery_has(caplog):
    from lavis.models.albef_models.albef_retrieval import AlbefRetrieval

    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.runners.runner_mafa import k_test_within

    gallery = SimpleNamespace(image=["a", "b", "c"], text=["x"] * 7)
    for model_class, wanted, inside in ((AlbefRetrieval, 256, 3), (AlbefRetrieval, 2, 2), (AlbefMafa, 256, 256)):
        task, model = SimpleNamespace(cfg=OmegaConf.create({"k_test": wanted})), object.__new__(model_class)
        with k_test_within(task, model, gallery):
            assert task.cfg.k_test == inside
        assert task.cfg.k_test == wanted
    assert [r.getMessage() for r in caplog.records] == [
        "run.k_test is 256, but the gallery has 3 images and 7 texts: the matching head ranks 3 candidates of each"
    ]


def test_lavis_evaluate_finds_the_settings_that_our_yaml_leaves_to_their_defaults():
    """It takes RunnerBase, whatever ``run.runner`` says."""
    from lavis_mafa.tasks.pretrain import MafaPretrainTask

    config = OmegaConf.create(
        {"model": {"arch": "albef_pretrain"}, "run": {"task": "mafa_pretrain", "evaluate": True, "batch_size_eval": 5}}
    )
    config.run.output_dir = "~/runs"
    MafaPretrainTask.setup_task(SimpleNamespace(config=config, run_cfg=config.run, model_cfg=config.model))
    assert (config.run.batch_size_train, config.run.batch_size_eval, config.run.num_workers) == (96, 5, 4)
    assert config.run.output_dir == os.path.expanduser("~/runs"), "LAVIS's train.py knows no tilde"
