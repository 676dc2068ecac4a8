"""What `count-false-negatives` and `mine` found, as pages and plots: against what went in, on results made without a model."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.objectives.itc import itc_loss, itc_targets
from lavis_mafa.tools import count_plots
from lavis_mafa.tools.count import Count, Sampling, Tally, count_results, samplings
from lavis_mafa.tools.curves import PRINT
from lavis_mafa.tools.findings import own_plot
from lavis_mafa.tools.report import smoothed_floor, smoothing_notes, truth_table
from lavis_mafa.tools.run_files import Run, open_runs

ABOUT = {"judge": "Con-D", "margin": None, "con_d": "con_d.pth", "seed": 42}


def counted(ways: list[Sampling], thresholds=(0.5,), lowest: float = 0.0, **about) -> dict:
    """A ``count.json`` of random scores; each later way has higher ones."""
    torch.manual_seed(0)
    count = Count({way: Tally(tuple(thresholds)) for way in ways}, truth_known=True, samples=100)
    count.own.add(torch.full((50,), 0.9))
    count.shuffled.add(torch.full((50,), 0.1))
    for number, tally in enumerate(count.tallies.values()):
        scores = lowest + (1 - lowest) * torch.rand(200) ** (6 - number)
        tally.add(scores, torch.ones(200, dtype=torch.bool), torch.rand(200) < scores)
    return count_results(count, 1.0, ABOUT | about)


ONE, MANY = samplings([64], [512]), samplings([16, 64], [128, 512])


def page_of(tmp_path: Path, results: dict, *more: Path) -> str:
    folder = tmp_path / "count"
    folder.mkdir(exist_ok=True)
    (folder / "count.json").write_text(json.dumps(results))
    assert main(["report", str(folder), *map(str, more), "--output", str(tmp_path / "r.html")]) == 0
    return html.unescape((tmp_path / "r.html").read_text())


def shares(results: dict) -> list[float]:
    return [100 * row["false_negatives"][0][f"wrt_{side}_share"] for row in results["ways"] for side in ("image", "text")]


# --- plots --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ways", "panels"),
    [(ONE, 1), (samplings([64], [128, 512]), 1), (samplings([16, 64], [128]), 1), (MANY, 2), (samplings([16, 64], []), 1)],
)
def test_every_share_is_drawn_inside_its_frame(ways, panels):
    results = counted(ways)
    found = count_plots._panels(results["ways"])
    assert len(found) == panels
    for draw in found.values():
        axis = Figure().subplots()
        draw(axis, results["ways"], PRINT)
        bars = sorted(patch.get_height() for patch in axis.patches if patch.get_height())
        dots = sorted(y for line in axis.lines if line.get_marker() == "o" for y in line.get_ydata())
        spaces = "search_space" in draw.__name__  # over M random batches are level lines without dots
        expected = sorted(shares({"ways": [row for row in results["ways"] if row["search_space"] or not spaces]}))
        assert (dots, bars) == (pytest.approx([] if bars else expected), pytest.approx(expected if bars else []))
        assert bool(bars) == (len({way.batch_size for way in ways}) == 1)
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > max(expected)
        left, right = axis.get_xlim()
        assert all(left < x < right for line in axis.lines if len(line.get_xdata()) for x in line.get_xdata())


@pytest.mark.parametrize("change", [{}, {"meaningless": "of $x_"}])
def test_all_panels_are_one_png(change):
    assert count_plots.count_plot(counted(MANY) | change).startswith(b"\x89PNG")


def test_bins_of_few_pairs_are_hollow_and_not_joined():
    results = counted(ONE)
    above, below = Figure().subplots(2)
    count_plots._calibration(above, below, results, PRINT)
    for number, row in enumerate(results["ways"]):
        bins = [b for b in row["truth"]["calibration"] if b["pairs"]]
        enough = [b for b in bins if b["pairs"] >= count_plots.FEW]
        assert 0 < len(enough) < len(bins)
        joined, every = above.lines[1 + 2 * number : 3 + 2 * number]
        assert list(joined.get_ydata()) == [b["true_share"] for b in enough] and joined.get_linestyle() == "-"
        assert list(every.get_ydata()) == [b["true_share"] for b in bins] and every.get_linestyle() == "None"
        assert every.get_markerfacecolor() == "none"
        heights = [patch.get_height() for patch in below.containers[number]]
        assert heights == [b["pairs"] for b in row["truth"]["calibration"]]


@pytest.mark.parametrize(("guide", "margin"), [(None, 0.0), (None, 0.9), (0.1, 0.0)])
def test_what_was_found_is_compared_with_the_own_pair(guide, margin):
    torch.manual_seed(0)
    found, own = torch.rand(300), torch.rand(300)
    rows = range(300)
    table = pa.table({"image": rows, "text": rows, "probability": found.numpy(), "own_probability": own.numpy()})
    results = {"settings": {"guide_margin": guide, "margin": margin}, "judge": "the guide"}
    plot = own_plot("a", results, table, [], 0)
    above = found >= margin * own if margin else found > own - (guide or 0.0)
    assert f"{above.double().mean():.1%} are" in plot.note and plot.note.startswith("The guide: ")


# --- pages --------------------------------------------------------------------------------------------------------------


def test_a_count_has_a_page_of_its_own(tmp_path):
    results = counted(MANY, (0.5, 0.8), con_d="<script>bite</script>")
    text = page_of(tmp_path, results)
    assert (tmp_path / "r.html").read_text().count("<script>bite") == 0
    for row in results["ways"]:
        for place, cells in enumerate(row["false_negatives"]):
            assert all(f"<td>{cells[f'wrt_{side}_share']:.1%}</td>" in text for side in ("image", "text"))
            assert f"<td>{row['truth']['thresholds'][place]['recall']:.1%}</td>" in text
    assert text.count("<svg viewBox") == 3 and "count.con_d" in text
    assert "times as many as random batches" in text and "Con-D's median p: own pairs 0.900, shuffled 0.100" in text
    assert 'id="gallery"' not in text and "Summary" not in text


def test_a_count_beside_a_run(tmp_path):
    run = run_folder.write_run(tmp_path / "run", None, metrics=False)
    text = page_of(tmp_path, counted(ONE), run)
    assert "False negatives, counted" in text and "Summary" in text and '<th scope="col">count</th>' in text
    summary = text[text.index('id="summary"') : text.index('id="counted"')]
    assert ">run</th>" in summary and ">count</th>" not in summary
    assert '<th scope="row">count</th>' not in text, "a count has no losses and no retrieval"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meaningless": "own pairs score like shuffled ones"}, "Meaningless, since own pairs score like shuffled ones"),
        ({}, "look before you believe it"),
    ],
)
def test_what_is_not_to_be_trusted_is_said_first(tmp_path, change, said):
    text = page_of(tmp_path, counted(ONE, lowest=0.84 if not change else 0.0) | change)
    problem = re.search(r'<p class="problem"><strong>(.*?)</strong>', text)
    assert problem is not None and said in problem[1]
    assert "times as many" not in text


def test_what_a_guide_found_bears_its_name(tmp_path):
    """`count-false-negatives` and `mine` with features, and one page about both."""
    torch.manual_seed(0)
    things, of = torch.randn(12, 8), torch.randint(12, (48,))
    files = {name: tmp_path / f"{name}.npy" for name in ("image", "text", "guide_image", "guide_text")}
    for number, file in enumerate(files.values()):
        np.save(file, (things[of] + (0.6, 0.6, 0.3, 0.3)[number] * torch.randn(48, 8)).numpy())
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{n}.png,thing {of[n]} of {n}\n" for n in range(48)))
    image, text, guide_image, guide_text = map(str, files.values())
    given = ["--annotations", str(tmp_path / "pairs.csv"), "--features", image, text, "--guide-features", guide_image, guide_text]
    given += ["--guide-margin", "0.1", "--batch-size", "8", "--search-space", "24", "--force"]
    assert main(["count-false-negatives", *given, "--output", str(tmp_path / "count")]) == 0
    assert main(["mine", *given, "--output", str(tmp_path / "mine")]) == 0
    page = page_of(tmp_path, json.loads((tmp_path / "count/count.json").read_text()), tmp_path / "mine")
    mined = json.loads((tmp_path / "mine/mine.json").read_text())
    assert "The guide's scores" in page and "Con-D's scores" not in page and "what the guide said" in page
    assert f"{mined['mined']} new pairs for {mined['images_with_new_captions']} images" in page and mined["mined"] > 5
    assert "mine: found against own pairs" in page and "above the own pair's less 0.1" in page
    assert "mine.guide_margin" in page and "count.margin" in page and "mine.json" in page and "model.ecm.threshold" not in page


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"ways": []}'])
def test_a_count_that_is_none_is_one_message(tmp_path, content, capsys):
    (tmp_path / "count.json").write_text(content)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "count.json" in error


# --- of runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "candidates"), [(0.5, 8), (0.2, 64), (1.0, 5), (0.0, 3)])
def test_the_floor_of_smoothed_targets_is_the_least_loss(alpha, candidates):
    targets = itc_targets(torch.eye(candidates, dtype=torch.bool), smoothing=alpha)
    best = itc_loss(targets.log(), targets.log(), targets, targets)
    assert smoothed_floor(alpha, candidates) == pytest.approx(float(best), abs=1e-5)


def test_smoothing_is_told_below_the_losses_it_lifts(runs):
    mafa, grit = open_runs([*runs])
    notes = smoothing_notes([mafa, grit])
    assert set(notes) == {"loss", "loss_itc"} and f"about {smoothed_floor(0.5, 96):.2f}" in notes["loss_itc"]
    assert mafa.name in notes["loss_itc"] and grit.name not in notes["loss_itc"]
    assert smoothing_notes([grit]) == {}


def test_precision_over_pairs_and_over_sightings_stand_side_by_side(runs):
    from lavis_mafa.tools.gallery import distinct_candidates, read_training_rows

    run = open_runs([runs[0]])[0]
    metrics = [record | {"con_d_precision": 0.25, "con_d_recall": 0.75} for record in run.metrics]
    run = Run(run.name, run.folder, run.config, metrics, {}, run.connections)
    table = truth_table([run], [distinct_candidates(0, run.connections, read_training_rows(run))])
    assert table is not None
    assert [row[1] for row in table.rows] == ["each pair once", "every sighting", "every sighting, last epoch"]
    assert table.rows[2][-2:] == ["25.0%", "75.0%"]
