"""Checkpoints that others quantized: their integers and scales as ours, nothing rounded a second time.

``config.json`` says how (``quantization_config``); three layouts are read, for a linear L with weight [out, in]:

    gptq                 L.qweight int32 [in/8, out] and L.qzeros int32 [groups, out/8], lowest nibble first along the
                         divided side; zero points are stored less one (format "gptq") or as they are ("gptq_v2");
                         L.scales [groups, out]; L.g_idx [in], the group of each input
    awq (version gemm)   L.qweight int32 [in, out/8] and L.qzeros int32 [groups, out/8]: nibble i of a word is column
                         0, 2, 4, 6, 1, 3, 5, 7 of the eight; L.scales [groups, out]
    compressed-tensors   pack-quantized: L.weight_packed int32 [out, in/8], value + 8, lowest nibble first;
                         int-quantized: L.weight int8 [out, in]; both with L.weight_scale [out, groups] or [out, 1]

A value is (nibble - zero point) * scale. Our integers are symmetric (TensorRT takes no zero point, rule Q-01), so the
zero point has to be 8 everywhere; the integer is then nibble - 8. Scales are kept as float16: those stored as float16
or bfloat16 exactly, a float32 one is rounded (2^-12 of itself), and the model that answers the goldens is the one with
the rounded scale. Everything that cannot be kept so is refused in one line; no linear is left out in silence.

Layouts as AutoGPTQ and GPTQModel, AutoAWQ and compressed-tensors write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvlm.affine import SMALLEST_SCALE
from qvlm.checkpoint import Array, QuantizedLinear, unpack_int4
from qvlm.errors import CheckpointError
from qvlm.models.adapter import Adapter
from qvlm.recipe import COMPONENTS, FORMATS, Format

_AGAIN = "Give the float checkpoint it was made from."
_INT4 = {32: "w4a16-g32", 64: "w4a16-g64", 128: "w4a16"}
# Column of the eight that each nibble of an AWQ word holds, lowest nibble first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The tensor that holds a linear's integers, and those that belong to it.
_INTEGERS = {"gptq": ".qweight", "awq": ".qweight", "compressed-tensors": ".weight_packed"}
_PARTS = {
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
    "compressed-tensors": (
        *(".weight_packed", ".weight", ".weight_scale", ".weight_shape", ".weight_zero_point"),
        *(".weight_g_idx", ".input_scale", ".input_zero_point"),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What ``quantization_config`` says. int4: format of packed linears; int8: of int8 ones; None where it has none.

    zero_offset: what GPTQ's stored zero points lack.
    """

    method: str
    int4: Format | None
    int8: Format | None = None
    zero_offset: int = 0


def settings(config: Mapping[str, Any], where: str) -> Settings | None:
    """Read config.json's ``quantization_config``; None if it has none, CheckpointError for one that cannot be kept."""
    if "quantization_config" not in config:
        return None
    stored = config["quantization_config"]
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: quantization_config is no object. {_AGAIN}")
    method = stored.get("quant_method", "unknown")
    said = f"{where}: already quantized ({method})"
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if isinstance(method, str) and method in readers:
        try:
            return readers[method](stored, said)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{said}: quantization_config holds another kind of value than expected ({error}). {_AGAIN}"
            ) from error
    raise CheckpointError(f"{said}, read are gptq, awq and compressed-tensors. {_AGAIN}")


def _int4(said: str, bits: object, group: object) -> Format:
    """The format of ``bits`` in groups of ``group``."""
    if bits != 4:
        raise CheckpointError(f"{said} with {bits} bits, expected 4. {_AGAIN}")
    if group not in _INT4:
        raise CheckpointError(f"{said} in groups of {group}, expected 32, 64 or 128. {_AGAIN}")
    return FORMATS[_INT4[int(str(group))]]


def _gptq(stored: Mapping[str, Any], said: str) -> Settings:
    format_ = _int4(said, stored.get("bits"), stored.get("group_size"))
    layout = stored.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{said} as {layout!r}, expected gptq or gptq_v2. {_AGAIN}")
    return Settings("gptq", format_, zero_offset=1 if layout == "gptq" else 0)


def _awq(stored: Mapping[str, Any], said: str) -> Settings:
    bits = stored.get("bits", stored.get("w_bit"))
    format_ = _int4(said, bits, stored.get("group_size", stored.get("q_group_size")))
    version = str(stored.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"{said} as version {version!r}, expected gemm. {_AGAIN}")
    return Settings("awq", format_)


