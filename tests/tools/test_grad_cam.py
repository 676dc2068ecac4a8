"""`analyse grad-cam`: a map per word of one text in one image."""

from __future__ import annotations

import json

import pytest
import torch

import reduced
import reduced_blip
from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import SoftMask
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives.soft_mask import soft_mask
from lavis_mafa.tools.grad_cam import joined, text_maps
from lavis_mafa.weights import shipped

CAPTION = "two snowmobiles near the sea"  # one word of several pieces


@pytest.mark.parametrize("host", [reduced, reduced_blip], ids=["albef", "blip"])
def test_words_have_the_maps_of_their_pieces(host):
    model, image = host.ours(), host.batch(1)["image"]
    found = text_maps(model, image[0], CAPTION, SoftMask(layer=1, share=0.3))
    ids, mask = model.words([CAPTION])
    zero = torch.tensor([0])
    with torch.no_grad():
        tokens = model.image_rows(image)[0]
        logits = model.match_rows(tokens, model.text_tokens([CAPTION]), zero, zero)
        reading = Reading.of(mask, model.device, zero, zero, 1)
    cams = word_maps(model, model.keys_values(tokens), model.text_tokens([CAPTION]), reading, 1)
    assert [word.word for word in found.words] == CAPTION.split()
    place = 1
    for word in found.words:
        pieces = len(model.tokenizer.tokenize(word.word))
        for patch, value in enumerate(word.cam.tolist()):
            assert value == pytest.approx(max(cams[place + n, patch].item() for n in range(pieces)), rel=1e-4, abs=1e-9)
        torch.testing.assert_close(word.mask, soft_mask(word.cam, 0.3))
        place += pieces
    assert place == len(cams) - 1 > len(found.words) + 1
    torch.testing.assert_close(found.whole.cam, cams[:-1].mean(dim=0), atol=1e-9, rtol=1e-4)
    assert found.probability == pytest.approx(logits.softmax(dim=1)[0, 1].item(), rel=1e-4)


def test_a_text_that_begins_within_a_word():
    assert [word for word, _ in joined(["##a", "b", "##c", "##d"], torch.zeros(4, 2))] == ["##a", "bcd"]


@pytest.fixture
def command(scenes, tmp_path, monkeypatch):
    """Its data are not needed."""
    monkeypatch.chdir(tmp_path)
    picture = str(scenes / "images/val/00000.png")

    def run(
        *more: str, yaml: str = "grit", weights: str = "scenes_start", text: str = "a dog & <b>cat</b>", image: str = picture
    ) -> int:
        start = ["analyse", "grad-cam", "--cfg-path", f"mafa/quickstart/scenes/{yaml}.yaml", "--checkpoint", str(shipped(weights))]
        options = ["--options", "datasets.grit_scenes.build_info.root=nowhere", f"model.tokenizer={scenes}/vocab.txt"]
        return main([*start, "--image", image, "--text", text, *more, *options])

    return run


def test_the_command_end_to_end(command, tmp_path, capsys):
    assert command() == 0
    content = json.loads((tmp_path / "output/grad-cam/grad_cam.json").read_text())
    assert f"with probability {content['probability']:.2f}" in capsys.readouterr().out
    assert content["layer"] == 1 and all(len(cam) == 16 for _, cam in content["words"])
    page = (tmp_path / "output/grad-cam/grad_cam.html").read_text()
    assert page.count("data:image/webp") == 2 * (1 + len(content["words"])) and "<b>cat" not in page


def test_laviss_data_need_not_be_there_either(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ["analyse", "grad-cam", "--cfg-path", "mafa/albef/eval/retrieval_coco.yaml", "--checkpoint", "scenes_start"]
    pair = ["--image", str(scenes / "images/val/00000.png"), "--text", "a dog"]
    options = ["model.model_type=tiny", "model.image_encoder.image_size=48", f"model.tokenizer={scenes}/vocab.txt", "run.device=cpu"]
    assert main([*start, *pair, "--options", *options, "datasets.coco_retrieval.vis_processor.eval.image_size=48"]) == 0
    assert (tmp_path / "output/grad-cam/grad_cam.html").is_file()


def test_what_the_command_refuses(command, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    for more, how, message in (
        (["--layer", "2"], {}, "the layer is 2; allowed: 1 or more, and below 2,"),
        ([], {"image": "gone.png"}, "--image is 'gone.png'"),
        ([], {"image": "text.png"}, "--image is 'text.png'"),
        ([], {"text": "  "}, "--text is '  '"),
        ([], {"yaml": "blip2_grit", "weights": "scenes_blip2_start"}, "model.arch is blip2_mafa, whose texts look at no patches"),
    ):
        assert command(*more, **how) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "output").exists()
