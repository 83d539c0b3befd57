"""Proves what qvlm-serve takes as an image: data URLs and files below one folder, in five formats, of a bounded size
that is read before decoding. Bombs, traversal, other machines and other formats are refused, and the server answers
as before: python -m pytest tests/runtime/test_serve_images.py
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from runtime_support import write_folder
from serve_support import chat_body, data_url, png, post, serving

from qvlm_runtime import Model, load
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

LIMITS = Limits(body_bytes=200_000, images=2, image_pixels=10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "toy"
    write_folder(path, max_context=256)
    (path.parent / "secret.png").write_bytes(png(8))
    root = path.parent / "root"
    root.mkdir()
    (root / "inside.png").write_bytes(png(1))
    (root / "text.png").write_text("not an image")
    (root / "link.png").symlink_to(path.parent / "secret.png")
    (root / "folder.png").mkdir()
    (root / "large.png").write_bytes(png(2, (100, 100)) + bytes(300_000))
    os.mkfifo(root / "pipe.png")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, "rtx", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def app(folder: Path, model: Model) -> App:
    return App(model, "toy", LIMITS, image_root=folder.parent / "root")


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    with serving(app) as number:
        yield number


@pytest.fixture(autouse=True)
def alive(app: App, port: int) -> Iterator[None]:
    """After each refusal the server answers about an image as the runtime does."""
    yield
    status, answer, _ = post(port, chat_body(urls=("inside.png",)))
    expected = app.model.generate("What?", [png(1)], max_new_tokens=8).text
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected


def bomb(side: int) -> bytes:
    """A small PNG of side x side black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packed = zlib.compressobj(9)
    rows = packed.compress(bytes((side + 7) // 8 + 1) * min(side, 4000)) + packed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [101, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(
    port: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", None)  # decoding anything would fail
        status, answer, _ = post(port, chat_body(urls=(data_url(bomb(side)),)))
    assert status == 400
    assert re.search(r"too many pixels|pixels, at most 10000", answer["error"]["message"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/cat.png", "https address"),
        ("http://169.254.169.254/latest", "http address"),
        ("ftp://x/y.png", "ftp address"),
        ("http://[", "http address"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png,abc", "expected data:image"),
        ("data:", "expected data:image"),
        ("data:image/png;base64,", "not an image"),
        (data_url(b"GIF89a"), "not an image"),
        (data_url(png()[:60]), "cannot be decoded"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        ("../secret.png", "no such image file"),
        ("..%2fsecret.png", "no such image file"),
        ("file:../secret.png", "no such image file"),
        ("file:%2e%2e/secret.png", "no such image file"),
        ("file:///etc/passwd", "no such image file"),
        ("file://localhost/etc/passwd", "no such image file"),
        ("file://evil.example/inside.png", "no such image file"),
        ("file://[/inside.png", "no such image file"),
        ("/etc/passwd", "no such image file"),
        ("root/../../secret.png", "no such image file"),
        ("link.png", "no such image file"),
        ("folder.png", "no such image file"),
        ("pipe.png", "no such image file"),
        ("absent.png", "no such image file"),
        ("inside.png\0.txt", "no such image file"),
        ("", "no such image file"),
        ("x" * 5000, "no such image file"),
        ("text.png", "not an image"),
        ("large.png", "more than 200000 bytes"),
    ],
)
def test_an_image_that_may_not_be_read_is_refused(port: int, url: str, message: str) -> None:
    status, answer, _ = post(port, chat_body(urls=(url,)))
    assert status == 400 and message in answer["error"]["message"]
    assert "secret" not in answer["error"]["message"]


def test_files_are_off_without_a_root(model: Model) -> None:
    with serving(App(model, "toy", LIMITS)) as port:
        status, answer, _ = post(port, chat_body(urls=("inside.png",)))
        assert status == 400 and "no files here" in answer["error"]["message"]


def test_more_images_than_allowed_are_refused(port: int) -> None:
    status, answer, _ = post(port, chat_body(urls=(data_url(png()),) * 3))
    assert status == 400 and "3 images, at most 2" in answer["error"]["message"]


def test_every_format_that_is_allowed_is_read(app: App, port: int) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        encoded = png(4, form=form)
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.format == form
        status, answer, _ = post(port, chat_body(urls=(data_url(encoded, form.lower()),)))
        expected = app.model.generate("What?", [encoded], max_new_tokens=8).text
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected
