from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.processors.blip_processors import BlipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from lavis_mafa.config.data import SETTINGS
from lavis_mafa.errors import UserError
from lavis_mafa.processors import (
    PROCESSORS,
    AlbefCaptionProcessor,
    AlbefImageEvalProcessor,
    AlbefImageTrainProcessor,
    RandAugment,
    RandomCrop,
)


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


def image_of(width: int, height: int) -> Image.Image:
    """Smooth, and nowhere the same."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x * y))], axis=2).astype(np.uint8))


def test_eval_is_laviss(image: Image.Image) -> None:
    assert torch.equal(AlbefImageEvalProcessor(image_size=32)(image), BlipImageEvalProcessor(image_size=32)(image))


@pytest.mark.parametrize("randaugment", [{"n": 2, "m": 7}, {"n": 1, "m": 10}, None])
def test_train_gives_normalised_squares(image: Image.Image, randaugment: dict[str, int] | None) -> None:
    process = PROCESSORS["albef_image_train"].from_config(OmegaConf.create({"image_size": 32, "randaugment": randaugment}))
    for _ in range(20):
        assert process(image).shape == (3, 32, 32)
        assert process(image).isfinite().all()


def test_flip_can_be_switched_off_and_plain_settings_change_nothing(image: Image.Image) -> None:
    def flips(on: bool) -> bool:
        return any(isinstance(step, RandomHorizontalFlip) for step in AlbefImageTrainProcessor(flip=on).transform.transforms)

    assert flips(True) and not flips(False)
    process = AlbefImageTrainProcessor(image_size=32, min_scale=1.0, flip=False, randaugment=None)
    wide = image.resize((32, 20))
    assert all(torch.equal(process(wide), process(wide)) for _ in range(9)), "a crop of everything is no crop"
    square = image.resize((32, 32))
    assert torch.equal(process(square), AlbefImageEvalProcessor(image_size=32)(square))


@pytest.mark.parametrize("size", [(70, 50), (31, 300), (400, 300)])
def test_a_crop_is_what_torchvision_draws_and_resizes_with_pil(size: tuple[int, int]) -> None:
    smooth = image_of(*size)
    ours, theirs = RandomCrop(32, (0.2, 1.0)), RandomResizedCrop(32, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    for seed in range(20):
        torch.manual_seed(seed)
        crop = ours(smooth)
        torch.manual_seed(seed)
        difference = crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs(smooth))
        assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and np.abs(difference).max() <= 2


@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), st.lists(st.floats(0.015625, 2, width=32), min_size=3, max_size=3))
def test_bytes_are_normalised_as_torchvision_does_to_the_bit(mean: list[float], std: list[float]) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = Compose([ToTensor(), Normalize(mean, std)])(every)
    pixels = torch.from_numpy(every).permute(2, 0, 1)
    process = AlbefImageTrainProcessor(mean=mean, std=std)
    assert torch.equal(process.normalised(pixels), expected)
    assert torch.equal(process.normalised(pixels.expand(2, 3, 16, 16)), expected.expand(2, 3, 16, 16))
    assert process.normalised(pixels).is_contiguous()


def test_autocontrast_does_not_blank_an_image_without_black(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).integers(5, 200, (16, 16, 3), dtype=np.uint8)
    augment = RandAugment(1, 7)
    monkeypatch.setattr(augment, "get_random_ops", lambda: [("AutoContrast", 1.0, 7)])
    stretched = augment(torch.from_numpy(array).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert stretched.min() == 0 and stretched.max() == 255
    assert np.corrcoef(stretched.ravel(), array.ravel())[0, 1] > 0.99


def test_captions() -> None:
    process = AlbefCaptionProcessor()
    assert process('A well-known <PERSON>,  and/or  (his) dog\'s "bone"!\n') == "a well known person and or his dogs bone"
    assert AlbefCaptionProcessor(prompt="a picture of ", max_words=2)("one two three") == "a picture of one two"
    for empty in ("", "...", " - ?!"):
        with pytest.raises(ValueError, match="holds no word"):
            process(empty)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(caption: str) -> None:
    process = AlbefCaptionProcessor()
    try:
        once = process(caption)
    except ValueError:
        return
    assert once == " ".join(once.split()) != ""
    assert len(once.split()) <= 30
    assert not set(once) & set(",.'!?\"()*#:;~-/")


def test_the_settings_are_the_arguments() -> None:
    for name, processor in PROCESSORS.items():
        assert list(SETTINGS[name]) and set(SETTINGS[name]) == set(inspect.signature(processor).parameters)
        defaults = {key: parameter.default for key, parameter in inspect.signature(processor).parameters.items()}
        processor.from_config(OmegaConf.create(defaults))


def test_the_settings_of_lavis_processors_are_what_they_read() -> None:
    """Their ``from_config`` passes a key over that it does not know."""
    for name in set(SETTINGS) - set(PROCESSORS):
        processor = registry.get_processor_class(name)
        read = Reading()
        processor.from_config(read)
        assert read.keys_read == set(SETTINGS[name])


class Reading(dict):
    """An empty block that notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_read: set[str] = set()

    def get(self, key: str, default: object = None) -> object:
        self.keys_read.add(key)
        return default


