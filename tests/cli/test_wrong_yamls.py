"""Whole files with a mistake in them: one message, exit code 2, and neither data nor weights were looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import safetensors
import safetensors.torch
import torch

from lavis_mafa.cli.main import main
from lavis_mafa.datasets import annotations

pytestmark = pytest.mark.slow

# --- right ones --------------------------------------------------------------------------------------------------------

DATA = """
datasets:
  grit_pairs:
    build_info:
      annotations: {train: {storage: pairs.jsonl}, val: {storage: val.jsonl}}
      images: {storage: images}
    vis_processor:
      train: {name: albef_image_train, image_size: 16}
      eval: {name: albef_image_eval, image_size: 16}
run:
  runner: runner_mafa
  max_epoch: 2
  init_lr: 1e-4
  seed: 42
  device: cpu
"""
VIT = "{image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 2}"
MAFA = """  model_type: tiny
  pretrained: start.pth
  ecm: {enabled: true, threshold: 0.8, ambiguous_from: 0.5}
  itc: {smoothing: 0.5, smooth_when: grouped}
"""
TRAINING = """  task: mafa_pretrain
  batch_size_train: 4
  grit: {queue_size: 48, search_space: 24}
"""
OPT = f"""
model:
  arch: blip2_opt_mafa
  model_type: tiny
  pretrained: start.pth
  image_encoder: {VIT}
  qformer: {{init: null, width: 16, layers: 2, heads: 2, queries: 2}}
  language_model: {{init: null, freeze: false, precision: fp32, width: 16, layers: 1, heads: 1}}
"""
BASES = {
    "albef": f"""
model:
  arch: albef_mafa
{MAFA}  discriminator: {{arch: albef_mafa, checkpoint: con_d.pth}}
  image_encoder: {VIT}
  text_encoder: {{init: null, width: 16, layers: 2, fusion_layer: 1, heads: 2}}
{DATA}{TRAINING}""",
    "blip": f"""
model:
  arch: blip_mafa
{MAFA}  discriminator: {{arch: blip_mafa, checkpoint: con_d.pth}}
  image_encoder: {VIT}
  text_encoder: {{init: null, width: 16, layers: 2, heads: 2}}
{DATA}{TRAINING}""",
    "stage 1": f"""
