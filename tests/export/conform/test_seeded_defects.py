"""Proves that the checker names the rule for 100 defects planted in good exported graphs, and says
nothing about the graphs as they were.

Run: python -m pytest tests/export/conform/test_seeded_defects.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tiny_models import make_case

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm.recipe import RECIPES
from qvlm_export.build import build
from qvlm_export.conform import check_graph
from qvlm_export.targets import TARGETS

TARGET = TARGETS["jetpack6"]
SEEDS = range(4)


class Graph:
    """A copy of a good graph, and what a mutation needs to damage it."""

    def __init__(self, model: ModelProto, seed: int) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.random = np.random.default_rng(seed)

    def tensor(self, name: str) -> TensorProto | None:
        return next((t for t in self.graph.initializer if t.name == name), None)

    def producer(self, name: str) -> NodeProto | None:
        return next((n for n in self.graph.node if name in n.output), None)

    def pick(self, wanted: Callable[[NodeProto], bool]) -> NodeProto:
        found = [node for node in self.graph.node if wanted(node)]
        return found[self.random.integers(len(found))]

    def op(self, *types: str) -> NodeProto:
        return self.pick(lambda node: node.op_type in types)

    def dq(self, dtype: int) -> NodeProto:
        """DequantizeLinear of a stored tensor of that type."""

        def wanted(node: NodeProto) -> bool:
            tensor = self.tensor(node.input[0]) if node.op_type == "DequantizeLinear" else None
            return tensor is not None and tensor.data_type == dtype

        return self.pick(wanted)

    def product(self, dtype: int) -> NodeProto:
        """MatMul with a stored weight of that type."""
        name = self.dq(dtype).output[0]
        return next(node for node in self.graph.node if name in node.input)

    def constant(self, node: NodeProto, index: int, values: np.ndarray | TensorProto) -> None:
        """Give ``node`` a new constant at an input; others keep the old one."""
        made = values if isinstance(values, TensorProto) else numpy_helper.from_array(values)
        made.name = f"planted_{len(self.graph.initializer)}"
        self.graph.initializer.append(made)
        node.input[index] = made.name

    def values(self, node: NodeProto, index: int) -> np.ndarray:
        tensor = self.tensor(node.input[index])
        assert tensor is not None
        return np.asarray(numpy_helper.to_array(tensor))

    def insert(
        self, op: str, node: NodeProto, index: int, *more: str, **attributes: object
    ) -> NodeProto:
        """A new node between ``node`` and its input number ``index``."""
        name = f"planted_{len(self.graph.node)}_{op}"
        made = helper.make_node(op, [node.input[index], *more], [name], name=name, **attributes)
        place = next(i for i, n in enumerate(self.graph.node) if n.name == node.name)
        node.input[index] = name
        self.graph.node.insert(place, made)
        return self.graph.node[place]

    def set(self, node: NodeProto, name: str, value: object) -> None:
        self.drop(node, name)
        node.attribute.append(helper.make_attribute(name, value))

    def drop(self, node: NodeProto, name: str) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)


def unsigned(g: Graph) -> None:
    g.constant(g.op("QuantizeLinear"), 2, np.zeros((), np.uint8))


def no_zero_point(g: Graph) -> None:
    del g.op("QuantizeLinear").input[2:]


def shifted(g: Graph) -> None:
    g.constant(g.op("QuantizeLinear"), 2, np.asarray(g.random.integers(1, 20), np.int8))


def int4_activation(g: Graph) -> None:
    zero = helper.make_tensor("z", TensorProto.INT4, (), [0])
    g.constant(g.op("QuantizeLinear"), 2, zero)


def dead_channel(g: Graph) -> None:
    node = g.dq(TensorProto.INT4)
    scale = g.values(node, 1).copy()
    scale[:, g.random.integers(scale.shape[1])] = 0
    g.constant(node, 1, scale)


def tiny_scale(g: Graph) -> None:
    node = g.dq(TensorProto.INT4)
    g.constant(node, 1, (g.values(node, 1) * 1e-4).astype(np.float16))


def no_axis(g: Graph) -> None:
    g.drop(g.dq(TensorProto.INT4), "axis")


def other_axis(g: Graph) -> None:
    g.set(g.dq(TensorProto.INT4), "axis", 1)


def other_block(g: Graph) -> None:
    g.set(g.dq(TensorProto.INT4), "block_size", int(g.random.integers(1, 60)))


def uneven_blocks(g: Graph) -> None:
    node = g.dq(TensorProto.INT4)
    scale = g.values(node, 1)
    g.constant(node, 1, np.ones((7, scale.shape[1]), np.float16))


def one_block(g: Graph) -> None:
    node = g.dq(TensorProto.INT4)
    g.drop(node, "block_size")
    g.constant(node, 1, g.values(node, 1)[:1].copy())


def scale_along_sum(g: Graph) -> None:
    node = g.dq(TensorProto.INT8)
    rows = g.values(node, 0).shape[0]
    g.constant(node, 1, np.full(rows, 0.01, np.float16))
    if len(node.input) > 2:
        g.constant(node, 2, np.zeros(rows, np.int8))
    g.set(node, "axis", 0)


def cast_weight(g: Graph) -> None:
    g.insert("Cast", g.product(TensorProto.INT4), 1, to=TensorProto.FLOAT)


def scaled_weight(g: Graph) -> None:
    node = g.product(TensorProto.INT8)
    made = g.insert("Mul", node, 1, "")
    g.constant(made, 1, np.ones((), np.float16))


def int8_before_int4(g: Graph) -> None:
    node = g.product(TensorProto.INT4)
    quantize = g.insert("QuantizeLinear", node, 0, "", "")
    dequantize = g.insert("DequantizeLinear", node, 0, "", "")
    for made in (quantize, dequantize):
        g.constant(made, 1, np.asarray(0.02, np.float16))
        g.constant(made, 2, np.asarray(0, np.int8))


def float_activation(g: Graph) -> None:
    node = g.product(TensorProto.INT8)
    dequantize = g.producer(node.input[0])
    assert dequantize is not None
    quantize = g.producer(dequantize.input[0])
    assert quantize is not None
    node.input[0] = quantize.input[0]


def output_type(g: Graph) -> None:
    g.set(g.dq(TensorProto.INT8), "output_dtype", TensorProto.FLOAT16)


def unknown_operator(g: Graph) -> None:
    node = g.op("Softmax", "Concat")
    node.op_type, node.domain = "FusedThing", "com.microsoft"


def too_new(g: Graph) -> None:
    g.op("Sigmoid").op_type = "Swish"


def mixed_types(g: Graph) -> None:
    def wanted(node: NodeProto) -> bool:
        tensor = g.tensor(node.input[1]) if node.op_type in ("Mul", "Add") else None
        return tensor is not None and tensor.data_type == TensorProto.FLOAT16

    node = g.pick(wanted)
    g.constant(node, 1, g.values(node, 1).astype(np.float32))


def float32_norm(g: Graph) -> None:
    node = g.op("LayerNormalization")
    g.constant(node, 1, g.values(node, 1).astype(np.float32))


def norm_without_bias(g: Graph) -> None:
    del g.op("LayerNormalization").input[2:]


def computed_axes(g: Graph) -> None:
    g.insert("Identity", g.op("Unsqueeze"), 1)


def transposed_constant(g: Graph) -> None:
    g.insert("Transpose", g.dq(TensorProto.INT8), 0, perm=[1, 0])


def shared_weight(g: Graph) -> None:
    name = g.dq(TensorProto.INT4).output[0]
    g.graph.node.append(helper.make_node("Relu", [name], ["planted"], name="planted_relu"))


def tiled_heads(g: Graph) -> None:
    g.op("Expand").op_type = "Tile"


def half_norm(g: Graph) -> None:
    mean = g.op("ReduceMean")
    g.insert("Cast", mean, 0, to=TensorProto.FLOAT16)
    square = g.producer(mean.input[0])
    assert square is not None
    square.op_type = "Mul"
    del square.attribute[:]
    square.input.append(square.input[0])
    cast = g.insert("Cast", square, 0, to=TensorProto.FLOAT16)
    square.input[1] = cast.output[0]


def unnamed(g: Graph) -> None:
    value = g.graph.input[g.random.integers(3)]
    value.type.tensor_type.shape.dim[1].ClearField("dim_param")


def quantized_bias(g: Graph) -> None:
    bias = g.op("Add")
    made = g.insert("DequantizeLinear", bias, 1, "")
    g.constant(made, 0, np.zeros(1, np.int32))
    g.constant(made, 1, np.asarray(0.1, np.float16))


# graph, damage, rule that must be named
MUTATIONS: tuple[tuple[str, Callable[[Graph], None], str], ...] = (
    ("vision", unsigned, "Q-02"),
    ("vision", no_zero_point, "Q-02"),
    ("vision", shifted, "Q-01"),
    ("vision", int4_activation, "W-09"),
    ("vision", scale_along_sum, "W-13"),
    ("vision", scaled_weight, "P-02"),
    ("vision", float_activation, "P-06"),
    ("vision", output_type, "Q-06"),
    ("vision", float32_norm, "T-04"),
    ("vision", norm_without_bias, "O-08"),
    ("vision", transposed_constant, "T-02"),
    ("vision", mixed_types, "T-03"),
    ("vision", unknown_operator, "O-01"),
    ("decoder", dead_channel, "Q-04"),
    ("decoder", tiny_scale, "Q-14"),
    ("decoder", no_axis, "Q-07"),
    ("decoder", other_axis, "Q-17"),
    ("decoder", other_block, "Q-12"),
    ("decoder", uneven_blocks, "Q-12"),
    ("decoder", one_block, "W-05"),
    ("decoder", cast_weight, "P-01"),
    ("decoder", int8_before_int4, "W-10"),
    ("decoder", unknown_operator, "O-01"),
    ("decoder", too_new, "O-01"),
    ("decoder", mixed_types, "T-03"),
    ("decoder", computed_axes, "O-02"),
    ("decoder", shared_weight, "W-02"),
    ("decoder", tiled_heads, "G-06"),
    ("decoder", half_norm, "G-04"),
    ("decoder", unnamed, "G-01"),
    ("decoder", quantized_bias, "Q-10"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelProto]:
    """Vision graph with INT8 per token, decoder with INT4, as exported, weights included."""
    folder = tmp_path_factory.mktemp("good")
    make_case(folder / "checkpoint", RECIPES["w4a16"])
    build(Checkpoint(folder / "checkpoint"), TARGET, folder, None, silent)
    names = ("vision", "decoder")
    return {name: onnx.load(folder / TARGET.name / f"{name}.onnx") for name in names}


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_nothing_is_said_about_the_good_graph(
    name: str, good: dict[str, ModelProto], tmp_path: Path
) -> None:
    onnx.save(good[name], tmp_path / "good.onnx")
    assert [f.line() for f in check_graph(tmp_path / "good.onnx", TARGET)] == []


def test_at_least_a_hundred_defects() -> None:
    assert len(MUTATIONS) * len(SEEDS) >= 100


@pytest.mark.parametrize(
    ("name", "damage", "rule"), MUTATIONS, ids=lambda v: getattr(v, "__name__", v)
)
def test_defect_is_named(
    name: str,
    damage: Callable[[Graph], None],
    rule: str,
    good: dict[str, ModelProto],
    tmp_path: Path,
) -> None:
    for seed in SEEDS:
        mutant = Graph(good[name], seed)
        damage(mutant)
        onnx.save(mutant.model, tmp_path / "mutant.onnx")
        named = {finding.rule for finding in check_graph(tmp_path / "mutant.onnx", TARGET)}
        assert rule in named, f"seed {seed}: found {sorted(named)}"
