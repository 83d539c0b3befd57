"""Does an exported model fit a device? Bytes of weights, activations and cache, counted from the graphs.

    weights      the engine files where the folder has some, else the stored tensors of both graphs
    activations  the most bytes alive at once while a graph runs node by node, for the longest
                 prompt; an engine that fuses needs less, its workspace may need more
    cache        rows a token adds, times the context
    largest      the largest single tensor: a board that has the memory can still refuse it in one piece

A device keeps some memory for itself. ``usable`` is what is left on a headless board with nothing
else running: an assumption, stated in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from qvlm.errors import ExportError
from qvlm_export.conform.view import GraphView, attribute, tensor_bytes
from qvlm_export.image_limits import within_context
from qvlm_runtime.image_spec import AnyresImage, ImageSpec, Layout
from qvlm_runtime.manifest import ModelSpec, TargetSpec
from qvlm_runtime.vision import extremes, input_shapes

GIB = 1 << 30
_STEPS = 64
# Operators whose result shares its input's memory.
_VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")


@dataclass(frozen=True)
class Device:
    """memory: bytes of the module, shared by CPU and GPU. usable: without what Linux, the CUDA context
    and TensorRT's own libraries take (assumed: 2 GiB). piece: bytes that one allocation got at least
    once where twice as much was refused, None where no limit is known.
    """

    name: str
    memory: int
    piece: int | None = None

    @property
    def usable(self) -> int:
        """Bytes for engines, activations and cache."""
        return self.memory - 2 * GIB


# On an Orin Nano of 8 GB a half-precision output projection of 622 MB could not be built; as two
# pieces of 311 MB it could.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("orin-nano-4gb", 4 * GIB, 320_000_000),
        Device("orin-nano-8gb", 8 * GIB, 320_000_000),
        Device("orin-nx-8gb", 8 * GIB, 320_000_000),
        Device("orin-nx-16gb", 16 * GIB),
        Device("agx-orin-32gb", 32 * GIB),
        Device("agx-orin-64gb", 64 * GIB),
        Device("thor-64gb", 64 * GIB),
        Device("thor", 128 * GIB),
    )
}


@dataclass(frozen=True)
class Fit:
    """Bytes of one target on one device. ``activations`` is for a prompt of ``context`` tokens.

    context: the largest context that fits, 0 if none does; at most the model's.
    """

    device: str
    target: str
    weights: int
    activations: int
    cache_per_token: int
    largest: int
    largest_name: str
    usable: int
    piece: int | None
    context: int
    max_context: int

    @property
    def fits(self) -> bool:
        """True if some context fits and no tensor is refused for its size."""
        return self.context > 0 and (self.piece is None or self.largest <= self.piece)

    def to_json(self) -> dict[str, Any]:
        """Every number, and the verdict."""
        return {**asdict(self), "fits": self.fits}

    def lines(self) -> list[str]:
        """What a user reads."""
        used = self.weights + self.activations + self.cache_per_token * self.context
        rows = [
            f"{self.target} on {self.device}: weights {_mb(self.weights)}, activations {_mb(self.activations)}, "
            f"cache {self.cache_per_token / 1e3:.1f} kB per token, {_mb(self.usable)} usable",
            f"largest tensor {_mb(self.largest)} ({self.largest_name})",
        ]
        if self.context:
            whole = self.context == self.max_context
            what = "the model's whole context" if whole else f"of {self.max_context} tokens"
            rows.append(f"fits up to {self.context} tokens, {what}: {_mb(used)}")
        else:
            rows.append("does not fit: use fewer bits, or a larger device")
        if self.piece is not None and self.largest > self.piece:
            rows.append(
                f"a tensor of {_mb(self.largest)} may be refused in one piece: "
                f"export with --max-tensor {self.piece // 10**6}"
            )
        return rows


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def named_device(name: str) -> Device:
    """The device of that name; ExportError listing the names otherwise."""
    if name not in DEVICES:
        raise ExportError(f"device {name!r} is unknown. Known: {', '.join(DEVICES)}.")
    return DEVICES[name]


def fit(
    folder: Path, target: str, spec: TargetSpec, model: ModelSpec, image: ImageSpec, device: Device
) -> Fit:
    """Count one target's graphs against a device; ExportError for a graph that cannot be read.

    The largest image of those the model takes is counted.

    The context is found by halving, to one part in 64: activations grow with the prompt, so what
    fits is an interval from 1.
    """
    views = {stem: GraphView.open(folder / path) for stem, path in spec.graphs.items()}
    weights = _engine_bytes(folder, spec) or sum(map(stored_bytes, views.values()))
    name, largest = max(
        (pair for view in views.values() for pair in _stored(view).items()),
        key=lambda pair: pair[1],
    )
    item = 4 if spec.dtype == "float32" else 2
    row = 2 * model.layers * model.kv_heads * model.head_dim * item
    largest_image = extremes(within_context(image, model.max_context))[1]
    vision = peak_bytes(views["vision"], _vision_dimensions(image, largest_image), {})

    def activations(tokens: int) -> int:
        values = {"kv_len": tokens, "write_index": 0}
        return max(
            vision, peak_bytes(views["decoder"], _dimensions(largest_image.rows, tokens), values)
        )

    def needs(context: int) -> int:
        return weights + activations(context) + row * context

    low, high = int(needs(1) <= device.usable), model.max_context
    if needs(high) <= device.usable:
        low = high
    while low and high - low > max(1, model.max_context // _STEPS):
        middle = (low + high) // 2
        if needs(middle) <= device.usable:
            low = middle
        else:
            high = middle
    return Fit(
        device.name,
        target,
        weights,
        activations(low or 1),
        row,
        largest,
        name,
        device.usable,
        device.piece,
        low,
        model.max_context,
    )


def _engine_bytes(folder: Path, spec: TargetSpec) -> int:
    """Bytes of the largest set of engines, one set per GPU generation; 0 without engines."""
    sets: dict[str, int] = {}
    for key, engine in spec.engines.items():
        generation = key.partition("/")[0]
        sets[generation] = sets.get(generation, 0) + (folder / engine.path).stat().st_size
    return max(sets.values(), default=0)


def _dimensions(rows: int, tokens: int) -> dict[str, int]:
    """The decoder's free dimensions for a prompt of ``tokens`` on an empty cache, all of it images
    of ``rows`` rows.
    """
    return {"S": tokens, "P": 0, "C": tokens, "M": max(1, tokens // rows) * rows}


def _vision_dimensions(spec: ImageSpec, image: Layout) -> dict[str, int]:
    """The vision graph's free dimensions; a graph of single tiles is run one at a time."""
    shapes = input_shapes(spec, image)
    tiles = image.tiles if isinstance(spec, AnyresImage) else 1
    return {"N": tiles, "P": shapes["pixel_values"][0], "M": image.rows, "G": image.rows}


