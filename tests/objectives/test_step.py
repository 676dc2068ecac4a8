"""The whole step against the loops, with a pair model and a Con-D that are tables."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavis_mafa.objectives import EcmSettings, EncodedBatch, ItcSettings, StepSettings, mafa_step

spec = importlib.util.spec_from_file_location("oracles", Path(__file__).with_name("oracles.py"))
oracles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracles)

B, K, TEMPERATURE = 6, 6, 0.1


class TablePairs:
    """ITM logits read from a table; the LM loss is the mean of another one. Remembers what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.itm = torch.randn(K, K, 2, generator=generator)
        self.lm = torch.randn(K, K, generator=generator)
        self.asked_lm: list[tuple[int, int]] = []

    def itm_logits(self, image_index, text_index):
        return self.itm[image_index, text_index]

    def lm_loss(self, image_index, text_index):
        self.asked_lm = list(zip(image_index.tolist(), text_index.tolist(), strict=True))
        return self.lm[image_index, text_index].mean()


class TableConD:
    def __init__(self, table):
        self.table = table

    def match_probability(self, samples, image_index, text_index):
        return self.table[image_index, text_index]


def batch(seed: int = 0) -> EncodedBatch:
    generator = torch.Generator().manual_seed(seed)
    sims = torch.rand(2, B, K, generator=generator) * 2 - 1
    return EncodedBatch(sims[0], sims[1], torch.tensor(TEMPERATURE), torch.eye(B, K, dtype=torch.bool), candidates=K)


def expected(encoded: EncodedBatch, pairs: TablePairs, table: torch.Tensor | None, settings: StepSettings):
    known = encoded.known_positive.tolist()
    found = oracles.hard_negatives(encoded.sim_i2t.tolist(), encoded.sim_t2i.tolist(), known)
    ecm = settings.ecm
    p = [0.0] * (2 * B)
    if table is not None:
        p = [float(table[b, found["text"][b]]) for b in range(B)] + [float(table[found["image"][b], b]) for b in range(B)]
    in_itc = [v > ecm.threshold and "itc" in ecm.use_in for v in p]
    rows = [
        [oracles.itc_target_row(known[b], found[d][b], in_itc[o + b], settings.itc.smoothing) for b in range(B)]
        for d, o in (("text", 0), ("image", B))
    ]
    logits = [(s / TEMPERATURE).tolist() for s in (encoded.sim_i2t, encoded.sim_t2i)]
    itc = oracles.itc(logits[0], logits[1], rows[0], rows[1])
    itm = oracles.itm_rows(found, p if "itm" in ecm.use_in else [0.0] * (2 * B), ecm.threshold, ecm.ambiguous_from)
    itm_logits = [pairs.itm[i, t].tolist() for i, t, _ in itm]
    new = {(b, found["text"][b]) for b in range(B) if p[b] > ecm.threshold}
    new |= {(found["image"][b], b) for b in range(B) if p[B + b] > ecm.threshold}
    lm = [(b, b) for b in range(B)] + (sorted(new) if "lm" in ecm.use_in else [])
    return itc, oracles.cross_entropy(itm_logits, [y for _, _, y in itm]), lm


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("use_in", [["itc", "itm", "lm"], ["itc"], ["itm"], ["lm"]])
@pytest.mark.parametrize("seed", range(5))
def test_mafa_step_equals_the_loop(seed, use_in, smoothing):
    table = torch.rand(K, K, generator=torch.Generator().manual_seed(seed + 50))
    settings = StepSettings(ItcSettings(smoothing=smoothing), EcmSettings(use_in=use_in))
    encoded, pairs = batch(seed), TablePairs(seed)
    output = mafa_step(pairs, encoded, {}, settings, TableConD(table))
    itc, itm, lm = expected(encoded, pairs, table, settings)
    assert output.loss_itc.item() == pytest.approx(itc, rel=1e-5)
    assert output.loss_itm.item() == pytest.approx(itm, rel=1e-5)
    assert pairs.asked_lm == lm
    assert output.loss.item() == pytest.approx((output.loss_itc + output.loss_itm + output.loss_lm).item())


def test_no_false_negative_is_the_plain_loss_exactly():
    """A Con-D that rejects everything, without smoothing, changes no bit against ECM switched off (ALBEF-Base)."""
    plain = StepSettings(ItcSettings(smoothing=0.0), EcmSettings(enabled=False))
    with_ecm = replace(plain, ecm=EcmSettings(enabled=True))
    one = mafa_step(TablePairs(), batch(), {}, plain)
    other = mafa_step(TablePairs(), batch(), {}, with_ecm, TableConD(torch.zeros(K, K)))
    assert torch.equal(one.loss_itc, other.loss_itc)
    assert torch.equal(one.loss_itm, other.loss_itm)
    assert torch.equal(one.loss_lm, other.loss_lm)


