"""Names that LAVIS and the authors' code have for settings of ours: whoever brings a YAML of theirs is told the new one.

The typed ``model:`` blocks, one for each of our models (see docs/configuration.md).

The typed ``run:`` blocks of our tasks, and the choices and ranges of all settings (see docs/configuration.md).

From what a user wrote to a checked, typed block: unknown keys, wrong types, values out of their choices or range.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Optional, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.errors import Mistakes, UserError, did_you_mean
from lavis_mafa.objectives.pretraining import EcmSettings, ItcSettings

# key -> what to write instead, or why there is nothing
OLD_NAMES = {
    "run.amp": "run.precision (bf16, or fp16 with loss scaling)",
    "run.warmup_start_lr": "run.warmup_lr",
    "run.warmup_epochs": "run.warmup_steps, in steps",
    "run.lr": "run.init_lr",
    "run.learning_rate": "run.init_lr",
    "run.decay_rate": "run.lr_decay_rate",
    "run.epochs": "run.max_epoch",
    "run.batch_size": "run.batch_size_train, pairs a process",
    "run.max_iters": "run.max_steps and run.max_epoch",
    "run.iters_per_inner_epoch": "run.save_every_steps",
    "run.max_grad_norm": "run.grad_clip",
    "run.clip_grad_norm": "run.grad_clip",
    "run.gradient_accumulation_steps": "run.accum_grad_iters",
    "run.queue_size": "run.grit.queue_size",
    "run.search_space": "run.grit.search_space",
    "run.resume": "run.resume_ckpt_path",
    "run.inference_method": "nothing: answers are generated",
    "run.task_type": "nothing: metrics do not depend on it",
    "run.train_dataset_ratios": "nothing: data sets are joined, each sample once an epoch",
    "run.alpha": "model.itc.momentum_distillation.alpha",
    "run.temp": "model.temperature",
    "model.load_pretrained": "model.pretrained: a checkpoint, or null to start without",
    "model.load_finetuned": "model.pretrained: a checkpoint, or null to start without",
    "model.finetuned": "model.pretrained",
    "model.image_size": "model.image_encoder.image_size",
    "model.image_res": "model.image_encoder.image_size",
    "model.img_size": "model.image_encoder.image_size",
    "model.freeze_vit": "model.image_encoder.freeze",
    "model.vit_model": "model.image_encoder.init",
    "model.vit_type": "model.model_type, and sizes in model.image_encoder",
    "model.vit_precision": "model.image_encoder.precision",
    "model.vit_grad_ckpt": "model.image_encoder.gradient_checkpointing",
    "model.vit_ckpt_layer": "model.image_encoder.gradient_checkpointing, of all layers",
    "model.use_grad_checkpoint": "model.image_encoder.gradient_checkpointing",
    "model.vit_drop_path_rate": "model.image_encoder.drop_path",
    "model.drop_path_rate": "model.image_encoder.drop_path",
    "model.num_query_token": "model.qformer.queries",
    "model.cross_attention_freq": "model.qformer.cross_attention_every",
    "model.opt_model": "model.language_model.init",
    "model.t5_model": "nothing: stage 2 has OPT alone",
    "model.max_txt_len": "model.max_text_length",
    "model.max_words": "model.max_text_length",
    "model.temp": "model.temperature",
    "model.queue_size": "model.itc.momentum_distillation.queue_size",
    "model.momentum": "model.itc.momentum_distillation.momentum",
    "model.alpha": "model.itc.momentum_distillation.alpha",
    "model.use_distill": "model.itc.momentum_distillation: null, or a block",
    "model.distill": "model.itc.momentum_distillation: null, or a block",
    "model.mlm_mask_prob": "model.mlm.mask_probability",
    "model.mlm_probability": "model.mlm.mask_probability",
    "model.negative_all_rank": "run.grit.batch_scope: global, or local",
    "model.med_config_path": "sizes in model.text_encoder",
    "model.bert_config": "sizes in model.text_encoder",
    "model.text_model": "model.text_encoder.init",
}


def replaced_by(key: str) -> str:
    """`` Here it is ...`` for a name of LAVIS's, or an empty string.

    Example:
        >>> replaced_by("run.amp")
        ' Here it is run.precision (bf16, or fp16 with loss scaling).'
    """
    return f" Here it is {OLD_NAMES[key]}." if key in OLD_NAMES else ""


@dataclass
class MomentumDistillation:
    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4


@dataclass
class AlbefDistillation(MomentumDistillation):
    mlm: bool = True


@dataclass
class Itc(ItcSettings):
    smooth_when: str = "grouped"
    momentum_distillation: Optional[MomentumDistillation] = None  # noqa: UP045 - OmegaConf reads this annotation


@dataclass
class AlbefItc(Itc):
    momentum_distillation: Optional[AlbefDistillation] = None  # noqa: UP045


@dataclass
class Ecm(EcmSettings):
    same_image: bool = True
    same_text: bool = True


@dataclass
class Itm:
    weight: float = 1.0
    negatives: str = "hardest"


@dataclass
class Mlm:
    weight: float = 1.0
    mask_probability: float = 0.5


@dataclass
class Lm:
    weight: float = 1.0


@dataclass
class ImageEncoder:
    init: Optional[str] = "deit"  # noqa: UP045
    image_size: int = 256
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.0
    gradient_checkpointing: bool = False


@dataclass
class TextEncoder:
    init: Optional[str] = "bert-base-uncased"  # noqa: UP045
    width: int = 768
    layers: int = 12
    fusion_layer: int = 6
    heads: int = 12
    dropout: float = 0.1


@dataclass
class EvaEncoder:
    init: Optional[str] = "eva_clip_g"  # noqa: UP045
    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_ratio: float = 4.3637
    drop_path: float = 0.0
    gradient_checkpointing: bool = False
    freeze: bool = True
    precision: str = "fp16"


@dataclass
class QFormer:
    init: Optional[str] = "bert-base-uncased"  # noqa: UP045
    width: int = 768
    layers: int = 12
    heads: int = 12
    queries: int = 32
    cross_attention_every: int = 2
    dropout: float = 0.1


@dataclass
class MedEncoder:
    """BLIP's text encoder and decoder, which share all but their self-attention."""

    init: Optional[str] = "bert-base-uncased"  # noqa: UP045
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1