def _stored(view: GraphView) -> dict[str, int]:
    return {
        name: tensor_bytes(tensor.data_type, tensor.dims) or 0
        for name, tensor in view.initializers.items()
    }


def stored_bytes(view: GraphView) -> int:
    """Bytes of a graph's stored tensors, two 4-bit values in a byte."""
    return sum(_stored(view).values())


def peak_bytes(view: GraphView, dimensions: Mapping[str, int], values: Mapping[str, int]) -> int:
    """Most bytes of computed tensors alive at once, in the order of the nodes.

    A tensor lives from the node that writes it to the last that reads it, or a view of it; inputs
    and stored tensors are not counted, and neither is what depends on stored ones alone (an engine
    computes it when it is built, or inside the product). ``dimensions`` gives free dimensions their
    size, ``values`` the contents of one-number inputs that decide shapes. ExportError for a tensor
    whose size does not follow from these.
    """
    view = _with_branches_taken(view, dimensions, values)
    sized = GraphView(_sized(view, dimensions, values), view.path)
    computed = [node for node in view.nodes if not view.is_constant(node.output[0])]
    owner: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(computed):
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        last.update((owner.get(name, name), index) for name in node.input)
    alive = peak = 0
    ends: dict[int, int] = {}
    for index, node in enumerate(computed):
        for name in (name for name in node.output if name and name not in owner):
            size = _bytes(sized, name)
            alive += size
            end = last.get(name, index)
            ends[end] = ends.get(end, 0) + size
        peak = max(peak, alive)
        alive -= ends.get(index, 0)
    return peak


