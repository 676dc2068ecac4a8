"""Writes docs/configuration.md from the settings' declarations (lavis_mafa/config/schema.py).

Run: python docs/make_configuration.py. A test fails while the page is not what this makes.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis_mafa.config.read import at
from lavis_mafa.config.schema import LARGEST, MODEL_BLOCKS, RUN_BLOCKS, MafaBlock, RunBlock, kind_of_setting, model_types, type_defaults

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
beside the paper's metrics; what is finished is not run again, and `--dry-run` prints command lines for a cluster. With `--scenes` (or
`--emoji`) it builds the data, trains Con-D and runs the rows on two cores, and says after the first how long the others will take;
`--con-d truth` takes the known truth for Con-D. Rows that name a size of the paper's data take it from the base
(`lavis_mafa/configs/ablations.yaml`): the queue of momentum distillation is as long as GRIT's, alpha is varied in half of the base's
epochs, and the lower threshold is where the base's ambiguous class begins.

Combinations that are refused:

- **ECM and Con-D**: `ecm.ambiguous_from` above `threshold`; `ecm.enabled` without a discriminator or its checkpoint; a block below
  `discriminator` that its family has not (`qformer` for ALBEF), or sizes there that cannot be; `discriminator.image_size` where Con-D
  takes the model's frozen ViT, which has its own, and the same size in `discriminator.image_encoder`.
- **Losses**: all three off; `itc.intra_modal` without `itc.momentum_distillation` or with `itc.weight: 0`; `run.k_test: 0` beside
  another `rank_by` than `itc`.
- **ViLTA**: what asks `language_teacher` where there is none, and a teacher that nothing asks; `itm.synthetic` with matching off, or
  with `generator: model` where no words are masked (BLIP, BLIP-2, `mlm` off); `mlm.cross_distillation` with masked words off, or
  beside `momentum_distillation.mlm`.
- **SoftMask**: `itm.soft_mask` with matching off, of the last layer that looks at images, or where there is one alone;
  `mlm.mask_everywhere` with masked words off, or with ITC and ITM off; `itc.focal` with ITC off.
- **GRIT**: B > M, M > L, or M no divisor of L (B = `batch_size_train`, M = `grit.search_space`, L = `grit.queue_size`); smoothing that
  waits for grouped epochs while GRIT is off; GRIT with stage 2, which has no contrastive features.
- **Tasks**: `mafa_classification` with another of our models than `albef_ve_mafa` and `albef_nlvr_mafa`, these with another of our
  tasks, or on labels of the other; `albef_ta_mafa` with GRIT, with splits to evaluate, or less than three pairs a batch; captions from
  `albef_mafa` or `blip_mafa`, answers from any of our models but `blip2_opt_mafa` and `albef_vqa_mafa`, or that with another task;
  stage 2 with `mafa_pretrain` and `valid_splits` or `test_splits`, since that evaluates retrieval; a `run.prompt` without
  `{}`; evaluating without `model.pretrained` or without any split; stage 2 without `stage_1` or `pretrained`; LAVIS's
  `runner_base` and `runner_iter`;
  `k_test`, `rank_by`, `coco_captions`, `record_connections` and GRIT for the tasks of captions, questions, labels and boxes.
- **Answers**: `run.inference` that the model cannot (`rank`: `albef_vqa_mafa`, LAVIS's `albef_vqa`, which does nothing else, and
  `blip_vqa`); settings of generating where answers are ranked, or of ranking where they are generated; beams of `albef_vqa_mafa`; an
  answer list that is none, or of which not one question has a right answer; more candidates than answers; `grit_vqa` for a task that
  answers no questions.
- **Grounding**: `mafa_grounding` with other models than `albef_mafa` and `blip_mafa`, or other data than `grit_boxes`, and these with
  another task; `run.layer` with `heat: itc`, or of the last layer that looks at images; a `heat` whose loss is off.
- **Splits** that no data set has, or that have no file; `train` in `valid_splits` or `test_splits`.
- **Schedules**: `linear_warmup_step_lr` without `lr_decay_rate` or with `lr_horizon_epochs`; `lr_decay_rate` with another one of these.
- **Precision**: `run.precision: fp16` on a CPU; fp16 weights on a CPU, also where `cuda` falls back to it; weights that are trained
  (`freeze: false`) in anything but fp32; training stage 2 on an OPT in fp16 without `run.precision: fp16`, whose loss scaling it needs.
- **Compiling** (`run.compile`) without a compiler that works, a model or a task of LAVIS's.
- **Sizes** that do not divide (width by heads, image by patch); `fusion_layer` not below `layers`.
- **Checkpoints of the wrong kind**, read from their names and shapes when a job starts: a stage 1 as `pretrained` of stage 2 or the
  other way round, an ALBEF, BLIP or BLIP-2 with T5 where another is needed, a Con-D whose Q-Former has other sizes than are set; of
  `albef_ve_mafa` and `albef_nlvr_mafa` a classifier of other classes, an answering decoder, or no classifier to evaluate; of
  `albef_vqa_mafa` a classifier, no MLM head to start with, or no decoder to evaluate; a model of two images, whose fusion
  layers are there twice, for a model of one.
"""

