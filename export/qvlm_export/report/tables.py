"""Tables of the page as markup. Text is escaped; ``Markup`` made here is not."""

from __future__ import annotations

from collections.abc import Sequence

from qvlm_export.report.svg import number, text


class Markup(str):
    """A cell that is markup already."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls sideways where it is too wide; numbers look right-aligned, the first column left."""
    cells = "".join(f"<th>{text(h)}</th>" for h in head)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{c if isinstance(c, Markup) else text(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """(value, what it is) as large numbers side by side."""
    shown = "".join(
        f'<div class="card"><b>{text(v)}</b><span>{text(t)}</span></div>' for v, t in values
    )
    return f'<div class="cards">{shown}</div>'


def cell(value: object) -> object:
    """A value of a stage's row: booleans as passed or failed, floats with three digits."""
    if isinstance(value, bool):
        word, kind = ("passed", "ok") if value else ("failed", "bad")
        return Markup(f'<span class="{kind}">{word}</span>')
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else value


def details(title: str, body: str) -> str:
    """A part that opens when asked."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"
