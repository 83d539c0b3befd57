"""Scenes the demo model is trained, calibrated and judged on: what is drawn, and what can be asked.

A scene is a function of one integer seed.  It has three panels on a 128 x 128 image: a header with
one printed word and one printed number, up to five coloured shapes on a coarse jittered grid of two
columns and three rows, and a bar chart of three or four lettered bars whose heights are integers.
Every drawn thing is a `Mark`; the renderer draws the marks and nothing else, so the marks are also
the exact ground truth the questions are answered from.

The seeds of the different uses come from disjoint ranges (`SEED_RANGES`), so that a calibration
image can never be an evaluation image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 128
TASKS = ("word", "number", "count", "colour", "compare", "locate", "chart", "describe")
# fmt: off
WORDS = (
    "ant", "apple", "arm", "bag", "ball", "bear", "bird", "boat", "book", "box", "bread", "bus",
    "cake", "car", "cat", "chair", "cloud", "cow", "cup", "desk", "dog", "door", "duck", "egg",
    "eye", "fish", "flag", "fork", "frog", "gate", "hand", "hat", "horse", "house", "key",
    "kite", "lamp", "leaf", "lion", "milk", "moon", "mouse", "nest", "pen", "pig", "plane",
    "rain", "ring", "road", "rose", "ship", "shoe", "snow", "sock", "spoon", "star", "sun",
    "tent", "train", "tree", "wind", "wolf", "yarn", "zebra",
)
# fmt: on
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (36, 150, 60),
    "blue": (38, 84, 214),
    "yellow": (232, 198, 20),
    "orange": (240, 128, 16),
    "purple": (138, 48, 176),
    "black": (24, 24, 24),
}
PLACES = ("top left", "top right", "middle left", "middle right", "bottom left", "bottom right")
BAR_LETTERS = "ABCDEFGH"
SeedUse = Literal["train", "calibration", "evaluation", "tuning", "showcase", "monitor"]
SEED_RANGES: dict[str, range] = {
    "calibration": range(1_000_000, 2_000_000),
    "evaluation": range(2_000_000, 3_000_000),
    "tuning": range(3_000_000, 4_000_000),
    "showcase": range(4_000_000, 5_000_000),
    "monitor": range(5_000_000, 6_000_000),
    "train": range(1_000_000_000, 2_000_000_000),
}

_GLYPH_STEP = 13
_GLYPH_SIZE = 21
_LABEL_SIZE = 15
_UNIT = 8


@dataclass(frozen=True)
class Mark:
    """One drawn thing: a printed character, a shape or a bar, centred at (x, y)."""

    group: Literal["word", "number", "shape", "label", "bar"]
    kind: str
    colour: str
    x: float
    y: float
    size: float
    value: int = 0


@dataclass(frozen=True)
class Shape:
    """A shape as the questions see it: what, which colour, in which cell."""

    kind: str
    colour: str
    place: str


@dataclass(frozen=True)
class Scene:
    """All that is true of an image, and the marks that draw it."""

    seed: int
    word: str
    number: str
    word_colour: str
    number_colour: str
    shapes: tuple[Shape, ...]
    bars: tuple[tuple[str, int], ...]
    background: tuple[int, int, int]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Question:
    """One question about a scene and its only right answer."""

    task: str
    prompt: str
    answer: str


def seed_at(use: SeedUse, index: int) -> int:
    """The scene seed number `index` of a use."""
    return SEED_RANGES[use][index]


def make_scene(seed: int) -> Scene:
    """Draw the content of the scene of this seed."""
    rng = np.random.default_rng(seed)
    colours = list(COLOURS)
    word = str(rng.choice(WORDS))
    number = str(rng.integers(10, 100))
    word_colour, number_colour = (str(c) for c in rng.choice(colours, 2))
    marks = _header(rng, word, number, word_colour, number_colour)
    chart_left = bool(rng.integers(2))
    shapes, shape_marks = _shapes(rng, 66.0 if chart_left else 0.0)
    bars, bar_marks = _chart(rng, 0.0 if chart_left else 64.0)
    background = tuple(int(v) for v in rng.integers(225, 256, 3))
    return Scene(
        seed,
        word,
        number,
        word_colour,
        number_colour,
        shapes,
        bars,
        (background[0], background[1], background[2]),
        (*marks, *shape_marks, *bar_marks),
    )


def _header(
    rng: np.random.Generator, word: str, number: str, word_colour: str, number_colour: str
) -> list[Mark]:
    gap = 10
    spare = SIZE - 4 - (len(word) + len(number)) * _GLYPH_STEP - gap
    start = 2 + float(rng.integers(0, max(spare, 1)))
    y = 15 + float(rng.integers(-3, 4))
    items: list[tuple[Literal["word", "number"], str, str]] = [
        ("word", word, word_colour),
        ("number", number, number_colour),
    ]
    if rng.integers(2):
        items.reverse()
    marks = []
    for group, text, colour in items:
        for char in text:
            marks.append(Mark(group, char, colour, start + _GLYPH_STEP / 2, y, _GLYPH_SIZE))
            start += _GLYPH_STEP
        start += gap
    return marks


def _shapes(rng: np.random.Generator, left: float) -> tuple[tuple[Shape, ...], list[Mark]]:
    count = int(rng.integers(1, 6))
    cells = sorted(int(c) for c in rng.choice(6, count, replace=False))
    # Few kinds and colours in one scene, so that counts above one are common.
    kinds = rng.choice(SHAPES, 3, replace=False)
    colours = rng.choice(list(COLOURS), 4, replace=False)
    shapes, marks = [], []
    for cell in cells:
        kind, colour = str(rng.choice(kinds)), str(rng.choice(colours))
        x = left + 16 + 30 * (cell % 2) + float(rng.integers(-2, 3))
        y = 48 + 32 * (cell // 2) + float(rng.integers(-3, 4))
        shapes.append(Shape(kind, colour, PLACES[cell]))
        marks.append(Mark("shape", kind, colour, x, y, float(rng.integers(18, 25))))
    return tuple(shapes), marks


def _chart(rng: np.random.Generator, left: float) -> tuple[tuple[tuple[str, int], ...], list[Mark]]:
    count = int(rng.integers(3, 5))
    letters = rng.choice(list(BAR_LETTERS), count, replace=False)
    heights = rng.integers(1, 10, count)
    step = 15
    x = left + (64 - count * step) / 2 + step / 2 + float(rng.integers(-2, 3))
    base = 109 + float(rng.integers(-2, 3))
    bars, marks = [], []
    for letter, height in zip(letters, heights, strict=True):
        colour = str(rng.choice(list(COLOURS)))
        tall = int(height) * _UNIT
        bars.append((str(letter), int(height)))
        marks.append(Mark("bar", str(letter), colour, x, base - tall / 2, 10.0, int(height)))
        marks.append(Mark("label", str(letter), "black", x, base + 9, _LABEL_SIZE, int(height)))
        x += step
    return tuple(bars), marks


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def render(scene: Scene) -> Image.Image:
    """The image of a scene: the marks on a tinted background with faint pixel noise."""
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    draw = ImageDraw.Draw(image)
    for mark in scene.marks:
        _draw(draw, mark)
    noise = np.random.default_rng(scene.seed + 7).integers(-10, 11, (SIZE, SIZE, 3))
    pixels = np.asarray(image, dtype=np.int16) + noise.astype(np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    x, y, half, ink = mark.x, mark.y, mark.size / 2, COLOURS[mark.colour]
    if mark.group in ("word", "number", "label"):
        draw.text((x, y), mark.kind, fill=ink, font=_font(int(mark.size)), anchor="mm")
    elif mark.group == "bar":
        tall = mark.value * _UNIT / 2
        draw.rectangle((x - half, y - tall, x + half, y + tall), fill=ink)
    elif mark.kind == "circle":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=ink)
    elif mark.kind == "square":
        draw.rectangle((x - half + 1, y - half + 1, x + half - 1, y + half - 1), fill=ink)
    elif mark.kind == "triangle":
        draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=ink)
    elif mark.kind == "diamond":
        draw.polygon([(x, y - half), (x + half, y), (x, y + half), (x - half, y)], fill=ink)
    else:
        arm = half / 3
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=ink)
        draw.rectangle((x - arm, y - half, x + arm, y + half), fill=ink)


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question:
    """One question of a task about a scene; `rng` picks among those with a single right answer."""
    prompt, answer = _ASKERS[task](scene, rng)
    return Question(task, prompt, answer)


def _word(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "What word is printed?", scene.word


def _number(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "What number is printed?", scene.number


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.integers(2):
        return "How many shapes are there?", str(len(scene.shapes))
    kinds = [s.kind for s in scene.shapes]
    kind = str(rng.choice([*kinds, str(rng.choice(SHAPES))]))
    plural = "crosses" if kind == "cross" else f"{kind}s"
    return f"How many {plural} are there?", str(kinds.count(kind))


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    which = int(rng.integers(4))
    if which == 0:
        return "What colour is the word?", scene.word_colour
    if which == 1:
        return "What colour is the number?", scene.number_colour
    kinds = [s.kind for s in scene.shapes]
    single = [s for s in scene.shapes if kinds.count(s.kind) == 1]
    if which == 2 and single:
        shape = single[int(rng.integers(len(single)))]
        return f"What colour is the {shape.kind}?", shape.colour
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    return f"What colour is the {shape.place} shape?", shape.colour


def _compare(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    pairs = [(a, b) for a in scene.bars for b in scene.bars if a[1] != b[1]]
    if pairs and rng.integers(2):
        first, second = pairs[int(rng.integers(len(pairs)))]
        prompt = f"Which bar is taller, {first[0]} or {second[0]}?"
    else:
        kinds = [s.kind for s in scene.shapes]
        one = str(rng.choice(kinds))
        two = str(rng.choice([k for k in SHAPES if k != one]))
        others = [k for k in kinds if k != one]
        if others:
            two = str(rng.choice(others))
        names = (one, two) if rng.integers(2) else (two, one)
        first, second = ((k, kinds.count(k)) for k in names)
        prompt = f"Which is more common, {first[0]} or {second[0]}?"
    if first[1] == second[1]:
        return prompt, "equal"
    return prompt, first[0] if first[1] > second[1] else second[0]


def _locate(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    pairs = [(s.colour, s.kind) for s in scene.shapes]
    single = [s for s in scene.shapes if pairs.count((s.colour, s.kind)) == 1]
    if not single:  # every shape has a twin: ask for the first place that holds one
        shape = scene.shapes[0]
        return f"Where is the first {shape.colour} {shape.kind}?", shape.place
    shape = single[int(rng.integers(len(single)))]
    return f"Where is the {shape.colour} {shape.kind}?", shape.place


def _chart_value(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    top = max(height for _, height in scene.bars)
    tallest = [letter for letter, height in scene.bars if height == top]
    if len(tallest) == 1 and rng.integers(4) == 0:
        return "Which bar is tallest?", tallest[0]
    letter, height = scene.bars[int(rng.integers(len(scene.bars)))]
    return f"What is the value of bar {letter}?", str(height)


def _describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    names = [f"{s.colour} {s.kind}" for s in scene.shapes]
    head = ", ".join(names[:-1])
    return "Describe the shapes.", f"{head} and {names[-1]}" if head else names[0]


_ASKERS = {
    "word": _word,
    "number": _number,
    "count": _count,
    "colour": _colour,
    "compare": _compare,
    "locate": _locate,
    "chart": _chart_value,
    "describe": _describe,
}


def draw_samples(use: SeedUse, count: int, first: int = 0) -> list[tuple[Image.Image, Question]]:
    """`count` images with one question each, the tasks in turn, every one on a scene of its own."""
    made = []
    for index in range(first, first + count):
        seed = seed_at(use, index)
        scene = make_scene(seed)
        question = ask(scene, TASKS[index % len(TASKS)], np.random.default_rng(seed + 1))
        made.append((render(scene), question))
    return made