@dataclass
class LanguageModel:
    init: Optional[str] = "facebook/opt-2.7b"  # noqa: UP045
    freeze: bool = True
    precision: str = "fp16"
    width: int = 2560  # sizes of a language model from scratch (init: null)
    layers: int = 32
    heads: int = 32


@dataclass
class DiscriminatorBlock:
    arch: str = "albef_retrieval"
    checkpoint: Optional[str] = None  # noqa: UP045
    precision: str = "bf16"
    model_type: Optional[str] = None  # noqa: UP045 - default: the model's own sizes, or `base` of another family
    image_encoder: Optional[dict[str, Any]] = None  # noqa: UP045
    text_encoder: Optional[dict[str, Any]] = None  # noqa: UP045
    qformer: Optional[dict[str, Any]] = None  # noqa: UP045


@dataclass
class MafaBlock:
    """What every model that trains with MAFA has."""

    arch: str = "albef_mafa"
    model_type: str = "base"
    pretrained: Optional[str] = None  # noqa: UP045 - start all weights from this checkpoint of ours
    tokenizer: str = "bert-base-uncased"
    max_text_length: int = 30
    embed_dim: int = 256
    temperature: float = 0.07
    itc: Itc = field(default_factory=Itc)
    ecm: Ecm = field(default_factory=Ecm)
    itm: Itm = field(default_factory=Itm)
    discriminator: Optional[DiscriminatorBlock] = None  # noqa: UP045


@dataclass
class AlbefBlock(MafaBlock):
    image_encoder: ImageEncoder = field(default_factory=ImageEncoder)
    text_encoder: TextEncoder = field(default_factory=TextEncoder)
    itc: AlbefItc = field(default_factory=AlbefItc)
    mlm: Mlm = field(default_factory=Mlm)


@dataclass
class BlipBlock(MafaBlock):
    arch: str = "blip_mafa"
    image_encoder: ImageEncoder = field(default_factory=lambda: ImageEncoder(image_size=224))
    text_encoder: MedEncoder = field(default_factory=MedEncoder)
    lm: Lm = field(default_factory=Lm)


