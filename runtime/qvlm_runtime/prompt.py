"""A prompt ready for the graphs, and how image markers become rows of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.context import RowKey
from qvlm_runtime.errors import PromptError
from qvlm_runtime.features import Picture
from qvlm_runtime.image_spec import Layout
from qvlm_runtime.manifest import MarkerSpec, ModelSpec

_RUN = "{image}"


@dataclass(frozen=True)
class Part:
    """The end of a prompt: what is run behind the cache rows that were kept.

    image_index counts rows of the features of ``pictures``; positions int64 [1 or 3, S].
    """

    token_ids: tuple[int, ...]
    image_index: tuple[int, ...]
    positions: NDArray[np.int64]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens, positions and pictures.

    image_index[i] is the row of all pictures' features that token i takes, or -1: rows count up
    over the pictures in order. positions: int64 [1 or 3, S].
    """

    text: str
    token_ids: tuple[int, ...]
    image_index: tuple[int, ...]
    positions: NDArray[np.int64]
    pictures: tuple[Picture, ...]

    def keys(self) -> list[RowKey]:
        """What each token's cache row depends on, besides the tokens before it."""
        rows = [
            (picture.key, row) for picture in self.pictures for row in range(picture.layout.rows)
        ]
        return [
            token if row < 0 else rows[row]
            for token, row in zip(self.token_ids, self.image_index, strict=True)
        ]

    def behind(self, start: int) -> Part:
        """Tokens from ``start`` on, with the pictures they use."""
        index = self.image_index[start:]
        first = next((row for row in index if row >= 0), None)
        pictures, base = list(self.pictures), 0
        while pictures and (first is None or base + pictures[0].layout.rows <= first):
            base += pictures.pop(0).layout.rows
        shifted = tuple(row - base if row >= 0 else -1 for row in index)
        return Part(self.token_ids[start:], shifted, self.positions[:, start:], tuple(pictures))


def marker_text(marker: MarkerSpec, layout: Layout) -> tuple[str, list[int]]:
    """The text that stands for one image, with "{image}" for each run of image tokens, and the
    lengths of these runs.
    """
    lines, columns = layout.grid
    if not marker.tile or not lines:
        return marker.whole, [layout.rows]
    text = ""
    for line in range(1, lines + 1):
        for column in range(1, columns + 1):
            text += marker.tile.replace("{line}", str(line)).replace("{column}", str(column))
        text += marker.line
    text += marker.last
    return text, [layout.rows // layout.tiles] * layout.tiles


def prompt_tokens(
    text: str,
    model: ModelSpec,
    layouts: Sequence[Layout],
    encode: Callable[[str], Sequence[int]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(token_ids, image_index) of a rendered chat whose markers stand for images of these layouts.

    ``encode`` gives the ids of a text. PromptError for more images than the model takes, or unless
    there are as many markers as layouts.
    """
    if model.images is not None and len(layouts) > model.images:
        raise PromptError(
            f"the prompt has {len(layouts)} images, this model takes {model.images}. "
            "Ask about each image in a prompt of its own."
        )
    pieces = text.split(model.image_token)
    if len(pieces) - 1 != len(layouts) and not model.marker.leading:
        raise PromptError(
            f"the prompt has {len(pieces) - 1} image markers ({model.image_token}) and "
            f"{len(layouts)} images, expected as many images as markers."
        )
    marked = [marker_text(model.marker, layout) for layout in layouts]
    # One image token for each run: a run is repeated after the text became tokens.
    shown = [words.replace(_RUN, model.image_token) for words, _ in marked]
    runs = [length for _, lengths in marked for length in lengths]
    if model.marker.leading:
        ids = [model.image_token_id] * len(runs) + list(encode("".join(pieces)))
    else:
        joined = zip(pieces, [*shown, ""], strict=True)
        ids = list(encode("".join(piece + words for piece, words in joined)))
    found = ids.count(model.image_token_id)
    if found != len(runs):
        raise PromptError(
            f"{model.image_token}: {len(runs)} in the prompt became {found} image tokens. "
            "The tokenizer does not know the image token: export again."
        )
    return expand_runs(ids, model.image_token_id, runs)


def expand_runs(
    ids: Sequence[int], image_token_id: int, runs: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Repeat the k-th image token runs[k] times; return (token_ids, image_index).

    image_index counts 0, 1, … over the repeated tokens of all images and is -1 elsewhere.
    """
    token_ids: list[int] = []
    image_index: list[int] = []
    lengths, row = iter(runs), 0
    for token in ids:
        if token == image_token_id:
            length = next(lengths)
            token_ids += [token] * length
            image_index += range(row, row + length)
            row += length
        else:
            token_ids.append(token)
            image_index.append(-1)
    return tuple(token_ids), tuple(image_index)
