"""Proves the report: JSON survives a round trip, bits count the whole model, the page is well-formed, has no script and
no outside reference, escapes what files say, and draws what the quantizer and a comparison recorded.

Run: python -m pytest tests/export/test_report.py -q
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.package import write_report
from qvlm_export.report import Report, component_rows, read_comparison, to_html
from qvlm_export.report.method import method_sections
from qvlm_export.report.svg import Axis
from qvlm_export.report.tried import tried_section

TRIED = [
    {"method": "float", "format": "float", "bits_per_weight": 16.0, "kl": 0.0, "exact_match": 0.98},
    {"method": "rtn", "format": "w4a16", "bits_per_weight": 4.7, "kl": 2e-3, "exact_match": 0.9},
    {"method": "q<&>", "format": "w8a8", "bits_per_weight": 8.3, "kl": 1e-5, "exact_match": 0.97},
]


def measured(layers: list[int], scale: float, text: bool) -> dict[str, Any]:
    kinds = ("image", "text") if text else ("image",)
    channels = [[17, 50.0 * scale], [3, 1.5]]
    found = {"median": 1.0, "largest": 50.0 * scale, "channels": channels}
    quiet = {"median": 1.0, "largest": 1.5, "channels": [[8, 1.5]]}
    return {
        "layers": layers,
        "measured": {
            "errors": {
                "nearest": dict.fromkeys(kinds, 0.02 * scale),
                "final": dict.fromkeys(kinds, 0.01 * scale),
            },
            "ranges": [
                {"layer": i, "linear": linear, **dict.fromkeys(kinds, one)}
                for i in range(layers[0], layers[1])
                for linear, one in (("q", found), ("down", quiet))
            ],
        },
    }


METHOD = {
    "name": "q-vlm",
    "components": {
        "vision": [measured([0, 1], 0.1, False), measured([1, 2], 1.0, False)],
        "text": [
            {
                **measured([0, 2], 1.0, True),
                "partition": [[0, 2], [2, 3]],
                "dependency": [0.5, 0.1],
                "entropy": [3.0, 2.5, 2.0],
            },
            measured([2, 3], 2.0, True),
        ],
    },
}


@pytest.fixture
def report(tiny_checkpoint: Path) -> Report:
    checkpoint = Checkpoint(tiny_checkpoint)
    return Report(
        "1",
        "a <model>",
        checkpoint.recipe.to_json(),
        component_rows(checkpoint),
        {"kl": 1e-3, "greedy": 0.99, "tokens": 5.0, "image_features": 0.01},
        targets={"ort": {"graphs": [{"graph": "vision", "nodes": 3, "bytes": 5}]}},
        method=METHOD,
        comparison=TRIED,
        versions={"numpy": np.__version__},
        files={"ort/decoder.onnx": "ab" * 32},
    )


def parsed(page: str) -> ElementTree.Element:
    """The body as XML: everything here is written so that it is."""
    body = page[page.index("<body>") : page.index("</html>")]
    return ElementTree.fromstring(body)


def test_json_round_trip(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.to_json())
    again = Report.read(path)
    assert again.to_json() == report.to_json()
    assert to_html(again) == to_html(report)
    path.write_text(json.dumps({**json.loads(report.to_json()), "schema": 1}))
    with pytest.raises(ExportError, match="schema 1, expected 2"):
        Report.read(path)
    data = json.loads(report.to_json())
    del data["source"]
    path.write_text(json.dumps(data))
    with pytest.raises(ExportError, match="not a whole report"):
        Report.read(path)


def test_bits_count_every_stored_weight(report: Report, tiny_checkpoint: Path) -> None:
    from qvlm.evaluate import sizes

    total = next(row for row in sizes(Checkpoint(tiny_checkpoint)) if row.component == "total")
    assert sum(row.parameters for row in report.components) == total.parameters
    assert sum(row.nbytes for row in report.components) == total.nbytes
    assert report.bits_per_weight == pytest.approx(total.bits_per_weight, rel=1e-12)


def test_the_page_is_self_contained_and_well_formed(report: Report) -> None:
    page = to_html(report)
    assert "<script" not in page and "http" not in page and "url(" not in page
    assert "prefers-color-scheme:dark" in page
    tree = parsed(page)
    titles = ["".join(h.itertext()) for h in tree.iter("h2")]
    assert titles == [
        "Bits and bytes by component",
        "What was tried: accuracy against bits per weight",
        "Dependency of decoder layers and the block partition",
        "Block error before and after",
        "Ranges of what the linears read",
        "Target ort",
        "Recipe",
        "Versions",
        "Files",
    ]
    assert "a <model>" in "".join(tree.itertext()) and "q<&>" in "".join(tree.itertext())
    # Every class a mark has is one that the style gives a colour.
    style = page[: page.index("<body>")]
    classes = {
        c for e in tree.iter() for c in e.get("class", "").split() if e.tag in ("circle", "rect")
    }
    assert classes and all(f".{name}{{" in style for name in classes)


def test_marks_are_what_was_recorded(report: Report) -> None:
    tree = parsed(to_html(report))
    tips = [t.text for t in tree.iter("title") if t.text]
    assert "block 0: layers 0 to 1" in tips and "block 1: layer 2" in tips
    assert "D(0, 1) = 0.5" in tips and "layer 2: 2 nats" in tips
    # Once at the hollow dot, once at the filled one.
    assert tips.count("text 0 to 1, image: 0.02 → 0.01") == 2
    assert "vision 1 q, image, channel 17: 50" in tips
    # Of a layer the input of the farthest outlier, for each kind of token; at 0.1 that is 5 against 1.5.
    assert "text 2 q, text, channel 17: 100" in tips and not [t for t in tips if " down," in t]
    assert not [t for t in tips if t.startswith("vision") and "text" in t]
    # One dot per tried row with a divergence in each of the two drawings.
    assert tips.count("q<&> w8a8: 8.3 bits, kl 1e-05") == 1
    assert sum(" bits, " in t for t in tips) == 4
    text = "".join(tree.itertext())
    assert "17 (50)" in text and "3 (1.5)" not in text


def test_the_partition_says_what_was_searched() -> None:
    """fused records a partition also where no block was rounded jointly."""

    def caption(*decoder: dict[str, Any]) -> str:
        first, second = METHOD["components"]["text"]
        rows = [{**first, **decoder[0]}, {**second, **decoder[1]}]
        sections = method_sections({"components": {"text": rows}})
        return next(part for part in sections if "Below: mutual dependency" in part)

    alone: dict[str, Any] = {"linears": {}}
    joint = {**alone, "solver": {"note": ""}}
    assert "Layers on one band were searched together.</p>" in caption({}, {})
    assert "Layers on one band were searched together.</p>" in caption(joint, joint)
    assert "searched together in 1 of 2 blocks" in caption(alone, joint)
    assert "No joint search ran" in caption(alone, alone)


def test_a_method_that_recorded_nothing_leaves_the_drawings_out(report: Report) -> None:
    assert method_sections({"name": "rtn", "components": {}}) == []
    page = to_html(replace(report, method={}, comparison=()))
    assert "Block error" not in page and "What was tried" not in page
    parsed(page)


def test_marks_stay_inside_the_drawing(report: Report) -> None:
    for svg in parsed(to_html(report)).iter("svg"):
        _, _, width, height = (float(n) for n in svg.get("viewBox", "").split())
        for mark in svg.iter("circle"):
            assert 0 <= float(mark.get("cx", -1)) <= width
            assert 0 <= float(mark.get("cy", -1)) <= height
        for label in svg.iter("text"):
            assert 0 <= float(label.get("y", -1)) <= height


def test_axes_cover_their_values_with_round_ticks() -> None:
    for values in ([0.93, 0.98], [4.1, 8.3, 16.0], [5.0], [-1.0, 3.0]):
        axis = Axis.linear(values, 100, 0)
        assert axis.low <= min(values) and max(values) <= axis.high
        assert axis(axis.low) == 100 and axis(axis.high) == pytest.approx(0)
        assert 2 <= len(axis.ticks) <= 7
    for values in ([1e-9, 3.0], [1.0], [1e-300, 1e300]):
        axis = Axis.logarithmic(values, 100, 0)
        assert axis.low <= min(values) * (1 + 1e-12) and max(values) <= axis.high * (1 + 1e-12)
        assert 2 <= len(axis.ticks) <= 9


def test_comparisons_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [*TRIED, {"kind": "other"}]}))
    assert read_comparison(path) == TRIED
    for data, message in (
        ({"rows": 3}, 'no "rows"'),
        ({"rows": [{"kind": "x"}]}, "no row has"),
        ({"rows": [{**TRIED[0], "kl": None}]}, "kl None of .* expected a number"),
        ({"rows": [{**TRIED[0], "kl": float("nan")}]}, "kl nan of .* expected a number"),
        ({"rows": [{**TRIED[0], "exact_match": "1"}]}, "exact_match '1' of .* expected a number"),
    ):
        path.write_text(json.dumps(data))
        with pytest.raises(ExportError, match=message):
            read_comparison(path)


def test_numbers_are_never_drawn_as_nan(report: Report) -> None:
    assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", to_html(report), re.IGNORECASE)


def test_methods_can_be_told_apart() -> None:
    rows = [{**TRIED[1], "method": f"m{i}"} for i in range(18)]
    (drawing, *_) = (part for part in tried_section(rows) if part.startswith("<svg"))
    marks = re.findall(r'r="4" class="(\w+ c\d)"', drawing)  # the legend's
    assert len(marks) == len(set(marks)) == 18


def test_what_cannot_be_drawn_leaves_the_old_report(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, report)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(report: Report) -> str:
        raise ValueError("no drawing")

    monkeypatch.setattr("qvlm_export.package.to_html", fail)
    with pytest.raises(ValueError, match="no drawing"):
        write_report(tmp_path, replace(report, version="9"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reference_without_a_score_draws_no_line() -> None:
    reference = {key: value for key, value in TRIED[0].items() if key != "exact_match"}
    page = "".join(tried_section([reference, *TRIED[1:]]))
    assert "exact match" in page and 'class="dash"' not in page
