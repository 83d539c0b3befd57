"""What a TensorRT compiler made of a graph, kernel by kernel, and whether integer weights stayed
integers in it.

Two sources list the same kernels: the log of TensorRT for RTX at detailed verbosity
(``parse_kernels``), and the JSON of an engine's inspector (``kernels_of_engine``). The inspector's
form is not documented and differs by release: a tensor's type stands under "Datatype" or
"Format/Datatype", there in words ("Row major linear FP16"); constants may be absent; a whole region
may stand as one layer. ``check`` therefore first asks what a list tells, and checks that much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from qvlm.errors import ExportError
from qvlm_export.facts import GraphFacts


@dataclass(frozen=True)
class KernelTensor:
    """A tensor of a kernel: dimensions (-1 where dynamic) and the compiler's type name (Half, Int4
    ...).
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements of a constant."""
        return prod(self.shape)


@dataclass(frozen=True)
class Kernel:
    """One entry of the compiler's layer list. ``profile`` is the optimization profile it was made
    for; ``nodes`` names the graph nodes in it, where the list tells.
    """

    name: str
    kind: str
    profile: int
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: str = ""

    def constant_elements(self, dtype: str) -> int:
        """Elements of its constants of one type."""
        return sum(t.elements for t in self.constants if t.dtype == dtype)


Telling = Literal["constants", "names", "nothing"]

_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: (?P<inputs>.*?), "
    r"(?:Constants: (?P<constants>.*?), )?Outputs: (?P<outputs>.*?), TacticName"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>.*?)\].*?Datatype: (?P<dtype>\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_NAMED_PROFILE = re.compile(r"\[profile (\d+)\]$")
# Both vocabularies of the inspector to the one of the log.
_TYPES = {
    "FP32": "Float",
    "FLOAT": "Float",
    "FP16": "Half",
    "HALF": "Half",
    "BF16": "BFloat16",
    "BFLOAT16": "BFloat16",
    "INT8": "Int8",
    "INT4": "Int4",
    "INT32": "Int32",
    "INT64": "Int64",
    "BOOL": "Bool",
}
_WIDE = ("Half", "Float", "BFloat16")
# Entries of the list that launch nothing on the data.
_NO_KERNEL = ("shape_call", "signal", "wait")


def parse_kernels(log: Sequence[str]) -> list[Kernel]:
    """Kernels from the compiler's log, without shape computations and stream synchronisation."""
    kernels = []
    for message in log:
        if not message.startswith("Layers:"):
            continue
        for match in filter(None, map(_LINE.match, message.splitlines())):
            if match["kind"] in _NO_KERNEL:
                continue
            profile = _PROFILE.search(match["name"])
            kernels.append(
                Kernel(
                    match["name"],
                    match["kind"],
                    int(profile[1]) if profile else 0,
                    _tensors(match["inputs"]),
                    _tensors(match["constants"]),
                    _tensors(match["outputs"]),
                )
            )
    return _by_rank(kernels)


def _tensors(text: str | None) -> tuple[KernelTensor, ...]:
    found = _TENSOR.finditer(text or "")
    return tuple(
        KernelTensor(tuple(int(n) for n in m["shape"].split(",") if n.strip()), m["dtype"])
        for m in found
    )


def kernels_of_engine(text: str, where: str) -> list[Kernel]:
    """Kernels from an engine inspector's JSON.

    ExportError if the text is not such a list: an engine built without detailed verbosity has names
    only.
    """
    try:
        layers = json.loads(text)["Layers"]
        kernels = [_layer(layer) for layer in layers if layer["LayerType"] not in _NO_KERNEL]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{where}: the engine's layer list is not understood ({error!r}). Report the release."
        ) from error
    return _by_rank(kernels)


def _layer(layer: Mapping[str, Any]) -> Kernel:
    name = str(layer["Name"])
    found = _PROFILE.search(name) or _NAMED_PROFILE.search(name)
    inputs, constants, outputs = (
        tuple(map(_layer_tensor, layer.get(key, ()))) for key in ("Inputs", "Constants", "Outputs")
    )
    return Kernel(
        name,
        str(layer["LayerType"]),
        int(found[1]) if found else 0,
        inputs,
        constants,
        outputs,
        str(layer.get("Metadata", "")),
    )


def _layer_tensor(tensor: Mapping[str, Any]) -> KernelTensor:
    words = str(tensor["Datatype"] if "Datatype" in tensor else tensor["Format/Datatype"])
    names = (_TYPES.get(word.upper()) for word in words.split())
    dtype = next(filter(None, names), words)
    return KernelTensor(tuple(int(n) for n in tensor["Dimensions"]), dtype)


