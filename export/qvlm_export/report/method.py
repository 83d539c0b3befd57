"""Drawings of what the quantizer recorded: dependency and partition, block errors, ranges of what the linears read.

A method that records nothing of one kind leaves that drawing out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qvlm.recipe import COMPONENTS
from qvlm_export.report.svg import LEFT, RIGHT, Axis, Drawing, number
from qvlm_export.report.tables import table

Json = Mapping[str, Any]

KINDS = {"image": "c0", "text": "c1"}
# A channel this many times the median of its input's channels is called an outlier.
OUTLIER = 20.0
_NOTHING: Json = {"median": 0.0, "largest": 0.0}


def method_sections(method: Json) -> list[str]:
    """Headings, drawings and tables as markup; [] for a float recipe or a checkpoint that recorded nothing."""
    components = method.get("components", {})
    rows = [(c, row) for c in COMPONENTS for row in components.get(c, ())]
    parts = []
    if found := next((row for _, row in rows if "dependency" in row and "partition" in row), None):
        parts += [
            "<h2>Dependency of decoder layers and the block partition</h2>",
            '<p class="sub">Above: entropy of what enters each layer. Below: mutual dependency of neighbours. '
            f"{_bands([row for c, row in rows if c == 'text'])}</p>",
            _dependency(found),
        ]
    measured = [(c, row) for c, row in rows if "measured" in row]
    if measured:
        parts += [
            "<h2>Block error before and after</h2>",
            '<p class="sub">|q − f|² / |f|² of what leaves each block, everything in front of it quantized too. '
            "Hollow: round to nearest in this block. Filled: the method's result.</p>",
            _errors(measured),
            _error_table(measured),
            "<h2>Ranges of what the linears read</h2>",
            '<p class="sub">Of each layer the input whose outliers reach farthest. Each line runs from the median over '
            "channels to the largest channel; dots are the largest channels, numbered where they are "
            f"{OUTLIER:g} times the median and more.</p>",
            _ranges(measured),
            _outlier_table(measured),
        ]
    return parts


def _bands(decoder: Sequence[Json]) -> str:
    """What was done with the blocks: ``fused`` partitions the decoder also where its bits ask for no joint rounding."""
    searched = sum("solver" in row or "linears" not in row for row in decoder)
    if not searched:
        return "Bands: the partition. No joint search ran on it: each layer was solved alone."
    if searched < len(decoder):
        return f"Layers on one band were searched together in {searched} of {len(decoder)} blocks."
    return "Layers on one band were searched together."


def _partition(row: Json) -> list[tuple[int, int]]:
    return [(int(start), int(stop)) for start, stop in row["partition"]]


def _dependency(row: Json) -> str:
    dependency, entropy = row["dependency"], row["entropy"]
    count = max(len(entropy), len(dependency) + 1)
    drawing = Drawing(330, "entropy of decoder layers, dependency of neighbours, block partition")
    step = (RIGHT - LEFT) / count
    for number_, (start, stop) in enumerate(_partition(row)):
        x = LEFT + step * start
        name = f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
        drawing.box(x + 2, 20, step * (stop - start) - 4, 276, "band", f"block {number_}: {name}")
        drawing.label(x + step * (stop - start) / 2, 14, f"block {number_}", "middle", "soft small")
    high = Axis.linear(entropy, 150, 48)
    drawing.scale(high, "entropy, nats")
    drawing.path([(LEFT + step * (k + 0.5), high(h)) for k, h in enumerate(entropy)], "line c0")
    for k, value in enumerate(entropy):
        drawing.dot(LEFT + step * (k + 0.5), high(value), "c0", f"layer {k}: {number(value)} nats")
    low = Axis.linear(dependency or [0.0], 292, 196, zero=True)
    drawing.scale(low, "dependency D(k, k+1)")
    for k, value in enumerate(dependency):
        x, y = LEFT + step * (k + 1), low(value)
        drawing.box(
            x - 7, min(y, low(0)), 14, abs(low(0) - y), "c1", f"D({k}, {k + 1}) = {number(value)}"
        )
    for k in range(count):
        drawing.label(LEFT + step * (k + 0.5), 314, k, "middle", "soft")
    drawing.label(LEFT, 328, "decoder layer", "start", "soft small")
    return drawing.markup()


def _columns(drawing: Drawing, places: Sequence[tuple[str, int]], top: float, low: float) -> float:
    """Component names, separators and numbers under a drawing's columns; the width of a column."""
    step = (RIGHT - LEFT) / len(places)
    every = 1 + len(places) // 40
    for k, (component, index) in enumerate(places):
        x = LEFT + step * k
        if k == 0 or places[k - 1][0] != component:
            if k:
                drawing.line(x, top, x, low + 22, "edge")
            drawing.label(x + 3, low + 34, component, "start", "small")
        if index % every == 0:
            drawing.label(x + step / 2, low + 16, index, "middle", "soft small")
    return step


def _aside(kinds: Json, side: int, step: float) -> float:
    """How far from the middle of its column a mark stands: image and text side by side, one alone in the middle."""
    return (side - 0.5) * min(14.0, step / 2) if all(kind in kinds for kind in KINDS) else 0.0


