"""What a training will take, before it starts: parameters, memory, FLOPs, hours (MAFA Table 12 for a YAML of one's own)."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lavis_mafa.config.schema import Grit
from lavis_mafa.errors import UserError
from lavis_mafa.grit import group_by_similarity
from lavis_mafa.grit.grouping import MATRIX_BUDGET
from lavis_mafa.grit.sampler import row_type
from lavis_mafa.runners.step import autocast
from lavis_mafa.tools.cost import (
    CON_D,
    CON_D_VIT,
    IMAGE,
    Cost,
    Flops,
    StepSize,
    build,
    build_con_d,
    can_share,
    cost_of,
    samples_of,
    watch_con_d,
)
from lavis_mafa.tools.training_data import read_annotated, split_files

PEAKS = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}  # TFLOP/s of an A100 without TF32, as torch multiplies fp32 unless told
TF32 = 156.0  # with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, as the authors' PyTorch did by itself
MOST_FLOPS = 2e12  # of a measured step on a CPU: a minute
INDEX, FP32 = 8, 4  # bytes
PUBLISHED = {  # rows that train, of LAVIS's sets for downstream tasks: Karpathy's splits, VQA2's train and val, Visual Genome 1.2, ...
    "coco_caption": 566_747,
    "coco_retrieval": 566_747,
    "flickr30k": 145_000,
    "coco_vqa": 658_111,
    "vg_vqa": 1_445_322,
    "nlvr": 86_373,
    "snli_ve": 529_527,
}


@dataclass(frozen=True)
class Wanted:
    """What a plan is asked for, beyond the YAML."""

    gpus: int = 1
    samples: int = 5_000_000  # pairs of an epoch
    samples_from: str = "4M-Noisy's, assumed: the YAML's data are not here (--samples)"
    text_length: int | None = None  # default: max_text_length
    new_positives: float = 0.0
    own_vit: bool = False
    throughput: float | None = None  # pairs a second of all GPUs
    peak: float | None = None  # TFLOP/s of a GPU
    share: float = 0.4  # of the peak that is reached


@dataclass(frozen=True)
class Plan:
    """Everything here is computed; nothing was trained, loaded or measured. Bytes, and FLOPs of a step on one GPU."""

    arch: str
    device: str  # cuda or cpu
    precision: str
    size: StepSize
    gpus: int
    cost: Cost
    gpu: dict[str, int]  # bytes on each GPU, by what they hold
    host: dict[str, int]  # bytes in the memory of the host, of each process
    grit_flops: float  # ordering on the CPU
    own_vit_flops: float | None  # what a ViT of its own would add to a Con-D that shares the model's; None: it cannot
    samples: int  # pairs of an epoch
    samples_from: str
    steps_of_epoch: int
    steps: int
    pairs_a_second: float
    assumption: str  # where pairs_a_second comes from

    @property
    def judging(self) -> float:
        return sum(part.total for name, part in self.cost.flops.items() if name in (CON_D, CON_D_VIT))

    @property
    def alone(self) -> float:
        """Without Con-D and GRIT."""
        return sum(part.total for part in self.cost.flops.values()) - self.judging

    @property
    def total(self) -> float:
        return self.alone + self.judging + self.cost.features

    @property
    def peak(self) -> int:
        """When backward begins with the LM head, all gradients allocated."""
        return sum(self.gpu.values())

    @property
    def hours(self) -> float:
        return self.steps * self.size.batch * self.gpus / self.pairs_a_second / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all fields and what follows from them."""
        fields = asdict(self)
        cost = fields.pop("cost")
        more = {"weights": cost["weights"], "saved": cost["saved"], "flops": cost["flops"], "collecting_flops": cost["features"]}
        more |= {"step_without_con_d_and_grit": self.alone, "con_d_share": self.judging / self.alone, "hours": self.hours}
        more |= {"grit_gpu_share": self.cost.features / self.alone, "grit_cpu_share": self.grit_flops / self.alone}
        return {"kind": "computed", **fields, **more, "peak_bytes_of_a_gpu": self.peak}