model:
  arch: blip2_mafa
{MAFA}  discriminator: {{arch: blip2_mafa, checkpoint: con_d.pth}}
  image_encoder: {VIT}
  qformer: {{init: null, width: 16, layers: 2, heads: 2, queries: 2}}
{DATA}{TRAINING}""",
    "stage 2": f"{OPT}{DATA}  task: mafa_pretrain\n  grit: {{enabled: false}}\n",
    "captions": f"{OPT}{DATA}  task: mafa_captioning\n  evaluate: true\n  test_splits: [val]\n  max_len: 10\n  min_len: 1\n",
    "vqa": f'{OPT}{DATA}  task: mafa_vqa\n  evaluate: true\n  test_splits: [val]\n  prompt: "Question: {{}} Answer:"\n  max_len: 10\n',
}

Edit = tuple[str, str] | Callable[[str], str | bytes]
EVERYWHERE = ("train", "evaluate", "validate")
TRAINED = ("train", "validate")  # what evaluating does not need


def added(text: str) -> Edit:
    return lambda base: base + text


def before(text: str) -> Edit:
    return lambda base: text + base


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 9)}]\n" for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + below] * 9)}]}}\n" for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)

# (base, what is wrong, edit, words of the message)
WRONG: list[tuple[str, str, Edit, tuple[str, ...]]] = [
    # the file itself
    ("albef", "empty", lambda _: "", ("model is missing", "model, datasets and run")),
    ("albef", "comments alone", lambda _: "# nothing\n", ("model is missing",)),
    ("albef", "a list", lambda _: "- model\n- run\n", ("the blocks model, datasets and run",)),
    ("albef", "a sentence", lambda _: "train it please", ("the blocks model, datasets and run",)),
    ("albef", "half a file", lambda base: base[: base.index("image_size: 16, patch") + 20], ("not readable as YAML", "line")),
    ("albef", "two documents", lambda base: f"{base}\n---\n{base}", ("not readable as YAML", "another document")),
    ("albef", "UTF-16", lambda base: base.encode("utf-16"), ("not readable as YAML", "utf-8")),
    ("albef", "Latin-1", lambda base: base.encode() + b"# caf\xe9\n", ("not readable as YAML", "utf-8")),
    ("albef", "a NUL", added("\0"), ("not readable as YAML", "not allowed")),
    ("albef", "tabs", ("  max_epoch: 2", "\tmax_epoch: 2"), ("not readable as YAML", "cannot start any token")),
    ("albef", "twice a key", ("  seed: 42", "  seed: 42\n  seed: 43"), ("duplicate key seed",)),
    ("albef", "twice a block", added("\nmodel: {arch: albef_mafa}\n"), ("duplicate key model",)),
    ("albef", "a megabyte", added("# \n" * 400_000), ("larger than 1,048,576 bytes",)),
    ("albef", "too deep", added("  x: " + "[" * 200 + "]" * 200), ("nested more than 50 deep",)),
    # aliases, tags and references
    ("albef", "a bomb of aliases", before(BOMB), ("values once its aliases", "allowed: 100,000")),
    ("albef", "a bomb of merges", before(MERGES), ("values once its aliases", "allowed: 100,000")),
    ("albef", "an alias of itself", ("  seed: 42", "  x: &x {y: *x}"), ("contains itself",)),
    ("albef", "an alias of nothing", ("  seed: 42", "  seed: *x"), ("undefined alias",)),
    (
        "albef",
        "a call",
        ("seed: 42", 'seed: !!python/object/apply:os.system ["touch mark"]'),
        ("!!python/object/apply:os.system", "line"),
    ),
    (
        "blip",
        "an object",
        ("seed: 42", "seed: !!python/object/new:subprocess.Popen [touch mark]"),
        ("!!python/object/new", "not allowed"),
    ),
    ("vqa", "a name", ("seed: 42", "seed: !!python/name:os.system"), ("!!python/name:os.system", "not allowed")),
    ("stage 1", "a module", ("seed: 42", "seed: !!python/module:antigravity"), ("!!python/module", "not allowed")),
    ("albef", "a tag of its own", ("seed: 42", "seed: !mine 42"), ("the tag !mine is not allowed",)),
    ("albef", "a number that is none", ("seed: 42", "seed: !!int x"), ("the tag !!int is not allowed",)),
    ("albef", "a point of a number", ("seed: 42", "seed: ._"), ("run.seed is '._'", "a whole number")),
    ("albef", "a reference to itself", ("seed: 42", "seed: ${run.seed}"), ("run.seed", "ecursive")),
    ("albef", "a reference to nothing", ("seed: 42", "seed: ${run.sed}"), ("run.seed", "sed")),
    ("albef", "an unknown resolver", ("seed: 42", "seed: ${python:1}"), ("run.seed", "python")),
    ("albef", "an unset variable", ("seed: 42", "seed: ${oc.env:LAVIS_MAFA_NONE}"), ("run.seed", "LAVIS_MAFA_NONE")),
    ("albef", "a made block", ("seed: 42", 'seed: "${oc.create:{a: 1}}"'), ("a reference", "ncompatible")),
    ("albef", "code as text", ("seed: 42", "seed: \"${oc.decode:'__import__(1)'}\""), ("run.seed",)),
    ("albef", "a value to be given", ("seed: 42", "seed: ???"), ("run.seed is ???", "still to be given")),
    # keys in the wrong place
    (
        "albef",
        "a block too far left",
        added("discriminator: {arch: albef_mafa}\n"),
        ("discriminator is not a block", "model, datasets, run"),
    ),
    ("albef", "a key too far left", ("  max_epoch: 2", "max_epoch: 2"), ("not readable as YAML",)),
    (
        "albef",
        "a key of run in model",
        ("  model_type: tiny", "  model_type: tiny\n  max_epoch: 2"),
        ("model.max_epoch is not a setting",),
    ),
    ("blip", "a key one too deep", ("{queue_size: 48,", "{queue_size: 48, batch_size_train: 4,"), ("run.grit.batch_size_train",)),
    ("albef", "a dotted key", added("run.max_epoch: 3\n"), ("run.max_epoch is not a block",)),
    ("albef", "a near name", ("max_epoch", "max_epochs"), ("run.max_epochs is not a setting", "Did you mean 'max_epoch'?")),
    ("blip", "ALBEF's key", ("heads: 2}\n\ndata", "heads: 2, fusion_layer: 1}\n\ndata"), ("model.text_encoder.fusion_layer is not",)),
    ("stage 1", "ALBEF's block", ("  qformer: ", "  text_encoder: "), ("model.text_encoder is not a setting", "qformer")),
    ("stage 2", "stage 1's block", added("model2: {}\n"), ("model2 is not a block", "Did you mean 'model'?")),
    ("vqa", "captioning's key", added("  caption_metrics: [bleu]\n"), ("run.caption_metrics is not a setting",)),
    ("captions", "the prompt in run", added("  prompt: 'a photo of'\n"), ("run.prompt is not a setting",)),
    # LAVIS has these, and means something else or nothing here
    ("albef", "LAVIS's amp", added("  amp: true\n"), ("run.amp is not a setting", "precision")),
    (
        "albef",
        "LAVIS's load_finetuned",
        ("  model_type: tiny", "  model_type: tiny\n  load_finetuned: false"),
        ("model.load_finetuned",),
    ),
    ("stage 1", "LAVIS's freeze_vit", ("  model_type: tiny", "  model_type: tiny\n  freeze_vit: true"), ("model.freeze_vit is not",)),
    ("albef", "LAVIS's warmup", added("  warmup_start_lr: 1e-5\n"), ("run.warmup_start_lr", "Here it is run.warmup_lr.")),
    # keys that are no text
    ("albef", "a number for a key", added("  1: 2\n"), ("run.1 is not a setting",)),
    ("albef", "null for a key", added("  null: 3\n"), ("not readable as YAML", "key")),
    ("albef", "a list for a key", added("  ? [1, 2]\n  : 3\n"), ("not readable as YAML", "key")),
    ("albef", "a number for a data set", ("  grit_pairs:", "  2017:"), ("datasets.2017 is no name of a data set", "grit_pairs")),
    # the wrong form
    ("albef", "a list of blocks", ("model:\n  arch", "model:\n - arch"), ("not readable as YAML",)),
    ("albef", "a list for a block", (VIT, "[16, 8, 16]"), ("model.image_encoder is [16, 8, 16]", "a block of settings")),
    ("albef", "a list for ecm", ("{enabled: true, threshold: 0.8, ambiguous_from: 0.5}", "[true]"), ("model.ecm is [True]", "a block")),
    ("stage 2", "a text for a block", (VIT, "eva_clip_g"), ("model.image_encoder is 'eva_clip_g'", "a block of settings")),
    ("albef", "a text for Con-D", ("{arch: albef_mafa, checkpoint: con_d.pth}", "con_d.pth"), ("model.discriminator is 'con_d.pth'",)),
    (
        "albef",
        "a list in Con-D",
        ("con_d.pth}", "con_d.pth, image_encoder: [1]}"),
        ("model.discriminator.image_encoder is [1]", "a block"),
    ),
    (
        "albef",
        "a processor's name alone",
        ("{name: albef_image_eval, image_size: 16}", "albef_image_eval"),
        ("vis_processor.eval is 'albef",),
    ),
    ("albef", "a null for a name", ("name: albef_image_eval", "name: null"), ("vis_processor.eval.name is None", "albef_image_eval")),
    (
        "albef",
        "a number for a caption processor",
        ("    vis_processor:", "    text_processor: {train: {name: 3}}\n    vis_processor:"),
        ("text_processor.train.name is 3", "such as albef_caption"),
    ),
    (
        "albef",
        "a size for a text",
        ("albef_image_eval, image_size: 16", "albef_image_eval, image_size: abc"),
        ("image_size is 'abc'", "1"),
    ),
    (
        "vqa",
        "images to evaluate of another size",
        lambda base: base.replace("albef_image_eval, image_size: 16", "albef_image_eval, image_size: 32"),
        ("vis_processor.eval.image_size is 32",),
    ),
    (
        "albef",
        "a data set without a block",
        ("    build_info:", "    build_info: x\n    y:"),
        ("grit_pairs.build_info is 'x'", "a block"),
    ),
    ("blip", "no data", ("datasets:\n", "datasets: {}\nx:\n"), ("datasets is empty", "grit_pairs")),
    ("albef", "a null block", ("  grit: {queue_size: 48, search_space: 24}", "  grit:"), ("run.grit is None", "a block of settings")),
    ("albef", "splits that are numbers", added("  train_splits: [1]\n"), ("run.train_splits is [1]", "a list of texts")),
    ("captions", "metrics as a text", added("  caption_metrics: bleu\n"), ("run.caption_metrics is 'bleu'", "a list")),
    # the wrong value
    ("albef", "no number", ("1e-4", '"1e-4x"'), ("run.init_lr is '1e-4x'", "a number")),
    ("albef", "a comma", ("1e-4", '"0,0001"'), ("run.init_lr is '0,0001'", "a number")),
    ("albef", "a date", ("seed: 42", "seed: 2026-01-01"), ("run.seed is '2026-01-01'", "a whole number")),
    ("albef", "half an epoch", ("max_epoch: 2", "max_epoch: 0.5"), ("run.max_epoch is 0.5", "a whole number")),
    ("albef", "yes for a number", ("max_epoch: 2", "max_epoch: yes"), ("run.max_epoch is True", "a whole number")),
    (
        "albef",
        "no yes and no no",
        ("{enabled: true", "{same_image: yep, enabled: true"),
        ("model.ecm.same_image is 'yep'", "true or false"),
    ),
    ("albef", "Norway", ("arch: albef_mafa\n", "arch: no\n"), ("model.arch is False", "albef_mafa")),
    ("albef", "a number too large", ("seed: 42", f"seed: {10**30}"), ("run.seed is 1000", "at most 4294967295")),
    ("albef", "a rate too large", ("1e-4", "9" * 400), ("run.init_lr is 9999", "at most 1000000000")),
    ("albef", "digits without an end", ("seed: 42", f"seed: {'9' * 5000}"), ("not readable as YAML", "digits")),
    ("albef", "an infinite rate", ("1e-4", ".inf"), ("run.init_lr is inf", "at most 1000000000")),
    ("albef", "no rate at all", ("1e-4", ".nan"), ("run.init_lr is nan", "at least 0")),
    ("albef", "a length that is NaN", added("  warmup_lr: .nan\n"), ("run.warmup_lr is nan",)),
    (
        "albef",
        "a whole number too large",
        ("max_epoch: 2", f"max_epoch: {2**31}"),
        ("run.max_epoch is 2147483648", "at most 2147483647"),
    ),
    ("albef", "a negative seed", ("seed: 42", "seed: -1"), ("run.seed is -1", "at least 0")),
    ("albef", "a share above one", ("threshold: 0.8", "threshold: 80"), ("model.ecm.threshold is 80", "between 0 and 1")),
    ("albef", "a Con-D that is never asked", ("{enabled: true,", "{enabled: true, every: 0,"), ("model.ecm.every is 0", "at least 1")),
    ("blip", "no pixel", ("con_d.pth}", "con_d.pth, image_size: 0}"), ("model.discriminator.image_size is 0", "at least 1")),
    ("albef", "no workers", added("  num_workers: -1\n"), ("run.num_workers is -1", "between 0 and 512")),
    ("stage 1", "a wrong choice", ("smooth_when: grouped", "smooth_when: group"), ("'group'", "Did you mean 'grouped'?")),
    ("albef", "an unknown type", ("model_type: tiny", "model_type: large"), ("model.model_type is 'large'", "base, tiny")),
    ("albef", "a device", ("device: cpu", "device: gpu"), ("run.device is 'gpu'", "cpu, cuda or cuda:0")),
    ("albef", "an Apple", ("device: cpu", "device: mps"), ("run.device is 'mps'", "only cpu and cuda are supported")),
    ("albef", "a file that is a number", ("pretrained: start.pth", "pretrained: 3"), ("model.pretrained is 3", "the path of a file")),
    ("captions", "no beam", added("  num_beams: 0\n"), ("run.num_beams is 0", "at least 1")),
    # fine alone, impossible together: the head of docs/configuration.md
    ("albef", "classes that overlap", ("ambiguous_from: 0.5", "ambiguous_from: 0.9"), ("model.ecm.ambiguous_from is 0.9", "(0.8)")),
    (
        "albef",
        "ALBEF with a Q-Former",
        ("con_d.pth}", "con_d.pth, qformer: {width: 8}}"),
        ("discriminator.qformer is set", "no qformer"),
    ),
    (
        "blip",
        "Con-D's patches",
        ("con_d.pth}", "con_d.pth, image_size: 12}"),
        ("model.discriminator.image_size is 12", "a multiple of patch_size (8)"),
    ),
    (
        "albef",
        "two keys for a size",
        ("con_d.pth}", "con_d.pth, image_size: 8, image_encoder: {image_size: 8}}"),
        ("model.discriminator.image_encoder.image_size is 8", "is model.discriminator.image_size"),
    ),
    ("albef", "a Con-D that cannot be", ("con_d.pth}", "con_d.pth, text_encoder: {heads: 3}}"), ("text_encoder.width", "of heads (3)")),
    ("albef", "B > M", ("batch_size_train: 4", "batch_size_train: 25"), ("run.batch_size_train is 25", "search_space (24)")),
    ("blip", "M > L", ("search_space: 24", "search_space: 96"), ("run.grit.search_space is 96", "queue_size (48)")),
    ("stage 1", "M that does not divide L", ("search_space: 24", "search_space: 23"), ("must divide queue_size (48); nearest: 24",)),
    ("albef", "L that nothing divides", ("queue_size: 48", "queue_size: 1000000007"), ("search_space is 24", "nearest: 1000000007")),
    ("stage 2", "GRIT in stage 2", ("grit: {enabled: false}", "grit: {enabled: true}"), ("run.grit.enabled is true", "stage 1")),
    ("albef", "captions of ALBEF", ("task: mafa_pretrain", "task: mafa_captioning"), ("writes no captions", "blip2_opt_mafa")),
    ("blip", "captions of BLIP", ("task: mafa_pretrain", "task: mafa_captioning"), ("writes no captions", "blip2_opt_mafa")),
    (
        "stage 1",
        "answers of stage 1",
        ("task: mafa_pretrain", "task: mafa_vqa"),
        ("blip2_mafa; allowed", "blip2_opt_mafa"),
    ),
    ("stage 2", "retrieval of stage 2", added("  test_splits: [val]\n"), ("has no matching head", "mafa_captioning")),
    ("vqa", "a prompt without a question", ("{} Answer", "Answer"), ("run.prompt is", "one {} for the question")),
    ("captions", "lengths that cross", ("min_len: 1", "min_len: 11"), ("run.min_len is 11", "max_len (10)")),
    ("vqa", "retrieval's candidates", added("  k_test: 8\n"), ("run.k_test is 8, but mafa_vqa has no use for it", "leave it out")),
    ("captions", "retrieval's score", added("  rank_by: itm\n"), ("run.rank_by is 'itm', but mafa_captioning", "leave it out")),
    ("vqa", "COCO's captions", added("  coco_captions: x.json\n"), ("run.coco_captions is 'x.json', but mafa_vqa",)),
    ("captions", "a record of Con-D", added("  record_connections: 0\n"), ("run.record_connections is 0", "leave it out")),
    ("captions", "GRIT", added("  grit: {enabled: true}\n"), ("run.grit.enabled is true, but mafa_captioning", "allowed: false")),
    ("vqa", "fp16 on a CPU", added("  precision: fp16\n"), ("run.precision is fp16", "fp32, bf16")),
    (
        "stage 2",
        "fp16 weights on a CPU",
        (VIT, VIT[:-1] + ", precision: fp16, freeze: true}"),
        ("image_encoder.precision is fp16", "cpu"),
    ),
    ("stage 2", "training in bf16", ("freeze: false, precision: fp32", "freeze: false, precision: bf16"), ("freeze: false", "fp32")),
    ("albef", "heads", (VIT, VIT.replace("heads: 2", "heads: 3")), ("model.image_encoder.width is 16", "multiple of heads (3)")),
    ("albef", "no patch", (VIT, VIT[:-1] + ", drop_patches: 1.0}"), ("image_encoder.drop_patches is 1.0", "between 0 and 0.99")),
    ("blip", "patches below none", (VIT, VIT[:-1] + ", drop_patches: -0.5}"), ("drop_patches is -0.5", "between 0 and 0.99")),
    (
        "stage 1",
        "a frozen ViT's patches",
        (VIT, VIT[:-1] + ", freeze: true, drop_patches: 0.5}"),
        ("model.image_encoder.drop_patches is 0.5, but a frozen ViT always sees whole images", "allowed here: 0"),
    ),
    (
        "albef",
        "Con-D's patches",
        ("con_d.pth}", "con_d.pth, image_encoder: {drop_patches: 0.5}}"),
        ("model.discriminator.image_encoder.drop_patches is 0.5, but Con-D always sees whole images", "allowed here: 0"),
    ),
    ("blip", "patches", (VIT, VIT.replace("patch_size: 8", "patch_size: 7")), ("image_encoder.image_size is 16", "patch_size (7)")),
    ("albef", "a fusion layer", ("fusion_layer: 1", "fusion_layer: 2"), ("model.text_encoder.fusion_layer is 2", "layers - 1 (1)")),
    ("stage 1", "a teacher", ("smooth_when: grouped", "momentum_distillation: {alpha: 0.4}"), ("blip2_mafa has no momentum teacher",)),
    (
        "blip",
        "a teacher of words",
        ("smooth_when: grouped", "momentum_distillation: {mlm: true}"),
        ("model.itc.momentum_distillation.mlm is not a setting", "Allowed: alpha, momentum, queue_size"),
    ),
    (
        "blip",
        "a teacher of nothing",
        ("smooth_when: grouped", "weight: 0, momentum_distillation: {alpha: 0.4}"),
        ("model.itc.weight is 0", "teach nothing"),
    ),
    ("albef", "evaluation rows shared twice", added("  use_dist_eval_sampler: true\n"), ("use_dist_eval_sampler is true", "false")),
]
WRONG_TO_TRAIN: list[tuple[str, str, Edit, tuple[str, ...]]] = [
    ("albef", "no run", lambda base: base[: base.index("run:")], ("run is missing",)),
    (
        "albef",
        "ECM without Con-D",
        ("discriminator: {arch: albef_mafa, checkpoint: con_d.pth}", "discriminator:"),
        ("no model.discriminator",),
    ),
    ("blip", "Con-D untrained", (", checkpoint: con_d.pth", ""), ("model.discriminator.checkpoint is null", "never used")),
    (
        "albef",
        "images of another size",
        ("albef_image_train, image_size: 16", "albef_image_train, image_size: 32"),
        ("vis_processor.train.image_size is 32", "model.image_encoder.image_size (16)"),
    ),
    ("albef", "no split", added("  train_splits: []\n"), ("run.train_splits is []", "allowed: [train]")),
    ("albef", "a split's name", added("  train_splits: [trian]\n"), ("run.train_splits is 'trian'", "Did you mean 'train'?")),
    ("albef", "smoothing without GRIT", ("{queue_size: 48", "{enabled: false, queue_size: 48"), ("it would never start", "always")),
    ("stage 2", "stage 2 from nothing", ("pretrained: start.pth", "pretrained: null"), ("model.stage_1 is null",)),
    (
        "stage 2",
        "an OPT in fp16 without scaling",
        lambda base: base.replace("freeze: false, precision: fp32", "freeze: true, precision: fp16").replace(
            "device: cpu", "device: cuda"
        ),
        ("gradients vanish", "run.precision: fp16"),
    ),
    ("albef", "a missing checkpoint", ("start.pth", "none.pth"), ("model.pretrained is 'none.pth'", "no such file")),
]
# names that only LAVIS's registry knows: found after it is imported
WRONG_NAMES: list[tuple[str, str, Edit, tuple[str, ...]]] = [
    ("albef", "arch", ("arch: albef_mafa\n", "arch: albef_mfa\n"), ("model.arch is 'albef_mfa'", "Did you mean 'albef_mafa'?")),
    ("blip", "task", ("mafa_pretrain", "mafa_pretrian"), ("run.task is 'mafa_pretrian'", "Did you mean 'mafa_pretrain'?")),
    ("stage 1", "data set", ("grit_pairs:", "grit_pears:"), ("datasets.grit_pears", "Did you mean 'grit_pairs'?")),
    (
        "albef",
        "processor",
        ("albef_image_train", "albef_image_trian"),
        ("vis_processor.train.name", "Did you mean 'albef_image_train'?"),
    ),
    ("albef", "runner", ("runner_mafa", "runner_mfa"), ("run.runner is 'runner_mfa'", "Did you mean 'runner_mafa'?")),
    ("albef", "lr_sched", added("  lr_sched: cosine\n"), ("run.lr_sched is 'cosine'", "warmup_cosine_per_step")),
]


def written(folder: Path, base: str, edit: Edit) -> Path:
    text = BASES[base]
    changed = edit(text) if callable(edit) else text.replace(*edit)
    assert changed != text, "the edit changes nothing"
    path = folder / "wrong.yaml"
    path.write_bytes(changed.encode() if isinstance(changed, str) else changed)
    return path


@pytest.fixture
def untouched(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder, where neither data nor weights may be read. What a YAML runs would leave ``mark`` in it."""

    def must_not_be_read(*_: Any, **__: Any) -> None:
        raise AssertionError("data or weights were touched")

    for owner, name in (
        (torch, "load"),
        (safetensors, "safe_open"),
        (safetensors.torch, "load_file"),
        (pyarrow.parquet, "read_table"),
        (pyarrow, "memory_map"),
        (annotations, "read_annotations"),
    ):
        monkeypatch.setattr(owner, name, must_not_be_read)
    monkeypatch.chdir(tmp_path)
    started = time.process_time()  # not the wall's: others may use the cores
    yield tmp_path
    assert time.process_time() - started < 10
    assert not (tmp_path / "mark").exists() and not (tmp_path / "output").exists()