@dataclass
class Blip2Block(MafaBlock):
    """Defaults of MAFA section G.7: smoothing 0.2, no re-sampling, no extra LM positives."""

    arch: str = "blip2_mafa"
    max_text_length: int = 32
    image_encoder: EvaEncoder = field(default_factory=EvaEncoder)
    qformer: QFormer = field(default_factory=QFormer)
    lm: Lm = field(default_factory=Lm)
    itc: Itc = field(default_factory=lambda: Itc(smoothing=0.2, smooth_when="always"))
    ecm: Ecm = field(default_factory=lambda: Ecm(use_in=["itc", "itm"], resample_ambiguous=False))


@dataclass
class Blip2OptBlock:
    arch: str = "blip2_opt_mafa"
    model_type: str = "opt2.7b"
    stage_1: Optional[str] = None  # noqa: UP045 - start the Q-Former from this stage-1 checkpoint
    pretrained: Optional[str] = None  # noqa: UP045 - start all weights from this stage-2 checkpoint
    max_text_length: int = 32
    prompt: str = ""
    image_encoder: EvaEncoder = field(default_factory=EvaEncoder)
    qformer: QFormer = field(default_factory=QFormer)
    language_model: LanguageModel = field(default_factory=LanguageModel)


def loss_weights(model: MafaBlock) -> dict[str, float]:
    """Block -> weight of the three losses; 0 is off, as is masked language modelling that masks nothing.

    Example:
        >>> loss_weights(BlipBlock())
        {'itc': 1.0, 'itm': 1.0, 'lm': 1.0}
    """
    weights = {name: getattr(model, name).weight for name in ("itc", "itm", "mlm" if isinstance(model, AlbefBlock) else "lm")}
    if isinstance(model, AlbefBlock) and model.mlm.mask_probability == 0:
        weights["mlm"] = 0.0
    return weights


@dataclass
class Grit:
    enabled: bool = True
    queue_size: int = 48000
    search_space: int = 4800
    batch_scope: str = "local"
    example_shuffle: bool = True
    batch_shuffle: bool = True
    collect: str = "training"
    memory: str = "matrix"


@dataclass
class RunBlock:
    """``run:`` of a ``mafa_pretrain`` task. Names that LAVIS has keep LAVIS's meaning."""

    task: str = "mafa_pretrain"
    runner: str = "runner_mafa"
    # optimisation
    lr_sched: str = "warmup_cosine_per_step"
    init_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_lr: float = 1e-5
    warmup_steps: int = 1000
    lr_horizon_epochs: Optional[int] = None  # noqa: UP045 - default: max_epoch
    lr_decay_rate: Optional[float] = None  # noqa: UP045 - of linear_warmup_step_lr, which needs it
    weight_decay: float = 0.02
    beta2: float = 0.999
    max_epoch: int = 20
    max_steps: Optional[int] = None  # noqa: UP045 - stop early, for trials
    batch_size_train: int = 96
    batch_size_eval: int = 64
    accum_grad_iters: int = 1
    grad_clip: Optional[float] = None  # noqa: UP045
    precision: str = "fp32"
    max_nonfinite_steps: int = 10
    seed: int = 42
    grit: Grit = field(default_factory=Grit)
    # data loading
    num_workers: int = 4
    max_bad_share: float = 0.01
    # what is written
    output_dir: str = "output"
    log_freq: int = 50
    save_every_epochs: int = 1
    save_every_steps: Optional[int] = None  # noqa: UP045
    keep_checkpoints: int = 3
    record_connections: int = 2000
    # splits and evaluation
    evaluate: bool = False
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    k_test: int = 256
    rank_by: Optional[str] = None  # noqa: UP045 - default: the model's own, see docs/decisions.md
    coco_captions: Optional[str] = None  # noqa: UP045 - captions_val2014.json: adds ECCV Caption's metrics on COCO's test split
    use_dist_eval_sampler: bool = False
    resume_ckpt_path: Optional[str] = None  # noqa: UP045
    # devices
    device: str = "cuda"
    distributed: bool = True
    world_size: int = 1
    dist_url: str = "env://"
    find_unused_parameters: bool = False
    rank_timeout_minutes: float = 30.0
    # filled in by LAVIS at run time
    rank: Optional[int] = None  # noqa: UP045
    gpu: Optional[int] = None  # noqa: UP045
    dist_backend: Optional[str] = None  # noqa: UP045


