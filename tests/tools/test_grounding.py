"""`analyse grounding`: maps against a pair alone, figures against naive loops, and the command on scenes."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import reduced
import reduced_blip
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading
from lavis_mafa.tools.grounding import (
    Tally,
    box_scores,
    ground,
    heat_of,
    hottest_point,
    hottest_quadrant,
    itc_maps,
    itm_maps,
    quadrant_of,
    read_boxes,
)
from lavis_mafa.weights import shipped

MODELS = {"albef": reduced, "blip": reduced_blip}


def box(left: int, top: int, right: int, bottom: int) -> dict[str, int]:
    return {"left": left, "top": top, "right": right, "bottom": bottom}


@pytest.fixture
def boxes_file(tmp_path):
    """Four images, 32 wide and 24 high, each with one of four squares, which its expression is about."""
    corners = [(0, 0, 8, 6), (20, 0, 32, 10), (2, 14, 10, 24), (18, 12, 30, 22)]
    rows = []
    for number, (left, top, right, bottom) in enumerate(corners):
        pixels = np.full((24, 32, 3), 30 * number, dtype=np.uint8)
        pixels[top:bottom, left:right] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": "the square", "box": box(*corners[number]), "boxes": [box(*c) for c in corners]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "boxes.parquet")
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "boxes.parquet"


# --- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_matching_map_is_the_mean_of_its_own_pairs_tokens(kind):
    model, samples = MODELS[kind].ours(), MODELS[kind].batch(4)
    image, text = torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        tokens, texts = model.image_rows(samples["image"])[0], model.text_rows(samples["text_input"])[0]
    maps = itm_maps(model, tokens, texts, image, text)
    zero = torch.zeros(1, dtype=torch.long)
    for found, i, t in zip(maps, image.tolist(), text.tolist(), strict=True):
        ids, mask = model.words([samples["text_input"][t]])
        alone = model.text_rows([samples["text_input"][t]])[0]
        words = word_maps(model, model.keys_values(tokens[i : i + 1]), alone, Reading.of(mask, model.device, zero, zero, 1))
        assert ids[0, -1] == model.tokenizer.sep_token_id and len(words) == mask.sum()
        wanted = torch.stack([words[w] for w in range(len(words) - 1)]).mean(dim=0)
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-3)
        assert found.shape == (16,) and found.min() >= 0 and found.max() > 0


def test_a_map_of_the_cosine_is_that_of_four_loops():
    """The gradient by hand: what the cosine gains where the class token looks a little more at one patch."""
    model, pixels = reduced.ours(), reduced.batch(2)["image"]
    with torch.no_grad():
        texts = model.text_rows(reduced.CAPTIONS[:2])[1]
        before = {name: p.grad for name, p in model.named_parameters()}
        every, crossed = torch.arange(2), itc_maps(model, pixels, texts, torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
        found = itc_maps(model, pixels, texts, every, every)
    torch.testing.assert_close(crossed[1:], found.flip(0), atol=1e-7, rtol=1e-4)
    assert not torch.allclose(crossed[0], crossed[1], rtol=1e-2), "another text has another map"
    assert all(p.grad is before[name] for name, p in model.named_parameters()) and not found.requires_grad
    vit = model.visual_encoder
    block, heads = vit.blocks[-1], reduced.HEADS
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        states = vit(pixels)
        handle.remove()
        q, k, v = block.attn.qkv(block.norm1(kept[0])).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(reduced.WIDTH / heads)).softmax(dim=-1)

        def cosine(weights: torch.Tensor) -> torch.Tensor:
            x = kept[0].double() + block.attn.double().proj((weights @ v.double()).transpose(1, 2).flatten(2))
            x = vit.norm.double()(x + block.mlp.double()(block.norm2.double()(x)))
            first = torch.nn.functional.normalize(model.vision_proj.double()(x[:, 0]), dim=-1)
            return (first * texts.double()).sum(dim=1)

        base, wanted = cosine(attention.double()), torch.zeros(2, 16)
        for head in range(heads):
            for patch in range(16):
                more = attention.double().clone()
                more[:, head, 0, 1 + patch] += 1e-6
                gain = (cosine(more) - base) / 1e-6
                wanted[:, patch] += (gain.clamp_min(0) * attention[:, head, 0, 1 + patch]).float() / heads
    assert states.shape[1] == 17 and wanted.max() > 0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-2)


def test_a_frozen_model_has_maps_too():
    model = reduced.ours().requires_grad_(False)
    with torch.no_grad():
        texts = model.text_rows(reduced.CAPTIONS[:2])[1]
    every = torch.arange(2)
    assert itc_maps(model, reduced.batch(2)["image"], texts, every, every).max() > 0
    assert model.visual_encoder.blocks[-1].attn.attention_map is None


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
        boxes = []
        while len(boxes) < 3:
            left, right = sorted(rng.sample(range(width + 1), 2))
            top, bottom = sorted(rng.sample(range(height + 1), 2))
            boxes.append((left, top, right, bottom))
        for score, (left, top, right, bottom) in zip(box_scores(heat, boxes).tolist(), boxes, strict=True):
            inside = [value for value, x, y in pixels if left <= x < right and top <= y < bottom]
            assert score == pytest.approx(sum(inside) / len(inside) ** 0.5, abs=1e-5)


def test_a_map_lies_on_its_image_as_its_patches_do():
    for patch in range(16):
        heat = heat_of(torch.eye(16)[patch], width=40, height=20)
        x, y = hottest_point(heat)
        assert heat.shape == (20, 40) and (x // 10, y // 5) == (patch % 4, patch // 4)


def test_a_perfect_map_is_always_right_and_a_blank_one_never(boxes_file):
    perfect, blank = Tally(), Tally()
    for number, one in enumerate(read_boxes(boxes_file)):
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


# --- the file ----------------------------------------------------------------------------------------------------------


def test_parquet_and_json_lines_say_the_same(boxes_file):
    one, other = read_boxes(boxes_file), read_boxes(boxes_file.with_suffix(".jsonl"))
    assert [(e.image, e.text, e.box, e.boxes) for e in one] == [(e.image, e.text, e.box, e.boxes) for e in other]
    assert one[1].box == (20, 0, 32, 10) and len(one[1].boxes) == 4 and one[1].image == boxes_file.parent / "1.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": None}, "row 2: a box is null; allowed: whole numbers left < right and top < bottom"),
        ({"box": box(8, 0, 8, 6)}, "row 2: a box is"),
        ({"box": {"left": 0, "top": 0, "right": 4}}, "row 2: a box is"),
        ({"box": box(0, 0, 3, 3)}, "row 2: the box .* is not among the 4 of 'boxes'"),
        ({"boxes": None}, "row 2: 'boxes' is null; allowed: a list of boxes"),
        ({"text": " "}, "row 2: 'text' is"),
        ({"image": "../1.png"}, "row 2: the image path '../1.png' leaves the image folder"),
        ({"image": "9.png"}, "row 2: no image at .*9.png; --images is the folder that the paths start from"),
    ],
)
def test_what_a_row_may_not_hold(boxes_file, change, message):
    rows = pq.read_table(boxes_file).to_pylist()
    rows[1] |= change
    pq.write_table(pa.Table.from_pylist(rows), boxes_file)
    with pytest.raises(UserError, match=message):
        read_boxes(boxes_file)


def test_what_a_file_may_not_be(boxes_file):
    table = pq.read_table(boxes_file)
    pq.write_table(table.drop_columns(["box"]), boxes_file)
    with pytest.raises(UserError, match="no column 'box'; its columns are image, text, boxes"):
        read_boxes(boxes_file)
    pq.write_table(table.slice(0, 0), boxes_file)
    with pytest.raises(UserError, match="boxes.parquet: no rows"):
        read_boxes(boxes_file)
    boxes_file.write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as .parquet"):
        read_boxes(boxes_file)
    for name, message in (("boxes.csv", "allowed: a .parquet or .jsonl file"), ("other.parquet", "there is no such file")):
        with pytest.raises(UserError, match=message):
            read_boxes(boxes_file.with_name(name))


def test_what_an_image_may_not_be(boxes_file):
    model, processors = reduced.ours(), (lambda picture: torch.zeros(3, 32, 32), str.lower)
    rows = pq.read_table(boxes_file).to_pylist()
    rows[0]["boxes"].append(box(0, 0, 33, 5))
    pq.write_table(pa.Table.from_pylist(rows), boxes_file)
    with pytest.raises(UserError, match=r"row 1: the box \(0, 0, 33, 5\) lies outside of 0.png, which is 32 x 24 pixels"):
        ground(model, read_boxes(boxes_file), processors)
    (boxes_file.parent / "0.png").write_bytes((boxes_file.parent / "0.png").read_bytes()[:40])
    with pytest.raises(UserError, match="row 1: .*0.png"):
        ground(model, read_boxes(boxes_file), processors)


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