# what `validate` says besides of files that are empty folders' or half of a configuration
ABSENT = ("no such", "does not exist", "nothing to evaluate on", "a YAML has the blocks")


def command(name: str, path: Path) -> list[str]:
    return [name, str(path)] if name == "validate" else [name, "--cfg-path", str(path)]


def check(refused: Callable[..., str], capsys: Any, path: Path, words: tuple[str, ...], commands: tuple[str, ...]) -> None:
    for name in commands:
        if name == "validate":
            capsys.readouterr()
            assert main(command(name, path)) == 2
            said = capsys.readouterr().err
            lines = said.splitlines()  # of which others tell what is not there
            said = next((line for line in lines if all(word in line for word in words)), said)
            assert all(line == said or any(word in line for word in ABSENT) for line in lines), lines
        else:
            said = refused(*command(name, path))
        assert all(word in said for word in words), said
        assert "Traceback" not in said


def named(rows: list[Any]) -> Any:
    return pytest.mark.parametrize(("base", "what", "edit", "words"), rows, ids=[f"{row[0]}: {row[1]}" for row in rows])


@pytest.mark.parametrize("base", BASES)
def test_the_files_that_are_made_wrong_are_right(base, untouched, capsys):
    path = written(untouched, base, lambda text: text + "# fine\n")
    assert main(["validate", "--no-files", str(path)]) == 0, capsys.readouterr().err


