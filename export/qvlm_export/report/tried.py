"""Drawings of a comparison's rows: accuracy and divergence against bits per weight, a colour per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qvlm_export.report.svg import COLOURS, LEFT, RIGHT, Axis, Drawing, number
from qvlm_export.report.tables import table

Json = Mapping[str, Any]

# The reference among the rows: no divergence, so only a line.
FLOAT = "float"
_MARKS = ("seen", "hollow", "dotted")


def tried_section(rows: Sequence[Json]) -> list[str]:
    """Heading, drawing and table as markup; [] without rows."""
    tried = [row for row in rows if row["method"] != FLOAT]
    if not tried:
        return []
    reference = next((row for row in rows if row["method"] == FLOAT), None)
    methods = list(dict.fromkeys(str(row["method"]) for row in tried))
    # Filled, hollow, dotted: three times as many methods as colours can be told apart.
    colours = {
        name: f"{_MARKS[k // COLOURS % len(_MARKS)]} c{k % COLOURS}"
        for k, name in enumerate(methods)
    }
    parts = [
        "<h2>What was tried: accuracy against bits per weight</h2>",
        '<p class="sub">A dot per method, format and draw, methods side by side; bits count the whole model.</p>',
    ]
    if all("exact_match" in row for row in tried):
        known = reference if reference and "exact_match" in reference else None
        parts.append(_scatter(tried, colours, "exact_match", known))
    parts.append(_scatter([r for r in tried if r["kl"] > 0], colours, "kl", None))
    return [*parts, _rows(rows)]


def _scatter(rows: Sequence[Json], colours: Mapping[str, str], key: str, line: Json | None) -> str:
    if not rows:
        return ""
    lines = _legend_lines(list(colours))
    top = 22 * len(lines) + 34
    drawing = Drawing(top + 250, f"{key} against bits per weight")
    for k, names in enumerate(lines):
        drawing.legend([(colours[name], name) for name in names], 16 + 22 * k)
    wide = Axis.linear([row["bits_per_weight"] for row in rows], LEFT + 50, RIGHT - 50)
    values = [row[key] for row in rows]
    if key == "kl":
        high = Axis.logarithmic(values, top + 200, top)
        drawing.scale(high, "KL to float, nats per token")
    else:
        high = Axis.linear([*values, *([line[key]] if line else [])], top + 200, top)
        drawing.scale(high, "exact match")
        if line:
            drawing.line(LEFT, high(line[key]), RIGHT, high(line[key]), "dash")
            drawing.label(RIGHT, high(line[key]) - 5, "float", "end", "soft")
    for tick in wide.ticks:
        drawing.label(wide(tick), top + 220, number(tick), "middle", "soft")
    drawing.label((LEFT + RIGHT) / 2, top + 240, "bits per weight", "middle", "soft")
    names = list(colours)
    for row in rows:
        # Methods of one format have the same bits: side by side, so that all can be seen.
        aside = (names.index(str(row["method"])) - (len(names) - 1) / 2) * min(9, 90 / len(names))
        tip = f"{row['method']} {row['format']}: {number(row['bits_per_weight'])} bits, {key} {number(row[key])}"
        at = wide(row["bits_per_weight"]) + aside, high(row[key])
        drawing.dot(*at, colours[str(row["method"])], tip, 5)
    return drawing.markup()


def _legend_lines(names: Sequence[str]) -> list[list[str]]:
    """Names in lines that fit the drawing."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for name in names:
        width = 30 + 7.2 * len(name)
        if lines[-1] and used + width > RIGHT - LEFT:
            lines.append([])
            used = 0.0
        lines[-1].append(name)
        used += width
    return lines


def _rows(rows: Sequence[Json]) -> str:
    names = (
        "method",
        "format",
        "draw",
        "bits_per_weight",
        "kl",
        "exact_match",
        "seconds",
        "peak_mb",
    )
    shown = [name for name in names if any(row.get(name) is not None for row in rows)]
    ordered = sorted(rows, key=lambda row: (row["bits_per_weight"], row["kl"]))
    lines = [[_cell(row.get(name)) for name in shown] for row in ordered]
    return f"<details><summary>the rows</summary>{table(shown, lines)}</details>"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)
