"""The typed ``model:`` blocks, one for each of our models (see docs/configuration.md)."""

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