@named(WRONG)
def test_a_wrong_file_is_refused_by_every_command(base, what, edit, words, untouched, refused_early, capsys):
    check(refused_early, capsys, written(untouched, base, edit), words, EVERYWHERE)


@named(WRONG_TO_TRAIN)
def test_a_file_that_cannot_be_trained(base, what, edit, words, untouched, refused_early, capsys):
    check(refused_early, capsys, written(untouched, base, edit), words, TRAINED)


@pytest.mark.parametrize("base", ["albef", "blip", "stage 1", "captions", "vqa"])
def test_nothing_to_evaluate(base, untouched, refused_early, capsys):
    path = written(untouched, base, ("pretrained: start.pth", "pretrained: null"))
    check(refused_early, capsys, path, ("model.pretrained is null", "run.evaluate is true"), ("evaluate",))


@named(WRONG_NAMES)
def test_a_name_that_nobody_registered(base, what, edit, words, untouched, refused, capsys):
    (untouched / "images").mkdir()
    for file in ("pairs.jsonl", "val.jsonl"):
        (untouched / file).touch()
    # files would be looked at before the names are
    path = written(untouched, base, edit)
    text = path.read_text().replace("pretrained: start.pth", "pretrained: null")
    path.write_text(text.replace("{enabled: true, threshold", "{enabled: false, threshold").replace(", checkpoint: con_d.pth", ""))
    check(refused, capsys, path, words, TRAINED)