@dataclass
class CaptioningRun(RunBlock):
    """``run:`` of a ``mafa_captioning`` task."""

    task: str = "mafa_captioning"
    grit: Grit = field(default_factory=lambda: Grit(enabled=False))
    use_dist_eval_sampler: bool = True  # captions and answers of several ranks are joined by id
    num_beams: int = 5
    max_len: int = 30
    min_len: int = 8
    length_penalty: float = 1.0
    caption_metrics: list[str] = field(default_factory=lambda: ["bleu", "cider"])
    caption_references: Optional[str] = None  # noqa: UP045 - default: the data set's own captions


@dataclass
class VqaRun(RunBlock):
    """``run:`` of a ``mafa_vqa`` or ``mafa_gqa`` task."""

    task: str = "mafa_vqa"
    grit: Grit = field(default_factory=lambda: Grit(enabled=False))
    use_dist_eval_sampler: bool = True  # captions and answers of several ranks are joined by id
    prompt: str = "Question: {} Answer:"
    num_beams: int = 5
    max_len: int = 10
    min_len: int = 1
    length_penalty: float = -1.0
    lemmatize: bool = False


CHOICES: dict[str, tuple[str, ...]] = {
    "model.itc.smooth_when": ("grouped", "always", "never"),
    "model.ecm.use_in": ("itc", "itm", "lm"),
    "model.ecm.false_negatives": ("convert", "eliminate"),
    "model.itm.negatives": ("hardest", "sampled", "random"),
    "model.discriminator.arch": (
        "albef_mafa",
        "albef_retrieval",
        "blip_mafa",
        "blip_image_text_matching",
        "blip_retrieval",
        "blip2_mafa",
        "blip2",
        "blip2_image_text_matching",
        "ground_truth",
    ),
    "model.discriminator.precision": ("fp32", "bf16"),
    "model.image_encoder.precision": ("fp32", "bf16", "fp16"),
    "model.language_model.precision": ("fp32", "bf16", "fp16"),
    "run.grit.batch_scope": ("local", "global"),
    "run.grit.collect": ("training", "separate"),
    "run.grit.memory": ("matrix", "rows"),
    "run.precision": ("fp32", "bf16", "fp16"),
    "run.rank_by": ("itm", "itm+itc", "itc"),
    "run.caption_metrics": ("bleu", "cider", "rouge_l", "meteor", "spice"),
}

INFINITE = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "model.max_text_length": (3, 512),
    "model.embed_dim": (1, INFINITE),
    "model.temperature": (0.001, 0.5),
    "model.itc.weight": (0.0, INFINITE),
    "model.itc.smoothing": (0.0, 1.0),
    "model.itc.consistency": (0.0, INFINITE),
    "model.itc.momentum_distillation.queue_size": (0, INFINITE),
    "model.itc.momentum_distillation.momentum": (0.0, 1.0),
    "model.itc.momentum_distillation.alpha": (0.0, 1.0),
    "model.ecm.threshold": (0.0, 1.0),
    "model.ecm.ambiguous_from": (0.0, 1.0),
    "model.itm.weight": (0.0, INFINITE),
    "model.mlm.weight": (0.0, INFINITE),
    "model.mlm.mask_probability": (0.0, 1.0),
    "model.lm.weight": (0.0, INFINITE),
    "run.init_lr": (0.0, INFINITE),
    "run.min_lr": (0.0, INFINITE),
    "run.warmup_steps": (0, INFINITE),
    "run.lr_horizon_epochs": (1, INFINITE),
    "run.lr_decay_rate": (0.0, 1.0),
    "run.weight_decay": (0.0, INFINITE),
    "run.beta2": (0.0, 0.999999),  # AdamW divides by what is left to 1
    "run.max_epoch": (1, INFINITE),
    "run.max_steps": (1, INFINITE),
    "run.batch_size_train": (1, INFINITE),
    "run.batch_size_eval": (1, INFINITE),
    "run.accum_grad_iters": (1, INFINITE),
    "run.grad_clip": (1e-12, INFINITE),
    "run.grit.queue_size": (1, INFINITE),
    "run.grit.search_space": (1, INFINITE),
    "run.num_workers": (0, 512),
    "run.max_bad_share": (0.0, 1.0),
    "run.log_freq": (1, INFINITE),
    "run.save_every_epochs": (1, INFINITE),
    "run.save_every_steps": (1, INFINITE),
    "run.keep_checkpoints": (1, INFINITE),
    "run.record_connections": (0, INFINITE),
    "run.k_test": (1, INFINITE),
    "run.num_beams": (1, INFINITE),
    "run.max_len": (1, INFINITE),
    "run.max_nonfinite_steps": (1, INFINITE),
    "run.rank_timeout_minutes": (0.01, INFINITE),
    "run.min_len": (0, INFINITE),
}
for _part in ("image_encoder", "text_encoder", "qformer", "language_model"):
    for _size in ("image_size", "patch_size", "width", "depth", "heads", "layers", "fusion_layer", "queries", "cross_attention_every"):
        RANGES[f"model.{_part}.{_size}"] = (1, INFINITE)
    RANGES |= {f"model.{_part}.{_share}": (0.0, 1.0) for _share in ("drop_path", "dropout")}
