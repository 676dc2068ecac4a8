"""The whole step against plain loops, with a pair model and a Con-D that are tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import step_oracle
from lavis_mafa.objectives import EcmSettings, EncodedBatch, ExtraPairs, ItcSettings, StepSettings, known_positives, mafa_step, text_key

B, K, TEMPERATURE = 6, 6, 0.1


class TablePairs:
    """ITM logits read from a table; the LM loss is the mean of another one. Remembers what it was asked."""

    def __init__(self, seed: int = 0, size: int = K) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.itm = torch.randn(size, size, 2, generator=generator).requires_grad_()
        self.lm = torch.randn(size, size, generator=generator).requires_grad_()
        self.asked_itm: list[tuple[int, int]] | None = None
        self.asked_lm: list[tuple[int, int]] | None = None

    def itm_logits(self, image_index, text_index):
        self.asked_itm = list(zip(image_index.tolist(), text_index.tolist(), strict=True))
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


# --- against the loops ---------------------------------------------------------------------------------------------------

WEIGHTS = [w for w in torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 0.5])] * 3).tolist() if any(w)]
SUBSETS = [[], ["itc"], ["itm"], ["lm"], ["itc", "itm"], ["itc", "lm"], ["itm", "lm"], ["itc", "itm", "lm"]]
STEPS = st.builds(
    StepSettings,
    itc=st.builds(
        ItcSettings, weight=st.just(1.0), smoothing=st.sampled_from([0.0, 0.5, 1.0]), consistency=st.sampled_from([0.0, 0.2, 2.0])
    ),
    ecm=st.builds(
        EcmSettings,
        enabled=st.booleans(),
        threshold=st.sampled_from([0.75, 0.5, 1.0]),
        ambiguous_from=st.sampled_from([0.5, 0.25, 0.0]),
        use_in=st.sampled_from(SUBSETS) | st.just(SUBSETS[-1]),
        false_negatives=st.sampled_from(["convert", "eliminate"]),
        resample_ambiguous=st.booleans(),
    ),
    negatives=st.sampled_from(["hardest", "hardest", "sampled", "random", "none"]),
)


@dataclass
class Problem:
    """A step's inputs as tensors; keys are those of all C columns, own ones first."""

    sims: torch.Tensor  # [2, B, C]
    teacher: torch.Tensor | None
    alpha: float
    keys: torch.Tensor  # [C, 2]
    candidates: int
    con_d: torch.Tensor  # [K, K], with extra rows more
    seed: int
    extra: ExtraPairs | None = None

    def encoded(self) -> EncodedBatch:
        sims, teacher = self.sims.clone().requires_grad_(), None
        if self.teacher is not None:
            teacher = self.teacher.clone().requires_grad_()
        batch = EncodedBatch(
            *(sims[0], sims[1], torch.tensor(0.25).requires_grad_()),
            known_positives(self.keys[: self.sims.shape[1]], self.keys),
            self.candidates,
            *((None, None) if teacher is None else teacher),
            distillation=self.alpha,
            extra=self.extra,
        )
        batch.leaves = sims, teacher
        return batch

    def noise(self, negatives: str) -> tuple[list[list[float]], list[list[float]]]:
        """The draws of a step, in its order: of the images' texts, then of the texts' images."""
        torch.manual_seed(self.seed)
        shape = self.sims.shape[1], self.candidates
        if negatives == "sampled":
            return tuple((-torch.empty(shape).exponential_().log()).tolist() for _ in range(2))
        return tuple(torch.rand(shape).tolist() for _ in range(2))

    def as_lists(self, pairs: TablePairs, how: StepSettings):
        return step_oracle.Given(
            sims=tuple(self.sims.tolist()),
            teacher=None if self.teacher is None else tuple(self.teacher.tolist()),
            alpha=self.alpha,
            temperature=0.25,
            image_keys=self.keys[:, 0].tolist(),
            text_keys=self.keys[:, 1].tolist(),
            candidates=self.candidates,
            noise=self.noise(how.negatives),
            con_d=self.con_d.tolist(),
            itm_logits=pairs.itm.tolist(),
            lm_losses=pairs.lm.tolist(),
            **{} if self.extra is None else self._extra_as_lists(self.extra),
        )

    @staticmethod
    def _extra_as_lists(extra: ExtraPairs):
        columns = (column.long().tolist() for column in (extra.image_index, extra.text_index, extra.label, extra.weight))
        return {"extra": list(zip(*columns, strict=True)), "judged": extra.texts is not None, "in_place": extra.in_place}


EXTRA = st.sampled_from([None, None, "texts", "texts, judged", "texts in place", "texts in place, judged", "images and texts"])