def _compressed(stored: Mapping[str, Any], said: str) -> Settings:
    if stored.get("format") == "mixed-precision" and not stored.get("config_groups"):
        raise CheckpointError(
            f"{said} by qvlm itself. Export it as it is: qvlm-export takes the folder."
        )
    if stored.get("kv_cache_scheme"):
        raise CheckpointError(f"{said} with a quantized cache (kv_cache_scheme). {_AGAIN}")
    if (stored.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise CheckpointError(f"{said} with sparse weights. {_AGAIN}")
    found: dict[int, Format] = {}
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{said} without config_groups. {_AGAIN}")
    for name, group in groups.items():
        format_ = _scheme(group, group.get("format") or stored.get("format"), f"{said}, {name}")
        bits = 4 if format_.name in _INT4.values() else 8
        if found.setdefault(bits, format_) != format_:
            raise CheckpointError(f"{said} with two kinds of INT{bits} linears. {_AGAIN}")
    return Settings("compressed-tensors", found.get(4), found.get(8))


def _scheme(group: Mapping[str, Any], layout: object, said: str) -> Format:
    """The format of one entry of config_groups."""
    weights = group.get("weights") or {}
    inputs = group.get("input_activations")
    if weights.get("type") != "int" or not weights.get("symmetric"):
        raise CheckpointError(f"{said}: weights are no symmetric integers. {_AGAIN}")
    if group.get("output_activations"):
        raise CheckpointError(f"{said}: outputs are quantized, too. {_AGAIN}")
    if layout == "pack-quantized":
        if inputs:
            raise CheckpointError(f"{said}: packed weights with quantized inputs. {_AGAIN}")
        if weights.get("actorder") in ("group", True):
            raise CheckpointError(f"{said}: inputs are reordered (actorder group). {_AGAIN}")
        return _int4(said, weights.get("num_bits"), weights.get("group_size"))
    if layout != "int-quantized":
        raise CheckpointError(
            f"{said}: format {layout!r}, expected pack-quantized or int-quantized. {_AGAIN}"
        )
    if weights.get("num_bits") != 8 or weights.get("strategy") not in ("channel", "tensor"):
        raise CheckpointError(f"{said}: expected INT8 weights with a scale a channel. {_AGAIN}")
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    if not inputs or not inputs.get("dynamic") or any(inputs.get(k) != dynamic[k] for k in dynamic):
        raise CheckpointError(
            f"{said}: inputs are not dynamic symmetric INT8 a token, which is what w8a8 does. {_AGAIN}"
        )
    return FORMATS["w8a8"]


@dataclass(frozen=True)
class Entry:
    """One imported linear: the name it has in the files, its component here, its format."""

    stored: str
    component: str
    format: Format


def entries(
    how: Settings,
    headers: Mapping[str, Mapping[str, Any]],
    model: nn.Module,
    adapter: Adapter,
    where: str,
) -> dict[str, Entry]:
    """Linear of the module tree -> where its integers are, from the files' headers ({tensor: {dtype, shape}}) alone.

    CheckpointError for integers that belong to no linear of the model, or to one that we never quantize.
    """
    linears = {
        name: (component, linear)
        for component in COMPONENTS
        for name, linear in adapter.linears(model, component).items()
    }
    rename = _renaming(model)
    found: dict[str, Entry] = {}
    for tensor, header in headers.items():
        suffix = _INTEGERS[how.method]
        if tensor.endswith(suffix):
            format_ = how.int4
        elif how.method == "compressed-tensors" and header["dtype"] == "I8":
            suffix, format_ = ".weight", how.int8
            if not tensor.endswith(suffix):
                continue
        else:
            continue
        stored = tensor.removesuffix(suffix)
        name = rename(f"{stored}.weight").removesuffix(".weight")
        if name not in linears:
            raise CheckpointError(
                f"{where}: {stored} is quantized and is none of the linears that are quantized here (fused experts are "
                f"not). {_AGAIN}"
            )
        component, linear = linears[name]
        if format_ is None or format_.weights is None:
            raise CheckpointError(
                f"{where}: {tensor} is of a kind that quantization_config does not name. {_AGAIN}"
            )
        if linear.in_features % (format_.weights.group_size or 1):
            raise CheckpointError(
                f"{where}: {stored} has {linear.in_features} inputs, groups of {format_.weights.group_size} do not "
                f"divide them. {_AGAIN}"
            )
        found[name] = Entry(stored, component, format_)
    if not found:
        raise CheckpointError(
            f"{where}: quantization_config says {how.method}, no tensor is. {_AGAIN}"
        )
    return found


def _renaming(model: nn.Module) -> Any:
    """The function from a name in the files to a name in the module tree: transformers' own."""
    from transformers import conversion_mapping, core_model_loading

    mapping: Any = conversion_mapping
    loading: Any = core_model_loading
    steps = [
        step
        for step in mapping.get_model_conversion_mapping(model)
        if isinstance(step, loading.WeightRenaming)
    ]
    return lambda name: loading.apply_renamings(name, steps)


def read(
    how: Settings,
    directory: Path,
    shards: tuple[str, ...],
    wanted: Mapping[str, Entry],
    model: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, QuantizedLinear]]:
    """All tensors in float32 under the files' names, imported weights as what their integers stand for; the integers.

    model: the module tree, for shapes. CheckpointError for a linear that is incomplete, has zero points other than the
    middle, reordered inputs, or a scale beyond float16.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for shard in shards:
            file = stack.enter_context(safe_open(str(directory / shard), framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))
        tensors: dict[str, Tensor] = {}
        linears: dict[str, QuantizedLinear] = {}
        taken: set[str] = set()
        for name, entry in wanted.items():
            parts = {
                suffix[1:]: files[entry.stored + suffix].get_tensor(entry.stored + suffix)
                for suffix in _PARTS[how.method]
                if entry.stored + suffix in files
            }
            taken |= {f"{entry.stored}.{suffix}" for suffix in parts}
            shape = tuple(model.get_parameter(f"{name}.weight").shape)
            linears[name] = _linear(how, entry, parts, shape, f"{directory}: {entry.stored}")
            tensors[f"{entry.stored}.weight"] = torch.from_numpy(linears[name].dequantize())
        for tensor, file in files.items():
            if tensor not in taken:
                value = file.get_tensor(tensor)
                tensors[tensor] = value.float() if value.is_floating_point() else value
    return tensors, linears


def _linear(
    how: Settings, entry: Entry, parts: Mapping[str, Tensor], shape: tuple[int, ...], where: str
) -> QuantizedLinear:
    """One linear [out, in] from its tensors."""
    scheme = entry.format.weights
    assert scheme is not None
    out, columns = shape
    groups = columns // (scheme.group_size or columns)
    zeros: Array | None = None
    if how.method == "compressed-tensors":
        packed = entry.format == how.int4
        need = {"weight_packed" if packed else "weight": (out, columns // 8 if packed else columns)}
        scale = _part(parts, "weight_scale", None, where)
        if not packed and scale.size == 1:
            scale = np.broadcast_to(scale.reshape(1, 1), (out, 1))
        (key, size), *_ = need.items()
        integers = _part(parts, key, size, where)
        integers = unpack_int4(integers, (out, columns)) if packed else integers
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"].numpy()
        order = parts.get("weight_g_idx")
    else:
        along = {"gptq": (columns // 8, out), "awq": (columns, out // 8)}[how.method]
        words = _part(parts, "qweight", along, where)
        scale = _part(parts, "scales", (groups, out), where).T
        stored_zeros = _part(parts, "qzeros", (groups, out // 8), where)
        if how.method == "gptq":
            # unpack_int4 takes 8 off each nibble, which is the zero point that is asked for below.
            integers = unpack_int4(np.ascontiguousarray(words.T), (out, columns))
            zeros = unpack_int4(stored_zeros, (groups, out)) + how.zero_offset
        else:
            integers = np.ascontiguousarray(_unpack_awq(words, out).T)
            zeros = _unpack_awq(stored_zeros, out)
        order = parts.get("g_idx")
    if zeros is not None and np.any(zeros):
        raise CheckpointError(
            f"{where}: has zero points other than the middle of the range, and no target takes any (rule Q-01). "
            f"Quantize symmetrically, or: {_AGAIN.lower()}"
        )
    if order is not None and not np.array_equal(
        order.numpy(), np.arange(columns) // (columns // groups)
    ):
        raise CheckpointError(
            f"{where}: inputs are reordered (g_idx, desc_act), and no target takes such groups. Quantize without "
            f"desc_act, or: {_AGAIN.lower()}"
        )
    if scale.shape != (out, groups):
        raise CheckpointError(
            f"{where}: scales of shape {list(scale.shape)}, expected {[out, groups]}. {_AGAIN}"
        )
    return QuantizedLinear(
        np.ascontiguousarray(integers), _float16(scale, integers, where), entry.format
    )


def _part(
    parts: Mapping[str, Tensor], key: str, shape: tuple[int, ...] | None, where: str
) -> Array:
    """One tensor as numpy (floats in float32), of the shape that the layout says."""
    if key not in parts:
        raise CheckpointError(f"{where}: has no {key}. Download the checkpoint again.")
    tensor = parts[key]
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where}: {key} of shape {list(tensor.shape)}, expected {list(shape)}. {_AGAIN}"
        )
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _unpack_awq(words: Array, columns: int) -> Array:
    """int32 [rows, columns/8] to nibble - 8 as int8 [rows, columns] in the order of the columns."""
    nibbles = unpack_int4(words, (words.shape[0], columns)).reshape(-1, 8)
    ordered = np.empty_like(nibbles)
    ordered[:, list(_AWQ_ORDER)] = nibbles
    return ordered.reshape(words.shape[0], columns)


def _float16(scale: Array, integers: Array, where: str) -> Array:
    """The scales as float16 values; a group of zeros has none that matters and takes the smallest."""
    rounded = scale.astype(np.float32).astype(np.float16).astype(np.float32)
    empty = ~integers.reshape(*scale.shape, -1).any(-1)
    rounded = np.where(empty, np.float32(SMALLEST_SCALE), rounded)
    if not np.all((rounded >= SMALLEST_SCALE) & np.isfinite(rounded)):
        raise CheckpointError(
            f"{where}: a scale between {scale.min():.3g} and {scale.max():.3g} is no normal positive float16 "
            f"(rule Q-04). {_AGAIN}"
        )
    return np.ascontiguousarray(rounded)