RANGES["model.image_encoder.mlp_ratio"] = (0.01, INFINITE)


MODEL_BLOCKS: dict[str, Any] = {
    "albef_mafa": AlbefBlock,
    "blip_mafa": BlipBlock,
    "blip2_mafa": Blip2Block,
    "blip2_opt_mafa": Blip2OptBlock,
}
RUN_BLOCKS: dict[str, Any] = {
    "mafa_pretrain": RunBlock,
    "mafa_captioning": CaptioningRun,
    "mafa_vqa": VqaRun,
    "mafa_gqa": VqaRun,
}

LARGEST = 2**31 - 1  # what a 32-bit integer takes
LARGEST_SEED = 2**32 - 1  # what numpy's takes
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
LARGEST_FLOAT = 1e9  # of rates, weights and minutes: far from what a sum in fp32 overflows at


def typed_block(name: str, values: DictConfig | dict[str, Any], where: str = "", shown: str = "") -> Any:
    """A checked instance of the block ``name`` with defaults filled in.

    Args:
        name: ``model`` (which one says ``values.arch``) or ``run`` (which one says ``values.task``).
        values: what the user wrote, already merged with the model type's defaults.
        where: the file, for the message.
        shown: how the message calls the block, if not by its name.

    Raises:
        UserError: an unknown key, a wrong type, a value outside its choices or range.
    """
    values = values if isinstance(values, DictConfig) else OmegaConf.create(values)
    shown, found = shown or name, Mistakes()
    schema, values = schema_of(name, values), without_wrong_keys(name, values, found, where, shown)
    while True:
        try:
            block = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
            break
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list and a block do not merge
            full_key = getattr(error, "full_key", None) or ""
            got = OmegaConf.select(values, full_key) if full_key else values
            key = f"{shown}.{full_key}" if full_key else shown
            found.add(f"{key} is {_plain(got)!r}, but must be {_wanted(schema, full_key)}.{in_file(where)}")
            if not _dropped(values, full_key):
                raise UserError(*found.messages) from error
    _check_values(block, name, shown, where, found)
    found.end()
    return block


def schema_of(name: str, values: DictConfig) -> Any:
    """The dataclass of a block."""
    return RUN_BLOCKS[values.get("task", "mafa_pretrain")] if name == "run" else MODEL_BLOCKS[values.get("arch", "albef_mafa")]


def without_wrong_keys(name: str, values: DictConfig, found: Mistakes, where: str = "", shown: str = "") -> DictConfig:
    """A copy of a block without the keys that it does not know, or that hold something else where a block or a list belongs.

    Args:
        found: is told of each.
        name, values, where, shown: as for :func:`typed_block`.
    """
    kept = copy.deepcopy(values)
    _drop_wrong_keys(schema_of(name, values), kept, shown or name, where, found)
    return kept


def _dropped(values: DictConfig, full_key: str) -> bool:
    """Take a key out of a block, so that what else is wrong can be found; False where there is none."""
    parent, _, last = full_key.split("[")[0].rpartition(".")
    block = OmegaConf.select(values, parent) if parent else values
    if not isinstance(block, DictConfig) or last not in block:
        return False
    del block[last]
    return True