def make_plan(model: Any, run: Any, wanted: Wanted) -> Plan:
    """Compute the plan of a typed ``model:`` and ``run:`` block, without their files.

    Raises:
        UserError: a language model of unknown size, or fewer pairs than a step takes.
    """
    batch, gpus, grit = run.batch_size_train, wanted.gpus, run.grit
    if batch * gpus > wanted.samples:
        raise UserError(
            f"a step takes {batch * gpus:,} pairs (run.batch_size_train {batch} on {gpus:,} GPUs), but an epoch has {wanted.samples:,} "
            f"({wanted.samples_from}); give fewer --gpus, or a smaller --batch-size."
        )
    gathered = gpus if grit.batch_scope == "global" and hasattr(model, "itc") else 1
    size = StepSize(batch, wanted.text_length or model.max_text_length, gathered, wanted.new_positives)
    device = "cuda" if run.device.startswith("cuda") else "cpu"
    shares = can_share(model) and model.ecm.enabled and not wanted.own_vit
    cost = cost_of(model, size, run.precision, device, wanted.own_vit, collects=grit.enabled and grit.collect == "separate")
    dim = getattr(model, "embed_dim", 0)
    total = sum(part.total for part in cost.flops.values()) + cost.features
    speed, assumption = _speed(total / batch, run.precision, wanted)
    of_epoch = wanted.samples // (batch * gpus)
    steps = of_epoch * run.max_epoch
    return Plan(
        arch=model.arch,
        device=device,
        precision=run.precision,
        size=size,
        gpus=gpus,
        cost=cost,
        gpu=gpu_memory(cost, gpus),
        host=host_memory(grit, dim, wanted.samples),
        grit_flops=batch * grit_flops_of_pair(grit, dim),
        own_vit_flops=cost.flops[IMAGE].forward if shares else None,
        samples=wanted.samples,
        samples_from=wanted.samples_from,
        steps_of_epoch=of_epoch,
        steps=steps if run.max_steps is None else min(steps, run.max_steps),
        pairs_a_second=speed,
        assumption=assumption,
    )


def gpu_memory(cost: Cost, gpus: int) -> dict[str, int]:
    """Bytes of a GPU at its fullest, by what they hold; more than one GPU means DDP."""
    weights, each = cost.weights, FP32 * cost.weights.trained
    return {
        "trained": weights.bytes_trained,
        "frozen": weights.bytes_frozen,
        "gradients": each,
        "optimizer": 2 * each,
        "buckets": each if gpus > 1 else 0,
        "teacher": weights.bytes_teacher,
        "con_d": weights.bytes_con_d,
        "saved": sum(cost.saved.values()),
        "transient": 2 * FP32 * cost.logits,  # once more in fp32, and their gradient
    }