def _errors(rows: Sequence[tuple[str, Json]]) -> str:
    places = [(component, int(row["layers"][0])) for component, row in rows]
    drawing = Drawing(300, "error of each block before and after the method, image and text apart")
    values = [
        value
        for _, row in rows
        for side in row["measured"]["errors"].values()
        for value in side.values()
        if value > 0
    ]
    if not values:
        return "<p>Every block is exact.</p>"
    axis = Axis.logarithmic(values, 250, 56)
    drawing.legend([("c0", "image tokens"), ("c1", "text tokens")], 16)
    drawing.scale(axis, "relative error")
    step = _columns(drawing, places, 48, 250)
    for k, (component, row) in enumerate(rows):
        errors = row["measured"]["errors"]
        for side, (kind, colour) in enumerate(KINDS.items()):
            before, after = (errors[name].get(kind, 0.0) for name in ("nearest", "final"))
            if before <= 0 or after <= 0:
                continue
            x = LEFT + step * (k + 0.5) + _aside(errors["final"], side, step)
            start, stop = row["layers"]
            tip = f"{component} {start} to {stop - 1}, {kind}: {number(before)} → {number(after)}"
            drawing.line(x, axis(before), x, axis(after), f"line {colour}")
            drawing.dot(x, axis(before), f"hollow {colour}", tip)
            drawing.dot(x, axis(after), colour, tip)
    return drawing.markup()


def _error_table(rows: Sequence[tuple[str, Json]]) -> str:
    lines = []
    for component, row in rows:
        errors = row["measured"]["errors"]
        cells = [
            number(errors[name][kind]) if kind in errors[name] else "–"
            for kind in KINDS
            for name in ("nearest", "final")
        ]
        start, stop = row["layers"]
        layers = str(start) if stop == start + 1 else f"{start}–{stop - 1}"
        lines.append([component, layers, *cells])
    head = ["component", "layers", "image, before", "image, after", "text, before", "text, after"]
    return f"<details><summary>the numbers</summary>{table(head, lines)}</details>"


def _inputs(rows: Sequence[tuple[str, Json]]) -> list[tuple[str, Json]]:
    """(component, range row) of every input. A checkpoint that names no linear recorded what enters its layers."""
    return [
        (component, {"linear": "layer", **entry})
        for component, row in rows
        for entry in row["measured"]["ranges"]
    ]


def _reach(found: Json) -> float:
    """Largest over median channel."""
    return float(found["largest"] / found["median"]) if found["median"] > 0 else 0.0


def _worst(rows: Sequence[tuple[str, Json]]) -> dict[tuple[str, int], dict[str, Json]]:
    """(component, layer) -> kind of token -> the input whose outliers reach farthest, with its linear."""
    worst: dict[tuple[str, int], dict[str, Json]] = {}
    for component, entry in _inputs(rows):
        layer = worst.setdefault((component, int(entry["layer"])), {})
        for kind in KINDS:
            if kind in entry and _reach(entry[kind]) > _reach(layer.get(kind, _NOTHING)):
                layer[kind] = {**entry[kind], "linear": entry["linear"]}
    return worst


def _ranges(rows: Sequence[tuple[str, Json]]) -> str:
    layers = _worst(rows)
    drawing = Drawing(330, "ranges of what the linears read, with the outlier channels")
    values = [
        value
        for kinds in layers.values()
        for found in kinds.values()
        for value in (found["median"], found["largest"])
    ]
    if not values:
        return "<p>Nothing but zeros enters these layers.</p>"
    axis = Axis.logarithmic(values, 280, 56)
    drawing.legend([("c0", "image tokens"), ("c1", "text tokens")], 16)
    drawing.scale(axis, "largest |x| of a channel")
    step = _columns(drawing, list(layers), 48, 280)
    for k, ((component, layer), kinds) in enumerate(layers.items()):
        for side, (kind, colour) in enumerate(KINDS.items()):
            if kind not in kinds:
                continue
            x, found = LEFT + step * (k + 0.5) + _aside(kinds, side, step), kinds[kind]
            drawing.line(x, axis(found["median"]), x, axis(found["largest"]), f"line {colour}")
            drawing.line(
                x - 4, axis(found["median"]), x + 4, axis(found["median"]), f"line {colour}"
            )
            where = f"{component} {layer} {found['linear']}, {kind}"
            for channel, value in found["channels"]:
                tip = f"{where}, channel {channel}: {number(value)}"
                drawing.dot(x, axis(value), colour, tip, 2.5)
            if step > 40 and _is_outlier(found):
                channel, value = found["channels"][0]
                # Two lines stand close: their numbers lean away from each other.
                shift, anchor = (
                    ((6, "end"), (-6, "start"))[side] if len(kinds) > 1 else (0, "middle")
                )
                drawing.label(x + shift, axis(value) - 7, channel, anchor, "small")
    return drawing.markup()


def _is_outlier(found: Json) -> bool:
    return _reach(found) >= OUTLIER


def _outlier_table(rows: Sequence[tuple[str, Json]]) -> str:
    lines = []
    for component, entry in _inputs(rows):
        for kind in KINDS:
            if kind in entry and _is_outlier(entry[kind]):
                found = entry[kind]
                channels = ", ".join(
                    f"{channel} ({number(value)})"
                    for channel, value in found["channels"]
                    if value >= OUTLIER * found["median"]
                )
                place = [component, str(entry["layer"]), entry["linear"], kind]
                lines.append([*place, number(found["median"]), channels])
    if not lines:
        return f'<p class="sub">No channel reaches {OUTLIER:g} times its input\'s median.</p>'
    head = ["component", "layer", "read by", "tokens", "median", "outlier channels (largest value)"]
    return f"<details><summary>outlier channels</summary>{table(head, lines)}</details>"
