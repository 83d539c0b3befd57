"""Plots as SVG text: bars, stacked bars and lines with intervals. Colours are the page's variables."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COLOURS = 6  # the page defines --c0 to --c5
_WIDTH = 860
_LABEL = 230
_NOTE = 270


@dataclass(frozen=True)
class Line:
    """A named curve of (x, y, low, high); ``theirs`` draws it dashed."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    theirs: bool = False


@dataclass(frozen=True)
class Bar:
    """A named bar of one or more parts. note stands behind it; ``theirs`` draws it hatched."""

    name: str
    parts: Mapping[str, float]
    note: str
    theirs: bool = False


def escape(value: object) -> str:
    """Text for HTML and SVG."""
    return html.escape(str(value))


def bars(title: str, rows: Sequence[Bar], parts: Sequence[str]) -> str:
    """Horizontal bars, their parts stacked in the order of ``parts``; a legend if there are several."""
    longest = max((sum(row.parts.values()) for row in rows), default=0.0) or 1.0
    out, y = [], 4
    for row in rows:
        x = float(_LABEL)
        out.append(
            f'<text x="{_LABEL - 10}" y="{y + 15}" text-anchor="end">{_clip(row.name)}</text>'
        )
        for part in parts:
            width = (_WIDTH - _LABEL - _NOTE) * row.parts.get(part, 0.0) / longest
            if width > 0:
                fill = f"var(--c{parts.index(part) % COLOURS})"
                style = f'fill="{fill}"' + (' fill-opacity=".35"' if row.theirs else "")
                edge = f' stroke="{fill}" stroke-dasharray="4 3"' if row.theirs else ""
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" {style}{edge}>'
                    f"<title>{escape(part)}: {row.parts[part]:.4g}</title></rect>"
                )
            x += width
        out.append(f'<text x="{x + 8:.1f}" y="{y + 15}" class="soft">{escape(row.note)}</text>')
        y += 28
    legend = _legend([(part, f"var(--c{i % COLOURS})", False) for i, part in enumerate(parts)])
    return _svg(title, y, out) + (legend if len(parts) > 1 else "")


def lines(
    title: str, x_title: str, y_title: str, curves: Sequence[Line], limit: float | None = None
) -> str:
    """Curves over a linear x from 0; a dashed line at ``limit``, or at the top if that is far above."""
    left, right, top, bottom = 76, 20, 26, 300
    points = [p for curve in curves for p in curve.points]
    x_max = max((p[0] for p in points), default=1.0) or 1.0
    highest = max((p[3] for p in points), default=1.0) or 1.0
    far = limit is not None and limit > 4 * highest
    y_max = 1.08 * (highest if limit is None or far else max(highest, limit))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (_WIDTH - left - right) * x / (x_max * 1.03),
            bottom - (bottom - top) * y / y_max,
        )

    out = []
    for tick in _ticks(y_max):
        y = place(0, tick)[1]
        out.append(f'<path d="M{left} {y:.1f}H{_WIDTH - right}" class="grid"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x_max):
        x = place(tick, 0)[0]
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    out.append(
        f'<text x="{_WIDTH - right}" y="{bottom + 38}" text-anchor="end" class="soft">{escape(x_title)}</text>'
        f'<text x="{left}" y="14" class="soft">{escape(y_title)}</text>'
    )
    if limit is not None:
        y = top if far else place(0, limit)[1]
        note = f"limit {limit:.3g}" + (", above this scale" if far else "")
        out.append(f'<path d="M{left} {y:.1f}H{_WIDTH - right}" class="limit"/>')
        out.append(f'<text x="{_WIDTH - right}" y="{y - 7:.1f}" text-anchor="end">{note}</text>')
    for i, curve in enumerate(curves):
        out += _curve(curve, f"var(--c{i % COLOURS})", place)
    legend = [(c.name, f"var(--c{i % COLOURS})", c.theirs) for i, c in enumerate(curves)]
    return _svg(title, bottom + 46, out) + _legend(legend)


def _curve(
    curve: Line, colour: str, place: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    ordered = sorted(curve.points)
    path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _, _ in ordered)
    dash = ' stroke-dasharray="6 4"' if curve.theirs else ""
    out = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for x, y, low, high in ordered:
        (px, py), (_, p_low), (_, p_high) = place(x, y), place(x, low), place(x, high)
        out.append(
            f'<path d="M{px:.1f} {p_low:.1f}V{p_high:.1f}" stroke="{colour}" stroke-width="1.5"/>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(curve.name)}, {x:g}: {y:.4g} ({low:.4g} to {high:.4g})</title></circle>"
        )
    return out


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to ``top``, about five."""
    raw = top / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    return [step * i for i in range(int(top / step) + 1)]


def _legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    items = "".join(
        f'<span><i style="background:{colour}{";opacity:.5" if theirs else ""}"></i>{escape(name)}</span>'
        for name, colour, theirs in entries
    )
    return f'<div class="legend">{items}</div>'


def _clip(name: str) -> str:
    return escape(name if len(name) <= 28 else "…" + name[-27:])


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {_WIDTH} {height:g}" '
        f'width="100%">{"".join(parts)}</svg>'
    )
