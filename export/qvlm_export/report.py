"""report.json and report.html: what an export holds, what was kept, and how that was checked.

``Report`` is the data; ``to_html`` draws it as one self-contained page (no script, no external file). Numbers come
from the stages that measured them; a stage that did not run leaves its section out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qvlm.checkpoint import Checkpoint, Golden
from qvlm.errors import ExportError
from qvlm.recipe import COMPONENTS

SCHEMA = 1


@dataclass(frozen=True)
class ComponentRow:
    """One component's linears: parameters, stored bytes (scales included) and the same weights' float16 bytes."""

    component: str
    linears: int
    quantized: int
    formats: Mapping[str, int]
    parameters: int
    nbytes: int
    float16_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass
class Report:
    """Everything the page shows. ``targets`` maps a target's name to graphs, verification rows and engines."""

    version: str
    source: str
    recipe: Mapping[str, Any]
    components: Sequence[ComponentRow]
    divergence: Mapping[str, float]
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    accuracy: Mapping[str, Any] | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """JSON text; ``bits_per_weight`` is added to each component."""
        data = asdict(self)
        for row, component in zip(data["components"], self.components, strict=True):
            row["bits_per_weight"] = round(component.bits_per_weight, 4)
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Report:
        """What ``to_json`` wrote; ExportError for anything else."""
        try:
            data = json.loads(text)
            for row in data["components"]:
                del row["bits_per_weight"]
            data["components"] = [ComponentRow(**row) for row in data["components"]]
            return Report(**data)
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{where}: not a report ({error!r}). Export again.") from error


def component_rows(checkpoint: Checkpoint) -> list[ComponentRow]:
    """One row per component that has linears, quantized or float."""
    component_of = {name: entry["component"] for name, entry in checkpoint.linears.items()}
    component_of.update(checkpoint.float_linears)
    rows = []
    for component in COMPONENTS:
        names = [name for name, owner in component_of.items() if owner == component]
        formats: dict[str, int] = {}
        parameters = nbytes = 0
        for name in names:
            linear = checkpoint.linear(name)
            if linear is None:
                size = checkpoint.tensor(f"{name}.weight").size
                nbytes += 2 * size
            else:
                size = linear.integers.size
                nbytes += linear.nbytes()
            kind = "float" if linear is None else linear.format.name
            formats[kind] = formats.get(kind, 0) + 1
            parameters += size
        quantized = len(names) - formats.get("float", 0)
        row = ComponentRow(
            component, len(names), quantized, formats, parameters, nbytes, 2 * parameters
        )
        if names:
            rows.append(row)
    return rows


def divergence(goldens: Sequence[Golden], eos_token_ids: Sequence[int]) -> dict[str, float]:
    """Float against fake-quantized model on the goldens' tokens, teacher-forced, to the first end
    token: what follows it is never generated.

    kl: mean KL(float || quantized) in nats per token; greedy: share of tokens with the same argmax;
    tokens: how many; image_features: relative L2 error of the projected image tokens.
    """
    kl, same, errors = [], [], []
    for golden in goldens:
        ends = np.flatnonzero(np.isin(golden.inputs["tokens"], list(eos_token_ids)))
        count = int(ends[0]) + 1 if len(ends) else len(golden.inputs["tokens"])
        reference, other = (
            _log_softmax(golden.outputs[side]["logits"][:count]) for side in ("float", "quant")
        )
        kl.append(np.sum(np.exp(reference) * (reference - other), axis=-1))
        same.append(reference.argmax(-1) == other.argmax(-1))
        features = golden.outputs["float"]["image_features"].astype(np.float64)
        difference = golden.outputs["quant"]["image_features"] - features
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(features)))
    return {
        "kl": float(np.mean(np.concatenate(kl))),
        "greedy": float(np.mean(np.concatenate(same))),
        "tokens": float(sum(len(k) for k in kl)),
        "image_features": float(np.mean(errors)),
    }


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


_STYLE = """
:root{--ink:#1b1f24;--soft:#667080;--line:#dfe3e8;--bar:#2f6f9f;--pale:#c9dbe8;--ok:#1b7f4b;--bad:#b3261e}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem;color:var(--ink);background:#fff;
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p.sub{color:var(--soft);margin:.2rem 0 1.2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
td.l,th.l{text-align:left}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.7rem 1rem;min-width:9rem}
.card b{display:block;font-size:1.35rem}
.card span{color:var(--soft);font-size:.85rem}
.ok{color:var(--ok)}
.bad{color:var(--bad)}
svg text{font:13px system-ui,sans-serif;fill:var(--ink)}
code{font-size:.9em}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--soft)}
.scroll{overflow-x:auto}
"""


