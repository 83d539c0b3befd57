"""Would a float16 graph overflow? Told from the largest activations that the quantizer recorded.

float16 ends at 65504. The samples are a small part of what a model will see, and a few tensors of a
graph lie between the recorded ones: rotation mixes two numbers (sqrt(2) times as much), quick GELU
multiplies by 1.702. ``HEADROOM`` covers both and leaves a little for other inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm_export.targets import Target
from qvlm_export.weights import FLOAT16_MAX

HEADROOM = 2.0


@dataclass(frozen=True)
class RangeRow:
    """One tensor for the report: the side ("input", "output") of a module, its largest |value| and
    what float16 allows it.
    """

    module: str
    side: str
    largest: float
    limit: float


def largest_activations(checkpoint: Checkpoint, count: int) -> list[RangeRow]:
    """The ``count`` largest recorded activations, largest first; empty if none were recorded."""
    rows = [
        RangeRow(module, side, value, FLOAT16_MAX / HEADROOM)
        for module, sides in checkpoint.magnitudes().items()
        for side, value in sides.items()
    ]
    return sorted(rows, key=lambda row: (-row.largest, row.module, row.side))[:count]


def check_range(checkpoint: Checkpoint, target: Target) -> None:
    """ExportError naming the largest activation if it does not fit the target's float type.

    Does nothing for bfloat16 and float32, which have float32's range.
    """
    if target.dtype != "float16":
        return
    for row in largest_activations(checkpoint, 1):
        if row.largest > row.limit:
            wide = [dtype for dtype in target.dtypes if dtype != "float16"]
            way = f"--dtype {wide[0]}" if wide else "target ort, which computes in float32"
            raise ExportError(
                f"target {target.name}: {row.module} {row.side} reaches {row.largest:.6g} on the "
                f"calibration samples, float16 takes up to {row.limit:g} (half its range, for what "
                f"the samples do not show). Export with {way}."
            )
