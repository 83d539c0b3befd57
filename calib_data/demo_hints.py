"""What training tells the model beyond the answer: what is on every patch, and where to look.

Both hints are read from the marks a scene was drawn with.  They only speed up learning: the heads
that predict the patch labels are thrown away, and no attention is forced in the written model.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from demo_model import PATCH
from qvlm_calib_data.scenes import COLOURS, SHAPES, SIZE, WORDS, Mark, Question, Scene

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGH"
SIGHTS = ("none", *SHAPES, *LETTERS)
SHADES = ("none", *COLOURS)
VALUES = 10
RANKS = 5
IGNORE = -100
SIDE = SIZE // PATCH


def patch_of(mark: Mark) -> int | None:
    """The patch that holds the centre of a mark; None if the centre is off the image."""
    column, row = int(mark.x // PATCH), int(mark.y // PATCH)
    return row * SIDE + column if 0 <= column < SIDE and 0 <= row < SIDE else None


def patch_labels(scene: Scene) -> npt.NDArray[np.int64]:
    """[patches, 5]: kind, colour, height (bar labels), rank in its group, word (letters).

    A patch is labelled by the mark whose centre it holds; by the nearest centre if there are more.
    """
    labels = np.full((SIDE * SIDE, 5), IGNORE, dtype=np.int64)
    labels[:, :2] = 0
    nearest = np.full(SIDE * SIDE, np.inf)
    ranks: dict[str, int] = {}
    for mark in scene.marks:
        rank = ranks[mark.group] = ranks.get(mark.group, -1) + 1
        index = patch_of(mark)
        if mark.group == "bar" or index is None:
            continue
        row, column = divmod(index, SIDE)
        away = abs(mark.x - (column + 0.5) * PATCH) + abs(mark.y - (row + 0.5) * PATCH)
        if away >= nearest[index]:
            continue
        nearest[index] = away
        labels[index] = (
            SIGHTS.index(mark.kind),
            SHADES.index(mark.colour),
            mark.value if mark.group == "label" else IGNORE,
            rank,
            WORDS.index(scene.word) if mark.group == "word" else IGNORE,
        )
    return labels


def evidence(scene: Scene, question: Question, pieces: list[str]) -> list[set[int]]:
    """For every token of the answer (`pieces`) the patches that show it; empty where none does."""
    groups: dict[str, list[Mark]] = {}
    for mark in scene.marks:
        groups.setdefault(mark.group, []).append(mark)
    shapes = groups["shape"]
    if question.task == "number":
        digits = iter(groups["number"])
        return [_patches([next(digits)]) if piece.isdigit() else set() for piece in pieces]
    if question.task == "describe":
        order = iter([m for m in shapes for _ in range(2)])
        named = {*SHAPES, *COLOURS}
        return [_patches([next(order)]) if p.strip() in named else set() for p in pieces]
    asked = question.prompt.rstrip("?").replace(",", "").split()
    if question.task == "word" or question.prompt == "What colour is the word?":
        seen = groups["word"]
    elif question.prompt == "What colour is the number?":
        seen = groups["number"]
    elif question.task == "chart":
        letter = question.answer if "tallest" in asked else asked[-1]
        seen = [m for m in groups["label"] if m.kind == letter]
    elif question.task == "compare" and "bar" in asked:
        seen = [m for m in groups["label"] if m.kind in (asked[-1], asked[-3])]
    else:
        seen = _shapes_asked(scene, shapes, asked, question.answer)
    return [_patches(seen) if p.strip() and p != "</s>" else set() for p in pieces]


def _shapes_asked(scene: Scene, shapes: list[Mark], asked: list[str], answer: str) -> list[Mark]:
    places = [s.place for s in scene.shapes]
    if asked[0] == "Where":
        return [shapes[places.index(answer)]]
    place = [i for i, p in enumerate(places) if p in " ".join(asked)]
    if place:
        return [shapes[place[0]]]
    kinds = {k for k in SHAPES for a in asked if a in (k, f"{k}s", f"{k}es")}
    colours = set(asked) & set(COLOURS)
    return [
        m for m in shapes if (not kinds or m.kind in kinds) and (not colours or m.colour in colours)
    ]


def _patches(marks: Iterable[Mark]) -> set[int]:
    return {index for mark in marks if (index := patch_of(mark)) is not None}