def to_html(report: Report) -> str:
    """The page as text."""
    body = [
        f"<h1>{_e(report.source)}</h1>",
        f'<p class="sub">qvlm {_e(report.version)} · method {_e(report.recipe.get("method"))} · '
        f"{_e(', '.join(report.targets) or 'no target')}</p>",
        _cards(report),
        "<h2>Size by component</h2>",
        _bars(report.components),
        _component_table(report.components),
    ]
    if report.accuracy:
        body += ["<h2>Accuracy</h2>", _accuracy(report.accuracy)]
    for name, target in report.targets.items():
        body += [f"<h2>Target <code>{_e(name)}</code></h2>", _target(target)]
    if report.seconds:
        rows = [[stage, f"{value:.1f} s"] for stage, value in report.seconds.items()]
        body += ["<h2>Time</h2>", _table(["stage", ""], rows)]
    details = {"recipe": report.recipe, "method": report.method}
    for title, data in details.items():
        text = _e(json.dumps(data, indent=2, sort_keys=True))
        body.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>qvlm: {_e(report.source)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of ``rows`` are text; a cell that starts with "<" is taken as markup made here."""
    cells = "".join(f"<th>{_e(h)}</th>" for h in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{c if c.startswith('<') else _e(c)}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _cards(report: Report) -> str:
    parameters = sum(row.parameters for row in report.components)
    nbytes = sum(row.nbytes for row in report.components)
    cards = [
        (f"{8 * nbytes / max(parameters, 1):.2f}", "bits per weight, all linears"),
        (f"{nbytes / max(2 * parameters, 1):.3f}×", "of the float16 bytes"),
        (f"{report.divergence['kl']:.2e}", "KL to float, nats per token"),
        (f"{100 * report.divergence['greedy']:.2f} %", "same greedy token as float"),
    ]
    if report.accuracy:
        cards.append((f"{100 * report.accuracy['quantized']['exact_match']:.1f} %", "exact match"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{_e(v)}</b><span>{_e(t)}</span></div>' for v, t in cards)
        + "</div>"
    )


def _bars(components: Sequence[ComponentRow]) -> str:
    """Bytes of each component against its float16 bytes."""
    widest = max((row.float16_bytes for row in components), default=1)
    lines, y = [], 4
    for row in components:
        full, kept = (max(2, round(560 * n / widest)) for n in (row.float16_bytes, row.nbytes))
        lines.append(
            f'<text x="0" y="{y + 15}">{_e(row.component)}</text>'
            f'<rect x="90" y="{y}" width="{full}" height="20" rx="3" fill="var(--pale)"/>'
            f'<rect x="90" y="{y}" width="{kept}" height="20" rx="3" fill="var(--bar)"/>'
            f'<text x="{100 + full}" y="{y + 15}">{row.nbytes / row.float16_bytes:.3f}× of '
            f"{row.float16_bytes / 1e6:.2f} MB</text>"
        )
        y += 30
    return (
        f'<svg role="img" aria-label="bytes by component against float16" viewBox="0 0 820 {y}" '
        f'width="100%">{"".join(lines)}</svg>'
    )


def _component_table(components: Sequence[ComponentRow]) -> str:
    rows = [
        [
            row.component,
            f"{row.quantized} of {row.linears}",
            ", ".join(f"{n} × {name}" for name, n in sorted(row.formats.items())),
            f"{row.parameters:,}",
            f"{row.bits_per_weight:.3f}",
            _megabytes(row.nbytes),
            _megabytes(row.float16_bytes),
        ]
        for row in components
    ]
    head = ["component", "quantized", "formats", "weights", "bits/weight", "bytes", "float16"]
    return _table(head, rows)


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
    return f'<p class="sub">{_e(note)}</p>' + _table(["exact match", *sides.values()], rows)


def _target(target: Mapping[str, Any]) -> str:
    parts = []
    for key, title in _SECTIONS.items():
        if rows := target.get(key):
            parts.append(f'<p class="sub">{title}</p>')
            parts.append(_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows]))
    return "".join(parts)


# Sections of a target: key -> what stands above its table; rows are JSON objects of one shape.
_SECTIONS = {
    "graphs": "Graphs as written, external data included.",
    "verify": "Replay of the goldens through ONNX Runtime: error of each output and its bound.",
    "greedy": "Greedy tokens through both graphs against the goldens.",
    "engines": "Engines, with the kernels of each profile; integer products checked in the compiler's list.",
    "rules": "TensorRT rules: findings below the level of an error.",
}


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f'<span class="{"ok" if value else "bad"}">{"passed" if value else "failed"}</span>'
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