def _by_rank(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels with ``profile`` counted from 0.

    The compiler numbers segments, not profiles: where a cache is updated in place, each profile has
    a segment without kernels in front.
    """
    rank = {segment: i for i, segment in enumerate(sorted({k.profile for k in kernels}))}
    return [replace(kernel, profile=rank[kernel.profile]) for kernel in kernels]


def check(kernels: Sequence[Kernel], facts: GraphFacts, where: str) -> Telling:
    """Assert as much as the list tells about integer weights, and return what it was read from.

    "constants": every integer weight's elements are found (``check_kernels``); "names": every
    product's node is named by a kernel, whose types tell the rest (``check_kernel_names``);
    "nothing": neither, and nothing is asserted. ExportError if a weight was lost.
    """
    if any(kernel.constants for kernel in kernels):
        check_kernels(kernels, facts, where)
        return "constants"
    named = " ".join(kernel.nodes for kernel in kernels)
    if not kernels or not all(_mention(p.node) in named for p in facts.products):
        return "nothing"
    check_kernel_names(kernels, facts, where)
    return "names"


def _mention(node: str) -> str:
    return f"[ONNX Layer: {node}]"


def check_kernels(kernels: Sequence[Kernel], facts: GraphFacts, where: str) -> None:
    """Assert from the kernel list, for every profile, that integer weights are used as integers.

    INT4: all weight elements are constants of kernels that multiply: ``runtime_fusion`` kernels, or
    in decode a kernel that dequantizes and sums in one go for small K. No kernel turns an INT4
    constant into a [K, N] float matrix (the compiler does that silently when a pattern is missed,
    at every run): such a kernel's output has as many elements as the constant.
    INT8: all weight elements are constants of kernels whose input is INT8 too. ExportError
    otherwise.
    """
    for profile in sorted({k.profile for k in kernels}):
        here = [k for k in kernels if k.profile == profile]
        for k in here:
            if _expands(k):
                raise ExportError(
                    f"{where}, profile {profile}: kernel {k.name} expands an INT4 weight to {k.outputs[0].shape} "
                    "floats at every run, expected a fused product"
                )
        fused = sum(k.constant_elements("Int4") for k in here)
        _expect_elements(
            fused, facts.elements("INT4"), f"{where}, profile {profile}: INT4 weights fused"
        )
        integer = [k for k in here if any(t.dtype == "Int8" for t in k.inputs)]
        found = sum(k.constant_elements("Int8") for k in integer)
        _expect_elements(
            found, facts.elements("INT8"), f"{where}, profile {profile}: INT8 x INT8 weights"
        )


def check_kernel_names(kernels: Sequence[Kernel], facts: GraphFacts, where: str) -> None:
    """Assert what a list without constants tells, for every profile.

    INT8: every product's node is in a kernel with an INT8 input. INT4: no kernel writes a float
    matrix of an INT4 weight's sizes. ExportError otherwise.
    """
    for profile in sorted({k.profile for k in kernels}):
        here = [k for k in kernels if k.profile == profile]
        integer = " ".join(k.nodes for k in here if any(t.dtype == "Int8" for t in k.inputs))
        for product in facts.products:
            place = f"{where}, profile {profile}: node {product.node}"
            if product.dtype == "INT8" and _mention(product.node) not in integer:
                raise ExportError(
                    f"{place} is in no kernel with an INT8 input, expected INT8 x INT8"
                )
            sizes = (product.depth, product.elements // product.depth)
            if product.dtype == "INT4" and any(
                t.shape[-2:] in (sizes, sizes[::-1])
                and t.dtype in _WIDE
                and t.elements == prod(sizes)
                for k in here
                for t in k.outputs
            ):
                raise ExportError(
                    f"{place}: a kernel writes its INT4 weight out as {list(sizes)} floats at every "
                    "run, expected a fused product"
                )


def _expands(kernel: Kernel) -> bool:
    """True if the kernel writes an INT4 constant out as floats instead of multiplying with it."""
    weight = kernel.constant_elements("Int4")
    if not weight or kernel.kind == "runtime_fusion":
        return False
    return any(o.dtype in _WIDE and o.elements >= weight for o in kernel.outputs)


def _expect_elements(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ExportError(
            f"{what}: {found} elements, expected {expected}. See the kernel list in the log."
        )


def integer_products(kernels: Sequence[Kernel], profile: int = 0) -> tuple[int, int]:
    """(kernels that multiply with INT4 weights, kernels that multiply INT8 by INT8) of one profile.

    A kernel that only writes its INT4 constant out as floats is no product.
    """
    here = [k for k in kernels if k.profile == profile]
    int4 = sum(1 for k in here if k.constant_elements("Int4") and not _expands(k))
    int8 = sum(
        1 for k in here if k.constant_elements("Int8") and any(t.dtype == "Int8" for t in k.inputs)
    )
    return int4, int8