def test_processors_can_be_sent_to_a_worker_that_was_spawned() -> None:
    image = Image.new("RGB", (32, 32), "red")
    for name, processor in PROCESSORS.items():
        made = processor.from_config()
        sent = pickle.loads(pickle.dumps(made))
        if "train" not in name:
            given = "A dog!" if "caption" in name else image
            assert str(sent(given)) == str(made(given))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("albef_image_train", "min_scale", value) for value in ("abc", None, -0.1, 2, True, float("nan"))),
        *(("albef_image_train", "randaugment", value) for value in (5, {"n": 2}, {"n": 2, "m": 11}, {"n": "2", "m": 7}, [2, 7])),
        *(("albef_image_eval", "image_size", value) for value in ("abc", 0, 16.0, None, [16, 16])),
        *(("albef_image_eval", "mean", value) for value in (1, "abc", [1, 2], [1, 2, "3"])),
        ("albef_image_train", "flip", "yes"),
        *(("albef_image_train", "distortions", value) for value in (True, {"blur": 1}, {"jitter": 0, "grayscale": 0, "blur": 2})),
        ("albef_image_eval", "std", [1, 1, 0]),
        ("albef_caption", "max_words", -1),
        ("albef_caption", "prompt", 3),
    ],
)
def test_a_wrong_value_is_named(name: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name}.{key} is .*; allowed: "):
        PROCESSORS[name].from_config(OmegaConf.create({"name": name, key: value}))


def test_distortions_have_their_probabilities(image: Image.Image) -> None:
    """Pixels as they were at 0; at 1 all images are grey, and blurred ones vary less from pixel to pixel."""

    def distorted(seed: int = 0, **probabilities: float) -> torch.Tensor:
        given = {"jitter": 0, "grayscale": 0, "blur": 0, **probabilities}
        process = AlbefImageTrainProcessor(image_size=32, flip=False, randaugment=None, distortions=given, mean=[0] * 3, std=[1] * 3)
        torch.manual_seed(seed)
        return process(image)

    torch.manual_seed(0)
    plain = AlbefImageTrainProcessor(image_size=32, flip=False, randaugment=None, mean=[0] * 3, std=[1] * 3)(image)
    assert torch.equal(distorted(), plain)
    grey = distorted(grayscale=1)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2]) and not torch.equal(plain[0], plain[1])
    assert distorted(3, blur=1).diff(dim=2).abs().mean() < distorted(3).diff(dim=2).abs().mean()
    assert not torch.equal(distorted(jitter=1), plain) and distorted(jitter=1).shape == plain.shape
    assert len({bool(distorted(seed, grayscale=0.5).std(dim=0).max() < 1e-6) for seed in range(20)}) == 2


def test_config_mistakes() -> None:
    with pytest.raises(UserError, match="min_scale is 0.9; allowed: at most max_scale"):
        AlbefImageTrainProcessor.from_config(OmegaConf.create({"min_scale": 0.9, "max_scale": 0.5}))
    with pytest.raises(UserError, match="albef_image_train.min_scal is not a key of .*Did you mean 'min_scale'?"):
        AlbefImageTrainProcessor.from_config(OmegaConf.create({"name": "albef_image_train", "min_scal": 0.1}))
    with pytest.raises(UserError, match="randaugment is .*allowed"):
        AlbefImageTrainProcessor(randaugment={"n": 2})
    assert AlbefCaptionProcessor.from_config().max_words == 30