# of build_info and the processors of grit_pairs
WRONG_DATA = [
    ("build_info.annotations.train.storage=5", "annotations.train.storage is 5; allowed: a path or a list of paths"),
    ("build_info.annotations.train.storage={a: 1}", "annotations.train.storage is {'a': 1}"),
    ("build_info.annotations.train.storage=[[x]]", "annotations.train.storage is [['x']]"),
    ("build_info.annotations={train: x.jsonl}", "annotations.train is 'x.jsonl'; allowed: a block, such as {storage: pairs.jsonl}"),
    ("build_info.annotations=null", "annotations is None; allowed: a block"),
    ("build_info.images.storage=5", "images.storage is 5; allowed: the folder"),
    ("build_info.images=img", "images is 'img'; allowed: a block, such as {storage: FOLDER}"),
    ("build_info.images.allow_absolute_paths=[yes]", "allow_absolute_paths is [True]; allowed: true, false"),
    ("build_info.max_images=true", "max_images is True; allowed: a whole number from 1"),
    ("build_info.max_image=1", "Did you mean 'max_images'?"),
    ("build_info.max_images_seed=3", "max_images_seed is 3, but max_images is null"),
    ("max_images=8", "grit_pairs.max_images is not a key; it belongs below build_info"),
    ("vis_procesor.train.name=x", "grit_pairs.vis_procesor is not a key; allowed: data_type, build_info, vis_processor"),
    ("text_processor.trian.name=albef_caption", "text_processor.trian is not a key; allowed: train, eval. Did you mean 'train'?"),
    ("build_info.annotations.val.storgae=x", "annotations.val.storgae is not a key; allowed: storage. Did you mean 'storage'?"),
    ("build_info.annotations.val.path=x", "annotations.val.path is not a key; allowed: storage."),
    ("build_info.annotations.val.storage=[{annotations: a, image: b}]", "Did you mean 'images'?"),
    ("build_info.images.storgae=x", "images.storgae is not a key; allowed: storage, allow_absolute_paths. Did you mean 'storage'?"),
    ("build_info.prefix_lm=3", "prefix_lm is 3; allowed: true, false"),
    ("vis_processor.train.min_scale=abc", "vis_processor.train.min_scale is 'abc'; allowed: a number from 0 to 1"),
    ("vis_processor.train.image_size=true", "vis_processor.train.image_size is True; allowed: a whole number from 1"),
    ("vis_processor.train.randaugment=5", "vis_processor.train.randaugment is 5; allowed: {n: 2, m: 7}"),
    ("vis_processor.eval.flip=true", "vis_processor.eval.flip is not a key of albef_image_eval"),
    ("text_processor.train.max_words=-1", "text_processor.train.max_words is -1; allowed: a whole number from 1"),
]


