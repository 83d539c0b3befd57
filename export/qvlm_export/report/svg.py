"""Inline SVG: axes, marks and legends as text. Colours are classes, so that the page's style serves light and dark.

Coordinates are pixels of a drawing ``WIDTH`` wide; the page scales it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 860
LEFT = 64
RIGHT = WIDTH - 12
# Classes c0 to c5 have colours; more series start again.
COLOURS = 6


def text(value: object) -> str:
    """Escaped for markup."""
    return html.escape(str(value))


def number(value: float) -> str:
    """Three digits, as short as they come."""
    return f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """Values to pixels, linear or logarithmic; ``ticks`` are the values that get a line."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.stop - self.start) * (at - low) / (high - low)

    @staticmethod
    def linear(values: Sequence[float], start: float, stop: float, zero: bool = False) -> Axis:
        """Round ticks round the values (and zero if asked)."""
        low, high = min(values), max(values)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high == low:
            low, high = low - 0.5, high + 0.5
        step = _round_step((high - low) / 4)
        first, last = math.floor(low / step), math.ceil(high / step)
        ticks = tuple(step * k for k in range(first, last + 1))
        return Axis(ticks[0], ticks[-1], start, stop, False, ticks)

    @staticmethod
    def logarithmic(values: Sequence[float], start: float, stop: float) -> Axis:
        """Powers of ten round the values, all positive; at most eight of them get a line."""
        first = math.floor(math.log10(min(values)))
        last = max(math.ceil(math.log10(max(values))), first + 1)
        every = -(-(last - first) // 8)
        ticks = tuple(10.0**k for k in range(first, last + 1, every))
        return Axis(10.0**first, 10.0**last, start, stop, True, ticks)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))


@dataclass
class Drawing:
    """Marks in the order they are drawn. ``title`` is what a screen reader says."""

    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, markup: str) -> None:
        """Append markup."""
        self.parts.append(markup)

    def label(
        self, x: float, y: float, value: object, anchor: str = "start", kind: str = ""
    ) -> None:
        """Text at its baseline."""
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{text(value)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> None:
        """A straight line."""
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, tip: str = ""
    ) -> None:
        """A rectangle; ``tip`` shows when pointed at."""
        self.add(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" '
            f'class="{kind}">{_tip(tip)}</rect>'
        )

    def dot(self, x: float, y: float, kind: str, tip: str = "", radius: float = 4) -> None:
        """A circle."""
        self.add(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{_tip(tip)}</circle>'
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add(f'<polyline points="{places}" class="{kind}"/>')

    def scale(self, axis: Axis, name: str, left: float = LEFT, right: float = RIGHT) -> None:
        """A vertical axis: its lines, numbers and name."""
        for tick in axis.ticks:
            self.line(left, axis(tick), right, axis(tick))
            self.label(left - 6, axis(tick) + 4, number(tick), "end", "soft")
        self.label(left, min(axis.start, axis.stop) - 10, name, "start", "soft")

    def legend(self, entries: Sequence[tuple[str, str]], y: float, x: float = LEFT) -> None:
        """(class, name) side by side."""
        for kind, name in entries:
            self.dot(x + 5, y - 4, kind)
            self.label(x + 15, y, name)
            x += 30 + 7.2 * len(name)

    def markup(self) -> str:
        """The element."""
        return (
            f'<svg role="img" aria-label="{text(self.title)}" viewBox="0 0 {WIDTH} {self.height}">'
            f"{''.join(self.parts)}</svg>"
        )


def _tip(tip: str) -> str:
    return f"<title>{text(tip)}</title>" if tip else ""
