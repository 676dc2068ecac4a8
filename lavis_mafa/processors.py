"""Image and caption processing as ALBEF, GRIT-VLP and MAFA do it, for any LAVIS data set.

Against LAVIS's own: ``blip_image_train`` fixes RandAugment's strength at 5 (7 here) and crops less; ``blip_caption`` keeps
commas, apostrophes, hyphens and 50 words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipImageBaseProcessor
from lavis.processors.randaugment import RandomAugment, arg_dict, func_dict
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from lavis_mafa.config.data import check_settings
from lavis_mafa.errors import EmptyCaption, UserError

# RandAugment's operations without those that change colours: captions speak of colours.
COLOUR_KEEPING = "Identity AutoContrast Equalize Brightness Sharpness ShearX ShearY TranslateX TranslateY Rotate".split()


class RandAugment(RandomAugment):
    """LAVIS's RandAugment over ``COLOUR_KEEPING``, with an AutoContrast that works.

    LAVIS's own negates an unsigned byte, so that any image without a black pixel comes out all white.
    """

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, isPIL=True, augs=COLOUR_KEEPING)

    def __call__(self, image: Image.Image) -> np.ndarray:
        array = np.asarray(image)
        for name, probability, level in self.get_random_ops():
            if np.random.random() > probability:
                continue
            if name == "AutoContrast":
                array = np.asarray(ImageOps.autocontrast(Image.fromarray(array)))
            else:
                array = func_dict[name](array, *arg_dict[name](level))
        return np.array(array)  # a copy: PIL's memory is read-only, which torch warns about


class _FromConfig:
    """LAVIS gives a processor its YAML block; here the block's keys are the constructor's arguments."""

    registered: str

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Any:
        """Build from a YAML block; UserError if a key is not an argument, or its value is none."""
        settings = {key: value for key, value in (cfg or {}).items() if key != "name"}
        check_settings(cls.registered, settings)
        return cls(**settings)


class AlbefImageTrainProcessor(_FromConfig, BlipImageBaseProcessor):
    """PIL RGB image -> [3, image_size, image_size], cropped, flipped and augmented at random, normalised.

    Args:
        min_scale: smallest share of the image's area that a crop keeps; max_scale: the largest.
        flip: mirror half of the images; switch it off where left and right mean something.
        randaugment: ``{n: operations, m: strength of 10}``, or None for none.
        mean: of the three channels; None is LAVIS's. std: likewise.
    """

    registered = "albef_image_train"

    def __init__(
        self,
        image_size: int = 256,
        min_scale: float = 0.2,
        max_scale: float = 1.0,
        flip: bool = True,
        randaugment: Mapping[str, int] | None = {"n": 2, "m": 7},  # noqa: B006 (only read)
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mean=mean, std=std)
        steps: list[Any] = [
            transforms.RandomResizedCrop(image_size, scale=(min_scale, max_scale), interpolation=InterpolationMode.BICUBIC)
        ]
        if flip:
            steps.append(transforms.RandomHorizontalFlip())
        if randaugment is not None:
            if set(randaugment) != {"n", "m"}:
                raise UserError(f"albef_image_train.randaugment is {dict(randaugment)}; allowed: {{n: 2, m: 7}} or null.")
            steps.append(RandAugment(**randaugment))
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), self.normalize])


class AlbefImageEvalProcessor(_FromConfig, BlipImageBaseProcessor):
    """PIL RGB image -> [3, image_size, image_size], the whole image squeezed into a square, normalised."""

    registered = "albef_image_eval"

    def __init__(self, image_size: int = 256, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__(mean=mean, std=std)
        resize = transforms.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)
        self.transform = transforms.Compose([resize, transforms.ToTensor(), self.normalize])


class AlbefCaptionProcessor(_FromConfig, BaseProcessor):
    """Clean a caption: lower case, no punctuation, blanks for hyphens and slashes, at most ``max_words`` words.

    Args:
        prompt: put before every caption.
        max_words: the rest is cut off.

    Example:
        >>> AlbefCaptionProcessor()("A well-known <PERSON>, smiling!")
        'a well known person smiling'
    """

    registered = "albef_caption"

    def __init__(self, prompt: str = "", max_words: int = 30) -> None:
        # not BaseProcessor's own: it keeps a lambda, which a data loader's worker cannot be sent
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """EmptyCaption if nothing is left: the runner treats the sample like one with an unreadable image."""
        text = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
        text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
        words = text.split()
        if not words:
            raise EmptyCaption(f"The caption {caption!r} holds no word.")
        return self.prompt + " ".join(words[: self.max_words])


PROCESSORS = {p.registered: p for p in (AlbefImageTrainProcessor, AlbefImageEvalProcessor, AlbefCaptionProcessor)}
# here, not in plugin.py: where this module is the first to import LAVIS, that asks for it while it is only half imported
registry.mapping["processor_name_mapping"].update(PROCESSORS)
