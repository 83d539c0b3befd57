"""Bits and bytes by component, as rows and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from qvlm.checkpoint import Checkpoint
from qvlm.commands.command import Json, table


def size_rows(checkpoint: Checkpoint) -> list[Json]:
    from qvlm.evaluate import sizes

    return [
        {**asdict(size), "bits_per_weight": round(size.bits_per_weight, 4)}
        for size in sizes(checkpoint)
    ]


def size_table(sizes: Sequence[Json]) -> str:
    rows = [(s["component"], s["parameters"], s["nbytes"], s["bits_per_weight"]) for s in sizes]
    return table(rows, ("component", "weights", "bytes", "bits/weight"))