def _with_branches_taken(
    view: GraphView, dimensions: Mapping[str, int], values: Mapping[str, int]
) -> GraphView:
    """The graph with the nodes of the branch that these sizes take in place of each If."""
    if not any(node.op_type == "If" for node in view.model.graph.node):
        return view
    known = {tensor.name: tensor for tensor in _sized(view, dimensions, values).graph.initializer}
    model = ModelProto()
    model.CopyFrom(view.skeleton)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "If":
            nodes.append(copy.deepcopy(node))
            continue
        if node.input[0] not in known:
            raise ExportError(f"{view.path}: {node.name} does not follow from the sizes.")
        taken = bool(numpy_helper.to_array(known[node.input[0]]).all())
        (branch,) = (a.g for a in node.attribute if a.name == ("else_branch", "then_branch")[taken])
        nodes += [copy.deepcopy(inner) for inner in branch.node]
        nodes.append(helper.make_node("Identity", [branch.output[0].name], list(node.output)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return GraphView(model, view.path)


def _sized(view: GraphView, dimensions: Mapping[str, int], values: Mapping[str, int]) -> ModelProto:
    """The graph without weights, its free dimensions and deciding inputs fixed."""
    model = ModelProto()
    model.CopyFrom(view.skeleton)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dimensions:
                dim.dim_value = dimensions[dim.dim_param]
    kept = [value for value in graph.input if value.name not in values]
    given = [name for name in values if any(value.name == name for value in graph.input)]
    del graph.input[:]
    graph.input.extend(kept)
    for name in given:
        graph.initializer.append(numpy_helper.from_array(np.array([values[name]]), name))
    while _fold_shapes(model, view.path):
        pass
    return model


def _fold_shapes(model: ModelProto, path: Path) -> bool:
    """Turn Shape nodes whose result is known, and what Gather and Equal make of it, into constants;
    True if there was one.

    ONNX's inference follows a Slice only if its ends are stored, and the mask's are Shape results.
    """
    sized, kept, graph = GraphView(model, path), [], model.graph
    for node in graph.node:
        known = _known_shape(sized, node)
        if known is None:
            kept.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(known, node.output[0]))
    found = len(kept) < len(graph.node)
    nodes = [copy.deepcopy(node) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    return found


def _known_shape(view: GraphView, node: NodeProto) -> npt.NDArray[Any] | None:
    """What a Shape node, or a Gather or Equal of such a result, gives; None if it is not known."""
    if node.op_type == "Equal":
        one, other = view.ints(node.input[0]), view.ints(node.input[1])
        return None if one is None or other is None else np.equal(one, other)
    if node.op_type == "Gather":
        whole, index = view.ints(node.input[0]), view.ints(node.input[1])
        if whole is None or index is None or view.rank(node.input[0]) != 1:
            return None
        return np.array(whole, np.int64)[index]
    shape = view.shape(node.input[0]) if node.op_type == "Shape" else None
    sizes = [size for size in shape or () if isinstance(size, int)]
    if shape is None or len(sizes) < len(shape):
        return None
    return np.array(
        sizes[attribute(node, "start", 0) : attribute(node, "end", len(sizes))], np.int64
    )


def _bytes(view: GraphView, name: str) -> int:
    dtype, shape = view.dtype(name), view.shape(name)
    if dtype is None or shape is None or not all(isinstance(size, int) for size in shape):
        found = "unknown" if shape is None else list(shape)
        raise ExportError(f"{view.path}: the shape of {name} is {found}, its bytes do not follow.")
    return tensor_bytes(dtype, [size for size in shape if isinstance(size, int)]) or 0
