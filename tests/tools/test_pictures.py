"""`analyse pictures`: negatives and pseudo-targets against naive loops, and the command on emoji."""

from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import reduced
from lavis_mafa.cli.main import main
from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.schema import SoftMask
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.errors import UserError
from lavis_mafa.models import albef
from lavis_mafa.models.momentum import by_momentum
from lavis_mafa.models.soft_masks import word_maps
from lavis_mafa.models.synthetic_texts import FUNCTION_WORDS
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives.lm import IGNORED
from lavis_mafa.objectives.soft_mask import soft_mask
from lavis_mafa.tools.candidates import Block, Known, grouped_order
from lavis_mafa.tools.pictures import (
    KINDS,
    Pool,
    WordMap,
    drawn,
    encode_pool,
    likeliest_texts,
    likeliest_words,
    negatives,
    negatives_table,
    of_anchors,
    truth_of,
    word_maps_of,
)
from lavis_mafa.tools.trained_model import _PairsOfGallery

pytestmark = pytest.mark.slow

COUNT, SIZE, SPACE = 22, 5, 8
KNOWN = Known(same_image=True, same_text=True)


def pool() -> Pool:
    """Features at random; two rows an image, and captions of which some are equal."""
    generator = torch.Generator().manual_seed(0)
    image, text, taught_image, taught_text = torch.randn(4, COUNT, 8, generator=generator)
    captions = [f"text {row % 17}" for row in range(COUNT)]
    truth = GroundTruth.from_pairs([(f"text {n}", f"thing {n % 3}") for n in range(17)])
    keys = torch.tensor([truth.text_key(caption) for caption in captions])
    concepts = torch.tensor([truth.concept_id(f"thing {row % 3}") for row in range(COUNT)])
    block = Block(0, torch.arange(COUNT) + 100, torch.arange(COUNT) // 2, captions, torch.empty(0), (), image, text)
    block.truth.update(concept=concepts, text_key=keys)
    return Pool(block, (taught_image, taught_text), truth)


def may_be_negatives(block: Block, one: int, other: int) -> bool:
    return one // 2 != other // 2 and block.captions[one] != block.captions[other]


def test_hardest_negatives_are_those_of_a_loop_over_batches():
    look = pool()
    found = negatives(look.block, SIZE, SPACE, seed=3, known=KNOWN)
    order = grouped_order(look.block, SPACE, 3).tolist()
    orders = {KINDS[1]: [range(COUNT)], KINDS[2]: [order[start : start + SPACE] for start in range(0, COUNT, SPACE)]}
    for kind, parts in orders.items():
        batches = [part[start : start + SIZE] for part in parts for start in range(0, len(part), SIZE)]
        for batch in batches:
            for anchor in batch:
                for direction in (0, 1):
                    pairs = {
                        (anchor, other)[:: 1 - 2 * direction]: other for other in batch if may_be_negatives(look.block, anchor, other)
                    }
                    cosines = {pair: float(look.block.image_features[pair[0]] @ look.block.text_features[pair[1]]) for pair in pairs}
                    place = anchor + COUNT * direction
                    assert bool(found[kind].exists[place]) == bool(pairs)
                    if pairs:
                        best = max(cosines, key=cosines.__getitem__)
                        assert (int(found[kind].image[place]), int(found[kind].text[place])) == best
                        assert float(found[kind].similarity[place]) == pytest.approx(cosines[best], abs=1e-5)


def test_a_random_negative_is_any_that_is_not_known_to_match():
    look = pool()
    found = negatives(look.block, SIZE, SPACE, seed=3, known=KNOWN)[KINDS[0]]
    assert (
        bool(found.exists.all())
        and torch.equal(found.image[:COUNT], torch.arange(COUNT))
        and torch.equal(found.text[COUNT:], found.image[:COUNT])
    )
    for image, text, cosine in zip(found.image.tolist(), found.text.tolist(), found.similarity.tolist(), strict=True):
        assert may_be_negatives(look.block, image, text)
        assert cosine == pytest.approx(float(look.block.image_features[image] @ look.block.text_features[text]), abs=1e-5)


def test_the_table_counts_what_truly_matches():
    look = pool()
    found = negatives(look.block, SIZE, SPACE, seed=3, known=KNOWN)
    for row, pairs in zip(negatives_table(look, found).rows, found.values(), strict=True):
        for side, cell in ((range(COUNT), row[2]), (range(COUNT, 2 * COUNT), row[4])):
            matches = [int(look.block.captions[pairs.text[p]].split()[1]) % 3 == pairs.image[p] % 3 for p in side if pairs.exists[p]]
            assert cell == f"{sum(map(int, matches)) / len(matches):.1%}"
    unknown = Pool(look.block, look.taught)
    assert {row[2] for row in negatives_table(unknown, found).rows} == {"–"} and unknown.matches(torch.arange(2), torch.arange(2)) == [
        None
    ] * 2


def test_anchors_have_their_own_negatives():
    found = negatives(pool().block, SIZE, SPACE, seed=3, known=KNOWN)
    anchors = torch.tensor([4, 9])
    shown = of_anchors(found, anchors)
    for kind, pairs in enumerate(found.values()):
        for place, anchor in enumerate(anchors.tolist()):
            for direction in (0, 1):
                at = anchor + COUNT * direction
                wanted = [int(pairs.image[at]), int(pairs.text[at])] if pairs.exists[at] else [-1, -1]
                assert shown[kind, direction, place].tolist() == wanted


def test_likeliest_texts_are_those_of_a_loop_each_caption_once():
    look, anchors = pool(), torch.tensor([3, 8])
    for anchor, found in zip(anchors.tolist(), likeliest_texts(look, anchors), strict=True):
        first = [row for row in range(COUNT) if look.block.captions.index(look.block.captions[row]) == row]
        cosines = {row: float(look.taught[0][anchor] @ look.taught[1][row]) for row in first}
        assert [row for row, _ in found] == sorted(cosines, key=cosines.__getitem__, reverse=True)[:5]
        assert [cosine for _, cosine in found] == pytest.approx([cosines[row] for row, _ in found], abs=1e-5)


def test_two_data_sets_have_no_truth_in_common():
    class Parts:
        datasets = [pool(), pool()]

    assert truth_of(pool()) is not None and truth_of(Parts) is None


def test_pairs_of_a_gallery_know_their_image_and_its_truth():
    look = pool()

    class Gallery:
        text = ["text 1", "text 2", "text 0"]
        txt2img = {0: [1, 0], 1: [0], 2: 1}
        concepts, text_keys = torch.tensor([2, 0]), torch.tensor([look.truth.text_key(text) for text in text])
        truth = look.truth

        def __getitem__(self, image):
            return {"image": torch.tensor(float(image))}

        def image_path(self, image):
            return f"{image}.png"

    pairs = _PairsOfGallery(Gallery())
    for text, image in enumerate((1, 0, 1)):
        sample = pairs[text]
        assert float(sample["image"]) == image == int(pairs.image_keys[text]) and str(pairs.image_path(text)) == f"{image}.png"
        assert sample["concept"] == (2, 0)[image] and look.truth.text(sample["text_key"]) == sample["text_input"] == Gallery.text[text]


# --- with a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def taught():
    """A model with a momentum model whose weights are its own."""
    model = reduced.ours(itc={"momentum_distillation": {"queue_size": 8}}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[0].endswith("_m"):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def test_the_momentum_model_as_a_model(taught):
    samples, teacher = reduced.batch(4), by_momentum(taught)
    before = {name: value.clone() for name, value in taught.state_dict().items()}
    _, image, text, _ = taught._momentum_features(samples["image"], *taught.words(samples["text_input"]))
    assert torch.equal(teacher.image_rows(samples["image"])[1], image) and torch.equal(
        teacher.text_rows(samples["text_input"])[1], text
    )
    assert not torch.allclose(taught.image_rows(samples["image"])[1], image, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in taught.state_dict().items())


def test_a_row_that_stands_in_for_another_counts_once():
    model = reduced.ours()
    more = {"index": torch.tensor([5, 6, 6, 7]), "image_key": torch.arange(4)}
    look = encode_pool(model, model, [reduced.batch(4, **more)])
    assert look.block.index.tolist() == [5, 6, 7] and look.block.captions == [reduced.CAPTIONS[row] for row in (0, 1, 3)]
    with torch.no_grad():
        model.text_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        encode_pool(model, model, [reduced.batch(4, **more)])


def test_a_masked_word_has_the_probability_that_training_gives_it(monkeypatch):
    """The loss of masked language modelling with this very word masked is -log of it; a caption counts alone as among others."""
    samples, model = reduced.batch(4, index=torch.arange(4)), reduced.ours().eval()
    found = likeliest_words(model, samples, seed=1, top=len(model.tokenizer))
    for row, word in enumerate(found):
        assert word is not None and " ".join(f"{word.before} {word.word} {word.after}".split()) == samples["text_input"][row]
        chances = [chance for _, chance in word.expected]
        assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1, abs=1e-4)

        def this_word(ids, *_, word=word.word):
            place = ids.tolist().index(model.tokenizer.convert_tokens_to_ids(word))
            labels, masked = torch.full_like(ids, IGNORED), ids.clone()
            labels[place], masked[place] = ids[place], model.tokenizer.mask_token_id
            return masked, labels

        monkeypatch.setattr(albef, "mask_tokens", this_word)
        alone = {"image": samples["image"][row : row + 1], "text_input": [samples["text_input"][row]]}
        with torch.no_grad():
            loss = model.encode(model.inputs(alone)).pairs.lm_loss(torch.zeros(1).long(), torch.zeros(1).long())
        assert dict(word.expected)[word.word] == pytest.approx(float(torch.exp(-loss)), rel=1e-4)
    words = {one.word for seed in range(8) for one in likeliest_words(model, samples, seed, top=1)}
    assert len(words) > len(found) and not words & {"a", "the", "of", "in"}


def test_a_words_map_is_its_own_whatever_the_batch():
    model = reduced.ours(text_encoder={"init": None, "width": 32, "layers": 4, "fusion_layer": 1, "heads": 2}).eval()
    samples = reduced.batch(4)
    found = word_maps_of(model, samples, SoftMask(layer=2, share=0.4))
    for row, words in enumerate(found):
        caption = samples["text_input"][row]
        tokens = ["[CLS]", *model.tokenizer.tokenize(caption)]
        assert [word.word for word in words] == [t for t in tokens if t.removeprefix("##").isalnum() and t not in FUNCTION_WORDS][:6]
        images = model.keys_values(model.image_states(samples["image"][row : row + 1]))
        one = torch.zeros(1, dtype=torch.long)
        texts = model.text_tokens([caption])
        alone = word_maps(model, images, texts, Reading.of(texts[-1], model.device, one, one, 1), 2)
        for word in words:
            torch.testing.assert_close(word.cam, alone[tokens.index(word.word)], rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(word.mask, soft_mask(word.cam, 0.4))
    with pytest.raises(UserError, match="the layer is 9"):
        word_maps_of(model, samples, SoftMask(layer=9))


def test_a_picture_of_a_map_is_red_and_grey_where_the_patch_is():
    image = torch.zeros(3, 40, 40)
    image[:, :20] = 1.0
    maps = WordMap("dog", torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    pictures = {name: Image.open(BytesIO(b64decode(url.partition(",")[2]))).convert("RGB") for name, url in drawn(image, maps).items()}
    red, green, _ = pictures["cam"].getpixel((36, 36))
    assert red > 150 > 80 > green and max(pictures["cam"].getpixel((4, 36))) < 25
    assert pictures["mask"].getpixel((3, 3)) == pytest.approx((127, 127, 127), abs=8) and min(pictures["mask"].getpixel((36, 3))) > 230


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_yaml, tmp_path, monkeypatch) -> Path:
    """An untrained model of the tiny YAML with a momentum model."""
    from lavis_mafa.models.albef import AlbefMafa

    monkeypatch.chdir(tmp_path)
    teacher = {"momentum_distillation": {"queue_size": 24, "alpha": 0.4}}
    block = OmegaConf.merge(check_yaml(str(tiny_yaml), []).model, {"itc": teacher, "discriminator": None, "ecm": {"enabled": False}})
    torch.manual_seed(0)
    torch.save({"model": AlbefMafa.from_config(block).state_dict()}, tmp_path / "untrained.pth")
    return tmp_path / "untrained.pth"


def test_the_command_end_to_end(tiny_yaml, checkpoint, tmp_path, capsys):
    command = ["analyse", "pictures", "--cfg-path", str(tiny_yaml), "--checkpoint", str(checkpoint), "--anchors", "3"]
    command += ["--output", "run/pictures", "--max-samples", "20"]
    assert main([*command, "--options", "model.itc.momentum_distillation.queue_size=24"]) == 0
    said, page = capsys.readouterr().out, (tmp_path / "run/pictures/pictures.html").read_text()
    content = json.loads((tmp_path / "run/pictures/pictures.json").read_text())
    assert content["teacher"] == "the momentum model" and content["pairs"] == 20 and len(content["anchors"]) == 3
    assert [row[0] for row in content["negatives"][1:]] == [*KINDS] and all(kind in said for kind in KINDS)
    for anchor in content["anchors"]:
        assert anchor["caption"] in page and len(anchor["texts"]) == len(anchor["word"]["expected"]) == 5
        assert anchor["word"]["word"] in anchor["caption"]
        for one in filter(None, sum(anchor["negatives"].values(), [])):
            assert 0 <= one["matching"] <= 1 and one["true"] in (True, False)
        assert {text["true"] for text in anchor["texts"] if text["own"]} <= {True}
    assert page.count('alt="where ') == page.count('alt="what the mask of ') >= 3
    assert page.count('<img class="pic"') == page.count('src="data:image/') > 3
    # again, into a folder of its own, without the momentum model; the training split has pictures too
    assert main([*command, "--split", "train"]) == 0
    again = json.loads((tmp_path / "run/pictures_2/pictures.json").read_text())
    assert again["teacher"] == "the model itself" and again["split"] == "train" and "image is missing" not in page


def test_the_command_on_blip(tiny_yaml, tmp_path, monkeypatch):
    """It has no masked words; without a truth nothing is said to match."""
    from lavis_mafa.models.blip import BlipMafa

    monkeypatch.chdir(tmp_path)
    yaml = tmp_path / "blip.yaml"
    yaml.write_text(tiny_yaml.read_text().replace("albef_mafa", "blip_mafa").replace("fusion_layer: 1, ", ""))
    block = check_yaml(str(yaml), ["model.discriminator=null", "model.ecm.enabled=false"]).model
    torch.save({"model": BlipMafa.from_config(block).state_dict()}, tmp_path / "blip.pth")
    command = ["analyse", "pictures", "--cfg-path", str(yaml), "--checkpoint", "blip.pth", "--anchors", "1", "--max-samples", "20"]
    assert main(command) == 0
    (anchor,) = json.loads((tmp_path / "output/pictures/pictures.json").read_text())["anchors"]
    assert anchor["word"] is None and len(anchor["texts"]) == 5


def test_what_it_refuses(tiny_yaml, checkpoint, capsys):
    command = ["analyse", "pictures", "--cfg-path", str(tiny_yaml), "--checkpoint", str(checkpoint)]
    for more, message in (
        (["--max-samples", "1"], "there is 1 pair to look at, but a negative takes two"),
        (["--batch-size", "33"], "must not exceed run.grit.search_space (32)"),
        (["--anchors", "0"], "'0' is not a whole number of at least 1"),
        (["--split", "holdout"], "the data have no split 'holdout'"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
