"""Would a float16 graph overflow? Told from the largest activations that the quantizer recorded.

float16 ends at 65504. The samples are a small part of what a model will see, and a few tensors of a
graph lie between the recorded ones: rotation mixes two numbers (sqrt(2) times as much), quick GELU
multiplies by 1.702. ``HEADROOM`` covers both and leaves a little for other inputs.
"""

from __future__ import annotations

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.targets import Target
from qvlm_export.weights import FLOAT16_MAX
from qvlm_export.wide import Overflow, RangeRow

HEADROOM = 2.0


def largest_activations(checkpoint: Checkpoint, count: int | None = None) -> list[RangeRow]:
    """The ``count`` largest recorded activations or all, largest first; empty if none were recorded."""
    rows = [
        RangeRow(module, side, value, FLOAT16_MAX / HEADROOM)
        for module, sides in checkpoint.magnitudes().items()
        for side, value in sides.items()
    ]
    return sorted(rows, key=lambda row: (-row.largest, row.module, row.side))[:count]


def overflow(checkpoint: Checkpoint, target: Target) -> Overflow:
    """The recorded activations that the target's float type does not hold, for the graphs to hold in
    float32; none for bfloat16 and float32, which have float32's range.

    ExportError naming the largest unless the target is asked to (``Target.overflow``).
    """
    if target.dtype != "float16":
        return Overflow()
    rows = [row for row in largest_activations(checkpoint) if row.largest > row.limit]
    if rows and target.overflow == "refuse":
        wide = [dtype for dtype in target.dtypes if dtype != "float16"]
        way = f"--dtype {wide[0]}" if wide else "target ort, which computes in float32"
        raise ExportError(
            f"target {target.name}: {rows[0]}. Export with --overflow float32, which computes the "
            f"layer in float32, or {way}."
        )
    return Overflow(rows)
