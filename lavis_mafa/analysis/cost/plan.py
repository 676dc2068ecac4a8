"""What a training will take, before it starts: parameters, memory, FLOPs, hours (MAFA Table 12 for a YAML of one's own)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lavis_mafa.analysis.cost.build import can_share
from lavis_mafa.analysis.cost.flops import Flops, grit_flops_of_pair, recomputed, step_flops
from lavis_mafa.analysis.cost.memory import GpuMemory, HostMemory, Weights, gpu_memory, grit_memory, lm_logits, saved_bytes, weights_of
from lavis_mafa.analysis.cost.step import CON_D, CON_D_VIT, IMAGE, TEXT, StepSize
from lavis_mafa.errors import UserError

PEAKS = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}  # TFLOP/s of an A100 without TF32, as torch multiplies fp32 unless told
TF32 = 156.0  # with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, as the authors' PyTorch did by itself


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
    """Everything here is computed; nothing was trained, loaded or measured."""

    arch: str
    device: str  # cuda or cpu
    precision: str
    size: StepSize
    gpus: int
    weights: Weights
    gpu: GpuMemory
    saved: dict[str, int]  # of which `gpu.saved` is the sum, by part
    host: HostMemory  # of each process
    flops: dict[str, Flops]  # of a step on one GPU, by part
    grit_flops: float  # of a step, ordering on the CPU
    collecting_flops: float  # of a step, the separate pass of grit.collect: separate
    own_vit_flops: float | None  # of a step, what a ViT of its own would add to a Con-D that shares the model's; None: it cannot
    samples: int  # pairs of an epoch
    samples_from: str
    steps_of_epoch: int
    steps: int
    pairs_a_second: float
    assumption: str  # where pairs_a_second comes from

    @property
    def alone(self) -> float:
        """FLOPs of a step without Con-D and GRIT."""
        return sum(part.total for name, part in self.flops.items() if name not in (CON_D, CON_D_VIT))

    @property
    def judging(self) -> float:
        return sum(part.total for name, part in self.flops.items() if name in (CON_D, CON_D_VIT))

    @property
    def total(self) -> float:
        return self.alone + self.judging + self.collecting_flops

    @property
    def hours(self) -> float:
        return self.steps * self.size.batch * self.gpus / self.pairs_a_second / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all fields and what follows from them."""
        more = {"step_without_con_d_and_grit": self.alone, "con_d_share": self.judging / self.alone, "hours": self.hours}
        grit = {"grit_gpu_share": self.collecting_flops / self.alone, "grit_cpu_share": self.grit_flops / self.alone}
        return {"kind": "computed", **asdict(self), **more, **grit, "peak_bytes_of_a_gpu": self.gpu.peak}


def make_plan(model: Any, run: Any, wanted: Wanted) -> Plan:
    """Compute the plan of a typed ``model:`` and ``run:`` block, without their files.

    Raises:
        UserError: a language model of unknown size, or fewer pairs than a step takes.
    """
    batch, gpus = run.batch_size_train, wanted.gpus
    if batch * gpus > wanted.samples:
        raise UserError(
            f"a step takes {batch * gpus:,} pairs (run.batch_size_train {batch} on {gpus:,} GPUs), but an epoch has {wanted.samples:,} "
            f"({wanted.samples_from}); give fewer --gpus, or a smaller --batch-size."
        )
    gathered = gpus if run.grit.batch_scope == "global" and hasattr(model, "itc") else 1
    size = StepSize(batch, wanted.text_length or model.max_text_length, gathered, wanted.new_positives)
    device = "cuda" if run.device.startswith("cuda") else "cpu"
    shares = can_share(model) and model.ecm.enabled
    flops = recomputed(model, step_flops(model, size, wanted.own_vit))
    collecting = 0.0
    if run.grit.enabled and run.grit.collect == "separate":
        collecting = flops[IMAGE].forward + flops[TEXT].forward
    weights = weights_of(model, wanted.own_vit)
    saved = saved_bytes(model, size, run.precision, device)
    dim = getattr(model, "embed_dim", 0)
    total = sum(part.total for part in flops.values()) + collecting
    speed, assumption = _speed(total / batch, run.precision, wanted)
    of_epoch = wanted.samples // (batch * gpus)
    steps = of_epoch * run.max_epoch
    return Plan(
        arch=model.arch,
        device=device,
        precision=run.precision,
        size=size,
        gpus=gpus,
        weights=weights,
        gpu=gpu_memory(weights, saved, lm_logits(model, size), gpus),
        saved=saved,
        host=grit_memory(run.grit, dim, wanted.samples),
        flops=flops,
        grit_flops=batch * grit_flops_of_pair(run.grit, dim),
        collecting_flops=collecting,
        own_vit_flops=flops[IMAGE].forward if shares and not wanted.own_vit else None,
        samples=wanted.samples,
        samples_from=wanted.samples_from,
        steps_of_epoch=of_epoch,
        steps=steps if run.max_steps is None else min(steps, run.max_steps),
        pairs_a_second=speed,
        assumption=assumption,
    )


def _speed(flops_of_pair: float, precision: str, wanted: Wanted) -> tuple[float, str]:
    if wanted.throughput is not None:
        return wanted.throughput, f"{wanted.throughput:,.1f} pairs a second, as given"
    tf32 = precision == "fp32" and torch.backends.cuda.matmul.allow_tf32
    peak = wanted.peak or (TF32 if tf32 else PEAKS[precision])
    whose = "as given" if wanted.peak else f"an A100 in {precision}, assumed"
    speed = wanted.gpus * peak * 1e12 * wanted.share / flops_of_pair
    return speed, f"{100 * wanted.share:g} % of {peak:g} TFLOP/s a GPU ({whose}): {speed:,.0f} pairs a second"


def table(plan: Plan) -> str:
    """The plan for reading."""
    b, weights, gpu = plan.size.batch, plan.weights, plan.gpu
    gpus = f"{plan.gpus} GPU" + ("s" if plan.gpus > 1 else "")
    lines = [
        f"{plan.arch}: {b} pairs a GPU, {gpus}, texts of {plan.size.text_length} tokens, {plan.precision}. Computed, not measured.",
        "",
        f"{'parameters':<30}{'number':>12}{'weights':>12}",
    ]
    for name, what in (("trained", "trained"), ("frozen", "frozen"), ("teacher", "momentum teacher, queue"), ("con_d", "Con-D")):
        number, size = getattr(weights, name), getattr(weights, f"bytes_{name}")
        lines += [f"  {what:<28}{count_of(number):>12}{bytes_of(size):>12}"] if number else []
    lines += ["", "memory of each GPU" if plan.device == "cuda" else "memory of the step, on the CPU"]
    names = {"trained": "weights, trained", "frozen": "weights, frozen", "optimizer": "AdamW", "buckets": "DDP's buckets"}
    names |= {"teacher": "momentum teacher and queue", "con_d": "Con-D", "saved": "saved for backward, states, images"}
    names |= {"transient": "logits as backward begins"}
    for kind, size in vars(gpu).items():
        lines += [f"  {names.get(kind, kind):<40}{bytes_of(size):>12}"] if size else []
    peak = "peak, 2 GB of CUDA and gaps not counted" if plan.device == "cuda" else "peak, the program itself not counted"
    lines.append(f"  {peak:<40}{bytes_of(gpu.peak):>12}")
    lines += ["", "memory of the host, each process", f"  {'order of the samples':<40}{bytes_of(plan.host.order):>12}"]
    if plan.host.queue:
        lines += [f"  {'GRIT, a queue that fills, one in grouping':<42}{bytes_of(plan.host.queue):>10}"]
        lines += [f"  {'GRIT, copies and similarities to group':<40}{bytes_of(plan.host.grouping):>12}"]
    lines += ["", f"{'GFLOP of a pair':<26}{'forward':>10}{'backward':>10}{'sum':>10}{'of a step':>12}"]
    for name, part in plan.flops.items():
        lines.append(_flops_line(name, part, plan, part.total))
    if plan.collecting_flops:
        lines.append(_flops_line("GRIT, separate pass", Flops(plan.collecting_flops), plan, plan.collecting_flops))
    lines.append(f"{'  a step in all':<46}{number_of(plan.total / b / 1e9):>10}{'':>12}  {plan.total / 1e12:,.3g} TFLOP")
    added = f"{100 * plan.judging / plan.alone:+.1f} %"
    if plan.own_vit_flops is not None:
        own = 100 * (plan.judging + plan.own_vit_flops) / plan.alone
        added += f" with the model's frozen ViT, {own:+.0f} % with a ViT of its own (--own-vit)"
    lines += ["", f"Con-D adds {added}." if plan.judging else "No Con-D."]
    if plan.host.queue:
        gpu_share, cpu_share = (100 * flops / plan.alone for flops in (plan.collecting_flops, plan.grit_flops))
        lines.append(f"GRIT adds {gpu_share:.2g} % on the GPU; its ordering, {cpu_share:.2g} % of a step's FLOPs, is the CPU's.")
    pairs = f"{plan.samples:,} pairs an epoch, {plan.samples_from}."
    epochs = f"{plan.steps_of_epoch:,} steps an epoch, {plan.steps:,} in all"
    lines += ["", pairs, f"{epochs}; {plan.assumption}:", f"{plan.hours:,.1f} hours. Data loading and communication are not counted."]
    return "\n".join(lines)


def _flops_line(name: str, part: Flops, plan: Plan, total: float) -> str:
    cells = "".join(f"{number_of(value / plan.size.batch / 1e9):>10}" for value in (part.forward, part.backward, total))
    return f"  {name:<24}{cells}{100 * total / plan.total:>10.1f} %"


def number_of(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 or value == 0 else f"{value:.2g}"


def count_of(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def bytes_of(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
