"""Published rules of thumb on bits by component, checked against one model's own sensitivities.

The rules are those of Das et al., "Towards Understanding Best Practices for Quantization of Vision-Language Models",
arXiv 2601.15287, as its committed data support them: measured on BLIP-2 and LLaVA-1.5, by lowering one part at a time.
A rule whose formats were not measured has no verdict. Reads rows, measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One rule, what this model says, and whether that is the same (None: not measured)."""

    rule: str
    found: str
    agrees: bool | None


class _Rows:
    def __init__(self, rows: Sequence[Json]) -> None:
        self.rows = rows

    def component(self, component: str, format_name: str) -> Json:
        """The row of a whole component; KeyError if it was not measured."""
        for row in self.rows:
            if (row["kind"], row["component"], row["format"]) == (
                "component",
                component,
                format_name,
            ):
                return row
        raise KeyError(component, format_name)

    def kl(self, component: str, format_name: str) -> float:
        return float(self.component(component, format_name)["kl"])

    def layers(self, component: str, format_name: str) -> list[float]:
        """Divergence of each layer, in order; KeyError with fewer than three."""
        found = [
            float(row["kl"])
            for row in self.rows
            if (row["kind"], row["component"], row["format"]) == ("layer", component, format_name)
        ]
        if len(found) < 3:
            raise KeyError(component, format_name)
        return found

    def worth(self, component: str) -> float:
        """Divergence saved by 8 bits instead of 4, per byte spent."""
        low, high = self.component(component, "w4a16"), self.component(component, "w8a8")
        return float((low["kl"] - high["kl"]) / (high["bytes"] - low["bytes"]))


def _vision(rows: _Rows) -> tuple[str, bool]:
    vision, text = rows.kl("vision", "w4a16"), rows.kl("text", "w4a16")
    return f"KL {vision:.2e} with vision at 4 bits, {text:.2e} with the decoder", vision < text


def _vision_int8(rows: _Rows) -> tuple[str, bool]:
    eight, four = rows.kl("vision", "w8a8"), rows.kl("vision", "w4a16")
    return f"KL {eight:.2e} at w8a8, {four:.2e} at w4a16", eight < four


def _projector(rows: _Rows) -> tuple[str, bool]:
    projector, text = rows.worth("projector"), rows.worth("text")
    ratio = f"{projector / text:.1f} times" if text > 0 else "more than"
    return f"a byte there saves {ratio} what one in the decoder does", projector > text


def _decoder_bits(rows: _Rows) -> tuple[str, bool]:
    parts = {c: rows.kl(c, "w4a16") for c in ("vision", "projector", "text")}
    first = max(parts, key=lambda c: parts[c])
    share = parts[first] / sum(parts.values())
    return f"{first} has {100 * share:.0f} % of the three components' KL at 4 bits", first == "text"


def _first_third(rows: _Rows) -> tuple[str, bool]:
    layers = rows.layers("text", "w4a16")
    third = len(layers) // 3
    parts = (layers[:third], layers[third : len(layers) - third], layers[len(layers) - third :])
    means = [sum(part) / len(part) for part in parts]
    shown = ", ".join(f"{mean:.2e}" for mean in means)
    return f"mean KL of a layer in the first, middle, last third: {shown}", means[0] == max(means)


RULES: dict[str, Callable[[_Rows], tuple[str, bool]]] = {
    "The vision tower is safe at 4-bit weights: it costs less than the decoder": _vision,
    "INT8 does not hurt the vision tower if activations have a scale per token": _vision_int8,
    "The projector is small: give it 8 bits": _projector,
    "Spend bits on the decoder: most of the loss is there": _decoder_bits,
    "The first third of the decoder is the sensitive one": _first_third,
}


def check(rows: Sequence[Json]) -> list[Finding]:
    """Every rule against the rows of ``sensitivity.measure``."""
    findings = []
    for rule, look in RULES.items():
        try:
            found, agrees = look(_Rows(rows))
        except KeyError:
            findings.append(Finding(rule, "not measured", None))
        else:
            findings.append(Finding(rule, found, agrees))
    return findings
