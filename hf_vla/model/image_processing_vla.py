"""Pictures as VGGT was trained to see them: white behind transparency, bicubic, sides in multiples of its patch.

Letters: V views, H W pixels.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .modeling_vggt import count_patches

PATCH = 14
"""Side of VGGT's patch in pixels."""

WHITE = 255


def resize_view(image: np.ndarray | Image.Image, size: int, mode: str) -> np.ndarray:
    """Resize one picture to the sizes that VGGT takes.

    Args:
        image: (H, W), (H, W, 3) or (H, W, 4) uint8, or a PIL image; transparency is laid over white.
        size: side in pixels, a multiple of 14.
        mode: `stretch` gives size x size, whatever the shape. `pad` keeps the shape and fills up to size x size with
            white. `crop` keeps the shape, makes the width `size` and cuts a larger height down to `size`: a picture
            that is wider than high stays so.

    Returns:
        (H', W', 3) uint8, H' and W' multiples of 14.

    Raises:
        ValueError: for a size that isn't a multiple of 14, an unknown mode, or an array that isn't a uint8 picture.

    Source: crop and pad as VGGT's `load_and_preprocess_images`.
    """
    if mode not in _RESIZERS:
        raise ValueError(f"Unknown resize mode {mode!r}; allowed: {', '.join(_RESIZERS)}.")
    count_patches(size, PATCH, "image size")
    return _RESIZERS[mode](_to_rgb(image), size)


def stack_views(views: Sequence[np.ndarray]) -> np.ndarray:
    """Stack pictures to (V, H, W, 3); where shapes differ, centre each on white of the largest height and width."""
    height, width = (max(view.shape[axis] for view in views) for axis in (0, 1))
    return np.stack([_centre_on_white(view, height, width) for view in views])


def _to_rgb(image: np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image)
    return image.convert("RGB")


def _from_array(image: np.ndarray) -> Image.Image:
    is_picture = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))
    if image.dtype != np.uint8 or not is_picture:
        raise ValueError(
            f"Expected a picture of shape (H, W, 3) in uint8, got {image.shape} in {image.dtype}; "
            "pictures of floats in [0, 1] are to be multiplied by 255 and rounded first."
        )
    return Image.fromarray(image)


def _stretch(image: Image.Image, size: int) -> np.ndarray:
    return _bicubic(image, size, size)


def _crop(image: Image.Image, size: int) -> np.ndarray:
    height = _patch_multiple(image.height * size / image.width)
    resized = _bicubic(image, size, height)
    top = max(0, (height - size) // 2)
    return resized[top : top + size]


def _pad(image: Image.Image, size: int) -> np.ndarray:
    scale = size / max(image.width, image.height)
    resized = _bicubic(image, _patch_multiple(image.width * scale), _patch_multiple(image.height * scale))
    return _centre_on_white(resized, size, size)


def _bicubic(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _patch_multiple(side: float) -> int:
    """Round to the nearest multiple of the patch, halves to the even one, as the reference does."""
    return max(1, round(side / PATCH)) * PATCH


def _centre_on_white(view: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = (height - view.shape[0], width - view.shape[1])
    if not any(missing):
        return view
    before_and_after = [(n // 2, n - n // 2) for n in missing]
    return np.pad(view, [*before_and_after, (0, 0)], constant_values=WHITE)


_RESIZERS = {"stretch": _stretch, "crop": _crop, "pad": _pad}
