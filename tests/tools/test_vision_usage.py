"""`analyse vision-usage`: counts against naive loops, a model that ignores the image, and the command on emoji."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import reduced
import reduced_blip
import reduced_blip2
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.objectives import language_modelling_loss
from lavis_mafa.tools.vision_usage import Usage, masked_usage, next_word_usage, without_image

pytestmark = pytest.mark.slow

MODELS = {"albef": reduced, "blip": reduced_blip, "blip2": reduced_blip2}


def samples(kind: str = "albef", seed: int = 0) -> dict:
    return MODELS[kind].batch(4, seed=seed, index=torch.arange(4))


def test_accuracy_is_counted_word_by_word():
    generator = torch.Generator().manual_seed(0)
    seen, unseen = (torch.randn(40, 9, generator=generator) for _ in range(2))
    words = torch.randint(9, (40,), generator=generator)
    usage = Usage()
    for part in (slice(0, 25), slice(25, 40)):
        usage.add(seen[part], unseen[part], words[part])
    metrics = usage.metrics()
    assert usage.words == 40
    for k in (1, 5):
        share = []
        for logits in (seen, unseen):
            right = 0
            for row, word in zip(logits.tolist(), words.tolist(), strict=True):
                right += word in sorted(range(9), key=lambda v, r=row: -r[v])[:k]
            share.append(right / 40)
        assert metrics[f"accuracy@{k}"] == pytest.approx(share[0])
        assert metrics[f"accuracy_without_image@{k}"] == pytest.approx(share[1])
        assert metrics[f"uov@{k}"] == pytest.approx(share[0] - share[1])


def test_nothing_predicted_is_an_error():
    with pytest.raises(UserError, match="no word was predicted"):
        Usage().metrics()


def test_masked_words_are_the_same_in_both_passes_and_whatever_the_batch(monkeypatch):
    model, seen = reduced.ours(), []
    predict = model.predict

    def spy(encoder, ids, reading, images, chosen):
        seen.append((ids, sum(float(keys.std(dim=1).sum()) for keys, _ in images), chosen.chosen))
        return predict(encoder, ids, reading, images, chosen)

    monkeypatch.setattr(model, "predict", spy)
    whole = masked_usage(model, [samples()], [0.5], passes=2, seed=3)[0.5]
    assert len(seen) == 4
    for one, other in (seen[:2], seen[2:]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
        assert one[1] > 1 and other[1] < 1e-4, "all of its tokens alike"
    assert not torch.equal(seen[0][0], seen[2][0]), "another pass masks other words"
    singles = [
        {"image": samples()["image"][i : i + 1], "text_input": [reduced.CAPTIONS[i]], "index": torch.tensor([i])} for i in range(4)
    ]
    apart = masked_usage(model, singles, [0.5], passes=2, seed=3)[0.5]
    assert apart.words == whole.words and torch.equal(apart.right, whole.right)
    assert masked_usage(model, [samples()], [0.2], passes=1, seed=3)[0.2].words < whole.words


def test_a_larger_probability_masks_more_of_the_same_words():
    found = masked_usage(reduced.ours(), [samples()], [0.15, 0.5, 1.0], passes=1, seed=0)
    words = [found[p].words for p in (0.15, 0.5, 1.0)]
    tokens = sum(len(reduced.ours().tokenizer.tokenize(caption)) for caption in reduced.CAPTIONS)
    assert words == sorted(words) and words[-1] == tokens


@pytest.mark.parametrize("kind", ["albef", "blip", "blip2"])
def test_a_model_that_ignores_the_image_has_no_usage_of_vision(kind):
    model = MODELS[kind].ours()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crossattention.output.dense" in name:
                parameter.zero_()
    usage = masked_usage(model, [samples()], [0.5], 3, 0)[0.5] if kind == "albef" else next_word_usage(model, [samples(kind)])
    metrics = usage.metrics()
    assert metrics["uov@1"] == metrics["uov@5"] == 0.0 and usage.words > 0


@pytest.mark.parametrize("kind", ["albef", "blip", "blip2"])
def test_without_the_image_nothing_of_it_is_left(kind):
    model = MODELS[kind].ours()
    own, losses = torch.arange(4), []
    with torch.no_grad():
        for seed in (0, 1):
            pairs = model.encode(model.inputs(samples(kind, seed))).pairs
            torch.manual_seed(0)
            losses.append((float(pairs.lm_loss(own, own)), float(torch.manual_seed(0) and without_image(pairs).lm_loss(own, own))))
    assert losses[0][0] != losses[1][0] and losses[0][1] == losses[1][1]


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_next_words_are_those_of_the_training_loss(kind, monkeypatch):
    model = MODELS[kind].ours()
    captured: list[tuple] = []
    module = sys.modules[f"lavis_mafa.models.{kind}"]

    def spy(states, words, head):
        captured.append((head(states), words))
        return language_modelling_loss(states, words, head)

    monkeypatch.setattr(module, "language_modelling_loss", spy)
    usage = next_word_usage(model, [samples(kind)])
    tokens = model.tokenizer(samples(kind)["text_input"]).input_ids
    assert usage.words == sum(len(text) - 1 for text in tokens)
    for (logits, words), right in zip(captured, usage.right[:, 0].tolist(), strict=True):
        assert words.tolist() == [word for text in tokens for word in text[1:]]
        assert right == sum(int(row.argmax()) == int(word) for row, word in zip(logits, words, strict=True))


# --- the command -------------------------------------------------------------------------------------------------------


def save_untrained(yaml: Path, path: Path, *options: str) -> list[str]:
    """A checkpoint of the YAML's model; the command's beginning."""
    from lavis.common.registry import registry

    from lavis_mafa.config.check import check_yaml
    from lavis_mafa.plugin import register

    register()
    block = check_yaml(str(yaml), [*options, "model.discriminator=null", "model.ecm.enabled=false"]).model
    torch.manual_seed(0)
    torch.save({"model": registry.get_model_class(block.arch).from_config(block).state_dict()}, path)
    return ["analyse", "vision-usage", "--cfg-path", str(yaml), "--checkpoint", str(path), "--max-samples", "20"]


def test_the_command_end_to_end(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = save_untrained(tiny_yaml, tmp_path / "albef.pth")
    assert main([*command, "--mask-probability", "0.15", "0.75", "--passes", "2"]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "output/vision-usage/vision_usage.json").read_text())
    assert content["split"] == "val" and content["captions"] == 20 and content["passes"] == 2
    few, many = content["results"]["15 % masked"], content["results"]["75 % masked"]
    assert 0 < few["words"] < many["words"]
    for row in (few, many):
        assert row["uov@5"] == pytest.approx(row["accuracy@5"] - row["accuracy_without_image@5"])
        assert f"{100 * row['accuracy@5']:.2f}" in said
    assert main([*command, "--mask-probability", "0.15", "0.75", "--passes", "2", "--batch-size", "7"]) == 0
    again = json.loads((tmp_path / "output/vision-usage_2/vision_usage.json").read_text())
    assert again["results"] == content["results"]
    assert main([*command, "--split", "train"]) == 0
    assert "50 % masked" in capsys.readouterr().out


def test_the_command_on_blip(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    yaml = tmp_path / "blip.yaml"
    yaml.write_text(tiny_yaml.read_text().replace("albef_mafa", "blip_mafa").replace("fusion_layer: 1, ", ""))
    command = save_untrained(yaml, tmp_path / "blip.pth")
    assert main(command) == 0
    assert "next word" in capsys.readouterr().out
    assert main([*command, "--passes", "3"]) == 2
    assert "blip_mafa predicts every next word" in capsys.readouterr().err


def test_what_it_refuses(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = save_untrained(tiny_yaml, tmp_path / "albef.pth")
    for more, message in (
        (["--options", "model.mlm.mask_probability=0"], "model.mlm.mask_probability is 0"),
        (["--mask-probability", "0"], "--mask-probability is 0"),
        (["--split", "holdout"], "the data have no split 'holdout'; they have: test, train, val."),
        (["--batch-size", "21"], "--batch-size is 21, but there are only 20 samples"),
        (["--passes", "0"], "'0' is not a whole number of at least 1"),
        (["--options", "model.arch=albef_retrieval"], "model.arch is 'albef_retrieval'"),
    ):
        assert main([*command, *more]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("lavis-mafa analyse: ") and message in said[-1], said
    assert not (tmp_path / "output").exists()
