"""Building one ONNX graph with onnx-ir: nodes with our names, shared small constants, one scope per
module.

Knows no operator's meaning: the vocabulary is in ``ops.py`` and ``qdq.py``; which values of a
float16 graph are float32 is kept by ``wide.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from qvlm_export.targets import Target
from qvlm_export.weights import Weights
from qvlm_export.wide import Overflow, RangeRow, WideValues

# ONNX IR version that came with each operator-set version.
IR_VERSIONS = {21: 10, 24: 12}
Dims = Sequence[int | str]


class GraphBuilder:
    """Collects nodes and constants; ``model`` closes the graph."""

    def __init__(
        self, name: str, target: Target, weights: Weights, overflow: Overflow | None = None
    ) -> None:
        self.name = name
        self.target = target
        self.weights = weights
        # What float16 does not hold; nothing in graphs of another float type.
        self.overflow = overflow or Overflow()
        self._wide = WideValues()
        # bool [1, S, 1], True on image tokens; None in a graph whose tokens are of one kind.
        self.image_tokens: ir.Value | None = None
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}

    @property
    def float_type(self) -> ir.DataType:
        """F: the element type of activations."""
        return self.weights.float_type()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes inside start with ``name/``."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Declare a graph input; strings in ``shape`` are free dimensions."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> None:
        """Make ``value`` a graph output under ``name``; ``dtype`` F for one that was float32."""
        value = self.narrow(value)
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        return self.op_many(op_type, inputs, 1, **attributes)[0]

    def op_many(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        base = "/".join([*self._scope, op_type])
        count = self._used.get(base, 0)
        self._used[base] = count + 1
        name = base if count == 0 else f"{base}_{count}"
        suffixes = [""] if outputs == 1 else [f":{i}" for i in range(outputs)]
        values = [ir.Value(name=f"{name}{suffix}/out") for suffix in suffixes]
        inputs, wide = self._typed(op_type, inputs)
        node = ir.node(op_type, inputs, attributes, outputs=values, name=name)
        self._nodes.append(node)
        if wide:
            row = self._wide.row(op_type, inputs)
            for value in node.outputs:
                self._wide.add(value, row)
        return node.outputs

    def _typed(
        self, op_type: str, inputs: Sequence[ir.Value | None]
    ) -> tuple[Sequence[ir.Value | None], bool]:
        """Inputs of one float type, and whether that is float32 in a float16 graph."""
        if op_type == "Cast" or not any(value in self._wide for value in inputs):
            return inputs, False
        places = self._wide.operands(op_type, inputs)
        if places is None:
            return [None if v is None else self.narrow(v) for v in inputs], False
        if not any(inputs[i] in self._wide for i in places if i < len(inputs)):
            return inputs, False
        return [
            self.widen(v) if i in places and v is not None else v for i, v in enumerate(inputs)
        ], True

    def is_wide(self, value: ir.Value) -> bool:
        """True for a float32 value of a float16 graph."""
        return value in self._wide

    def widen(self, value: ir.Value, row: RangeRow | None = None) -> ir.Value:
        """The value as float32, a stored one without a Cast; ``row``: what it holds if it leaves
        float16.
        """
        if value in self._wide:
            return self._wide.add(value, row) if row else value
        if value.dtype == ir.DataType.FLOAT:
            return value
        if (tensor := value.const_value) is None:
            return self._wide.add(self.op("Cast", value, to=int(ir.DataType.FLOAT)), row)

        def wide() -> ir.TensorProtocol:
            return ir.Tensor(tensor.numpy().astype(np.float32))

        lazy = ir.LazyTensor(wide, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()))
        return self._wide.add(self.constant(f"{value.name}.float32", lazy), row)

    def held(self, value: ir.Value, module: str, wide: bool = False) -> ir.Value:
        """The result of ``module``: float32 if asked for or if float16 does not hold it, else in the
        graph's type.
        """
        row = self.overflow.row(module, "output")
        if value in self._wide:
            self._wide.add(value, row)
        return self.widen(value, row) if wide or row else self.narrow(value)

    def stream(self, x: ir.Value, layer: str) -> ir.Value:
        """What a layer adds to: float32 from the first layer on that has a module of float32."""
        if not self.overflow.below(layer):
            return x
        rows = (self.overflow.row(layer, side) for side in ("output", "input"))
        return self.widen(x, next(filter(None, rows), None))

    def expect_held(self, x: ir.Value, module: str) -> None:
        """ExportError if ``module`` reads x in float16 and the audit found it too large."""
        if x not in self._wide and (row := self.overflow.row(module, "input")):
            self._wide.refuse(row, self.target.name)

    def narrow(self, value: ir.Value) -> ir.Value:
        """The value in the graph's float type. ExportError if the audit found it too large."""
        if value not in self._wide:
            return value
        if (row := self._wide.row("Cast", [value])) is not None:
            self._wide.refuse(row, self.target.name)
        return self.op("Cast", value, to=int(self.float_type))

    def choose(
        self, condition: ir.Value, then: Callable[[], ir.Value], otherwise: Callable[[], ir.Value]
    ) -> ir.Value:
        """If-1: the value of one of two functions, whose nodes run only where bool [1] ``condition``
        takes them. Both may read every value made before; what they return is made by their nodes.
        """
        branches = {
            "then_branch": self._branch("then", then),
            "else_branch": self._branch("else", otherwise),
        }
        return self.op("If", condition, **branches)

    def _branch(self, name: str, build: Callable[[], ir.Value]) -> ir.Graph:
        outer, self._nodes = self._nodes, []
        try:
            with self.scope(name):
                result = build()
            return ir.Graph([], [result], nodes=self._nodes, name="/".join([*self._scope, name]))
        finally:
            self._nodes = outer

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A named constant; the same name gives the same value."""
        if name not in self._constants:
            tensor.name = name
            self._constants[name] = ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._constants[name]

    def i64(self, *numbers: int) -> ir.Value:
        """INT64 vector of these numbers."""
        label = "i64_" + "_".join(f"m{-n}" if n < 0 else str(n) for n in numbers)
        return self.constant(label, ir.Tensor(np.array(numbers, np.int64)))

    def scalar(self, number: float, dtype: ir.DataType | None = None) -> ir.Value:
        """Rank-0 constant, of the graph's float type unless ``dtype`` says otherwise."""
        type_ = dtype or self.float_type
        array = np.array(number, type_.numpy())
        return self.constant(f"{type_.name.lower()}_{number!r}", ir.Tensor(array, dtype=type_))

    def parameter(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """A float tensor of the checkpoint under its own name."""
        self.weights.expect(name, shape)
        return self.constant(name, self.weights.stored(name, shape))

    def model(self, version: str) -> ir.Model:
        """The finished model. Constants keep the order of their first use."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": self.target.opset},
            name=self.name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSIONS[self.target.opset],
            producer_name="qvlm",
            producer_version=version,
        )
