"""TCL's losses against loops, one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_mafa.objectives import (
    EcmSettings,
    EncodedBatch,
    IntraModal,
    ItcSettings,
    StepSettings,
    intra_modal_losses,
    local_loss,
    mafa_step,
    pooled_patches,
)

TEMPERATURE = 0.25


def nce(scores: list[float], positives: list[int]) -> float:
    """Cross-entropy with the target shared equally."""
    total = math.log(sum(math.exp(s) for s in scores))
    return sum(total - scores[c] for c in positives) / len(positives)


def local_by_loops(scores: list, known: list, real: list) -> float:
    """TCL section 3.2: each anchor with each of its own parts, against all parts of those it is not known to match."""
    losses = []
    for b, rows in enumerate(scores):
        negatives = [math.exp(s) for k, parts in enumerate(rows) if not known[b][k] for n, s in enumerate(parts) if real[k][n]]
        own = [math.exp(s) for n, s in enumerate(rows[b]) if real[b][n]]
        losses.append(sum(-math.log(s / (s + sum(negatives))) for s in own) / len(own))
    return sum(losses) / len(losses)


def random_problem(rows: int, more: int, queue: int, seed: int) -> tuple[IntraModal, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def cosines(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()

    candidates = rows + more
    known = torch.rand(rows, candidates + queue, generator=generator) < 0.2
    known |= torch.eye(rows, candidates + queue, dtype=torch.bool)
    real = torch.arange(5) < torch.randint(1, 6, (candidates, 1), generator=generator)
    whole = cosines(rows, candidates + queue), cosines(rows, candidates + queue)
    return IntraModal(whole, (cosines(rows, candidates, 4), cosines(rows, candidates, 5), real)), known


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), more=st.sampled_from([0, 2]), queue=st.sampled_from([0, 3]), seed=st.integers(0, 10**6))
def test_both_losses_equal_the_loops(rows, more, queue, seed):
    intra, known = random_problem(rows, more, queue, seed)
    found = intra_modal_losses(intra, torch.tensor(TEMPERATURE), known)
    whole = 0.0
    for cosines in intra.whole:
        for b, row in enumerate((cosines / TEMPERATURE).tolist()):
            whole += nce(row, [c for c in range(len(row)) if known[b, c]]) / rows / 2
    patches, words, real = intra.parts
    everywhere = torch.ones(rows + more, 4, dtype=torch.bool).tolist()
    local = local_by_loops((patches / TEMPERATURE).tolist(), known.tolist(), everywhere)
    local += local_by_loops((words / TEMPERATURE).tolist(), known.tolist(), real.tolist())
    assert found["loss_imc"].item() == pytest.approx(whole, rel=1e-5)
    assert found["loss_lmi"].item() == pytest.approx(local / 2, rel=1e-5, abs=1e-6)
    sum(found.values()).backward()
    assert all(cosines.grad.isfinite().all() for cosines in (*intra.whole, patches, words))
    assert not words.grad.masked_select(~real.expand_as(words)).any(), "what is after a text's end has no say"
    alone = local_loss(patches.detach() / TEMPERATURE, known[:, : rows + more])
    assert alone.item() == pytest.approx(
        local_by_loops((patches / TEMPERATURE).tolist(), known.tolist(), everywhere), rel=1e-5, abs=1e-6
    )


def test_the_gradient_of_the_local_loss():
    """By finite differences, in rows with and without negatives."""
    known = torch.tensor([[True, True, True], [False, True, False]])
    real = torch.tensor([[True, True], [True, False], [True, True]])
    logits = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1))
    exact = logits.clone().requires_grad_()
    local_loss(exact, known, real).backward()
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        step = torch.zeros_like(logits)
        step[tuple(place)] = 1e-3
        by_loops = [local_by_loops((logits + sign * step).double().tolist(), known.tolist(), real.tolist()) for sign in (1, -1)]
        assert exact.grad[tuple(place)].item() == pytest.approx((by_loops[0] - by_loops[1]) / 2e-3, abs=1e-3)


@pytest.mark.parametrize(("side", "regions"), [(16, 4), (24, 4), (4, 2), (7, 2), (1, 1)])
def test_regions_are_means_of_patches(side, regions):
    patches = torch.randn(2, side * side, 3)
    found = pooled_patches(patches)
    assert found.shape == (2, regions**2, 3)
    for place in range(regions**2):
        rows, columns = (
            range(at * side // regions, math.ceil((at + 1) * side / regions)) for at in (place // regions, place % regions)
        )
        wanted = torch.stack([patches[:, r * side + c] for r in rows for c in columns]).mean(dim=0)
        torch.testing.assert_close(found[:, place], wanted)


def test_patches_that_make_no_square_are_refused():
    with pytest.raises(ValueError, match="12 patches make no square"):
        pooled_patches(torch.zeros(1, 12, 2))


@pytest.mark.parametrize("on", [("whole",), ("parts",), ("whole", "parts")])
def test_the_step_averages_what_is_on_and_adds_consistency(on):
    """TCL: (i2t + t2i + i2i + t2t + two of parts) / 6."""
    intra, known = random_problem(3, 0, 0, 5)
    intra = IntraModal(**{name: getattr(intra, name) for name in on})
    sims = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(2))
    encoded = EncodedBatch(sims[0], sims[1], torch.tensor(TEMPERATURE), known, candidates=3)
    how = StepSettings(ItcSettings(smoothing=0.0), EcmSettings(enabled=False), "none", lm_weight=0.0)

    def run(batch: EncodedBatch, consistency: float = 0.0):
        return mafa_step(None, batch, {}, replace(how, itc=replace(how.itc, consistency=consistency)))

    plain, tcl = run(encoded), run(replace(encoded, intra=intra))
    more = intra_modal_losses(intra, encoded.temperature, known)
    assert tcl.metrics.keys() - plain.metrics.keys() == more.keys() and len(more) == len(on)
    torch.testing.assert_close(tcl.loss_itc, (plain.loss_itc + sum(more.values())) / (1 + len(on)), check_dtype=False)
    added = run(encoded, 0.5).loss_itc - plain.loss_itc
    torch.testing.assert_close(run(replace(encoded, intra=intra), 0.5).loss_itc - tcl.loss_itc, added, check_dtype=False)
