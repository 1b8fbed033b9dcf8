"""Training pictures varied in colour, sharpness and cut, in ways that leave what they say of the scene's geometry true.

Every view of a sample is varied alike: the same change of colour, the same blur, the same cut. What lies at one place of
both pictures before lies at one place after, so a pair's geometry is that of the same scene through a slightly longer lens.
There is no mirroring, turning or shearing, which would make the recorded actions wrong.

Letters: V views, H W pixels.
"""

from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import Dataset

from hf_vla.sample import Draw, Sample


class AugmentationLike(Protocol):
    """How far pictures are varied, as `hf_vla.recipe.Augmentation` has it; 0 leaves them."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    blur: float
    crop: float


def varies(augmentation: AugmentationLike) -> bool:
    """Tell whether anything is varied at all."""
    a = augmentation
    return any((a.brightness, a.contrast, a.saturation, a.hue, a.blur, a.crop))


class Variation(NamedTuple):
    """One draw: what is done to every view of a sample."""

    brightness: float
    """Factor."""
    contrast: float
    """Factor, of the distance to the picture's mean grey."""
    saturation: float
    """Factor, of the distance to the picture's own greys."""
    hue: float
    """Turn of the colour circle, -0.5 to 0.5."""
    blur: float
    """Standard deviation of a Gaussian, as a share of the shorter side."""
    box: tuple[float, float, float, float]
    """Left, top, right and lower edge of what is kept, as shares of width and height."""


class AugmentedDataset(Dataset):
    """A dataset's samples with varied pictures: a pure function of (seed, epoch, index).

    Args:
        dataset: map-style, of samples with pictures; indexed with a `Draw` if it has `wants_epoch = True`.
        augmentation: how far pictures are varied.
        seed: with epoch and index it decides every variation.
    """

    wants_epoch = True

    def __init__(self, dataset, augmentation: AugmentationLike, seed: int):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, where: int | Draw) -> Sample:
        """Read a sample; a plain number is one of epoch 0."""
        draw = where if isinstance(where, Draw) else Draw(where, 0)
        sample = self.dataset[draw if getattr(self.dataset, "wants_epoch", False) else draw.index]
        variation = draw_variation(self.augmentation, np.random.default_rng((self.seed, draw.epoch, draw.index)))
        return sample._replace(images=[vary(picture, variation) for picture in sample.images])

    @property
    def info(self):
        """The dataset's DatasetInfo."""
        return self.dataset.info

    @property
    def tasks(self) -> list[str]:
        """The instruction of every sample."""
        return self.dataset.tasks


def draw_variation(augmentation: AugmentationLike, generator: np.random.Generator) -> Variation:
    """Draw one variation, each part evenly within its bounds; the same numbers are drawn whatever the bounds are."""
    a, draws = augmentation, generator.random(8).tolist()
    signed = [2 * draw - 1 for draw in draws]
    kept = 1 - a.crop * draws[5]
    left, top = (1 - kept) * draws[6], (1 - kept) * draws[7]
    return Variation(
        brightness=1 + a.brightness * signed[0],
        contrast=1 + a.contrast * signed[1],
        saturation=1 + a.saturation * signed[2],
        hue=a.hue * signed[3],
        blur=a.blur * draws[4],
        box=(left, top, left + kept, top + kept),
    )


def vary(picture: np.ndarray, variation: Variation) -> np.ndarray:
    """Vary one (H, W, 3) uint8 RGB picture; the result has the same size."""
    image = Image.fromarray(picture)
    if variation.box != (0.0, 0.0, 1.0, 1.0):
        sides = (image.width, image.height, image.width, image.height)
        box = tuple(min(share * side, side) for share, side in zip(variation.box, sides, strict=True))
        image = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    for enhance, factor in (
        (ImageEnhance.Brightness, variation.brightness),
        (ImageEnhance.Contrast, variation.contrast),
        (ImageEnhance.Color, variation.saturation),
    ):
        image = image if factor == 1 else enhance(image).enhance(factor)
    image = _turn_hue(image, variation.hue)
    if variation.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(variation.blur * min(image.size)))
    return np.asarray(image)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    if turn == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + round(turn * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
