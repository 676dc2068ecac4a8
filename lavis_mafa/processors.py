"""Image and caption processing as ALBEF, GRIT-VLP and MAFA do it, for any LAVIS data set.

Against LAVIS's own: ``blip_image_train`` fixes RandAugment's strength at 5 (7 here) and crops less; ``blip_caption`` keeps
commas, apostrophes, hyphens and 50 words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipImageBaseProcessor
from lavis.processors.randaugment import RandomAugment, arg_dict, func_dict
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.v2.functional import resize

from lavis_mafa.config.data import check_settings
from lavis_mafa.datasets.images import Box
from lavis_mafa.errors import EmptyCaption, UserError

# RandAugment's operations without those that change colours: captions speak of colours.
COLOUR_KEEPING = "Identity AutoContrast Equalize Brightness Sharpness ShearX ShearY TranslateX TranslateY Rotate".split()


class RandomCrop(transforms.RandomResizedCrop):
    """torchvision's crop of a PIL image, the same one drawn, as uint8 [3, side, side].

    torch resizes bytes three times as fast as PIL does; in some 3 % of a photograph's values the two differ, by 1 of 255.
    """

    def __init__(self, side: int, scale: tuple[float, float]) -> None:
        super().__init__(side, scale, interpolation=InterpolationMode.BICUBIC)

    def forward(self, image: Image.Image) -> Tensor:
        return self.resized(image.crop(self.box(image.size)))

    def box(self, size: tuple[int, int]) -> Box:
        """Draw the crop of an image of this width and height; one of all of its area is the image, whatever its shape."""
        if min(self.scale) == 1:
            return 0, 0, *size
        top, left, height, width = self.get_params(torch.empty(size[::-1], device="meta"), self.scale, self.ratio)
        return left, top, left + width, top + height

    def resized(self, crop: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return resize(pixels, self.size, self.interpolation, antialias=True)


class RandAugment(RandomAugment):
    """LAVIS's RandAugment over ``COLOUR_KEEPING`` on uint8 [3, H, W], with an AutoContrast that works.

    LAVIS's own negates an unsigned byte, so that any image without a black pixel comes out all white.
    """

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, augs=COLOUR_KEEPING)

    def __call__(self, pixels: Tensor) -> Tensor:
        array = pixels.permute(1, 2, 0).numpy()
        for name, probability, level in self.get_random_ops():
            if np.random.random() > probability:
                continue
            if name == "AutoContrast":
                array = np.array(ImageOps.autocontrast(Image.fromarray(array)))
            else:
                array = func_dict[name](array, *arg_dict[name](level))
        return torch.from_numpy(array).permute(2, 0, 1)


class Distortions(v2.Compose):
    """TCL's of uint8 [3, H, W], each with its probability: brightness, contrast, saturation (0.4) and hue (0.1), grey, a blur."""

    def __init__(self, jitter: float, grayscale: float, blur: float) -> None:
        super().__init__(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=jitter),
                v2.RandomGrayscale(grayscale),
                v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=blur),
            ]
        )


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
        min_scale: smallest share of the image's area that a crop keeps, 1 for whole images; max_scale: the largest.
        flip: mirror half of the images; switch it off where left and right mean something.
        distortions: ``{jitter: 0.8, grayscale: 0.2, blur: 0.5}`` are the probabilities of TCL's, or None for none. They change colours.
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
        distortions: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(mean=mean, std=std)
        steps: list[Any] = [RandomCrop(image_size, (min_scale, max_scale))]
        if distortions is not None:
            steps.append(Distortions(**distortions))
        if flip:
            steps.append(transforms.RandomHorizontalFlip())
        if randaugment is not None:
            if set(randaugment) != {"n", "m"}:
                raise UserError(f"albef_image_train.randaugment is {dict(randaugment)}; allowed: {{n: 2, m: 7}} or null.")
            steps.append(RandAugment(**randaugment))
        self.transform = transforms.Compose([*steps, self.normalised])

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> float32 on the same device, equal to what ToTensor and Normalize make of it to the bit."""

        def of_channels(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)

        floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        # by a tensor: CUDA would multiply by the reciprocal of a number, which is not the same
        return floats.div_(of_channels([255])).sub_(of_channels(self.normalize.mean)).div_(of_channels(self.normalize.std))


class AlbefImageEvalProcessor(_FromConfig, BlipImageBaseProcessor):
    """PIL RGB image -> [3, image_size, image_size], the whole image squeezed into a square, normalised."""

    registered = "albef_image_eval"

    def __init__(self, image_size: int = 256, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__(mean=mean, std=std)
        squeeze = transforms.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)
        self.transform = transforms.Compose([squeeze, transforms.ToTensor(), self.normalize])


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
