"""`analyse grounding`: figures against naive loops, and the command on scenes."""

from __future__ import annotations

import json
import random

import pytest
import torch

from boxes_file import write_boxes
from lavis_mafa.cli.main import main
from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.boxes import read_expressions
from lavis_mafa.tools.grounding import Tally, hottest_point, hottest_quadrant, quadrant_of
from lavis_mafa.weights import shipped

# --- figures -----------------------------------------------------------------------------------------------------------


def test_points_quadrants_and_boxes_are_those_of_pixel_loops():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(20):
        width, height = rng.randint(4, 13), rng.randint(4, 13)
        heat = torch.randn(height, width, generator=generator)
        pixels = [(float(heat[y, x]), x, y) for y in range(height) for x in range(width)]
        assert hottest_point(heat) == max(pixels)[1:]
        quarters: dict[int, list[float]] = {n: [] for n in range(4)}
        for value, x, y in pixels:
            quarters[quadrant_of((x, y, x + 1, y + 1), width, height)].append(value)
        # of an odd side the middle belongs to the lower and to the right, for boxes and for pixels alike
        assert hottest_quadrant(heat) == max(quarters, key=lambda n: sum(quarters[n]) / len(quarters[n]))


def test_a_perfect_map_is_always_right_and_a_blank_one_never(tmp_path):
    perfect, blank = Tally(), Tally()
    for number, one in enumerate(read_expressions([AnnotationFile(write_boxes(tmp_path))])):
        left, top, right, bottom = one.box
        pixels = torch.zeros(24, 32)
        pixels[top:bottom, left:right] = 1.0
        cam = torch.nn.functional.adaptive_avg_pool2d(pixels[None], 8).flatten()
        perfect.add(cam, number, one, 32, 24)
        blank.add(torch.zeros(64), number, one, 32, 24)
    figures = perfect.figures()
    assert [one.accuracy for one, _ in figures.values()] == [1.0] * 3 and perfect.blank == 0
    assert [chance for _, chance in figures.values()] == pytest.approx([0.25, (48 + 120 + 80 + 120) / 4 / 768, 0.25])
    assert [one.accuracy for one, _ in blank.figures().values()] == [0.0] * 3 and blank.blank == 4


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*more: str, yaml: str = "grit", weights: str = "scenes_con_d") -> int:
        start = ["analyse", "grounding", "--cfg-path", f"mafa/quickstart/scenes/{yaml}.yaml", "--checkpoint", str(shipped(weights))]
        options = ["--options", f"datasets.grit_scenes.build_info.root={scenes}", f"model.tokenizer={scenes}/vocab.txt"]
        return main([*start, "--boxes", str(scenes / "grounding_val.parquet"), *more, *options])

    return run


@pytest.mark.parametrize("by", ["itm", "itc"])
def test_the_command_end_to_end(command, tmp_path, capsys, by):
    assert command("--by", by, "--batch-size", "10") == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "output/grounding/grounding.json").read_text())
    assert content["images"] == 24 and content["expressions"] >= 48 and content["layer"] == (1 if by == "itm" else None)
    quadrant = content["results"]["quadrant"]
    assert quadrant["chance"] == 0.25 and quadrant["low"] > 0.25, "trained weights find more than guessing would"
    assert all(f"{100 * row['accuracy']:.1f}" in said for row in content["results"].values())
    if by == "itm":
        assert command("--by", by, "--batch-size", "3") == 0
        again = json.loads((tmp_path / "output/grounding_2/grounding.json").read_text())
        assert again["results"] == content["results"]


def test_what_the_command_refuses(command, tmp_path, capsys):
    for more, kind, message in (
        (["--layer", "2"], {}, "the layer is 2; allowed: 1 or more, and below 2,"),
        (["--layer", "1", "--by", "itc"], {}, "--layer is 1, but --by itc reads the image encoder's last block"),
        ([], {"yaml": "blip2_grit", "weights": "scenes_blip2_con_d"}, "model.arch is blip2_mafa, whose texts look at no patches"),
    ):
        assert command(*more, **kind) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "output").exists()
