"""A prompt ready for the graphs, and how image markers become rows of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.backend import Array, DeviceArray
from qvlm_runtime.context import RowKey
from qvlm_runtime.features import Picture


@dataclass(frozen=True)
class Prompt:
    """Tokens and pictures.

    image_index[i] is the row of all pictures' features that token i takes, or -1: rows count up
    over the pictures in order.
    """

    text: str
    token_ids: tuple[int, ...]
    image_index: tuple[int, ...]
    pictures: tuple[Picture, ...]
    tokens_per_image: int

    @property
    def pixels(self) -> NDArray[np.float32] | list[Array | DeviceArray] | None:
        """All pictures' pixels float32 [N, 3, H, W], or None without images.

        With images in CUDA memory among them, a list of one array for each.
        """
        pixels = [picture.pixels for picture in self.pictures]
        host = [one for one in pixels if not isinstance(one, DeviceArray)]
        if len(host) < len(pixels):
            return list(pixels)
        return np.stack(host) if host else None

    def keys(self) -> list[RowKey]:
        """What each token's cache row depends on, besides the tokens before it."""
        per = self.tokens_per_image
        return [
            token if row < 0 else (self.pictures[row // per].key, row % per)
            for token, row in zip(self.token_ids, self.image_index, strict=True)
        ]

    def behind(self, start: int) -> tuple[tuple[int, ...], list[int], tuple[Picture, ...]]:
        """Tokens from ``start`` on, the pictures they use, and image_index counted over these."""
        index = self.image_index[start:]
        rows = [row for row in index if row >= 0]
        first = rows[0] // self.tokens_per_image if rows else len(self.pictures)
        base = first * self.tokens_per_image
        shifted = [row - base if row >= 0 else -1 for row in index]
        return self.token_ids[start:], shifted, self.pictures[first:]


def expand_images(
    ids: Sequence[int], image_token_id: int, tokens_per_image: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Repeat each image marker tokens_per_image times; return (token_ids, image_index).

    image_index counts 0, 1, … over the repeated markers of all images and is -1 elsewhere.
    """
    token_ids: list[int] = []
    image_index: list[int] = []
    row = 0
    for token in ids:
        if token == image_token_id:
            token_ids += [token] * tokens_per_image
            image_index += range(row, row + tokens_per_image)
            row += tokens_per_image
        else:
            token_ids.append(token)
            image_index.append(-1)
    return tuple(token_ids), tuple(image_index)
