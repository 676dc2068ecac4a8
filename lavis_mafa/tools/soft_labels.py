"""What soft labels each way of softening ITC gives to whom (MAFA Table 2, section D)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lavis_mafa.grit import GritQueue, next_epoch_order
from lavis_mafa.models.encoders import fold_token_type
from lavis_mafa.models.momentum import MOMENTUM_PARTS
from lavis_mafa.objectives import EncodedBatch, distilled_targets, itc_targets
from lavis_mafa.tools.curves import as_png
from lavis_mafa.weights import load_exactly, read_weights

S_ITC, CONSISTENCY, MOMENTUM = "S-ITC", "Consistency Loss", "Momentum Distillation"
Sums = tuple[float, float, float | None]
PAPER = "paper, COCO scale"
PAPERS_SUMS: dict[str, Sums] = {  # MAFA Table 2: B = 96, Q = 48000, the last epoch on 4M pairs in GRIT's order
    S_ITC: (0.5260, 0.4740, None),
    CONSISTENCY: (0.9822, 0.0178, None),
    MOMENTUM: (0.6746, 0.0009, 0.3245),
}
NOT_LAVIS = ("idx_queue", "text_queue_keys")  # a teacher without them is whole: what its queue holds is then not known
TEACHER = (*(f"{part}_m." for part in MOMENTUM_PARTS), "image_queue", "text_queue", "queue_ptr", "idx_queue")
Labels = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Softening:
    """alpha of S-ITC (MAFA eq. 5), lambda of the consistency loss (GRIT-VLP eq. 6), alpha of momentum distillation (ALBEF eq. 6)."""

    smoothing: float = 0.5
    consistency: float = 0.2
    distillation: float | None = None


def soft_labels(batch: EncodedBatch, softening: Softening) -> Labels:
    """The label rows of one batch by each method, for images and for texts.

    With y the hard labels (known positives share the mass), p_i2t and p_t2i the two directions' softmax over the batch:

    - S-ITC: ``(1 - alpha) y + alpha / B``.
    - Consistency loss: for an image ``(y + lambda p_t2i) / (1 + lambda)``, for a text ``(y + lambda p_i2t) / (1 + lambda)``; row b
      of p_t2i is text b against all images. This is what GRIT-VLP's loss trains towards: KL(q || p) is the cross-entropy of p with
      labels q, less a constant, so ``ITC(y) + lambda / 2 (KL + KL)`` is ``(1 + lambda)`` times ITC with these labels, plus a
      constant. MAFA writes ``(1 - a) y + a p``; that a is ``lambda / (1 + lambda)``, 1/6 for GRIT-VLP's 0.2.
    - Momentum distillation: ``(1 - alpha) y + alpha p``, with p and y over the batch and the queue, p by the teacher.

    Without a teacher in ``batch``, or with ``distillation`` None, the third method is left out.

    Returns:
        method -> rows of images, rows of texts: [B, K], with the queue [B, C]; each row sums to 1.
    """
    count, temperature = batch.candidates, batch.temperature.clamp(0.001, 0.5)  # the range it is kept in while training
    known = batch.known_positive[:, :count]
    hard, smooth = _labels(known, 0.0), _labels(known, softening.smoothing)
    logits_i2t, logits_t2i = batch.sim_i2t[:, :count] / temperature, batch.sim_t2i[:, :count] / temperature
    share = softening.consistency / (1 + softening.consistency)
    labels: Labels = {
        S_ITC: (smooth, smooth),
        CONSISTENCY: (distilled_targets(hard, logits_t2i, share), distilled_targets(hard, logits_i2t, share)),
    }
    if batch.teacher_i2t is not None and batch.teacher_t2i is not None and softening.distillation is not None:
        hard, alpha = _labels(batch.known_positive, 0.0), softening.distillation
        images, texts = batch.teacher_i2t / temperature, batch.teacher_t2i / temperature
        labels[MOMENTUM] = distilled_targets(hard, images, alpha), distilled_targets(hard, texts, alpha)
    return labels


def _labels(known: Tensor, smoothing: float) -> Tensor:
    nobody = torch.zeros(len(known), dtype=torch.long, device=known.device)
    return itc_targets(known, nobody, nobody.bool(), smoothing)


@dataclass
class SortedLabels:
    """The labels of each anchor in descending order, averaged over all anchors (section D, steps 2 and 3)."""

    batch_size: int
    anchors: int = 0
    total: dict[str, Tensor] = field(default_factory=dict)

    def add(self, labels: Labels) -> None:
        """Take one batch; its images and its texts are anchors alike."""
        for method, rows in labels.items():
            ordered = torch.cat(rows).sort(dim=1, descending=True).values.sum(dim=0, dtype=torch.float64).cpu()
            self.total[method] = self.total.get(method, 0) + ordered
        self.anchors += sum(len(rows) for rows in labels[S_ITC])

    def curves(self) -> dict[str, Tensor]:
        """method -> [N] the mean label of rank 1 to N."""
        return {method: total / self.anchors for method, total in self.total.items()}

    def sums(self) -> dict[str, Sums]:
        """method -> sums of the labels in Top1-5, Top6-B, TopB+1-B+Q; None where there is no queue (steps 4 and 5)."""
        size = self.batch_size
        return {
            method: (float(c[:5].sum()), float(c[5:size].sum()), float(c[size:].sum()) if len(c) > size else None)
            for method, c in self.curves().items()
        }


def restore_teacher(model: Any, checkpoint: Any) -> str | None:
    """Give the model the checkpoint's own momentum teacher and queue, which a start from ``pretrained`` leaves behind.

    Returns:
        why there is none, or None.

    Raises:
        UserError: the teacher's or the queue's sizes are others than the YAML's.
    """
    if getattr(model.settings.itc, "momentum_distillation", None) is None:
        return "model.itc.momentum_distillation is null, so there is no momentum teacher"
    own, state = model.state_dict(), fold_token_type(read_weights(checkpoint, "--checkpoint"))
    theirs = {name: value for name, value in state.items() if name.startswith(TEACHER)}
    if any(name.startswith(TEACHER) and name not in (*NOT_LAVIS, *theirs) for name in own):
        return f"{checkpoint} has no momentum teacher with a queue"
    load_exactly(model, {**own, **theirs}, f"--checkpoint: {checkpoint}")
    return None


def grouped_order(model: Any, batches: Any, chosen: Tensor, batch_size: int, grit: Any, seed: int) -> Tensor:
    """The samples ``chosen`` (LongTensor[n]) as GRIT groups them, by the features of a pass over ``batches``."""
    place = torch.full((int(chosen.max()) + 1,), -1)
    place[chosen] = torch.arange(len(chosen))
    queue = GritQueue(grit.queue_size, grit.search_space, grit.example_shuffle, seed, memory=grit.memory)
    for samples in batches:
        queue.collect(place[samples["index"]], *model.grit_features(samples))
    return chosen[next_epoch_order([queue.finish_epoch()], len(chosen), batch_size, grit.batch_shuffle, seed)]


def format_table(labels: SortedLabels, queue_size: int, left_out: str | None) -> str:
    """Table 2 of these data beside the paper's."""
    size = labels.batch_size
    heads = ("Top1-5", f"Top6-{size}", f"Top{size + 1}-{size + queue_size}" if queue_size else "TopB+1-B+Q")
    lines = [f"{'':24}{'':36}   {PAPER} (B 96, Q 48000)", f"{'sum of soft labels':24}" + "".join(f"{head:>12}" for head in heads)]
    lines[1] += "   " + "".join(f"{head:>12}" for head in ("Top1-5", "Top6-B", "TopB+1-B+Q"))
    for method, own in labels.sums().items():
        row = "".join("           -" if value is None else f"{value:12.4f}" for value in (*own, *PAPERS_SUMS[method]))
        lines.append(f"{method:24}{row[:36]}   {row[36:]}")
    if left_out is not None:
        lines.append(f"{MOMENTUM} is left out: {left_out}.")
    return "\n".join(lines)


def plot_curves(labels: SortedLabels) -> bytes:
    """PNG: the mean label of each rank, both axes logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=120)
    axis = figure.subplots()
    for method, curve in labels.curves().items():
        axis.plot(torch.arange(1, len(curve) + 1), curve, label=method, linewidth=1.8, marker="." if len(curve) < 200 else None)
    axis.axvline(labels.batch_size, color="grey", linestyle=":", linewidth=1, label=f"B = {labels.batch_size}")
    axis.set(xscale="log", yscale="log", xlabel="rank of the label among an anchor's", ylabel="mean soft label")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return as_png(figure)