def host_memory(grit: Grit, dim: int, samples: int) -> dict[str, int]:
    """Bytes of each process: GRIT's two queues (one fills while the other is grouped), what grouping takes, the order of an epoch
    (with GRIT at its end: this one, the lists of all ranks, and the next one while its blocks move; measured, 20 bytes a sample)."""
    order = samples * row_type(samples).itemsize
    if not grit.enabled:
        return {"queue": 0, "grouping": 0, "order": order}
    queue, matrices = grit.queue_size * (2 * dim * FP32 + INDEX), 0
    if grit.memory == "matrix":
        pair = 2 * grit.search_space**2
        matrices = FP32 * pair * min(grit.queue_size // grit.search_space, max(1, MATRIX_BUDGET // pair))
    return {"queue": 2 * queue, "grouping": 2 * queue + matrices, "order": 5 * order}


def grit_flops_of_pair(grit: Grit, dim: int) -> float:
    """What ordering costs for each pair, on the CPU and beside the step: similarities of a sub-queue in both directions."""
    if not grit.enabled:
        return 0.0
    # by rows, one direction is computed at each hop, and half of the rows are dropped whenever half are visited
    return grit.search_space * dim * (4.0 if grit.memory == "matrix" else 4.0 / 3.0)


def training_rows(config: DictConfig) -> int | None:
    """Rows of the training split of all data sets of a YAML; None where the files of one are not on this machine.

    Raises:
        UserError: they are, but cannot be read.
    """
    from lavis.common.registry import registry

    from lavis_mafa.plugin import register

    register()
    total = 0
    for name in map(str, config.datasets):
        builder = registry.get_builder_class(name)
        if builder is None:
            return None
        block: Any = OmegaConf.merge(OmegaConf.load(builder.default_config_path()).datasets[name], config.datasets[name])
        try:
            found = split_files(name, block, "train")
        except UserError:  # no file is named
            return None
        if found is None or not all(file.path.is_file() for file in found.files):
            return None
        total += len(read_annotated(name, block) or ())
    return total or None


def published_rows(config: DictConfig) -> int | None:
    """As :func:`training_rows`, by what is known of public data sets; None where one is not known."""
    rows = [PUBLISHED.get(str(name)) for name in config.datasets]
    return None if None in rows else sum(filter(None, rows))


# --- measured ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Medians of a few steps."""

    machine: str
    steps: int
    seconds: float  # of a step
    con_d_seconds: float  # of it, 0 without Con-D
    grouping_seconds: float  # of one sub-queue of GRIT, 0 without

    def line(self, batch: int, search_space: int) -> str:
        text = f"Measured on {self.machine}: {self.seconds:.3f} s a step (median of {self.steps}), "
        text += f"{batch / self.seconds:,.1f} pairs a second"
        if self.con_d_seconds:
            text += f"; Con-D {100 * self.con_d_seconds / (self.seconds - self.con_d_seconds):+.1f} %"
        if self.grouping_seconds:
            share = 100 * self.grouping_seconds * batch / search_space / self.seconds
            text += f"; GRIT orders {search_space} pairs in {self.grouping_seconds:.3f} s, {share:.1f} % of their steps, in a thread"
        return text + ". Data loading is not in it."


def measure(settings: Any, run: Any, plan: Plan, own_vit: bool = False, steps: int = 3) -> Measured:
    """Time whole training steps of this YAML (forward, backward, AdamW) with random images and untrained weights.

    Raises:
        UserError: the model is too large for this machine.
    """
    device = torch.device("cuda" if run.device.startswith("cuda") and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and plan.total > MOST_FLOPS:
        raise UserError(
            f"--measure: a step is {plan.total / 1e12:,.1f} TFLOP, too much for a CPU (at most {MOST_FLOPS / 1e12:g}); "
            "try --options model.model_type=tiny, or a smaller --batch-size."
        )
    torch.manual_seed(run.seed)
    with device:
        model, con_d = build(settings), build_con_d(settings, own_vit)
    model.to(device)
    seconds: list[float] = []
    judging: list[float] = []

    def timed(ask: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def ask_and_time(*arguments: Any) -> Tensor:
            begin = _now(device)
            probability = ask(*arguments)
            judging.append(_now(device) - begin)
            return probability

        return ask_and_time

    if con_d is not None:
        watch_con_d(con_d, timed)
        model.set_discriminator(con_d)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.init_lr, weight_decay=run.weight_decay)
    for _ in range(steps + 1):
        samples = samples_of(settings, plan.size, device)
        begin = _now(device)
        with autocast(run.precision, device):
            loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(_now(device) - begin)
    grouping = 0.0
    if run.grit.enabled:
        image, text = torch.nn.functional.normalize(torch.randn(2, run.grit.search_space, settings.embed_dim), dim=-1)
        begin = time.perf_counter()
        group_by_similarity(image, text, memory=run.grit.memory)
        grouping = time.perf_counter() - begin
    # the first step warms up
    return Measured(machine(device), steps, median(seconds[1:]), median(judging[1:]) if plan.judging else 0.0, grouping)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> str:
    """What it was measured on, for a reader."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# --- for reading -----------------------------------------------------------------------------------------------------------

HOLDS = {
    "trained": "weights, trained",
    "frozen": "weights, frozen",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "buckets": "DDP's buckets",
    "teacher": "teachers, queue",
    "con_d": "Con-D",
    "saved": "saved for backward, states, images",
    "transient": "logits as backward begins",
}


def table(plan: Plan) -> str:
    """The plan for reading."""
    batch, weights, gpu = plan.size.batch, plan.cost.weights, plan.device == "cuda"
    gpus = f"{plan.gpus} GPU" + ("s" if plan.gpus > 1 else "")
    lines = [
        f"{plan.arch}: {batch} pairs a GPU, {gpus}, texts of {plan.size.text_length} tokens, {plan.precision}. Computed, not measured.",
        "",
        f"{'parameters':<30}{'number':>12}{'weights':>12}",
    ]
    for name, what in (("trained", "trained"), ("frozen", "frozen"), ("teacher", "teachers, queue"), ("con_d", "Con-D")):
        number, size = getattr(weights, name), getattr(weights, f"bytes_{name}")
        lines += [f"  {what:<28}{f'{number / 1e6:,.1f} M':>12}{_bytes(size):>12}"] if number else []
    lines += ["", "memory of each GPU" if gpu else "memory of the step, on the CPU"]
    lines += [f"  {HOLDS[kind]:<40}{_bytes(size):>12}" for kind, size in plan.gpu.items() if size]
    what = "peak, 2 GB of CUDA and gaps not counted" if gpu else "peak, the program itself not counted"
    lines.append(f"  {what:<40}{_bytes(plan.peak):>12}")
    lines += ["", "memory of the host, each process", f"  {'order of the samples':<40}{_bytes(plan.host['order']):>12}"]
    if plan.host["queue"]:
        lines += [f"  {'GRIT, a queue that fills, one in grouping':<42}{_bytes(plan.host['queue']):>10}"]
        lines += [f"  {'GRIT, copies and similarities to group':<40}{_bytes(plan.host['grouping']):>12}"]
    lines += ["", f"{'GFLOP of a pair':<26}{'forward':>10}{'backward':>10}{'sum':>10}{'of a step':>12}"]
    parts = plan.cost.flops | ({"GRIT, separate pass": Flops(plan.cost.features)} if plan.cost.features else {})
    for name, part in parts.items():
        cells = "".join(f"{_number(value / batch / 1e9):>10}" for value in (part.forward, part.backward, part.total))
        lines.append(f"  {name:<24}{cells}{100 * part.total / plan.total:>10.1f} %")
    lines.append(f"{'  a step in all':<46}{_number(plan.total / batch / 1e9):>10}{'':>12}  {plan.total / 1e12:,.3g} TFLOP")
    added = f"Con-D adds {100 * plan.judging / plan.alone:+.1f} %"
    if plan.own_vit_flops is not None:
        own = 100 * (plan.judging + plan.own_vit_flops) / plan.alone
        added += f" with the model's frozen ViT, {own:+.0f} % with a ViT of its own (--own-vit)"
    lines += ["", f"{added}." if plan.judging else "No Con-D."]
    if plan.host["queue"]:
        gpu_share, cpu_share = (100 * flops / plan.alone for flops in (plan.cost.features, plan.grit_flops))
        lines.append(f"GRIT adds {gpu_share:.2g} % on the GPU; its ordering, {cpu_share:.2g} % of a step's FLOPs, is the CPU's.")
    lines += ["", f"{plan.samples:,} pairs an epoch, {plan.samples_from}."]
    lines.append(f"{plan.steps_of_epoch:,} steps an epoch, {plan.steps:,} in all; {plan.assumption}:")
    lines.append(f"{plan.hours:,.1f} hours. Data loading and communication are not counted.")
    return "\n".join(lines)


def _speed(flops_of_pair: float, precision: str, wanted: Wanted) -> tuple[float, str]:
    if wanted.throughput is not None:
        return wanted.throughput, f"{wanted.throughput:,.1f} pairs a second, as given"
    tf32 = precision == "fp32" and torch.backends.cuda.matmul.allow_tf32
    peak = wanted.peak or (TF32 if tf32 else PEAKS[precision])
    whose = "as given" if wanted.peak else f"an A100 in {precision}, assumed"
    speed = wanted.gpus * peak * 1e12 * wanted.share / flops_of_pair
    return speed, f"{100 * wanted.share:g} % of {peak:g} TFLOP/s a GPU ({whose}): {speed:,.0f} pairs a second"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
