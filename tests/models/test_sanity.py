"""A Con-D that knows nothing is told of once, on the first batches; training is the same with and without the look."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import families
import launched
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.models import sanity
from lavis_mafa.models.con_d import GroundTruthDiscriminator, build_discriminator
from lavis_mafa.models.sanity import SanityCheck, partners
from lavis_mafa.objectives.trust import is_sane

FAMILIES = [("albef", False), ("blip", False), ("blip2", False)]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=[name for name, _ in FAMILIES])
HARDLY_BETTER = "score hardly better than shuffled ones"


class Says:
    """One probability for own pairs, another for the rest; a third where only hardest negatives are asked about."""

    def __init__(self, own: float, other: float, hardest: float | None = None) -> None:
        self.own, self.other, self.calls = own, other, 0
        self.hardest = other if hardest is None else hardest

    def match_probability(self, samples, image_index, text_index):
        self.calls += 1
        own = image_index == text_index
        return torch.where(own, self.own, self.other if own.any() else self.hardest)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=sanity.__name__)

    def read() -> list[tuple[str, str]]:
        records = [r for r in caplog.records if r.name == sanity.__name__]
        return [(r.levelname, r.getMessage()) for r in records if r.getMessage().startswith("Con-D (")]

    return read


def samples(family, number: int, **more):
    """The ``number``-th batch of a training."""
    return {**families.batch(family), "epoch": 0, "iters": number, "num_iters_per_epoch": 100, **more}


def train(family, con_d, batches: int = 6, **changes):
    model = families.build(family, con_d, **changes)
    for number in range(batches):
        families.step(model, samples(family, number), seed=number)
    return model


# --- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "level"),
    [(0.9, 0.1, "INFO"), (0.5, 0.5, "WARNING"), (0.1, 0.9, "WARNING"), (0.51, 0.5, "WARNING"), (0.3, 0.01, "INFO")],
    ids=["good", "constant", "inverted", "within the margin", "low but apart"],
)
def test_medians_are_told_once(said, own, other, level):
    con_d = Says(own, other)
    train(("albef", False), con_d)
    [(found, text)] = said()
    assert found == level and f"16 own pairs {own:.3f}, shuffled {other:.3f}, hardest negatives {other:.3f};" in text
    assert (HARDLY_BETTER in text) == ("CANNOT JUDGE" in text) == (level == "WARNING") and "Says" in text
    assert f"{own > 0.8:.0%}, {other > 0.8:.0%}, {other > 0.8:.0%} are above model.ecm.threshold (0.8)" in text
    assert con_d.calls == 6 + sanity.BATCHES  # one more on each of the first batches, none later


def test_an_anchor_without_a_negative_is_in_no_share(said):
    check, known = SanityCheck("Says", 0.8), torch.eye(4, dtype=torch.bool)
    for number in range(sanity.BATCHES):
        check.update(Says(0.95, 0.1), samples(("albef", False), number), known, torch.tensor([0.9, float("nan"), 0.7, float("nan")]))
    [(_, text)] = said()
    assert "hardest negatives 0.800; 100%, 0%, 50% are above" in text


def test_hardest_negatives_that_score_like_own_pairs_are_told(said):
    train(("albef", False), Says(0.558, 0.171, hardest=0.594))
    [(level, text)] = said()
    assert level == "WARNING" and "CANNOT JUDGE: hardest negatives (median 0.594) score like own pairs (0.558)" in text


@every_family
@pytest.mark.parametrize("seed", [1, 2])
def test_random_weights_are_told_by_their_files_name(tmp_path, said, family, seed):
    """A checkpoint of the right keys and sizes that was never trained."""
    path = tmp_path / "untrained.pth"
    torch.save({"model": families.REDUCED[family[0]].ours(seed).state_dict()}, path)
    model = families.build(family, discriminator={"arch": f"{family[0]}_mafa", "checkpoint": str(path), "precision": "fp32"})
    model.settings.ecm.enabled = True
    model.set_discriminator(build_discriminator(model.settings, model))
    for number in range(5):
        families.step(model, samples(family, number), seed=number)
    [(level, text)] = said()
    assert level == "WARNING" and HARDLY_BETTER in text and str(path) in text and "model.ecm.enabled: false" in text


def test_ground_truth_passes(said):
    truth = GroundTruth.from_pairs([(text, text) for text in "abcd"])
    ids = {
        "concept": torch.tensor([truth.concept_id(t) for t in "abcd"]),
        "text_key": torch.tensor([truth.text_key(t) for t in "abcd"]),
    }
    family = ("albef", False)
    model = families.build(family, GroundTruthDiscriminator(truth), discriminator={"arch": "ground_truth"})
    for number in range(5):
        families.step(model, samples(family, number, **ids))
    [(level, text)] = said()
    assert level == "INFO" and "Con-D (ground_truth): median match probability of 16 own pairs 1.000, shuffled 0.000" in text


def test_large_batches_need_no_four_of_them(said, monkeypatch):
    monkeypatch.setattr(sanity, "PAIRS", 8)
    con_d = Says(0.9, 0.1)
    train(("albef", False), con_d)
    assert con_d.calls == 6 + 2 and "of 8 own pairs" in said()[0][1]


def test_a_short_epoch_is_enough(said):
    family = ("albef", False)
    model = families.build(family, Says(0.5, 0.5))
    for number in range(3):
        families.step(model, samples(family, number, num_iters_per_epoch=2))
    assert "of 8 own pairs" in said()[0][1]


def test_nothing_to_compare_is_told_too(said):
    family = ("albef", False)
    model = families.build(family, Says(0.5, 0.5))
    for number in range(5):
        families.step(model, samples(family, number, text_input=["a red dog"] * 4))
    [(level, text)] = said()
    assert level == "INFO" and "is not checked" in text


def test_a_spoilt_image_does_not_count(said):
    family = ("albef", False)
    model = families.build(family, families.Always(0.5))
    for number in range(4):
        batch = samples(family, number)
        if number == 1:
            batch["image"][2] = float("nan")
        families.step(model, batch)
    [(level, text)] = said()
    # neither its own pair nor the one it is shuffled into
    assert level == "WARNING" and "15 own pairs 0.500, shuffled 0.500, hardest negatives 0.500" in text


# --- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{"epoch": 1}, {"iters": 40}])
def test_a_resumed_run_is_not_checked_again(said, where):
    con_d, family = Says(0.5, 0.5), ("albef", False)
    model = families.build(family, con_d)
    for _ in range(5):
        families.step(model, samples(family, 0, **where))
    assert con_d.calls == 5 and said() == []


def test_without_the_runners_keys_the_first_forwards_are_checked(said):
    con_d, family = Says(0.5, 0.5), ("albef", False)
    model = families.build(family, con_d)
    batch = families.REDUCED["albef"].batch(4)
    model.eval()(batch)
    assert con_d.calls == 1  # evaluation is not looked at
    model.train()
    for _ in range(5):
        families.step(model, dict(batch))
    assert len(said()) == 1 and con_d.calls == 1 + 5 + 4


def test_without_ecm_con_d_is_never_asked(said):
    con_d, family = Says(0.5, 0.5), ("albef", False)
    model = families.build(family, con_d, ecm={"enabled": False})
    families.step(model, samples(family, 0))
    assert con_d.calls == 0 and said() == []


# --- it changes nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES, ids=families.NAMES)
def test_training_is_equal_to_the_last_bit(tmp_path, family):
    path = tmp_path / "con_d.pth"
    torch.save({"model": families.REDUCED[family[0]].ours(1).state_dict()}, path)
    named = {"arch": f"{family[0]}_mafa", "checkpoint": str(path), "precision": "fp32"}
    ends = []
    for looks in (True, False):
        model = families.build(family, discriminator=named, itm={"negatives": "sampled"}, ecm={"threshold": 0.5})
        model.settings.ecm.enabled = True
        model.set_discriminator(build_discriminator(model.settings, model))
        model.con_d_check = model.con_d_check if looks else None
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        torch.manual_seed(0)
        for number in range(3):
            output = model(samples(family, number))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.detach())
        ends.append((losses, model.state_dict(), torch.get_rng_state()))
    (losses, state, random), (other_losses, other_state, other_random) = ends
    assert all(torch.equal(a, b) for a, b in zip(losses, other_losses, strict=True)) and torch.equal(random, other_random)
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


@pytest.mark.ranks
@pytest.mark.parametrize("scope", ["local", "global"])
def test_two_processes_tell_once(tmp_path, scope):
    path = tmp_path / "con_d.pth"
    torch.save({"model": families.REDUCED["albef"].ours(1).state_dict()}, path)
    script = Path(families.__file__).with_name("looking.py")
    done = launched.run(script, path, scope, cwd=tmp_path, processes=2, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(HARDLY_BETTER) == 1 and "of 8 own pairs" in done.stderr, done.stderr
    assert done.stderr.count("All 4 captions of a batch") == 1, done.stderr
    assert done.stdout.count("6 ranges") == 2, done.stdout


# --- its parts ---------------------------------------------------------------------------------------------------------


def test_a_partner_is_of_another_image_and_another_text():
    known = torch.eye(4, 6, dtype=torch.bool)
    known[0, 1] = known[1, 0] = True  # two captions of one image
    partner, exists = partners(["a", "b", "c", "b"], known)
    assert partner.tolist() == [2, 2, 3, 0] and exists.all()


def test_no_partner_where_all_match():
    assert not partners(["a", "b"], torch.ones(2, 2, dtype=torch.bool))[1].any()
    assert not partners(["a", "a"], torch.eye(2, dtype=torch.bool))[1].any()
    assert not partners(["a"], torch.eye(1, dtype=torch.bool))[1].any()


def test_chance_alone_seldom_looks_sane():
    """A Con-D that knows nothing scores both lists alike; scores are spread as widely as they can be."""
    torch.manual_seed(0)
    passed = sum(is_sane(torch.rand(256).round() - torch.rand(256).round()) for _ in range(1000))
    assert passed < 10


def test_scores_are_dropped_when_they_are_told():
    check = SanityCheck("con_d", 0.8)
    for _ in range(4):
        check.update(Says(0.9, 0.1), {"text_input": ["a", "b"]}, torch.eye(2, dtype=torch.bool))
    assert check.done and check.scores == check.hardest == []
