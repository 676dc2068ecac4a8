"""`analyse minimal-pairs`: partners and accuracy against naive loops, all three hosts, and the command on scenes."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

import reduced
import reduced_blip
import reduced_blip2
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.objectives.mining import best_query
from lavis_mafa.tools.minimal_pairs import OneWordApart, accuracies, examples, find_pairs, preferred, score_pairs
from lavis_mafa.tools.significance import Accuracy
from lavis_mafa.weights import shipped

MODELS = {"albef": reduced, "blip": reduced_blip, "blip2": reduced_blip2}
WORDS = "a an red blue cat dog".split()


def drawn_texts(count: int = 120) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(count)]


def gallery(**more) -> SimpleNamespace:
    """30 images with four texts each, some of them the same."""
    texts = drawn_texts()
    return SimpleNamespace(
        text=texts, image=[f"{n}.png" for n in range(30)], img2txt={n: list(range(4 * n, 4 * n + 4)) for n in range(30)}, **more
    )


def differing(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one.split(), other.split(), strict=True))


def test_partners_are_those_of_a_quadratic_loop():
    texts = drawn_texts()
    apart = OneWordApart(texts)
    partners = 0
    for number, text in enumerate(texts):
        length = len(text.split())
        naive = [n for n, o in enumerate(texts) if length > 1 and len(o.split()) == length and differing(text, o) == 1]
        assert apart.of(number) == naive
        partners += len(naive)
    assert partners > 200


@pytest.mark.parametrize("known", [False, True])
def test_pairs_leave_out_what_is_right_for_the_image(known):
    right = torch.zeros(30, 120, dtype=torch.bool)
    for image in range(30):
        right[image, 4 * image : 4 * image + 4] = True
    if known:  # a truth under which some own captions are wrong, and some others right
        right ^= torch.rand(30, 120, generator=torch.Generator().manual_seed(0)) < 0.2
    data = gallery(**({"relevant": right} if known else {}))
    pairs, apart = find_pairs(data, seed=0), OneWordApart(data.text)
    wanted = {}
    for image in range(30):
        for text in range(4 * image, 4 * image + 4):
            partners = {other for other in apart.of(text) if not right[image, other]}
            if right[image, text] and partners:
                wanted[image, text] = partners
    assert list(zip(pairs.image.tolist(), pairs.text.tolist(), strict=True)) == list(wanted)
    assert pairs.possible == sum(map(len, wanted.values()))
    for caption, partners in enumerate(wanted.values()):
        compared = pairs.other[pairs.caption == caption].tolist()
        assert len(set(compared)) == len(compared) == min(3, len(partners)) and set(compared) <= partners
    few = find_pairs(data, seed=0, max_captions=10)
    whole = {key: pairs.other[pairs.caption == caption].tolist() for caption, key in enumerate(wanted)}
    assert len(few) == 10
    for caption, key in enumerate(zip(few.image.tolist(), few.text.tolist(), strict=True)):
        assert few.other[few.caption == caption].tolist() == whole[key], "whichever captions are drawn, their partners are the same"


def test_nothing_to_compare_is_an_error():
    data = SimpleNamespace(text=["a cat", "two dogs", "cat", "dog"], image=["0", "1"], img2txt={0: [0, 2], 1: [1, 3]})
    with pytest.raises(UserError, match="no two of the 4 captions differ in exactly one word"):
        find_pairs(data, seed=0)


def test_each_caption_counts_once_and_equal_scores_half():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randint(4, (n,), generator=generator).float() for n in (12, 30))
    caption = torch.cat([torch.arange(12), torch.randint(12, (18,), generator=generator)])
    for c, share in enumerate(preferred(own, other, caption).tolist()):
        wins = [(own[c] > o).item() + 0.5 * (own[c] == o).item() for o in other[caption == c]]
        assert share == pytest.approx(sum(wins) / len(wins))


def test_of_one_image_there_is_no_interval():
    assert Accuracy.of(torch.tensor([1.0, 0.0]), torch.tensor([3, 3])) == Accuracy(0.5, None, None)
    two = Accuracy.of(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 4]))
    assert two.low is not None and two.high is not None and two.low < two.accuracy < two.high


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_each_pair_alone(kind, monkeypatch):
    monkeypatch.setattr("lavis_mafa.tools.minimal_pairs.PAIRS_AT_ONCE", 3)
    monkeypatch.setattr("lavis_mafa.tools.minimal_pairs.TEXTS_AT_ONCE", 2)
    model, pixels = MODELS[kind].ours(), MODELS[kind].batch(4)["image"]
    captions = [*MODELS[kind].batch(4)["text_input"], "nobody names this"]
    image, text = torch.tensor([3, 0, 1, 3, 0, 3, 3]), torch.tensor([2, 0, 1, 0, 3, 1, 3])
    batches = [(torch.tensor([0, 1]), pixels[:2]), (torch.tensor([3]), pixels[3:])]
    scores = score_pairs(model, batches, captions, image, text, ["itm", "itc"])
    zero = torch.zeros(1, dtype=torch.long)
    for place, (i, t) in enumerate(zip(image.tolist(), text.tolist(), strict=True)):
        with torch.no_grad():
            (tokens, seen), (texts, read) = model.image_rows(pixels[i : i + 1]), model.text_rows([captions[t]])
            logits = model.match_rows(tokens, texts, zero, zero)[0]
        assert float(scores["itm"][place]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
        assert float(scores["itc"][place]) == pytest.approx(float(best_query(seen, read)), abs=1e-5)


def test_broken_weights_are_an_error():
    model = reduced.ours()
    with torch.no_grad():
        model.itm_head.bias.fill_(float("nan"))
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(UserError, match="1 of 1 scores by ITM are NaN or infinite"):
        score_pairs(model, [(one, reduced.batch(1)["image"])], ["a dog"], one, one, ["itm"])


def test_examples_are_the_extremes_of_the_first_score():
    data = gallery()
    pairs = find_pairs(data, seed=0)
    scores = {
        name: torch.randn(len(pairs) + len(pairs.other), generator=torch.Generator().manual_seed(n)) for n, name in enumerate("ab")
    }
    margins = scores["a"][: len(pairs)][pairs.caption] - scores["a"][len(pairs) :]
    shown = examples(data, pairs, scores)
    assert [one["margin"]["a"] for one in shown] == [
        *margins.sort().values[:5].tolist(),
        *margins.sort(descending=True).values[:5].tolist(),
    ]
    assert all(differing(one["own"], one["other"]) == 1 and data.text.index(one["own"]) // 4 <= int(one["image"][:-4]) for one in shown)
    assert set(accuracies(pairs, scores)) == {"a", "b"}


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ["analyse", "minimal-pairs", "--cfg-path", "mafa/quickstart/scenes/grit.yaml", "--checkpoint", str(shipped("scenes_con_d"))]
    return [*start, "--options", f"datasets.grit_scenes.build_info.root={scenes}", f"model.tokenizer={scenes}/vocab.txt"]


def test_the_command_end_to_end(command, tmp_path, capsys):
    assert main([*command[:6], "--max-samples", "12", "--batch-size", "5", *command[6:]]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "output/minimal-pairs/minimal_pairs.json").read_text())
    assert content["captions"] == 12 and content["truth_known"] and content["split"] == "val"
    assert 12 <= content["pairs"] <= 36 and content["pairs"] <= content["possible_pairs"]
    for row in content["results"].values():
        assert row["accuracy"] > 0.8 and row["low"] <= row["accuracy"] <= row["high"]
        assert f"{100 * row['accuracy']:.1f}" in said
    for one in content["examples"]:
        assert differing(one["own"], one["other"]) == 1 and f"{one['own']} | {one['other']}" in said
    assert main([*command[:6], "--max-samples", "12", "--score", "itc", *command[6:]]) == 0
    again = json.loads((tmp_path / "output/minimal-pairs_2/minimal_pairs.json").read_text())
    assert again["results"] == {"itc": content["results"]["itc"]}


def test_what_it_refuses(command, scenes, tmp_path, capsys):
    def said(more: list[str], *options: str) -> str:
        assert main([*command[:6], *more, *command[6:], *options]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "split 'train' is no gallery of images and captions; those of these data: test, unseen, val." in said(["--split", "train"])
    assert "the data have no split 'holdout'; they have:" in said(["--split", "holdout"])
    assert "--score is itm, but model.itm is off" in said(["--score", "itm"], "model.itm.negatives=none")
    assert not (tmp_path / "output").exists()
