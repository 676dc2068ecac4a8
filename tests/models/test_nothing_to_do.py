"""Where there is nothing to do: finite losses, a gradient for every weight that ever gets one, and a word to the user, once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES, Always, batch, build, every_family, step
from lavis_mafa.models import sanity as nothing_to_do

pytestmark = pytest.mark.slow  # 200 steps of models

NO_NEGATIVE, NONE_LEFT, ONE_TEXT, NO_WORD = (
    "A batch has no negative",
    "ECM leaves a batch",
    "All 4 captions",
    "captions of a batch are empty",
)


def degenerate(family, case):
    """The batch; what is said of it without ECM."""
    return {
        "one sample": lambda: (batch(family, 1), [NO_NEGATIVE]),
        "one image": lambda: (batch(family, image_key=torch.zeros(4, dtype=torch.long)), [NO_NEGATIVE]),
        "one caption": lambda: (batch(family, text_input=["a red dog"] * 4), [ONE_TEXT, NO_NEGATIVE]),
        "no words": lambda: (batch(family, text_input=[""] * 4), [NO_WORD, NO_NEGATIVE]),
    }[case]()


@pytest.fixture
def warnings(caplog):
    def said() -> list[str]:
        texts = [r.getMessage() for r in caplog.records if r.name == nothing_to_do.__name__]
        return [text for text in texts if not text.startswith("Con-D (")]

    return said


@pytest.fixture(scope="module")
def trained_weights():
    """Which weights get a gradient where everything is to do."""
    return {family: step(build(family, Always(0.1)), batch(family))[1].keys() for family in FAMILIES}


def check_step(model, samples, wanted):
    output, gradients = step(model, samples)
    losses = [value for name, value in output.items() if name.startswith("loss")]
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses)
    assert gradients.keys() == wanted  # DDP without find_unused_parameters waits for each of them
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return output


@every_family
@pytest.mark.parametrize("case", ["one sample", "one image", "one caption", "no words"])
@pytest.mark.parametrize(
    ("negatives", "ecm"),
    [("hardest", None), ("hardest", "convert"), ("hardest", "eliminate"), ("sampled", "convert"), ("random", "eliminate")],
)
def test_a_degenerate_batch(family, case, negatives, ecm, trained_weights, warnings):
    con_d = None if ecm is None else Always(0.9)
    itc = {"smoothing": 0.5, "smooth_when": "always", "consistency": 0.2}
    model = build(family, con_d, itm={"negatives": negatives}, itc=itc, ecm={"false_negatives": ecm or "convert"})
    samples, wanted = degenerate(family, case)
    for _ in range(2):
        check_step(model, samples, trained_weights[family])
    said = warnings()
    assert len(said) == len(wanted) and all(part in text for part, text in zip(wanted, said, strict=True)), said


@every_family
@pytest.mark.parametrize(
    ("con_d", "ecm", "said"),
    [
        (0.9, {"false_negatives": "eliminate"}, NONE_LEFT),
        (0.9, {}, NONE_LEFT),
        (0.1, {"threshold": 0.0, "ambiguous_from": 0.0}, NONE_LEFT),
        (1.0, {"threshold": 1.0}, "model.ecm.threshold is 1.0, and no probability exceeds it"),
        (0.1, {}, None),
    ],
    ids=["all eliminated", "all converted", "threshold 0", "threshold 1", "nothing found"],
)
def test_verdicts_that_leave_nothing(family, con_d, ecm, said, trained_weights, warnings):
    model = build(family, Always(con_d), ecm=ecm)
    for _ in range(2):
        check_step(model, batch(family), trained_weights[family])
    assert len(warnings()) == (said is not None) and all(said in text for text in warnings())


@every_family
@pytest.mark.parametrize("negatives", ["hardest", "sampled"])
@pytest.mark.parametrize(
    ("probability", "ecm", "case"),
    [
        (0.1, {}, None),
        (0.1, {"false_negatives": "eliminate"}, None),
        (1.0, {"threshold": 1.0, "ambiguous_from": 1.0}, None),
        (0.9, {}, "one sample"),
        (0.9, {"false_negatives": "eliminate"}, "one image"),
    ],
    ids=["all rejected", "none eliminated", "threshold 1", "one sample", "one image"],
)
def test_where_ecm_has_nothing_to_do_the_step_is_the_plain_one(family, negatives, probability, ecm, case):
    samples = batch(family) if case is None else degenerate(family, case)[0]
    output, gradients = step(build(family, Always(probability), itm={"negatives": negatives}, ecm=ecm), samples)
    plain, plain_gradients = step(build(family, itm={"negatives": negatives}), samples)
    for name in ("loss", "loss_itc", "loss_itm"):
        assert torch.equal(output[name], plain[name]), name
    assert gradients.keys() == plain_gradients.keys()
    assert all(torch.equal(gradient, plain_gradients[name]) for name, gradient in gradients.items())


@every_family
def test_without_negatives_itm_is_that_of_the_own_pairs(family):
    model, own = build(family), torch.arange(4)
    samples, _ = degenerate(family, "one image")
    output, _ = step(model, samples)
    with torch.no_grad():
        model = build(family)
        logits = model.encode(model.inputs(samples)).pairs.itm_logits(own, own)
    torch.testing.assert_close(output.loss_itm.detach(), F.cross_entropy(logits, torch.ones(4, dtype=torch.long)))


@pytest.mark.parametrize("family", [("albef", False), ("albef", True)], ids=["plain", "teacher"])
def test_masked_lm_without_a_word_to_mask_is_zero(family, trained_weights, warnings):
    output = check_step(build(family, mlm={"mask_probability": 1.0}), degenerate(family, "no words")[0], trained_weights[family])
    assert output.loss_mlm == 0 and len(warnings()) == 2


@every_family
def test_pair_lists_may_be_empty(family):
    model = build(family)
    pairs = model.encode(model.inputs(batch(family))).pairs
    empty = torch.zeros(0, dtype=torch.long)
    assert pairs.itm_logits(empty, empty).shape == (0, 2)
    assert pairs.lm_loss(empty, empty) == 0


def test_con_d_that_never_finds_anything_is_told_after_many_pairs(monkeypatch, warnings):
    monkeypatch.setattr(nothing_to_do, "ASKED", 24)
    model = build(("albef", False), Always(0.1))
    for number in range(1, 9):
        step(model, batch(("albef", False)))
        assert len(warnings()) == (number >= 4)  # 8 pairs a step; looked at after steps 1, 2, 4 and 8
    assert "none of 32 hard negatives positive" in warnings()[0]


def test_one_find_is_enough(monkeypatch, warnings):
    monkeypatch.setattr(nothing_to_do, "ASKED", 24)
    model = build(("albef", False), Always(0.9))
    step(model, batch(("albef", False), 2))
    model.set_discriminator(Always(0.1))
    for _ in range(8):
        step(model, batch(("albef", False)))
    assert all("none of" not in text for text in warnings())


def test_a_batch_that_comes_late_is_told_as_well(warnings):
    """Sums reach back to the last look."""
    family = ("albef", False)
    model = build(family)
    for number in range(1, 9):
        step(model, batch(family, 1 if number == 5 else 4))
        assert len(warnings()) == (number == 8)


@every_family
def test_a_spoilt_batch_is_not_one_without_negatives(family, warnings):
    model, samples = build(family, Always(0.1)), batch(family)
    samples["image"].fill_(float("nan"))
    step(model, samples)
    assert warnings() == []


def test_nothing_is_said_on_other_ranks_or_while_evaluating(monkeypatch, warnings):
    family = ("albef", False)
    with torch.no_grad():
        build(family).eval()(batch(family, 1))
    monkeypatch.setattr(nothing_to_do, "rank", lambda: 1)
    step(build(family), batch(family, 1))
    assert warnings() == []