@pytest.mark.parametrize(("option", "words"), WRONG_DATA, ids=[row[0] for row in WRONG_DATA])
def test_a_wrong_value_of_the_data_is_found_by_validate(option, words, untouched, capsys):
    path = written(untouched, "albef", added("# fine but for an option\n"))
    assert main(["validate", "--no-files", str(path), "--options", f"datasets.grit_pairs.{option}"]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    ("option", "words"), [("root=3", "root is 3"), ("captions=[x]", "captions is ['x']"), ("view=pair", "'pairs'?")]
)
def test_a_wrong_value_of_the_emoji(option, words, untouched, capsys):
    path = written(untouched, "albef", added("# fine but for an option\n"))
    assert main(["validate", "--no-files", str(path), "--options", f"datasets.grit_emoji.build_info.{option}"]) == 2
    assert words in capsys.readouterr().err


def test_a_part_of_a_processor_is_enough(untouched, capsys):
    path = written(untouched, "albef", added("# fine\n"))
    options = ["datasets.grit_pairs.text_processor.train.max_words=20", "datasets.coco_caption.text_processor.train.max_words=20"]
    assert main(["validate", "--no-files", str(path), "--options", *options]) == 0, capsys.readouterr().err


FINE: list[tuple[str, str, Edit]] = [
    ("albef", "CRLF", lambda base: base.replace("\n", "\r\n")),
    ("albef", "a byte order mark", lambda base: b"\xef\xbb\xbf" + base.encode()),
    ("albef", "yes and no", ("enabled: true", "enabled: yes")),
    ("albef", "a quoted number", ("seed: 42", 'seed: "42"')),
    ("stage 1", "an alias", ("queue_size: 48, search_space: 24", "queue_size: &n 48, search_space: *n")),
    (
        "blip",
        "a merge",
        ("grit: {queue_size: 48, search_space: 24}", "grit: {<<: &g {queue_size: 48, search_space: 24}, memory: rows}"),
    ),
    ("albef", "a reference", ("queue_size: 48", 'queue_size: "${run.seed}"')),
    ("albef", "a processor without a name", ("name: albef_image_eval, ", "")),
    ("stage 1", "patches of a trained ViT, though not of its Con-D", (VIT, VIT[:-1] + ", freeze: false, drop_patches: 0.5}")),
    ("albef", "the largest seed", ("seed: 42", f"seed: {2**32 - 1}")),
    ("captions", "the environment", added("  output_dir: ${oc.env:HOME}/output\n")),
    (
        "vqa",
        "JSON",
        lambda base: (
            '{"model": {"arch": "albef_mafa", "model_type": "tiny"}, "datasets": {"grit_pairs": {}}, "run": {"task": "mafa_pretrain"}}'
        ),
    ),
]


@pytest.mark.parametrize(("base", "what", "edit"), FINE, ids=[row[1] for row in FINE])
def test_a_file_that_looks_odd_but_is_right(base, what, edit, untouched, capsys):
    path = written(untouched, base, edit)
    if what == "a reference":
        path.write_text(path.read_text().replace("seed: 42", "seed: 48"))
    if what == "JSON":
        path.write_text(path.read_text().replace('"tiny"', '"tiny", "discriminator": {"arch": "ground_truth"}'))
    assert main(["validate", "--no-files", str(path)]) == 0, capsys.readouterr().err


def test_the_tables_are_as_long_as_they_should_be():
    every = [*WRONG, *WRONG_TO_TRAIN, *WRONG_NAMES]
    assert len(every) >= 40 and len({row[:2] for row in every}) == len(every)
    assert {row[0] for row in every} == set(BASES)
