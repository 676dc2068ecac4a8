"""`analyse soft-labels`: the labels against naive loops, their properties, and the command on emoji."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import oracles
import reduced
from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import Grit
from lavis_mafa.errors import UserError
from lavis_mafa.objectives import EncodedBatch, consistency_loss, itc_loss
from lavis_mafa.tools.soft_labels import (
    CONSISTENCY,
    MOMENTUM,
    PAPERS_SUMS,
    S_ITC,
    Softening,
    SortedLabels,
    format_table,
    grouped_order,
    restore_teacher,
    soft_labels,
)

pytestmark = pytest.mark.slow

TEACHER = {"momentum_distillation": {"queue_size": 24, "alpha": 0.4}}


def encoded(count: int = 8, queue: int = 0, same: bool = False, seed: int = 0) -> EncodedBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(count, count + queue, generator=generator) * 2 - 1 for _ in range(4)]
    known = torch.eye(count, count + queue, dtype=torch.bool)
    if same:
        known[0, 1] = known[1, 0] = True
    teachers = draw[2:] if queue else [None, None]
    return EncodedBatch(draw[0], draw[1], torch.tensor(0.3), known, count, *teachers)


@pytest.mark.parametrize("same", [False, True])
def test_labels_are_those_of_the_formulas(same):
    batch, weight, alpha = encoded(queue=5, same=same), 0.2, 0.4
    labels = soft_labels(batch, Softening(0.5, weight, alpha))
    size, known = 8, batch.known_positive.tolist()
    sims = {0: batch.sim_i2t, 1: batch.sim_t2i}
    for direction in (0, 1):
        for b in range(size):
            own = oracles.itc_target_row(known[b][:size], 0, False, 0.0)
            other = oracles.softmax([float(v) / 0.3 for v in sims[1 - direction][b, :size]])
            taught = oracles.softmax([float(v) / 0.3 for v in (batch.teacher_i2t, batch.teacher_t2i)[direction][b]])
            everywhere = oracles.itc_target_row(known[b], 0, False, 0.0)
            wanted = {
                S_ITC: oracles.itc_target_row(known[b][:size], 0, False, 0.5),
                CONSISTENCY: [(y + weight * p) / (1 + weight) for y, p in zip(own, other, strict=True)],
                MOMENTUM: [(1 - alpha) * y + alpha * p for y, p in zip(everywhere, taught, strict=True)],
            }
            for method, row in wanted.items():
                assert labels[method][direction][b].tolist() == pytest.approx(row, abs=1e-6), method


def test_every_row_sums_to_one():
    for rows in soft_labels(encoded(queue=5, same=True), Softening(0.3, 0.7, 0.9)).values():
        for row in rows:
            torch.testing.assert_close(row.sum(dim=1), torch.ones(8))


def test_consistency_labels_train_as_grit_vlps_loss_does():
    batch, weight = encoded(), 0.2
    gradients = []
    for kind in ("labels", "loss"):
        logits = [(s / batch.temperature).requires_grad_() for s in (batch.sim_i2t, batch.sim_t2i)]
        if kind == "labels":
            loss = (1 + weight) * itc_loss(*logits, *soft_labels(batch, Softening(consistency=weight))[CONSISTENCY])
        else:
            loss = itc_loss(*logits, torch.eye(8), torch.eye(8)) + weight * consistency_loss(*logits)
        gradients.append(torch.autograd.grad(loss, logits))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_teacher_there_is_no_third_method():
    assert set(soft_labels(encoded(), Softening(distillation=0.4))) == {S_ITC, CONSISTENCY}
    assert set(soft_labels(encoded(queue=3), Softening(distillation=None))) == {S_ITC, CONSISTENCY}


def test_sums_are_of_the_averaged_sorted_rows():
    seen, batches = SortedLabels(8), [encoded(queue=5, seed=seed) for seed in range(3)]
    rows: dict[str, list[list[float]]] = {}
    for batch in batches:
        labels = soft_labels(batch, Softening(0.5, 0.2, 0.4))
        seen.add(labels)
        for method, both in labels.items():
            rows.setdefault(method, []).extend(sorted(row, reverse=True) for row in torch.cat(both).tolist())
    assert seen.anchors == 48
    for method, sums in seen.sums().items():
        for got, (start, end) in zip(sums, ((0, 5), (5, 8), (8, 13)), strict=True):
            naive = sum(sum(row[start:end]) for row in rows[method]) / 48
            assert (got is None and method != MOMENTUM and start == 8) or got == pytest.approx(naive, abs=1e-6)


@pytest.mark.parametrize(("size", "alpha"), [(96, 0.5), (16, 0.2), (6, 1.0)])
def test_the_sums_of_s_itc_have_a_closed_form(size, alpha):
    seen = SortedLabels(size)
    seen.add(soft_labels(encoded(size, same=True), Softening(smoothing=alpha)))
    top, rest, queue = seen.sums()[S_ITC]
    assert (top, queue) == (pytest.approx(1 - alpha + alpha * 5 / size), None)
    assert rest == pytest.approx(alpha * (size - 5) / size)
    if (size, alpha) == (96, 0.5):
        assert (round(top, 4), round(rest, 4)) == PAPERS_SUMS[S_ITC][:2]


def test_the_table_has_the_papers_numbers_and_says_what_is_left_out():
    seen = SortedLabels(8)
    seen.add(soft_labels(encoded(), Softening()))
    lines = format_table(seen, 0, "there is no teacher").splitlines()
    assert "paper, COCO scale" in lines[0] and "0.5260" in lines[2] and "0.9822" in lines[3]
    assert lines[4] == "Momentum Distillation is left out: there is no teacher."


def test_the_checkpoints_own_teacher_and_queue_come_back(tmp_path):
    trained, path = reduced.ours(itc=TEACHER), tmp_path / "trained.pth"
    with torch.no_grad():
        trained.vision_proj_m.weight.add_(1.0)
    torch.save({"model": trained.state_dict()}, path)
    model = reduced.ours(seed=1, itc=TEACHER)
    model.load_from_pretrained(str(path))
    assert not torch.equal(model.vision_proj_m.weight, trained.vision_proj_m.weight)
    assert restore_teacher(model, path) is None
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match="image_queue"):
        restore_teacher(reduced.ours(itc={"momentum_distillation": {"queue_size": 8}}), path)
    torch.save({"model": reduced.ours().state_dict()}, path)
    assert "no momentum teacher with a queue" in restore_teacher(model, path)
    assert "momentum_distillation is null" in restore_teacher(reduced.ours(), path)


def test_grouped_order_keeps_the_chosen_samples_and_groups_them():
    chosen, corners = torch.tensor([17, 3, 8, 12, 5, 9, 30, 21]), torch.eye(4)

    class Model:
        def grit_features(self, samples):
            features = corners[samples["index"] % 2]
            return features, features

    batches = [{"index": part} for part in chosen.split(3)]
    grit = Grit(queue_size=8, search_space=8)
    order = grouped_order(Model(), batches, chosen, 2, grit, seed=0)
    assert sorted(order.tolist()) == sorted(chosen.tolist())
    alike = [a % 2 == b % 2 for a, b in order.view(-1, 2).tolist()]
    assert sum(alike) >= 3


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher_checkpoint(tiny_yaml, tmp_path, monkeypatch):
    """An untrained model of the tiny YAML with a teacher."""
    from omegaconf import OmegaConf

    from lavis_mafa.config.check import check_yaml
    from lavis_mafa.models.albef import AlbefMafa

    monkeypatch.chdir(tmp_path)
    block = OmegaConf.merge(check_yaml(str(tiny_yaml), []).model, {"itc": TEACHER, "discriminator": None, "ecm": {"enabled": False}})
    torch.manual_seed(0)
    torch.save({"model": AlbefMafa.from_config(block).state_dict()}, tmp_path / "untrained.pth")
    return tmp_path / "untrained.pth"


def test_the_command_end_to_end(tiny_yaml, teacher_checkpoint, tmp_path, capsys):
    command = ["analyse", "soft-labels", "--cfg-path", str(tiny_yaml), "--checkpoint", str(teacher_checkpoint), "--max-samples", "70"]
    command += ["--output", "looked/labels"]
    assert main([*command, "--options", "model.itc.momentum_distillation.queue_size=24"]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "looked/labels/soft_labels.json").read_text())
    assert content["anchors"] == 4 * 16 * 2 and content["batch_size"] == 16
    assert content["sums"][S_ITC]["top1-5"] == pytest.approx(0.5 + 0.5 * 5 / 16)
    for method, sums in content["sums"].items():
        assert sum(value or 0 for value in sums.values()) == pytest.approx(1.0)
        assert f"{sums['top6-B']:.4f}" in next(line for line in said.splitlines() if line.startswith(method))
        curve = content["mean_sorted_labels"][method]
        assert curve == sorted(curve, reverse=True) and len(curve) == (40 if method == MOMENTUM else 16)
    assert content["paper, COCO scale"][MOMENTUM]["topB+1-B+Q"] == 0.3245
    assert (tmp_path / "looked/labels/soft_labels.png").read_bytes().startswith(b"\x89PNG")
    # again, into a folder of its own, in random batches, without the teacher
    assert main([*command, "--order", "random", "--smoothing", "0.2", "--batch-size", "10"]) == 0
    again = json.loads((tmp_path / "looked/labels_2/soft_labels.json").read_text())
    assert again["sums"][S_ITC]["top1-5"] == pytest.approx(0.8 + 0.2 * 5 / 10)
    assert MOMENTUM not in again["sums"] and "momentum_distillation is null" in capsys.readouterr().out


def test_what_it_refuses(tiny_yaml, teacher_checkpoint, capsys):
    command, usual = ["analyse", "soft-labels"], ["--cfg-path", str(tiny_yaml)]
    given = ["--checkpoint", str(teacher_checkpoint)]
    for more, message in (
        (["--checkpoint", "missing.pth"], "--checkpoint is 'missing.pth', but there is no such file."),
        ([*given, "--batch-size", "5"], "at least 6"),
        ([*given, "--max-samples", "12"], "the batch size is 16, but there are only 12 samples"),
        ([*given, "--batch-size", "33"], "must not exceed run.grit.search_space (32)"),
        ([*given, "--smoothing", "1.5"], "'1.5' is not a number between 0 and 1"),
        (["--cfg-path", "mafa/quickstart/blip2/stage_2.yaml", *given], "model.arch is 'blip2_opt_mafa'"),
        ([*given, "--options", "model.embed_dim=16"], "does not fit the model"),
    ):
        assert main([*command, *(usual if "--cfg-path" not in more else []), *more]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("lavis-mafa analyse: ") and message in said[-1], said
    assert not Path("output").exists(), "nothing is made before all is checked"
