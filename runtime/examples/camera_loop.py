"""A camera loop: frames come in as arrays, one answer goes out for each, with a deadline.

Run: ffmpeg … -f image2pipe -c:v ppm - | python runtime/examples/camera_loop.py OUT [QUESTION]
"""

import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from qvlm_runtime import Model, load


def frames(pipe: BinaryIO) -> Iterator[np.ndarray]:
    """Frames of a stream of binary PPM images, uint8 [H, W, 3]; ends with the stream."""
    while pipe.readline().strip() == b"P6":
        width, height = map(int, pipe.readline().split())
        assert pipe.readline().strip() == b"255", "eight bits a channel"
        yield np.frombuffer(pipe.read(3 * width * height), np.uint8).reshape(height, width, 3)


def watch(model: Model, pipe: BinaryIO, question: str) -> Iterator[str]:
    """One answer a frame. An unchanged frame costs no vision run: its features are cached."""
    for frame in frames(pipe):
        yield model.generate(question, [frame], max_new_tokens=16, timeout=2.0).text


if __name__ == "__main__":
    with load(sys.argv[1]) as opened:
        for answer in watch(opened, sys.stdin.buffer, " ".join(sys.argv[2:]) or "What is there?"):
            print(answer, flush=True)
