"""Intervals and p against plain loops and enumeration, and how often they are wrong where the truth is known."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import run_folder
from lavis_mafa.errors import UserError
from lavis_mafa.tools.run_files import query_splits, read_evaluations, read_queries
from lavis_mafa.tools.significance import half_widths, interval, over_seeds, paired, paired_over_seeds, sign_flip


def queries(seed: int, images: int, shape: tuple[int, ...] = (), shared: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values [*shape, Q] with mean 0 and the image of each, one to four an image; ``shared``: what those of one image have alike."""
    rng = np.random.default_rng(seed)
    image = rng.permutation(np.repeat(np.arange(images), rng.integers(1, 5, images)))
    return rng.normal(size=(*shape, len(image))) + shared * rng.normal(size=(*shape, images))[..., image], image


# --- against loops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_drawing_images_by_hand(seed):
    values, image = queries(seed, 25, shared=2.0)
    values += 10  # else it would not matter that sums and counts are drawn together
    draw, means = random.Random(seed), []
    for _ in range(4000):
        drawn = [v for i in draw.choices(range(25), k=25) for v in values[image == i]]
        means.append(statistics.fmean(drawn))
    means.sort()
    low, high = interval(values, image)
    assert (float(low), float(high)) == pytest.approx((means[100], means[3899]), abs=0.06 * (means[3899] - means[100]))


@pytest.mark.parametrize("seed", range(3))
def test_p_is_that_of_all_signs(seed):
    values, image = queries(seed, 9, shared=1.0)
    values += 0.5 * seed
    seen = abs(values.sum())
    totals = [abs(sum(s * values[image == i].sum() for i, s in enumerate(signs))) for signs in itertools.product((1, -1), repeat=9)]
    assert float(sign_flip(values, image)) == pytest.approx(np.mean([total >= seen - 1e-9 for total in totals]))


def test_several_metrics_at_once_are_each_of_them_alone():
    values, image = queries(1, 40, (3,))
    low, high = interval(values, image)
    p = sign_flip(values, image)
    for row in range(3):
        assert (low[row], high[row]) == pytest.approx(tuple(map(float, interval(values[row], image))))
        assert p[row] == pytest.approx(float(sign_flip(values[row], image)), abs=0.02)


def test_neither_depends_on_the_order_of_queries():
    values, image = queries(2, 40)
    order = np.random.default_rng(0).permutation(len(values))
    assert interval(values[order], image[order]) == pytest.approx(interval(values, image))
    assert sign_flip(values[order], image[order]) == pytest.approx(sign_flip(values, image))


def test_what_has_no_spread():
    image = np.arange(50)
    assert tuple(map(float, interval(np.full(50, 100.0), image))) == (100, 100)
    assert sign_flip(np.zeros(50), image) == 1
    assert np.isnan(interval(np.arange(3.0), [7, 7, 7])).all() and sign_flip(np.arange(3.0), [7, 7, 7]) == 1


# --- how often they are wrong -------------------------------------------------------------------------------------------


def test_of_equal_models_one_in_twenty_looks_different():
    """Queries of one image share a part; taken one by one, far too many would."""
    values, image = queries(3, 60, (600,), shared=1.5)
    rate = np.mean(sign_flip(values, image, 499) < 0.05)
    assert 0.025 < rate < 0.075
    assert np.mean(sign_flip(values, np.arange(len(image)), 499) < 0.05) > 0.12


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    values, image = queries(4, 60, (400,), shared=1.5)
    low, high = interval(values, image, 499)
    assert 0.91 < np.mean((low <= 0) & (high >= 0)) < 0.98
    low, high = interval(values, np.arange(len(image)), 499)
    assert np.mean((low <= 0) & (high >= 0)) < 0.87


# --- of runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: run_folder.write_scores(folder / name, right, seed) for name, right, seed in (("mafa", 2.5, 1), ("grit", 1.0, 2))}


def test_the_queries_means_are_the_metrics_of_the_evaluation(scored):
    table, metrics = read_queries(scored["mafa"], "val").to_pandas(), read_evaluations(scored["mafa"])["val"]
    names = [name for name in table.columns if name not in ("direction", "query", "image")]
    assert len(names) == 10 and table.groupby("direction", observed=True).size().to_dict() == {"ir": 60, "tr": 30}
    for direction in ("tr", "ir"):
        for name in names:
            of = name.replace("itc_", f"itc_{direction}_") if name.startswith("itc_") else f"{direction}_{name}"
            assert table[table.direction == direction][name].mean() == pytest.approx(metrics[of], abs=1e-4), of
    texts = table[table.direction == "ir"]
    assert (texts["image"] == texts["query"] % 30).all() and (table[table.direction == "tr"].eval("image == query")).all()


def test_two_runs_are_compared_query_by_query(scored):
    found = paired(scored["mafa"], scored["grit"], "val", "r_precision", "ir")
    means = [read_evaluations(run)["val"]["ir_r_precision"] for run in scored.values()]
    assert (found.mean_a, found.mean_b) == pytest.approx(means, abs=1e-4) and found.difference == pytest.approx(means[0] - means[1])
    assert found.low < found.difference < found.high and found.p < 0.0001
    assert found.sentence("MAFA", "GRIT") == (
        f"MAFA above GRIT by {found.difference:.1f} ± {(found.high - found.low) / 2:.1f} points of R-Precision, IR; p < 0.0001"
    )
    back = paired(scored["grit"], scored["mafa"], "val", "r_precision", "ir")
    assert back.difference == -found.difference and "GRIT below MAFA by" in back.sentence("GRIT", "MAFA")
    same = paired(scored["grit"], scored["grit"], "val", "itc_r1", "tr")
    assert (same.difference, same.p) == (0, 1)
    assert same.sentence("A", "B") == "A and B cannot be told apart: +0.0 ± 0.0 points of R@1 by ITC alone, TR; p = 1"


def test_the_texts_of_an_image_are_one_witness(scored, tmp_path):
    other = run_folder.write_scores(tmp_path, 1.1, seed=5)
    found = paired(other, scored["grit"], "val", "map_at_r", "ir")
    a, b = (table.filter(pc.equal(table["direction"], "ir")) for table in (read_queries(run, "val") for run in (other, scored["grit"])))
    difference, image = a["map_at_r"].to_numpy() - b["map_at_r"].to_numpy(), a["image"].to_numpy()
    assert len(image) == 60 and len(set(image)) == 30 and 0.001 < found.p < 0.999
    wanted = (*map(float, interval(difference, image)), float(sign_flip(difference, image)))
    assert (found.low, found.high, found.p) == pytest.approx(wanted, rel=1e-4)


def test_pairs_are_surer_than_two_runs_apart(scored, tmp_path):
    """A model and itself with two queries of a hundred better: seen, though their own intervals overlap widely."""
    table = read_queries(scored["grit"], "val")
    better = table["r_precision"].to_numpy().copy()
    better[better < 100] += 2
    (tmp_path / "result").mkdir()
    changed = table.set_column(table.column_names.index("r_precision"), "r_precision", pa.array(better))
    pq.write_table(changed, tmp_path / "result/val_queries.parquet")
    found = paired(tmp_path, scored["grit"], "val", "r_precision", "tr")
    assert found.p < 0.001 and found.high - found.low < half_widths(scored["grit"], "val")["tr_r_precision"]


def test_half_widths_are_named_as_the_metrics(scored, tmp_path):
    found = half_widths(scored["mafa"], "val")
    metrics = read_evaluations(scored["mafa"])["val"]
    assert set(found) == set(metrics) - {"split", "epoch", "rank_by", "agg_metrics", "itc_agg_metrics"}
    assert all(value > 0 for name, value in found.items() if 0 < metrics[name] < 100)
    assert half_widths(scored["mafa"], "test") == half_widths(tmp_path, "val") == {}


def test_what_cannot_be_compared_is_one_message(scored, tmp_path):
    mafa = scored["mafa"]
    with pytest.raises(
        UserError, match=r"no metrics of single queries of the split 'test' .*it has those of: val\. .*lavis-mafa evaluate"
    ):
        paired(mafa, scored["grit"], "test", "r1", "tr")
    with pytest.raises(UserError, match=r"has no metrics of single queries of the split 'val' .*those of: none"):
        paired(mafa, tmp_path, "val", "r1", "tr")
    with pytest.raises(UserError, match=r"the metric 'r_precisoin' .* Did you mean 'r_precision'\? Known: r1, "):
        paired(mafa, scored["grit"], "val", "r_precisoin", "tr")
    for name, other in (("texts", {"texts": 61}), ("matches", {"matches": 1})):
        with pytest.raises(UserError, match="scored on other galleries in the split 'val'"):
            paired(mafa, run_folder.write_scores(tmp_path / name, 1.0, **other), "val", "r1", "tr")
    (tmp_path / "result").mkdir()
    (tmp_path / "result/val_queries.parquet").write_bytes(b"PAR1")
    assert query_splits(tmp_path) == ["val"]
    with pytest.raises(UserError, match="val_queries.parquet is not readable as Parquet"):
        paired(mafa, tmp_path, "val", "r1", "tr")


# --- over seeds ---------------------------------------------------------------------------------------------------------


def test_over_seeds_students_t():
    assert over_seeds([1.0]) is None
    values = [60.0, 62.0, 61.0, 65.0]
    # t of 3 degrees of freedom at 97.5 %: 3.182
    assert over_seeds(values) == pytest.approx(3.1824 * statistics.stdev(values) / 2, rel=1e-4)
    others = [59.0, 60.5, 58.0, 63.0]
    found = paired_over_seeds(values, others)
    differences = [a - b for a, b in zip(values, others, strict=True)]
    assert found["difference"] == pytest.approx(statistics.fmean(differences))
    assert found["half"] == pytest.approx(3.1824 * statistics.stdev(differences) / 2, rel=1e-4)
    # where the interval ends at 0, p is 0.05
    edge = paired_over_seeds([v + found["half"] - found["difference"] for v in values], others)
    assert edge["p"] == pytest.approx(0.05)
    assert paired_over_seeds(values, values) == {"difference": 0.0, "half": 0.0, "p": None}