def extra_pairs(kind: str | None, rows: int, candidates: int, generator: torch.Generator) -> ExtraPairs | None:
    """A text beyond the candidates for each image; or two images and two texts in all sorts of pairs."""
    if kind is None:
        return None
    own, beyond = torch.arange(rows), candidates + torch.arange(rows)
    weight = torch.randint(2, (rows,), generator=generator).float()
    if kind == "images and texts":
        image, text = (torch.tensor(rows_) for rows_ in ([candidates, candidates, 0], [0, candidates, candidates]))
        return ExtraPairs(image, text, torch.tensor([1, 0, 0]), torch.tensor([1.0, 1.0, 0.0]))
    texts = [f"text {b}" for b in range(rows)] if "judged" in kind else None
    return ExtraPairs(own, beyond, torch.zeros_like(own), weight, texts, "in place" in kind)


def problem(
    rows: int, more: int, queue: int, teacher: bool, known: int, seed: int, ties: bool = True, extra: str | None = None
) -> Problem:
    """``more`` candidates of other ranks, ``queue`` further keys; of ``known`` images and texts (0: nothing is known)."""
    generator = torch.Generator().manual_seed(seed)
    candidates = rows + more
    sims = torch.rand(2, rows, candidates + queue, generator=generator) * 2 - 1
    if ties and seed % 2:
        sims = (sims * 4).round() / 4
    probabilities = torch.tensor([0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0])  # thresholds among them
    keys = torch.full((candidates + queue, 2), -1)
    if known:
        keys = torch.randint(-1, known, keys.shape, generator=generator)
    probability = probabilities[torch.randint(len(probabilities), (candidates + rows, candidates + rows), generator=generator)]
    return Problem(
        sims,
        torch.rand(sims.shape, generator=generator) * 2 - 1 if teacher else None,
        0.4 if teacher else 0.0,
        keys,
        candidates,
        probability,
        seed,
        extra_pairs(extra, rows, candidates, generator),
    )


@settings(max_examples=400, deadline=None)
@given(
    how=STEPS,
    weights=st.sampled_from(WEIGHTS) | st.just((1.0, 1.0, 1.0)),
    rows=st.integers(1, 5),
    more=st.sampled_from([0, 0, 2, 5]),
    queue=st.sampled_from([0, 3]),
    teacher=st.booleans(),
    known=st.sampled_from([0, 2, 6, 30]),
    seed=st.integers(0, 10**6),
    extra=EXTRA,
)
def test_the_step_equals_the_loops(how, weights, rows, more, queue, teacher, known, seed, extra):
    how = replace(how, itc=replace(how.itc, weight=weights[0]), itm_weight=weights[1], lm_weight=weights[2])
    matches = weights[1] > 0 and how.negatives != "none"
    assume(weights[0] or weights[2] or matches)
    given_ = problem(rows, more, queue, teacher, known, seed, extra=extra)
    pairs = TablePairs(seed, 2 * rows + more)
    encoded, as_lists = given_.encoded(), given_.as_lists(pairs, how)
    if how.negatives == "sampled":  # rounding decides between scores that are all but equal
        scores = given_.sims[:, :, : rows + more] / 0.25 + torch.tensor(as_lists.noise)
        assume(rows + more < 2 or scores.sort(dim=2).values.diff(dim=2).min() > 1e-4)
    wanted = step_oracle.step(as_lists, how)

    torch.manual_seed(seed)
    output = mafa_step(pairs, encoded, {}, how, TableConD(given_.con_d) if how.ecm.enabled else None)
    output.loss.backward()

    exists = output.mined.pairs.exists
    mined = output.mined.pairs.image_index[exists].tolist(), output.mined.pairs.text_index[exists].tolist()
    assert list(zip(*mined, strict=True)) == wanted.asked
    close(output.loss, wanted.loss)
    for name, loss in (("itc", output.loss_itc), ("itm", output.loss_itm), ("lm", output.loss_lm)):
        assert (loss is None) == (name not in wanted.losses)
        if loss is not None:
            close(loss, wanted.losses[name])
    assert output.metrics.keys() == wanted.metrics.keys() | {"temperature"}
    for name, value in wanted.metrics.items():
        assert output.metrics[name].item() == pytest.approx(value, rel=1e-5, nan_ok=True), name
    # no pass of a loss that is off; the others are asked about the right pairs
    assert (pairs.asked_itm is None) != matches and (pairs.asked_lm is None) == (weights[2] == 0)
    assert not Counter((i, t) for i, t, _ in wanted.itm) - Counter(pairs.asked_itm or [])
    appended = 0 if given_.extra is None or given_.extra.in_place else len(given_.extra.label)
    assert pairs.asked_itm is None or len(pairs.asked_itm) == 3 * rows + appended  # static shapes
    assert (pairs.asked_lm or []) == wanted.lm
    sims, of_teacher = encoded.leaves
    if weights[0]:
        close(sims.grad, torch.tensor(wanted.of_sims))
        close(encoded.temperature.grad, wanted.of_temperature)
    else:
        assert sims.grad is None and encoded.temperature.grad is None
    assert of_teacher is None or of_teacher.grad is None
    for table, gradients in ((pairs.itm, wanted.of_itm), (pairs.lm, wanted.of_lm)):
        expected = torch.zeros_like(table)
        for place, value in gradients.items():
            expected[place] = value
        close(torch.zeros_like(table) if table.grad is None else table.grad, expected)


