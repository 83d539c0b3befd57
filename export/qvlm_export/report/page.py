"""report.html: one self-contained page (no script, no external file), legible in light and in dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qvlm_export.report.data import OTHER, ComponentRow, Report
from qvlm_export.report.method import method_sections
from qvlm_export.report.svg import Drawing, text
from qvlm_export.report.tables import cards, cell, details, table
from qvlm_export.report.tried import tried_section

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6573;--line:#dfe3e8;--edge:#9aa4b0;--paper:#fff;
 --pale:#cfdeea;--band:#eef2f6;--ok:#1b7f4b;--bad:#b3261e;
 --c0:#2f6f9f;--c1:#c2611b;--c2:#3b8f52;--c3:#8a4fa3;--c4:#a8862b;--c5:#b33b5e}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ed;--soft:#9ba6b3;--line:#2c333b;--edge:#5d6874;--paper:#14181d;
 --pale:#2b4257;--band:#1d232a;--ok:#5cc48d;--bad:#f0837a;
 --c0:#6cb2e4;--c1:#f0995a;--c2:#7fcf95;--c3:#c795df;--c4:#dcbb62;--c5:#ec88a5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 4rem;color:var(--ink);background:var(--paper);
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.1rem;margin:2.4rem 0 .4rem}
p.sub{color:var(--soft);margin:.2rem 0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.7rem 1rem;min-width:9rem}
.card b{display:block;font-size:1.35rem}
.card span{color:var(--soft);font-size:.85rem}
.ok{color:var(--ok)}
.bad{color:var(--bad)}
code{font-size:.9em}
pre{overflow:auto;max-height:30rem;font-size:.8rem;background:var(--band);padding:.8rem;border-radius:.4rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--soft)}
.scroll{overflow-x:auto}
svg{display:block;width:100%;height:auto;margin:.3rem 0}
svg text{font:13px system-ui,sans-serif;fill:var(--ink)}
svg text.soft{fill:var(--soft)}
svg text.small{font-size:11.5px}
.grid{stroke:var(--line)}
.edge{stroke:var(--edge);stroke-dasharray:2 3}
.dash{stroke:var(--soft);stroke-dasharray:5 4}
.band{fill:var(--band)}
.pale{fill:var(--pale)}
.c0{fill:var(--c0);stroke:var(--c0)}
.c1{fill:var(--c1);stroke:var(--c1)}
.c2{fill:var(--c2);stroke:var(--c2)}
.c3{fill:var(--c3);stroke:var(--c3)}
.c4{fill:var(--c4);stroke:var(--c4)}
.c5{fill:var(--c5);stroke:var(--c5)}
.line{fill:none;stroke-width:1.6}
.hollow{fill:var(--paper);stroke-width:1.6}
.dotted{fill:var(--paper);stroke-width:1.8;stroke-dasharray:2 1.8}
.seen{fill-opacity:.7}
"""

# Sections of a target: key -> what stands above its table; rows are JSON objects of one shape.
_SECTIONS = {
    "graphs": "Graphs as written, external data included.",
    "verify": "Replay of the goldens through ONNX Runtime: error of each output and its bound.",
    "greedy": "Greedy tokens through both graphs against the goldens.",
    "engines": "Engines, with the kernels of each profile; integer products checked in the compiler's list.",
    "largest activations": "Largest activations of the float model on the samples, and half of float16's range.",
    "float32": "What leaves float16: these modules' values are float32 in this target's graphs.",
    "rules": "TensorRT rules: findings below the level of an error.",
}


