"""Images of a request: data URLs, and files below one folder that the server was given.

Network addresses are not opened: a server that fetches what a stranger names can be sent into the
network behind it. An image's size is read from its header and refused before any pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qvlm_runtime.serve.asgi import HttpError
from qvlm_runtime.serve.limits import Limits

# Formats whose decoders are widely used on hostile input; Pillow knows forty more.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def image_bytes(url: str, root: Path | None, limits: Limits, where: str) -> bytes:
    """The encoded image behind a URL, its format and size checked. HttpError 400."""
    if url[:5].lower() == "data:":
        data = _decoded(url, where)
    elif url[:5].lower() == "file:" or "://" not in url:
        data = _file(url, root, limits, where)
    else:
        raise HttpError(
            400,
            f"{where}: got a {url.partition('://')[0][:10]} address, expected a data: URL. "
            "Network addresses are not opened.",
        )
    _check(data, limits, where)
    return data


def _decoded(url: str, where: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise HttpError(400, f"{where}: expected data:image/…;base64,…")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HttpError(400, f"{where}: not base64 ({error}).") from error


def _file(url: str, root: Path | None, limits: Limits, where: str) -> bytes:
    if root is None:
        raise HttpError(400, f"{where}: no files here. Send a data: URL.")
    # One answer for what is absent and what is outside, so that it tells nothing of the machine.
    refused = HttpError(400, f"{where}: no such image file below the server's --image-root.")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise refused
        # An absolute path replaces the root here and has to lie below it all the same.
        path = (root / (unquote(parts.path) if parts.scheme else url)).resolve()
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            raise refused
        if path.stat().st_size > limits.body_bytes:
            raise HttpError(400, f"{where}: the file has more than {limits.body_bytes} bytes.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise refused from error


def _check(data: bytes, limits: Limits, where: str) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HttpError(400, f"{where}: too many pixels.") from error
    except Exception as error:  # Pillow's header parsers promise no common base
        raise HttpError(400, f"{where}: not an image in {', '.join(FORMATS)}.") from error
    if width * height > limits.image_pixels:
        raise HttpError(
            400,
            f"{where}: {width} x {height} pixels, at most {limits.image_pixels}. Scale it down.",
        )