def close(found: torch.Tensor, wanted) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float32)
    torch.testing.assert_close(found.detach(), wanted, atol=2e-5, rtol=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    how=STEPS,
    rows=st.integers(1, 3),
    queue=st.sampled_from([0, 3]),
    teacher=st.booleans(),
    known=st.sampled_from([0, 6]),
    seed=st.integers(0, 999),
)
def test_the_steps_of_two_ranks_are_the_shares_of_one(how, rows, queue, teacher, known, seed):
    """batch_scope: global. Each rank has its own rows first; all ask one Con-D, and every candidate counts as for one process."""
    how = replace(how, negatives="hardest")
    whole = problem(2 * rows, 0, queue, teacher, known, seed, ties=False)
    table = TablePairs(seed, 2 * rows)
    encoded = whole.encoded()
    one = mafa_step(table, encoded, {}, how, TableConD(whole.con_d))
    one.loss_itc.backward()
    losses, asked, lm, gradients = [], [], set(), []
    for rank in (0, 1):
        own = list(range(rank * rows, (rank + 1) * rows))
        order = own + [k for k in range(2 * rows) if k not in own]
        columns = order + list(range(2 * rows, 2 * rows + queue))
        share = replace(
            whole,
            sims=whole.sims[:, own][:, :, columns],
            teacher=None if whole.teacher is None else whole.teacher[:, own][:, :, columns],
            keys=whole.keys[columns],
            con_d=whole.con_d[order][:, order],
        )
        pairs = TablePairs(seed, 2 * rows)
        mine = share.encoded()
        output = mafa_step(pairs, mine, {}, how, TableConD(share.con_d))
        output.loss_itc.backward()
        losses.append(output.loss_itc.detach())
        asked += [(order[i], order[t]) for i, t in pairs.asked_itm]
        lm |= {(order[i], order[t]) for i, t in pairs.asked_lm}
        gradients.append(mine.leaves[0].grad[:, :, torch.tensor(columns).argsort()])
    close(torch.stack(losses).mean(), one.loss_itc.detach())
    close(torch.cat(gradients, dim=1) / 2, encoded.leaves[0].grad)
    assert sorted(asked) == sorted(table.asked_itm) and lm == set(table.asked_lm)


def test_a_texts_key_is_the_text_alone():
    """On every process and in every run; the number itself is in checkpoints."""
    texts = ["a red dog", "a red cat", "A red dog", "", "\ud800", *(f"caption {i}" for i in range(1000))]
    keys = [text_key(text) for text in texts]
    assert len(set(keys)) == len(texts) and all(0 <= key < 2**63 for key in keys)
    digest = hashlib.blake2b(b"a red dog", digest_size=8).hexdigest()
    assert text_key(" a\tred  dog\n") == keys[0] == int(digest, 16) // 2


# --- what has nothing to do, or cannot be done ----------------------------------------------------------------------------


def test_no_false_negative_is_the_plain_loss_exactly():
    """A Con-D that rejects everything, without smoothing, changes no bit against ECM switched off (ALBEF-Base)."""
    plain = StepSettings(ItcSettings(smoothing=0.0), EcmSettings(enabled=False))
    with_ecm = replace(plain, ecm=EcmSettings(enabled=True))
    one = mafa_step(TablePairs(), batch(), {}, plain)
    other = mafa_step(TablePairs(), batch(), {}, with_ecm, TableConD(torch.zeros(K, K)))
    assert torch.equal(one.loss_itc, other.loss_itc)
    assert torch.equal(one.loss_itm, other.loss_itm)
    assert torch.equal(one.loss_lm, other.loss_lm)


def test_one_sample_gives_finite_losses():
    encoded = EncodedBatch(torch.ones(1, 1), torch.ones(1, 1), torch.tensor(0.1), torch.ones(1, 1, dtype=torch.bool), candidates=1)
    output = mafa_step(TablePairs(), encoded, {}, StepSettings(), TableConD(torch.ones(K, K)))
    assert torch.isfinite(output.loss)
    assert output.metrics["new_positive_share"] == 0  # its own pair is no new positive


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