def to_html(report: Report) -> str:
    """The page as text."""
    body = [
        f"<h1>{text(report.source)}</h1>",
        f'<p class="sub">qvlm {text(report.version)} · method {text(report.recipe.get("method"))} · '
        f"{text(', '.join(report.targets) or 'no target')}</p>",
        _cards(report),
        "<h2>Bits and bytes by component</h2>",
        _bars(report.components),
        _component_table(report),
    ]
    if report.accuracy:
        body += ["<h2>Accuracy</h2>", _accuracy(report.accuracy)]
    body += tried_section(report.comparison)
    body += method_sections(report.method)
    for name, target in report.targets.items():
        body += [f"<h2>Target <code>{text(name)}</code></h2>", _target(target)]
    if report.seconds:
        rows = [[stage, f"{value:.1f} s"] for stage, value in report.seconds.items()]
        body += ["<h2>Time</h2>", table(["stage", ""], rows)]
    body += ["<h2>Recipe</h2>", _recipe(report.recipe), *_origin(report)]
    body.append(details("everything the method recorded", _json(report.method)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>qvlm: {text(report.source)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _json(data: object) -> str:
    return f"<pre>{text(json.dumps(data, indent=2, sort_keys=True))}</pre>"


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _cards(report: Report) -> str:
    linears = [row for row in report.components if row.component != OTHER]
    parameters = sum(row.parameters for row in linears)
    bits = 8 * sum(row.nbytes for row in linears) / max(parameters, 1)
    values = [
        (f"{report.bits_per_weight:.3f}", "bits per weight, whole model"),
        (f"{bits:.3f}", "bits per weight, all linears"),
        (f"{report.bits_per_weight / 16:.3f}×", "of the float16 bytes"),
        (f"{report.divergence['kl']:.2e}", "KL to float, nats per token"),
        (f"{100 * report.divergence['greedy']:.2f} %", "same greedy token as float"),
    ]
    if report.accuracy:
        values.append((f"{100 * report.accuracy['quantized']['exact_match']:.1f} %", "exact match"))
    return cards(values)


def _bars(components: Sequence[ComponentRow]) -> str:
    """Bytes of each component against its float16 bytes."""
    widest = max((row.float16_bytes for row in components), default=1)
    drawing = Drawing(
        30 * len(components) + 26, "bytes of each component, as stored and as float16"
    )
    for k, row in enumerate(components):
        y = 4 + 30 * k
        full, kept = (max(2, 560 * n / widest) for n in (row.float16_bytes, row.nbytes))
        drawing.label(0, y + 15, row.component)
        tip = f"{row.component}: {row.nbytes:,} of {row.float16_bytes:,} bytes"
        drawing.box(90, y, full, 20, "pale", tip)
        drawing.box(90, y, kept, 20, "c0", tip)
        share = f"{_megabytes(row.nbytes)}, {row.nbytes / max(row.float16_bytes, 1):.3f}×"
        drawing.label(100 + full, y + 15, share)
    y = 30 * len(components) + 18
    drawing.box(90, y - 9, 10, 10, "c0")
    drawing.label(106, y, "stored", kind="soft small")
    drawing.box(160, y - 9, 10, 10, "pale")
    drawing.label(176, y, "the same weights in float16", kind="soft small")
    return drawing.markup()


def _component_table(report: Report) -> str:
    rows = [
        [
            row.component,
            f"{row.quantized} of {row.linears}" if row.linears else "–",
            ", ".join(f"{n} × {name}" for name, n in sorted(row.formats.items())) or "float",
            f"{row.parameters:,}",
            f"{row.bits_per_weight:.3f}",
            _megabytes(row.nbytes),
            _megabytes(row.float16_bytes),
        ]
        for row in report.components
    ]
    nbytes, parameters = (
        sum(getattr(row, key) for row in report.components) for key in ("nbytes", "parameters")
    )
    total = [f"{parameters:,}", f"{report.bits_per_weight:.3f}", _megabytes(nbytes)]
    rows.append(["whole model", "", "", *total, _megabytes(2 * parameters)])
    head = ["component", "quantized", "formats", "weights", "bits/weight", "bytes", "float16"]
    return table(head, rows)


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    sides = {"reference": "float", "quantized": "quantized"}
    tasks = sorted(set().union(*(accuracy[s]["tasks"] for s in sides)))
    rows = [[task, *(f"{100 * accuracy[s]['tasks'][task]:.1f} %" for s in sides)] for task in tasks]
    rows.append(["all", *(f"{100 * accuracy[s]['exact_match']:.2f} %" for s in sides)])
    rows.append(["decode, tokens/s", *(f"{accuracy[s]['tokens_per_second']:.0f}" for s in sides)])
    note = (
        f"{accuracy['questions']} held-out questions through the runtime; KL(float ‖ quantized) on the answers' "
        f"tokens {accuracy['kl']:.2e} nats."
    )
    return f'<p class="sub">{text(note)}</p>' + table(["exact match", *sides.values()], rows)


def _target(target: Mapping[str, Any]) -> str:
    parts = []
    for key, title in _SECTIONS.items():
        if rows := target.get(key):
            parts.append(f'<p class="sub">{title}</p>')
            parts.append(table(list(rows[0]), [[cell(v) for v in row.values()] for row in rows]))
    return "".join(parts)


def _recipe(recipe: Mapping[str, Any]) -> str:
    rules = [[rule["pattern"], rule["format"]] for rule in recipe.get("rules", ())]
    facts = [f"{key} {recipe[key]}" for key in ("method", "samples", "seed") if key in recipe]
    head = f'<p class="sub">{text(", ".join(facts))}; the first rule that matches wins.</p>'
    return head + table(["pattern", "format"], rules) + details("recipe.json", _json(recipe))


def _origin(report: Report) -> list[str]:
    """Versions and hashes."""
    parts = []
    if report.versions:
        parts += [
            "<h2>Versions</h2>",
            table(["package", "version"], sorted(report.versions.items())),
        ]
    if report.files:
        rows = sorted(report.files.items())
        parts += ["<h2>Files</h2>", details("sha256", table(["file", "sha256"], rows))]
    return parts
