"""The typed ``run:`` blocks of our tasks, and the choices and ranges of all settings (see docs/configuration.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


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