def in_file(where: str) -> str:
    """`` (where)``, or nothing."""
    return f" ({where})" if where else ""


def _drop_wrong_keys(schema: type, values: DictConfig, path: str, where: str, found: Mistakes) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    hints = _resolved(schema)
    for node in list(values):
        key = str(node)
        if key not in fields:
            hint = replaced_by(f"{path}.{key}") or f"{did_you_mean(key, fields)} Allowed: {', '.join(sorted(fields))}."
            found.add(f"{path}.{key} is not a setting.{hint}{in_file(where)}")
            del values[node]
            continue
        below = hints[key]
        child = values[node] if not OmegaConf.is_missing(values, node) else None
        may_be_null = "Optional" in str(fields[key])
        if dataclasses.is_dataclass(below) and isinstance(below, type) and isinstance(child, DictConfig):
            _drop_wrong_keys(below, child, f"{path}.{key}", where, found)
        elif (child is not None or not may_be_null) and (wanted := _misplaced(below, child, f"{path}.{key}")):
            found.add(f"{path}.{key} is {repr(_plain(child))[:200]}, but must be {wanted}.{in_file(where)}")
            del values[node]


def _misplaced(below: Any, child: Any, key: str) -> str | None:
    """What a field takes, where ``child`` has another form than that; OmegaConf would convert some of it, and fail at the rest."""
    if dataclasses.is_dataclass(below) or str(below).startswith("dict"):
        return None if isinstance(child, DictConfig) else "a block of settings"
    if str(below).startswith("list"):
        if isinstance(child, DictConfig) and child and all(value is None for value in child.values()):
            return f"a list, which has brackets: [{', '.join(map(str, child))}]"
        texts = isinstance(child, ListConfig) and all(isinstance(word, str) for word in child)
        return None if texts else "a list of texts"
    if child is None or isinstance(child, DictConfig | ListConfig):
        return WORDS.get(below, "a value")
    if below in (int, float) and isinstance(child, bool):
        return WORDS[below]
    if below in (int, float) and isinstance(child, int) and abs(child) > _largest(key, below):
        return f"at most {_largest(key, below):.10g}"
    return None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _wanted(schema: type, full_key: str) -> str:
    """The type of a nested field in a reader's words."""
    hint: Any = schema
    for part in full_key.split("."):
        if not dataclasses.is_dataclass(hint):
            break
        hint = _resolved(hint).get(part.split("[")[0], hint)  # type: ignore[arg-type]
    if "dict" in str(hint):
        return "a block of settings"
    return WORDS.get(hint, "a list" if "list" in str(hint) else str(getattr(hint, "__name__", hint)))


def _resolved(schema: type) -> dict[str, Any]:
    """Field types with ``Optional[X]`` as X."""
    hints = typing.get_type_hints(schema)
    return {name: next((a for a in get_args(t) if a is not type(None)), t) if _optional(t) else t for name, t in hints.items()}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _check_values(block: Any, path: str, shown: str, where: str, found: Mistakes) -> None:
    for f in dataclasses.fields(block):
        value, key, name = getattr(block, f.name), f"{path}.{f.name}", f"{shown}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_values(value, key, name, where, found)
        elif value is not None and key in CHOICES:
            for word in value if isinstance(value, list) else [value]:
                if word not in CHOICES[key]:
                    allowed = ", ".join(CHOICES[key])
                    hint = did_you_mean(str(word), CHOICES[key])
                    found.add(f"{name} is {word!r}, but must be one of {allowed}.{hint}{in_file(where)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            largest = _largest(key, type(value))
            low, high = RANGES.get(key, (0 if isinstance(value, int) else -largest, INFINITE))
            if not low <= value <= high:
                allowed = f"at least {low:.10g}" if high == INFINITE else f"between {low:g} and {high:g}"
                found.add(f"{name} is {value}, but must be {allowed}.{in_file(where)}")
            elif value > largest:
                found.add(f"{name} is {value}, but must be at most {largest:.10g}.{in_file(where)}")


def _largest(key: str, kind: type) -> float:
    if kind is float:
        return LARGEST_FLOAT
    return LARGEST_SEED if key == "run.seed" else LARGEST
