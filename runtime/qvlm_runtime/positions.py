"""position_ids of a prompt: the rule that ModelSpec.positions names.

    sequential  [1, S]: 0, 1, 2, …
    mrope       [3, S], time, line and column (Qwen2-VL, arXiv 2409.12191): a text token has the same
                number three times, one more than the largest before it; the rows of an image stand
                on a grid that begins there: time stays, line and column count over its rows.

Behind both, a token's number is one more than the largest before it, so a decode step needs to know
that number only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime.image_spec import Layout
from qvlm_runtime.manifest import Positions

AXES: dict[Positions, int] = {"sequential": 1, "mrope": 3}


def prompt_positions(
    rule: Positions, image_index: Sequence[int], layouts: Sequence[Layout]
) -> NDArray[np.int64]:
    """int64 [1 or 3, S] of a whole prompt; ``layouts`` are those of its images in order."""
    index = np.asarray(image_index, np.int64)
    if rule == "sequential":
        return np.arange(len(index), dtype=np.int64)[None]
    pieces, at, number = [], 0, 0
    firsts = iter(np.cumsum([0, *(layout.rows for layout in layouts)])[:-1])
    for layout, first in zip(layouts, firsts, strict=True):
        start = int(np.flatnonzero(index == first)[0])
        pieces.append(_text(number, start - at))
        number += start - at
        lines, columns = layout.grid
        grid = np.indices((1, lines, columns)).reshape(3, -1)
        pieces.append(grid + number)
        at, number = start + layout.rows, number + max(layout.grid)
    return np.concatenate([*pieces, _text(number, len(index) - at)], axis=1)


def _text(number: int, count: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(number, number + count, dtype=np.int64), (3, count))
