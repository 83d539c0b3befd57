"""An image in NumPy and Pillow, as Hugging Face's PIL image processors treat it: opened, resized,
normalised. What all kinds of image_spec.py share, and the kind "whole".

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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import Array
from qvlm_runtime.errors import ImageError
from qvlm_runtime.frames import host_array
from qvlm_runtime.image_spec import Layout, PixelSpec, WholeImage

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


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with any transparency composited on white."""
    from PIL import Image

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def resized_shape(height: int, width: int, resize: tuple[Any, ...]) -> tuple[int, int]:
    """(height, width) after ``WholeImage.resize``; the longer edge is rounded down."""
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


def rgb(source: Any, spec: PixelSpec, where: str) -> NDArray[np.uint8]:
    """An image (anything ``open_image`` takes) as uint8 [H, W, 3]. ImageError."""
    image = open_image(source, where)
    array = np.array(to_rgb(image) if spec.convert_rgb else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(
            f"{where}: mode {image.mode} gives {array.dtype} {array.shape}, expected RGB. "
            'Convert it with image.convert("RGB").'
        )
    if not array.size:
        raise ImageError(
            f"{where}: {image.width} x {image.height} pixels, expected at least one. Leave it out."
        )
    return array


def resized(
    array: NDArray[np.uint8], size: tuple[int, int], spec: PixelSpec, where: str
) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] of ``size`` (height, width). ImageError beyond Pillow's largest image."""
    from PIL import Image

    height, width = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise ImageError(
            f"{where}: {array.shape[1]} x {array.shape[0]} pixels become {width} x {height}, "
            f"more than {limit} pixels. Crop the image first."
        )
    image = Image.fromarray(array)
    return np.array(image.resize((width, height), resample=Image.Resampling(spec.resample)))


def normalised(pixels: NDArray[np.uint8], spec: PixelSpec) -> Pixels:
    """uint8 [..., 3, H, W] rescaled and normalised, float32."""
    values: NDArray[Any] = pixels
    if spec.rescale is not None:
        values = (values.astype(np.float64) * spec.rescale).astype(np.float32)
    values = values.astype(np.float32, copy=False)
    if spec.mean is not None and spec.std is not None:
        mean = np.array(spec.mean, np.float32)[:, None, None]
        std = np.array(spec.std, np.float32)[:, None, None]
        values = (values - mean) / std
    return np.ascontiguousarray(values)


def whole_layout(spec: WholeImage, height: int, width: int) -> Layout:
    """One tile, whatever the size."""
    return Layout(1, spec.rows, (0, 0))


def whole_extremes(spec: WholeImage) -> tuple[Layout, Layout]:
    """One tile in any case."""
    return (whole_layout(spec, 0, 0),) * 2


def whole_shapes(spec: WholeImage, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of pixel_values; ImageError if the spec does not fix it."""
    exact = spec.resize[1:] if spec.resize is not None and spec.resize[0] == "exact" else None
    size = spec.crop or exact
    if size is None:
        raise ImageError("image settings: images come out in any size, expected a fixed one.")
    return {"pixel_values": (1, 3, int(size[0]), int(size[1]))}


def whole_arrays(spec: WholeImage, array: NDArray[np.uint8], where: str) -> dict[str, Array]:
    """uint8 [H, W, 3] to pixel_values float32 [1, 3, h, w]. ImageError."""
    if spec.resize is not None:
        size = resized_shape(array.shape[0], array.shape[1], spec.resize)
        array = resized(array, size, spec.pixels, where)
    pixels: NDArray[Any] = np.moveaxis(array, -1, 0)
    if spec.crop is not None:
        pixels = centre_crop(pixels, spec.crop)
    return {"pixel_values": normalised(pixels, spec.pixels)[None]}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