def test_eliminated_pairs_leave_every_loss():
    """ECM-E: a false negative is no ITC key of its anchor, no ITM pair and no LM row."""
    settings = StepSettings(ItcSettings(smoothing=0.0), EcmSettings(false_negatives="eliminate"))
    encoded, pairs = batch(3), TablePairs(3)
    output = mafa_step(pairs, encoded, {}, settings, TableConD(torch.ones(K, K)))
    found = oracles.hard_negatives(encoded.sim_i2t.tolist(), encoded.sim_t2i.tolist(), torch.eye(B).bool().tolist())
    total = 0.0
    for sims, direction in ((encoded.sim_i2t, "text"), (encoded.sim_t2i, "image")):
        for b in range(B):
            kept = [k for k in range(K) if k != found[direction][b]]
            row = oracles.softmax([float(sims[b, k]) / TEMPERATURE for k in kept])
            total += -torch.log(torch.tensor(row[kept.index(b)])).item() / B / 2
    assert output.loss_itc.item() == pytest.approx(total, rel=1e-4)
    assert pairs.asked_lm == [(b, b) for b in range(B)]
    own = [pairs.itm[b, b].tolist() for b in range(B)]
    assert output.loss_itm.item() == pytest.approx(oracles.cross_entropy(own, [1] * B), rel=1e-5)


def test_keys_from_a_queue_are_contrasted_with_but_never_mined():
    encoded = batch()
    queue = torch.full((B, 3), 5.0)  # more similar than anything in the batch
    longer = replace(
        encoded,
        sim_i2t=torch.cat([encoded.sim_i2t, queue], 1),
        sim_t2i=torch.cat([encoded.sim_t2i, queue], 1),
        known_positive=torch.eye(B, K + 3, dtype=torch.bool),
    )
    settings = StepSettings(ItcSettings(smoothing=0.0), EcmSettings(enabled=False))
    short, long = mafa_step(TablePairs(), encoded, {}, settings), mafa_step(TablePairs(), longer, {}, settings)
    assert long.loss_itc > short.loss_itc
    assert torch.equal(long.loss_itm, short.loss_itm)


def test_one_sample_gives_finite_losses():
    encoded = EncodedBatch(torch.ones(1, 1), torch.ones(1, 1), torch.tensor(0.1), torch.ones(1, 1, dtype=torch.bool), candidates=1)
    output = mafa_step(TablePairs(), encoded, {}, StepSettings(), TableConD(torch.ones(K, K)))
    assert torch.isfinite(output.loss)
    assert output.figures["new_positive_share"] == 0  # its own pair is no new positive


def test_ecm_without_a_discriminator_is_refused():
    with pytest.raises(ValueError, match="no discriminator"):
        mafa_step(TablePairs(), batch(), {}, StepSettings())


def test_a_nan_probability_is_an_error():
    table = torch.rand(K, K)
    table[:, :] = float("nan")
    with pytest.raises(ValueError, match="probabilities must be in"):
        mafa_step(TablePairs(), batch(), {}, StepSettings(), TableConD(table))


# --- similarities that are not finite ----------------------------------------------------------------------------------


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("negatives", ["hardest", "sampled", "random"])
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("rows", [[2], list(range(B))], ids=["one image", "all images"])
def test_similarities_that_are_not_finite_give_such_a_loss(negatives, value, rows):
    """Con-D is NaN on the same pairs, as where an image has a NaN pixel: no exception, and no verdict on those pairs."""
    encoded, table = batch(), torch.full((K, K), 0.9)
    encoded.sim_i2t[rows], encoded.sim_t2i[:, rows], table[rows] = value, value, float("nan")
    output = mafa_step(TablePairs(), encoded, {}, StepSettings(negatives=negatives), TableConD(table))
    assert not output.loss_itc.isfinite() and not output.loss.isfinite()
    kept = output.mined.pairs.exists
    assert output.mined.probability[kept].isfinite().all()
    assert not (output.mined.connections.positive & ~kept).any()
    pairs = output.mined.pairs
    assert 0 <= pairs.image_index.min() and pairs.image_index.max() < K and 0 <= pairs.text_index.min() and pairs.text_index.max() < K


def test_a_nan_probability_of_a_sound_pair_is_an_error_beside_a_spoilt_one():
    encoded, table = batch(), torch.full((K, K), 0.1)
    encoded.sim_i2t[2], encoded.sim_t2i[:, 2] = float("nan"), float("nan")
    table[2] = table[4] = float("nan")
    with pytest.raises(ValueError, match=r"wrong at positions \[4\]"):
        mafa_step(TablePairs(), encoded, {}, StepSettings(), TableConD(table))


def test_a_spoilt_pair_changes_no_other_pairs_verdict():
    table = torch.rand(K, K, generator=torch.Generator().manual_seed(1))
    whole = mafa_step(TablePairs(), batch(), {}, StepSettings(), TableConD(table)).mined
    encoded = batch()
    encoded.sim_i2t[2] = float("nan")  # the texts' candidates stay as they were
    spoilt = mafa_step(TablePairs(), encoded, {}, StepSettings(), TableConD(table)).mined
    others = torch.arange(2 * B) != 2
    assert not spoilt.pairs.exists[2] and torch.equal(spoilt.pairs.exists[others], whole.pairs.exists[others])
    assert torch.equal(spoilt.connections.positive[others], whole.connections.positive[others])


def test_ranges_of_a_step():
    encoded, table = batch(), torch.rand(K, K)
    output = mafa_step(TablePairs(), encoded, {}, StepSettings(), TableConD(table))
    sims = torch.stack([encoded.sim_i2t, encoded.sim_t2i]) / TEMPERATURE
    torch.testing.assert_close(output.ranges["similarity"], torch.stack([sims.min(), sims.max()]))
    asked = output.mined.probability
    assert output.ranges["con_d_probability"].tolist() == [asked.min(), asked.max()]
    assert output.ranges["temperature"].tolist() == pytest.approx([TEMPERATURE, TEMPERATURE])
    assert output.ranges.keys() == {"similarity", "itm_logits", "temperature", "con_d_probability"}
