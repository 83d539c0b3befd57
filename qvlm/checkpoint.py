"""The quantized model on disk: integers, scales, float remainder, recipe, goldens. numpy only, no torch.

Layout (names as the ``compressed-tensors`` convention has them, so that other tools read the tensors):

    config.json                  the source's, plus ``quantization_config`` (format "mixed-precision")
    model-00001.safetensors ...  float tensors under their own names, and for a quantized linear ``L``:
        L.weight_packed  int32 [out, in*4/32]   4 bits: value + 8, eight to a word, lowest bits first
        L.weight         int8  [out, in]        any other bit width
        L.weight_shape   int64 [2]              with weight_packed only
        L.weight_scale   float16 [out, groups]  ([1, 1] per tensor)
        L.weight_zero_point int8, same shape    asymmetric only
        L.input_scale / L.input_zero_point      static activations only: float32 / int32, [1] or [in]
    model.safetensors.index.json
    recipe.json                  the recipe that made it
    quantization.json            {"linears": {name: {component, format}}, "float_linears": {name: component},
                                 "method": what the method reports}
    magnitudes.json              {module: {"input", "output"}}: largest |activation| of the float model on the samples
    goldens.npz                  see ``Goldens``
    tokenizer and processor files, copied from the source

Names are those of the module tree that transformers 5 builds (``model.language_model.layers.0...``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from qvlm.errors import CheckpointError
from qvlm.recipe import ActivationScheme, Format, Recipe, WeightScheme, named_format

Array = npt.NDArray[Any]
SHARD_BYTES = 1 << 30
MAGNITUDES = "magnitudes.json"


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear as integers.

    integers [out, in] int8; scale [out, groups] float32 holding float16 values ([1, 1] per tensor); zero_point int8
    of scale's shape or None; input_scale and input_zero_point for static activations ([1] or [in]).
    Value of a weight: (integers - zero_point) * scale.
    """

    integers: Array
    scale: Array
    format: Format
    zero_point: Array | None = None
    input_scale: Array | None = None
    input_zero_point: Array | None = None

    @property
    def weights(self) -> WeightScheme:
        """The weight's scheme (a quantized linear always has one)."""
        if self.format.weights is None:
            raise CheckpointError(f"format {self.format.name!r} quantizes no weight")
        return self.format.weights

    @property
    def activations(self) -> ActivationScheme | None:
        """The input's scheme; None when activations stay float."""
        return self.format.activations

    def dequantize(self) -> Array:
        """The float32 weight [out, in] that the integers stand for."""
        out, columns = self.integers.shape
        groups = self.scale.shape[1]
        grid = self.integers.astype(np.float32).reshape(out, groups, columns // groups)
        if self.zero_point is not None:
            grid = grid - self.zero_point.astype(np.float32)[..., None]
        return (grid * self.scale[..., None]).reshape(out, columns)

    def nbytes(self) -> int:
        """Bytes of integers (packed) and scales as deployed, float16 scales."""
        bits = self.integers.size * self.weights.bits
        zero = 0 if self.zero_point is None else self.zero_point.size
        return -(-bits // 8) + 2 * self.scale.size + zero


def pack_int4(integers: Array) -> Array:
    """int8 [out, in] in [-8, 7] to int32 [out, ceil(in/8)], lowest nibble first, stored as value + 8."""
    out, columns = integers.shape
    padded = np.zeros((out, -(-columns // 8) * 8), np.uint32)
    padded[:, :columns] = (integers.astype(np.int16) + 8).astype(np.uint32)
    shifts = (4 * np.arange(8, dtype=np.uint32))[None, None, :]
    words: Array = np.bitwise_or.reduce(padded.reshape(out, -1, 8) << shifts, axis=-1)
    return words.astype(np.uint32).view(np.int32)


def unpack_int4(packed: Array, shape: tuple[int, int]) -> Array:
    """Inverse of ``pack_int4``."""
    shifts = (4 * np.arange(8, dtype=np.uint32))[None, None, :]
    nibbles = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    return (nibbles.reshape(packed.shape[0], -1)[:, : shape[1]].astype(np.int16) - 8).astype(
        np.int8
    )


@dataclass(frozen=True)
class Golden:
    """One prompt and what the float and the fake-quantized model answered to it.

    Both are teacher-forced on the float model's greedy tokens.

    input_ids [S] (image token repeated once per image token), pixel_values float32 (all that the tower saw: tiles
    [N, 3, H, W], or a row per patch), image_sizes [images, 2] (height and width of each picture), image_index [S] (row
    of image_features that replaces the token's embedding, -1 for text), position_ids [S], or [3, S] with M-RoPE,
    tokens [T].
    For each of "float" and "quant": image_features [M, feature size], logits [T, vocab] (row 0 from the prompt alone,
    row t after tokens[:t] were fed), key and value [S+T-1, kv_heads, head_dim] of the last decoder layer, key after
    rope.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Mapping[str, Array]]


_INPUTS = ("input_ids", "pixel_values", "image_sizes", "image_index", "position_ids", "tokens")
_OUTPUTS = ("image_features", "logits", "key", "value")


def write_goldens(path: Path, goldens: Iterable[Golden]) -> None:
    """Write goldens.npz atomically."""
    arrays: dict[str, Array] = {}
    count = 0
    for i, golden in enumerate(goldens):
        arrays.update({f"{i}.{key}": golden.inputs[key] for key in _INPUTS})
        for side in ("float", "quant"):
            arrays.update({f"{i}.{side}.{key}": golden.outputs[side][key] for key in _OUTPUTS})
        count += 1
    arrays["count"] = np.array(count)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def read_goldens(path: Path) -> list[Golden]:
    """Read goldens.npz; CheckpointError if it is missing or damaged."""
    try:
        # An own handle: numpy leaves its own open when the archive is damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return [
                Golden(
                    {key: file[f"{i}.{key}"] for key in _INPUTS},
                    {
                        side: {key: file[f"{i}.{side}.{key}"] for key in _OUTPUTS}
                        for side in ("float", "quant")
                    },
                )
                for i in range(int(file["count"]))
            ]
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise CheckpointError(f"{path}: goldens not readable ({error}). Quantize again.") from error


class CheckpointWriter:
    """Writes tensors shard by shard; nothing has its final name until ``close``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, Array] = {}
        self._bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._linears: dict[str, dict[str, str]] = {}

    def add(self, name: str, array: Array) -> None:
        """Add one float (or index) tensor."""
        self._pending[name] = np.ascontiguousarray(array).reshape(array.shape)
        self._bytes += array.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def add_linear(self, component: str, name: str, linear: QuantizedLinear) -> None:
        """Add one quantized linear; ``name`` is the module's, without ``.weight``."""
        self._linears[name] = {"component": component, "format": linear.format.name}
        if linear.weights.bits == 4 and linear.weights.symmetric:
            self.add(f"{name}.weight_packed", pack_int4(linear.integers))
            self.add(f"{name}.weight_shape", np.array(linear.integers.shape, np.int64))
        else:
            self.add(f"{name}.weight", linear.integers)
        self.add(f"{name}.weight_scale", linear.scale.astype(np.float16))
        if linear.zero_point is not None:
            self.add(f"{name}.weight_zero_point", linear.zero_point)
        if linear.input_scale is not None:
            self.add(f"{name}.input_scale", linear.input_scale.astype(np.float32))
        if linear.input_zero_point is not None:
            self.add(f"{name}.input_zero_point", linear.input_zero_point.astype(np.int32))

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        if not self._pending:
            return
        path = self.directory / f"model-{len(self._shards) + 1:05d}.safetensors"
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(self._pending, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(
                f"{partial}: not written ({error}). Free disk space and continue with --resume."
            ) from error
        self._shards.append((path, list(self._pending)))
        self._pending, self._bytes = {}, 0

    def close(
        self,
        config: Mapping[str, Any],
        recipe: Recipe,
        method_report: Mapping[str, Any],
        float_linears: Mapping[str, str] | None = None,
    ) -> None:
        """Write the JSON files and give every shard its name.

        float_linears: name -> component of the linears a recipe could have quantized and did not.
        """
        self._flush()
        for path, _ in self._shards:
            os.replace(path.with_name(path.name + ".partial"), path)
        weight_map = {name: path.name for path, names in self._shards for name in names}
        quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
        dump_json(self.directory / "config.json", {**config, "quantization_config": quantization})
        dump_json(self.directory / "recipe.json", recipe.to_json())
        report = {
            "linears": self._linears,
            "float_linears": dict(float_linears or {}),
            "method": dict(method_report),
        }
        dump_json(self.directory / "quantization.json", report)
        # transformers refuses an index without "metadata".
        index = {"metadata": {}, "weight_map": weight_map}
        dump_json(self.directory / "model.safetensors.index.json", index)


def dump_json(path: Path, data: object) -> None:
    """Write JSON atomically: two-space indent, sorted keys, final newline."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError naming the file otherwise."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a {type(data).__name__}, expected a JSON object")
    return data


class Checkpoint:
    """A quantized checkpoint opened for reading, one tensor in memory at a time.

    Raises CheckpointError if a file is missing, truncated or does not hold what the index says.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config = load_json(self.directory / "config.json")
        self.recipe = Recipe.from_json(load_json(self.directory / "recipe.json"))
        report = load_json(self.directory / "quantization.json")
        index = load_json(self.directory / "model.safetensors.index.json")
        try:
            self.linears: dict[str, dict[str, str]] = report["linears"]
            self.float_linears: dict[str, str] = report["float_linears"]
            self.method_report: dict[str, Any] = report["method"]
            self._files: dict[str, str] = index["weight_map"]
        except KeyError as error:
            raise CheckpointError(
                f"{self.directory}: not a checkpoint of this version of qvlm (no {error}). Quantize again."
            ) from error
        self._handles: dict[str, Any] = {}
        for shard in sorted(set(self._files.values())):
            self._open(shard)

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            from safetensors import SafetensorError, safe_open

            path = self.directory / shard
            try:
                self._handles[shard] = safe_open(str(path), framework="np")
            except FileNotFoundError as error:
                raise CheckpointError(f"{path}: listed in the index but absent") from error
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path}: not a complete safetensors file ({error}). Make the checkpoint again."
                ) from error
        return self._handles[shard]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> Iterator[str]:
        """Every stored tensor's name."""
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the file's header alone."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory}: no tensor {name!r}")
        return tuple(int(n) for n in self._open(self._files[name]).get_slice(name).get_shape())

    def tensor(self, name: str) -> Array:
        """One stored tensor as it is on disk (bfloat16 through ml_dtypes)."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory}: no tensor {name!r}")
        return np.asarray(self._open(self._files[name]).get_tensor(name))

    def float_tensor(self, name: str) -> Array:
        """One float tensor as float32."""
        return self.tensor(name).astype(np.float32)

    def magnitudes(self) -> dict[str, dict[str, float]]:
        """Largest |activation| per module of the float model; empty if the checkpoint does not say."""
        path = self.directory / MAGNITUDES
        return load_json(path) if path.is_file() else {}

    def linear(self, name: str) -> QuantizedLinear | None:
        """The quantized linear ``name``, or None if that linear stayed float."""
        if name not in self.linears:
            return None
        format_ = named_format(self.linears[name]["format"])
        if f"{name}.weight_packed" in self:
            out, columns = (int(n) for n in self.tensor(f"{name}.weight_shape"))
            integers = unpack_int4(self.tensor(f"{name}.weight_packed"), (out, columns))
        else:
            integers = self.tensor(f"{name}.weight")

        def optional(suffix: str) -> Array | None:
            key = f"{name}.{suffix}"
            return self.tensor(key) if key in self else None

        return QuantizedLinear(
            integers,
            self.float_tensor(f"{name}.weight_scale"),
            format_,
            optional("weight_zero_point"),
            optional("input_scale"),
            optional("input_zero_point"),
        )

    def goldens(self) -> list[Golden]:
        """The goldens written with it."""
        return read_goldens(self.directory / "goldens.npz")
