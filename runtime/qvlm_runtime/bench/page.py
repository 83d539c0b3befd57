"""bench.html: bench.json drawn as one self-contained page, light and dark, no script.

It draws what is in the file and computes nothing but units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qvlm_runtime.bench.measure import PARTS
from qvlm_runtime.bench.plots import Bar, Line, bars, escape, lines

_STYLE = """
:root{--ink:#1b1f24;--soft:#667080;--line:#dfe3e8;--page:#fff;--bad:#b3261e;
 --c0:#2f6f9f;--c1:#d98a29;--c2:#4b9a6a;--c3:#9a5fb4;--c4:#b8443c;--c5:#6b7785;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#98a2b0;--line:#343b45;--page:#14171b;
 --bad:#ff8a80;--c0:#6fb1e0;--c1:#f0b060;--c2:#7cc99a;--c3:#c795dd;--c4:#ee7f76;--c5:#a3aebb}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:2rem 1.25rem;color:var(--ink);background:var(--page);
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p.sub{color:var(--soft);margin:.2rem 0 1rem}
p.bad{color:var(--bad)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
td{white-space:nowrap}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
svg text{font:13px system-ui,sans-serif;fill:var(--ink)}
svg text.soft{fill:var(--soft)}
svg .grid{stroke:var(--line);fill:none}
svg .limit{stroke:var(--bad);fill:none;stroke-dasharray:8 5}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;color:var(--soft);font-size:.9rem;margin:.3rem 0}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.4rem}
.scroll{overflow-x:auto}
pre{overflow-x:auto}
summary{cursor:pointer;color:var(--soft)}
"""
_GB = 1e9


def to_html(data: Mapping[str, Any]) -> str:
    """The page of one bench.json."""
    subjects, imported = data["subjects"], data["imported"]
    body = [
        "<h1>qvlm-bench</h1>",
        f'<p class="sub">{escape(_machine(data))}</p>',
        _warnings(data),
        "<h2>First token</h2>",
        '<p class="sub">Medians of the parts; “other” is what the whole call took beside them. '
        "Bars with a dashed edge are other tools' own figures.</p>",
        _first_token(subjects, imported),
        _first_token_table(subjects),
        "<h2>Decode</h2>",
        _decode(subjects, imported),
        _decode_table(subjects),
        _above_floor(subjects),
        "<h2>Memory</h2>",
        _memory(subjects),
        _memory_table(subjects),
        "<h2>Energy</h2>",
        _energy(data),
    ]
    if data["ratios"]:
        body += ["<h2>Ratios</h2>", _ratios(data["ratios"])]
    if imported:
        body += ["<h2>Other tools' results</h2>", _imported(imported)]
    details = {key: data[key] for key in ("machine", "plan", "limits", "power", "rounds")}
    for title, value in details.items():
        text = escape(json.dumps(value, indent=2))
        body.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>qvlm-bench</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _name(subject: Mapping[str, Any]) -> str:
    threads = subject["threads"]
    words = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{subject['name']}, {words}" if threads else str(subject["name"])


def _threads(count: str) -> str:
    """Threads in words; 0 is the engine's choice."""
    return "threads: the engine's choice" if count == "0" else f"threads: {count}"