TYPES = {int: "int", float: "float", str: "str", bool: "bool", list: "list of str", dict: "block"}
TITLE = "| key | type | default | allowed | meaning | paper |\n|---|---|---|---|---|---|\n"
Row = tuple[str, str, str, str, str, str]


def rows(schema: Any, path: str, sizes: Any) -> Iterator[Row]:
    """A table row of every key below ``path``, blocks before their own keys.

    Args:
        sizes: the model type's defaults, whose values stand where a setting has none of its own.
    """
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, (kind, optional), rules = f"{path}.{field.name}", kind_of_setting(hints[field.name]), field.metadata
        null, about = " or null" if optional else "", (rules["meaning"], rules["paper"])
        if dataclasses.is_dataclass(kind):
            yield key, "block", "`null`" if optional else "", "", *about
            yield from rows(kind, key, sizes)
        else:
            yield key, TYPES[kind] + null, f"`{written(default(field, at(sizes, key)))}`", allowed(rules, kind), *about


def default(field: dataclasses.Field[Any], of_type: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return of_type if field.default is dataclasses.MISSING else field.default


def allowed(rules: Any, kind: Any) -> str:
    low, high = rules["low"], rules["high"]
    if rules["choices"]:
        return ", ".join(f"`{word}`" for word in rules["choices"])
    if low is None and kind is int:
        low = 0
    if low is None:
        return ""
    return f"&ge; {low:g}" if high is None or high > LARGEST else f"{low:g} to {high:g}"


def written(value: Any) -> str:
    """As one would write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def sections(block: str, shared: Any, schemas: dict[str, Any]) -> Iterator[str]:
    """The page's part of ``model:`` or ``run:``: what all have, then of each what it adds or has otherwise."""
    common = list(rows(shared, block, type_defaults("albef_mafa", "base")))
    yield f"\n## `{block}:`\n\n{' '.join(shared.__doc__.split())}\n\n{TITLE}{table(common)}"
    for schema in dict.fromkeys(s for s in schemas.values() if s is not shared):
        names = [name for name in schemas if schemas[name] is schema]
        sizes = type_defaults(names[0], schema.model_type) if block == "model" else {}
        own = [row for row in rows(schema, block, sizes) if row not in common and row[0] not in ("model.arch", "run.task")]
        text, types = " ".join(schema.__doc__.split()), ", ".join(f"`{kind}`" for kind in model_types(names[0]))
        if types:
            text += f" Types: {types}; the defaults of sizes are those of `{schema.model_type}`."
        yield f"\n### {', '.join(f'`{name}`' for name in names)}\n\n{text}\n\n{TITLE}{table(own)}"


def table(found: list[Row]) -> str:
    return "".join(f"| `{key}` | {' | '.join(cells)} |\n" for key, *cells in found)


def render() -> str:
    return "".join([HEAD, *sections("model", MafaBlock, MODEL_BLOCKS), *sections("run", RunBlock, RUN_BLOCKS)])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
