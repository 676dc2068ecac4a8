"""The typed blocks of our YAML: what may be written, with which type, choices and range (see docs/configuration.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from lavis_mafa.objectives.pretraining import EcmSettings, ItcSettings


@dataclass
class MomentumDistillation:
    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4


@dataclass
class Itc(ItcSettings):
    smooth_when: str = "grouped"
    momentum_distillation: Optional[MomentumDistillation] = None  # noqa: UP045 - OmegaConf reads this annotation


@dataclass
class Ecm(EcmSettings):
    same_image: bool = True


@dataclass
class Itm:
    negatives: str = "hardest"


@dataclass
class Mlm:
    mask_probability: float = 0.5


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
class DiscriminatorBlock:
    arch: str = "albef_retrieval"
    checkpoint: Optional[str] = None  # noqa: UP045
    precision: str = "bf16"
    image_encoder: Optional[ImageEncoder] = None  # noqa: UP045 - default: the model's own sizes
    text_encoder: Optional[TextEncoder] = None  # noqa: UP045


@dataclass
class ModelBlock:
    arch: str = "albef_mafa"
    model_type: str = "base"
    pretrained: Optional[str] = None  # noqa: UP045 - start all weights from this checkpoint of ours
    tokenizer: str = "bert-base-uncased"
    max_text_length: int = 30
    embed_dim: int = 256
    temperature: float = 0.07
    image_encoder: ImageEncoder = field(default_factory=ImageEncoder)
    text_encoder: TextEncoder = field(default_factory=TextEncoder)
    itc: Itc = field(default_factory=Itc)
    ecm: Ecm = field(default_factory=Ecm)
    itm: Itm = field(default_factory=Itm)
    mlm: Mlm = field(default_factory=Mlm)
    discriminator: Optional[DiscriminatorBlock] = None  # noqa: UP045


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
    weight_decay: float = 0.02
    beta2: float = 0.999
    max_epoch: int = 20
    max_steps: Optional[int] = None  # noqa: UP045 - stop early, for trials
    batch_size_train: int = 96
    batch_size_eval: int = 64
    accum_grad_iters: int = 1
    grad_clip: Optional[float] = None  # noqa: UP045
    precision: str = "fp32"
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
    coco_captions: Optional[str] = None  # noqa: UP045 - captions_val2014.json: adds ECCV Caption's metrics on COCO's test split
    use_dist_eval_sampler: bool = False
    resume_ckpt_path: Optional[str] = None  # noqa: UP045
    # devices
    device: str = "cuda"
    distributed: bool = True
    world_size: int = 1
    dist_url: str = "env://"
    find_unused_parameters: bool = False
    # filled in by LAVIS at run time
    rank: Optional[int] = None  # noqa: UP045
    gpu: Optional[int] = None  # noqa: UP045
    dist_backend: Optional[str] = None  # noqa: UP045


CHOICES: dict[str, tuple[str, ...]] = {
    "model.itc.smooth_when": ("grouped", "always", "never"),
    "model.ecm.use_in": ("itc", "itm", "lm"),
    "model.ecm.false_negatives": ("convert", "eliminate"),
    "model.itm.negatives": ("hardest", "sampled", "random"),
    "model.discriminator.arch": ("albef_mafa", "albef_retrieval", "ground_truth"),
    "model.discriminator.precision": ("fp32", "bf16"),
    "run.grit.batch_scope": ("local", "global"),
    "run.grit.collect": ("training", "separate"),
    "run.grit.memory": ("matrix", "rows"),
    "run.precision": ("fp32", "bf16", "fp16"),
}

INFINITE = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "model.max_text_length": (3, 512),
    "model.embed_dim": (1, INFINITE),
    "model.temperature": (0.001, 0.5),
    "model.itc.smoothing": (0.0, 1.0),
    "model.itc.consistency": (0.0, INFINITE),
    "model.itc.momentum_distillation.queue_size": (1, INFINITE),
    "model.itc.momentum_distillation.momentum": (0.0, 1.0),
    "model.itc.momentum_distillation.alpha": (0.0, 1.0),
    "model.ecm.threshold": (0.0, 1.0),
    "model.ecm.ambiguous_from": (0.0, 1.0),
    "model.mlm.mask_probability": (0.0, 1.0),
    "run.init_lr": (0.0, INFINITE),
    "run.min_lr": (0.0, INFINITE),
    "run.warmup_steps": (0, INFINITE),
    "run.lr_horizon_epochs": (1, INFINITE),
    "run.weight_decay": (0.0, INFINITE),
    "run.beta2": (0.0, 1.0),
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
}
for _encoder in ("image_encoder", "text_encoder", "discriminator.image_encoder", "discriminator.text_encoder"):
    RANGES |= {f"model.{_encoder}.{size}": (1, INFINITE) for size in ("width", "heads")}
    if _encoder.endswith("image_encoder"):
        RANGES |= {f"model.{_encoder}.{size}": (1, INFINITE) for size in ("image_size", "patch_size", "depth")}
        RANGES |= {f"model.{_encoder}.drop_path": (0.0, 1.0)}
    else:
        RANGES |= {f"model.{_encoder}.{size}": (1, INFINITE) for size in ("layers", "fusion_layer")}
        RANGES |= {f"model.{_encoder}.dropout": (0.0, 1.0)}

BLOCKS: dict[str, Any] = {"model": ModelBlock, "run": RunBlock}
