"""float32 where float16 ends: which values of a float16 graph are float32, and why.

The quantizer recorded the largest activation of every module. Asked for (``--overflow float32``),
a layer with a module that leaves float16 is built so:

1. The stream of additions is float32 from that layer on; norms read it and give float16 again.
2. A linear beside such a module (below the same parent) multiplies x / m, m = max|x| of the token,
   in float16 or integers as ever, and gives product * m in float32. No weight changes its type, so
   INT4 and INT8 products stay what they are; rounding is that of float16, relative to m.
3. What is made of float32 values element by element is float32; attention, the cache and the
   outputs of a graph are float16. A recorded overflow that would reach these is refused.

Casts join the kernels around them. Types follow values: an operator with a float32 operand gets the
others as float32 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import onnx_ir as ir

from qvlm.errors import ExportError


@dataclass(frozen=True)
class RangeRow:
    """One recorded tensor: the side ("input", "output") of a module, its largest |value| and what
    float16 allows it.
    """

    module: str
    side: str
    largest: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.module} {self.side} reaches {self.largest:.6g} on the calibration samples, "
            f"float16 takes up to {self.limit:g} (half its range, for what the samples do not show)"
        )


class Overflow:
    """The recorded tensors that a float16 graph is to hold in float32."""

    def __init__(self, rows: Iterable[RangeRow] = ()) -> None:
        self._rows: Mapping[tuple[str, str], RangeRow] = {(r.module, r.side): r for r in rows}

    @property
    def rows(self) -> list[RangeRow]:
        """All of them, in the order given."""
        return list(self._rows.values())

    def row(self, module: str, side: str) -> RangeRow | None:
        """The row of one side of a module, None if it stays within float16."""
        return self._rows.get((module, side))

    def below(self, module: str) -> bool:
        """Whether a module at or below this one leaves float16."""
        return any(f"{name}.".startswith(f"{module}.") for name, _ in self._rows)

    def beside(self, module: str) -> bool:
        """Whether the module, or one below the same parent, leaves float16."""
        parent = module.rpartition(".")[0]
        return any(name.startswith(f"{parent}.") for name, _ in self._rows)


# Operators whose result has the type of these inputs (None: of all), and may be float32.
_TYPED: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Pow"), (0, 1)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), (0, 1, 2)),
    **dict.fromkeys(("Reshape", "Transpose", "Slice", "Split", "Unsqueeze", "Squeeze"), (0,)),
    **dict.fromkeys(("Gather", "Sigmoid", "Tanh", "Gelu", "Relu", "Abs", "Sqrt"), (0,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), (0,)),
    "Where": (1, 2),
    "Concat": None,
}


class WideValues:
    """The float32 values of one float16 graph, each with the row that it holds, if any."""

    def __init__(self) -> None:
        self._rows: dict[ir.Value, RangeRow | None] = {}

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._rows

    def add(self, value: ir.Value, row: RangeRow | None = None) -> ir.Value:
        """Say that a value is float32."""
        self._rows[value] = row
        return value

    def operands(self, op_type: str, inputs: Iterable[ir.Value | None]) -> tuple[int, ...] | None:
        """Positions of the inputs that decide the result's type; None if the operator is one that
        stays float16.
        """
        if op_type not in _TYPED:
            return None
        places = _TYPED[op_type]
        return tuple(range(len(list(inputs)))) if places is None else places

    def row(self, op_type: str, values: Iterable[ir.Value | None]) -> RangeRow | None:
        """What the result of an operator with these inputs holds: the first row of one of them. A
        quotient holds none: it is divided because it is too large.
        """
        if op_type == "Div":
            return None
        return next((row for v in values if v is not None and (row := self._rows.get(v))), None)

    def refuse(self, row: RangeRow, target: str) -> NoReturn:
        """ExportError: this is needed in float16."""
        raise ExportError(
            f"target {target}: {row}, and attention, static INT8, the cache or an output of the "
            "graph needs it in float16. Export with --dtype bfloat16."
        )
