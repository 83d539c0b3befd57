"""Images to pixel_values in NumPy and Pillow, equal to Hugging Face's PIL image processor.

Every step does the same arithmetic in the same order and dtype as transformers 5.23's PilBackend
(`image_processing_backends.py`, `image_transforms.py`): transparency is composited on white, resize
works on uint8 in Pillow, rescale multiplies in float64 and rounds to float32, normalise subtracts
and divides in float32. The result is the same bit for bit. A path is opened as `load_image` does:
EXIF orientation applied, then converted to RGB (which drops an alpha channel instead of compositing
it); an image object is taken as it is. Network addresses are not opened.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.errors import ImageError
from qvlm_runtime.frames import host_array
from qvlm_runtime.manifest import ImageSpec

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.float32]
# What Pillow's decoders raise on bad bytes; it promises no common base.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
)


def open_image(source: Any, where: str = "image") -> Image.Image:
    """A Pillow image, decoded, from a path, encoded bytes, a uint8 array or a Pillow image.

    An array is [H, W] or [H, W, 3], in host memory, of NumPy or of a library that speaks
    ``__array_interface__`` or DLPack (frames.py).

    ImageError, one line, if there is no such file, it is not an image, it is cut short, or it has
    more pixels than Pillow's decompression-bomb limit.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    array = None if isinstance(source, Image.Image) else host_array(source, where)
    if array is not None:
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ImageError(
                f"{where}: array {array.dtype} {array.shape}, expected uint8 [H, W] or [H, W, 3]"
            )
        return Image.fromarray(array)
    try:
        if isinstance(source, Image.Image):
            source.load()
            return source
        encoded = isinstance(source, bytes)
        where = where if encoded else os.fspath(source)
        with Image.open(io.BytesIO(source) if encoded else where) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"{where}: no such file. Give the path of an image.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{where}: not an image that Pillow can read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: {error}. Scale the image down first.") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{where}: cannot be decoded ({_line(error)}).") from error


def pixel_values(images: Sequence[Any], spec: ImageSpec) -> Pixels:
    """Preprocess images (anything ``open_image`` takes) to float32 [N, 3, H, W].

    ImageError if one cannot be read, or if they come out in different sizes.
    """
    arrays = [preprocess(source, spec, f"image {i + 1}") for i, source in enumerate(images)]
    check_shapes(arrays)
    return np.stack(arrays)


def check_shapes(arrays: Sequence[Pixels]) -> None:
    """ImageError if preprocessed images have different sizes."""
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1:
        raise ImageError(f"images come out in different shapes {sorted(sizes)}, expected one.")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with any transparency composited on white."""
    from PIL import Image

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def resized_shape(height: int, width: int, resize: tuple[Any, ...]) -> tuple[int, int]:
    """(height, width) after ``ImageSpec.resize``; the longer edge is rounded down."""
    if resize[0] == "exact":
        return int(resize[1]), int(resize[2])
    edge = int(resize[1])
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def centre_crop(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """[C, h, w] cut from the middle of [C, H, W]; where the image is smaller, zeros around it.

    The odd pixel falls where transformers' center_crop puts it.
    """
    channels, height, width = pixels.shape
    if size[0] <= height and size[1] <= width:
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return pixels[:, top : top + size[0], left : left + size[1]]
    padded = (max(size[0], height), max(size[1], width))
    pad = [math.ceil((padded[i] - (height, width)[i]) / 2) for i in range(2)]
    canvas = np.zeros((channels, *padded), pixels.dtype)
    canvas[:, pad[0] : pad[0] + height, pad[1] : pad[1] + width] = pixels
    top = (height - size[0]) // 2 + pad[0]
    left = (width - size[1]) // 2 + pad[1]
    return canvas[:, max(0, top) : top + size[0], max(0, left) : left + size[1]]


def preprocess(source: Any, spec: ImageSpec, where: str) -> Pixels:
    """One image (anything ``open_image`` takes) to float32 [3, H, W]. ImageError."""
    from PIL import Image

    image = open_image(source, where)
    array = np.array(to_rgb(image) if spec.convert_rgb else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(
            f"{where}: mode {image.mode} gives {array.dtype} {array.shape}, expected RGB. "
            'Convert it with image.convert("RGB").'
        )
    if spec.resize is not None:
        height, width = resized_shape(array.shape[0], array.shape[1], spec.resize)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and height * width > limit:
            raise ImageError(
                f"{where}: {array.shape[1]} x {array.shape[0]} pixels become {width} x {height}, "
                f"more than {limit} pixels. Crop the image first."
            )
        rgb = Image.fromarray(array)
        array = np.array(rgb.resize((width, height), resample=Image.Resampling(spec.resample)))
    pixels: NDArray[Any] = np.moveaxis(array, -1, 0)
    if spec.crop is not None:
        pixels = centre_crop(pixels, spec.crop)
    if spec.rescale is not None:
        pixels = (pixels.astype(np.float64) * spec.rescale).astype(np.float32)
    pixels = pixels.astype(np.float32, copy=False)
    if spec.mean is not None and spec.std is not None:
        mean = np.array(spec.mean, np.float32)[:, None, None]
        std = np.array(spec.std, np.float32)[:, None, None]
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
