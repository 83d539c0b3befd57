"""What report.json holds: sizes, what was kept, how that was checked, and what the quantizer recorded.

Numbers come from the stages that measured them; a stage that did not run leaves its part empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from qvlm.checkpoint import Checkpoint, Golden, load_json
from qvlm.errors import ExportError
from qvlm.recipe import COMPONENTS, EMBEDDING

SCHEMA = 2
# Norms, biases, position tables and the embeddings that stayed float.
OTHER = "other"


@dataclass(frozen=True)
class ComponentRow:
    """One component's linears: parameters, stored bytes (scales included) and the same weights' float16 bytes.

    The last row, "other", has no linears: it is what a recipe cannot quantize or did not, at 16 bit.
    """

    component: str
    linears: int
    quantized: int
    formats: Mapping[str, int]
    parameters: int
    nbytes: int
    float16_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass
class Report:
    """Everything the page shows.

    targets: a target's name -> graphs, verification rows and engines. method: what the quantizer recorded of each
    block. comparison: rows of ``qvlm compare``. versions and files: what made it, sha256 of what was made.
    """

    version: str
    source: str
    recipe: Mapping[str, Any]
    components: Sequence[ComponentRow]
    divergence: Mapping[str, float]
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    accuracy: Mapping[str, Any] | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    comparison: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, scales and float parts included."""
        parameters = sum(row.parameters for row in self.components)
        return 8 * sum(row.nbytes for row in self.components) / parameters if parameters else 0.0

    def to_json(self) -> str:
        """JSON text; ``bits_per_weight`` is added to each component."""
        data = {**asdict(self), "bits_per_weight": round(self.bits_per_weight, 4)}
        for row, component in zip(data["components"], self.components, strict=True):
            row["bits_per_weight"] = round(component.bits_per_weight, 4)
        # As made, not sorted: the order of a row's keys is that of its table's columns.
        return json.dumps(data, indent=2) + "\n"

    @staticmethod
    def read(path: Path) -> Report:
        """What ``to_json`` wrote; ExportError for another schema or a missing key."""
        data = load_json(path)
        if data.get("schema") != SCHEMA:
            raise ExportError(
                f"{path}: schema {data.get('schema')!r}, expected {SCHEMA}. Export again."
            )
        try:
            rows = [_only(ComponentRow, row) for row in data["components"]]
            return Report(**{**_only_keys(Report, data), "components": rows})
        except TypeError as error:
            raise ExportError(f"{path}: not a whole report ({error}). Export again.") from error


def _only_keys(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(kind)}
    return {key: value for key, value in data.items() if key in known}


def _only(kind: type[Any], data: Mapping[str, Any]) -> Any:
    return kind(**_only_keys(kind, data))


def read_comparison(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file or of the JSON that ``qvlm compare`` printed; ExportError if they are not there."""
    rows = load_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ExportError(f'{path}: no "rows", expected the JSON of `qvlm compare --json`.')
    needed = ("method", "format", "bits_per_weight", "kl")
    found = [row for row in rows if all(key in row for key in needed)]
    if not found:
        raise ExportError(f"{path}: no row has {', '.join(needed)}. Give a file of `qvlm compare`.")
    for row in found:
        for key in _DRAWN:
            if key in row and not _finite(row[key]):
                raise ExportError(
                    f"{path}: {key} {row[key]!r} of {row['method']} {row['format']}, expected a number. "
                    "Leave this row out, or compare again."
                )
    return found


# What of a comparison's row is drawn.
_DRAWN = ("bits_per_weight", "kl", "exact_match")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def component_rows(checkpoint: Checkpoint) -> list[ComponentRow]:
    """One row per component that has linears, quantized or float, and one for everything else."""
    component_of = {name: entry["component"] for name, entry in checkpoint.linears.items()}
    component_of.update(checkpoint.float_linears)
    rows = []
    for component in (*COMPONENTS, EMBEDDING):
        names = [name for name, owner in component_of.items() if owner == component]
        formats: dict[str, int] = {}
        parameters = nbytes = 0
        for name in names:
            linear = checkpoint.linear(name)
            if linear is None:
                size = checkpoint.tensor(f"{name}.weight").size
                nbytes += 2 * size
            else:
                size = linear.integers.size
                nbytes += linear.nbytes()
            kind = "float" if linear is None else linear.format.name
            formats[kind] = formats.get(kind, 0) + 1
            parameters += size
        quantized = len(names) - formats.get("float", 0)
        row = ComponentRow(
            component, len(names), quantized, formats, parameters, nbytes, 2 * parameters
        )
        if names:
            rows.append(row)
    left = _other_parameters(checkpoint, set(component_of))
    return [*rows, ComponentRow(OTHER, 0, 0, {}, left, 2 * left, 2 * left)]


def _other_parameters(checkpoint: Checkpoint, linears: set[str]) -> int:
    """Elements of the float tensors that are no linear's weight, biases included."""
    count = 0
    for name in checkpoint.names():
        owner, _, kind = name.rpartition(".")
        if owner not in linears or kind == "bias":
            count += prod(checkpoint.shape(name))
    return count


def divergence(goldens: Sequence[Golden], eos_token_ids: Sequence[int]) -> dict[str, float]:
    """Float against fake-quantized model on the goldens' tokens, teacher-forced, to the first end
    token: what follows it is never generated.

    kl: mean KL(float || quantized) in nats per token; greedy: share of tokens with the same argmax;
    tokens: how many; image_features: relative L2 error of the projected image tokens.
    """
    kl, same, errors = [], [], []
    for golden in goldens:
        ends = np.flatnonzero(np.isin(golden.inputs["tokens"], list(eos_token_ids)))
        count = int(ends[0]) + 1 if len(ends) else len(golden.inputs["tokens"])
        reference, other = (
            _log_softmax(golden.outputs[side]["logits"][:count]) for side in ("float", "quant")
        )
        kl.append(np.sum(np.exp(reference) * (reference - other), axis=-1))
        same.append(reference.argmax(-1) == other.argmax(-1))
        features = golden.outputs["float"]["image_features"].astype(np.float64)
        difference = golden.outputs["quant"]["image_features"] - features
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(features)))
    return {
        "kl": float(np.mean(np.concatenate(kl))),
        "greedy": float(np.mean(np.concatenate(same))),
        "tokens": float(sum(len(k) for k in kl)),
        "image_features": float(np.mean(errors)),
    }


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