def _machine(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    words = [machine.get("board"), machine["processor"], f"{machine['cores']} cores"]
    words += [f"{machine['memory_bytes'] / _GB:.1f} GB", machine.get("power_mode")]
    words += [f"{name} {version}" for name, version in machine["libraries"].items()]
    return " · ".join([str(w) for w in words if w] + [f"qvlm {data['version']}", data["time"]])


def _warnings(data: Mapping[str, Any]) -> str:
    found = []
    for threads, rounds in data["rounds"].items():
        hot = [i for i, one in enumerate(rounds) if one["throttled"]]
        if hot:
            reasons = sorted({r for i in hot for r in rounds[i]["throttled"]})
            found.append(
                f"Throttled in {len(hot)} of {len(rounds)} rounds ({_threads(threads)}): {'; '.join(reasons)}."
            )
        found += _wide(data, threads, len(rounds))
    return "".join(f'<p class="bad">{escape(text)}</p>' for text in found)


def _wide(data: Mapping[str, Any], threads: str, rounds: int) -> list[str]:
    """A sentence if the rounds ended before the intervals were as narrow as the plan asked."""
    asked, width = data["plan"]["spread"], 0.0
    for subject in data["subjects"]:
        if str(subject["threads"]) == threads:
            figures = [c["step_seconds"] for c in subject["contexts"]]
            figures += [c["first_token"]["whole"] for c in subject["cases"]]
            width = max(width, *((f["high"] - f["low"]) / 2 / f["median"] for f in figures))
    if width <= asked:
        return []
    return [
        f"After {rounds} rounds ({_threads(threads)}) the widest interval is ±{100 * width:.0f} %, "
        f"{100 * asked:.0f} % was asked: the machine was not quiet."
    ]


def _first_token(subjects: Sequence[Any], imported: Sequence[Any]) -> str:
    rows = []
    for subject in subjects:
        for case in subject["cases"]:
            parts = {p: max(0.0, case["first_token"][p]["median"]) for p in PARTS}
            whole = case["first_token"]["whole"]["median"]
            tokens, images = case["total_prompt_tokens"], case["images"]
            note = f"{_short(1e3 * whole)[0]} ms · {tokens:,} tokens, {images} image{'s' * (images != 1)}"
            rows.append(Bar(_name(subject), parts, note))
    for one in imported:
        if one["first_token"]:
            whole = sum(one["first_token"].values())
            note = f"{_short(1e3 * whole)[0]} ms · {one['tool']}"
            rows.append(Bar(one["name"], one["first_token"], note, theirs=True))
    return bars("time to the first token by part", rows, PARTS)


def _first_token_table(subjects: Sequence[Any]) -> str:
    head = ["", "text tokens", "images", *(f"{p}, ms" for p in (*PARTS, "whole"))]
    head += ["answer, ms", "of tokens", "of float32 peak: prefill, vision"]
    rows = []
    for subject in subjects:
        for case in subject["cases"]:
            parts = [_ms(case["first_token"][p]) for p in (*PARTS, "whole")]
            answer = case["answer_seconds"]
            whole = [_ms(answer), str(case["output_tokens"])] if answer else ["–", "–"]
            floors = case["floors"] or {}
            shares = ", ".join(f"{f['share']:.2g}" for f in floors.values()) or "–"
            cells = [_name(subject), str(case["prompt_tokens"]), str(case["images"])]
            rows.append([*cells, *parts, *whole, shares])
    return _table(head, rows)


def _decode(subjects: Sequence[Any], imported: Sequence[Any]) -> str:
    curves = []
    for subject in subjects:
        points = []
        for row in subject["contexts"]:
            step = row["step_seconds"]
            points.append((row["context"], 1 / step["median"], 1 / step["high"], 1 / step["low"]))
        curves.append(Line(_name(subject), points))
    for one in imported:
        if one["decode"]:
            points = []
            for rate in one["decode"]:
                d, r = rate["deviation"] or 0.0, rate["per_second"]
                points.append((rate["tokens"], r, r - d, r + d))
            curves.append(Line(f"{one['tool']}: {one['name']}", points, theirs=True))
    return lines("decode speed against context", "cached tokens", "tokens per second", curves)


def _decode_table(subjects: Sequence[Any]) -> str:
    head = [
        "",
        "cached tokens",
        "step, ms",
        "tokens/s",
        "bytes to read",
        "floor, ms",
        "share reached",
    ]
    rows = []
    for subject in subjects:
        for row in subject["contexts"]:
            floor = row["floor"]
            cells = [_name(subject), f"{row['context']:,}", _ms(row["step_seconds"])]
            cells.append(f"{row['tokens_per_second']:.1f}")
            if floor:
                cells += [f"{floor['bytes'] / 1e6:,.1f} MB", f"{1e3 * floor['seconds']:.2f}"]
                cells.append(f"{floor['share']:.2f}")
            else:
                cells += ["–", "–", "–"]
            rows.append(cells)
    return _table(head, rows)


def _above_floor(subjects: Sequence[Any]) -> str:
    """A sentence if a step was faster than its floor."""
    floors = [row["floor"] for subject in subjects for row in subject["contexts"] if row["floor"]]
    if all(floor["share"] <= 1 for floor in floors):
        return ""
    return (
        '<p class="sub">A share above 1: what a step reads stayed in the processor\'s caches, or other '
        "work slowed the measurement of the machine's bandwidth.</p>"
    )


def _memory(subjects: Sequence[Any]) -> str:
    curves = [
        Line(
            _name(s),
            [(r["context"], *(r["resident_bytes"] / _GB,) * 3) for r in s["contexts"]],
        )
        for s in subjects
    ]
    limit = min(s["memory"]["limit_bytes"] for s in subjects) / _GB
    return lines("memory against context", "cached tokens", "resident GB", curves, limit)


def _memory_table(subjects: Sequence[Any]) -> str:
    head = [
        "",
        "load, s",
        "hashing, s",
        "resident when loaded",
        "peak of loading",
        "peak of the run",
    ]
    rows = []
    for s in subjects:
        load, device = s["load"], s["memory"]["device_peak_bytes"]
        sizes = (load["resident_bytes"], load["peak_bytes"], s["memory"]["host_peak_bytes"])
        seconds = [f"{load[key]['median']:.2f}" for key in ("seconds", "verify_seconds")]
        last = "not available" if device is None else f"{device / _GB:.2f} GB"
        rows.append([_name(s), *seconds, *(f"{n / _GB:.3f} GB" for n in sizes), last])
    return _table([*head, "GPU memory in use"], rows)


def _energy(data: Mapping[str, Any]) -> str:
    power = data["power"]
    if not power["sources"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in power["not_available"].items())
        return f'<p class="sub">Not available on this machine ({escape(reasons)}).</p>'
    measured = [s for s in data["subjects"] if s["energy"]]
    plots = []
    for part in ("token", "image"):
        rows = [
            Bar(
                _name(s),
                {part: s["energy"][part]["joules"]},
                f"{s['energy'][part]['joules']:.3g} J, {s['energy'][part]['joules_above_idle']:.3g} above idle",
            )
            for s in measured
            if part in s["energy"]
        ]
        if rows:
            plots.append(f'<p class="sub">Joules per {part}.</p>')
            plots.append(bars(f"joules per {part}", rows, [part]))
    sources = ", ".join(
        f"{s['source']} (total: {' + '.join(s['total'])})" for s in power["sources"]
    )
    return f'<p class="sub">From {escape(sources)}.</p>' + "".join(plots)


def _ratios(rows: Sequence[Any]) -> str:
    head = ["", "against", "figure", "speed ratio", "interval", "coverage"]
    cells = []
    for row in rows:
        f = row["figure"]
        ends = f"{f['low']:.3f} to {f['high']:.3f}"
        cells.append([row["name"], row["against"], row["series"], f"{f['median']:.3f}", ends])
        cells[-1].append(f"{100 * f['coverage']:.1f} %")
    return _table(head, cells)


def _imported(rows: Sequence[Any]) -> str:
    head = [
        "",
        "tool",
        "decode, tokens/s at cached tokens",
        "prefill, tokens/s of prompt tokens",
        "peak",
    ]
    cells = []
    for one in rows:
        rates = [
            ", ".join(f"{r['per_second']:.1f} at {r['tokens']}" for r in one[kind]) or "–"
            for kind in ("decode", "prefill")
        ]
        peak = f"{one['peak_bytes'] / _GB:.2f} GB" if one["peak_bytes"] else "–"
        cells.append([one["name"], one["tool"], *rates, peak])
    return _table(head, cells)


def _ms(figure: Mapping[str, float]) -> str:
    """Median and half-width of the interval, in milliseconds; one sample has no interval."""
    median, half = 1e3 * figure["median"], 1e3 * (figure["high"] - figure["low"]) / 2
    text, digits = _short(median)
    return text + (f" ± {half:,.{digits}f}" if figure["coverage"] else "")


def _short(value: float) -> tuple[str, int]:
    """Three or more digits of a number, at most two behind the point; and how many behind it."""
    digits = max(0, min(2, 3 - len(str(int(value)))))
    return f"{value:,.{digits}f}", digits


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines_ = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines_}</table></div>'
