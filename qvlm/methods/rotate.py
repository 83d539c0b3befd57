"""Rotations that fold: R1 of the decoder's residual stream, R2 of every attention's values.

Papers: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv 2404.00456;
Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025, arXiv 2405.16406 (its names R1, R2).

A few channels of a residual stream are many times larger than the rest and set the scale of every INT8 token. With an
orthogonal Q (``qvlm.rotation``) the stream x becomes x Q, in which they are spread over all channels:

    RMS(x Q) = RMS(x) Q              because |x Q| = |x|; the gain g stands between and goes first
    W RMS(x) = (W diag(g) Q) RMS(x) Q    what reads the stream
    (Q' W) y, Q' b                    what writes to it

1. The gain of every norm in front of readers is multiplied into them and becomes one, the final norm's into the head.
2. R1, one Q: rows of the embedding, and a learned row that ends an image's line; the projector's last linear, whose
   outputs enter the stream as image tokens, and that of each deepstack merger; per layer what writes (rows, bias) and
   what reads (columns); the head's columns.
3. R2, one Q per layer as wide as a head: rows (and bias) of each value head, and the columns of the output projection
   that read it. Attention mixes tokens, not channels of a head, so it passes.

Signs are drawn from the recipe's seed; nothing is learned and no sample is read. A tower with LayerNorm subtracts the
mean of its channels, which a rotation does not pass: only R2 there. A head tied to the embedding is refused R1: it
absorbs a gain that the embedding must not have (``qvlm.untie`` gives it a copy). A method that begins with this
transform (``fused``) asks for "auto": R1 where the model permits it, and R2.

What we do differently: sizes that are no power of two take a cosine transform for their odd part (the papers: tables of
Hadamard matrices); no rotation that would have to run online (R3, R4).

Cost: every weight of the decoder is rotated once, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import RecipeError
from qvlm.fold import Point, full_name, points, value_points
from qvlm.methods.method import Context, State
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress
from qvlm.recipe import Recipe
from qvlm.rotation import Rotation, random_signs
from qvlm.untie import HINT

KINDS = ("residual", "values")
OPTIONS: Mapping[str, Any] = {"rotations": list(KINDS)}  # R1, R2
AUTO = "auto"


class Rotate:
    """The transform ``rotate``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
        """The option, and what R1 needs."""
        kinds = _kinds(recipe, model, adapter)
        if not (isinstance(kinds, list) and kinds and all(kind in KINDS for kind in kinds)):
            raise RecipeError(
                f"option rotations: {kinds!r}, expected {AUTO} or a list out of {', '.join(KINDS)}"
            )
        if "residual" not in kinds:
            return
        hint = 'Leave rotate out, set the option rotations to ["values"]'
        if adapter.residual is None:
            raise RecipeError(
                f"transform rotate: no rotation passes the residual stream of {adapter.model_type}. {hint}."
            )
        if adapter.tied(model):
            raise RecipeError(
                f"transform rotate: {adapter.head} shares the embedding's weight (tie_word_embeddings), but must "
                f"absorb the final norm's gain alone. {hint}, or {HINT}."
            )

    def find(self, context: Context, progress: Progress) -> State:
        """The signs: "residual" [hidden], "values/<component>" [layers, head width]."""
        generator = torch.Generator().manual_seed(context.recipe.seed)
        model, adapter = context.model, context.adapter
        kinds = _kinds(context.recipe, model, adapter)
        state: dict[str, Any] = {}
        if "residual" in kinds and adapter.residual is not None:
            hidden = model.get_parameter(f"{adapter.residual.embedding}.weight").shape[1]
            state["residual"] = random_signs(hidden, generator).numpy()
        if "values" in kinds:
            for component in ("vision", "text"):
                found = value_points(model, adapter, component)
                signs = [random_signs(_width(point), generator) for point in found]
                if signs:
                    state[f"values/{component}"] = torch.stack(signs).numpy()
        return state

    def apply(self, context: Context, state: State) -> dict[str, Any]:
        """Steps 1 to 3."""
        report: dict[str, Any] = {}
        if "residual" in state:
            signs = torch.from_numpy(state["residual"])
            rotate_residual(context.model, context.adapter, Rotation(signs))
            report["residual"] = len(signs)
        for component in ("vision", "text"):
            if f"values/{component}" in state:
                rows = torch.from_numpy(state[f"values/{component}"])
                found = value_points(context.model, context.adapter, component)
                for point, signs in zip(found, rows, strict=True):
                    rotate_values(context.model, point, Rotation(signs))
                report[f"values_{component}"] = len(found)
        return report


def _kinds(recipe: Recipe, model: nn.Module, adapter: Adapter) -> Any:
    """The option; what the model permits for "auto", which is the default where no recipe names the transform."""
    default = OPTIONS["rotations"] if "rotate" in recipe.transforms else AUTO
    kinds = recipe.options.get("rotations", default)
    if kinds != AUTO:
        return kinds
    return list(KINDS) if adapter.residual and not adapter.tied(model) else ["values"]


def _width(point: Point) -> int:
    assert point.heads is not None
    return point.heads.width


@torch.no_grad()
def rotate_residual(model: nn.Module, adapter: Adapter, rotation: Rotation) -> None:
    """Steps 1 and 2 in place; the adapter must have a residual stream and an untied head."""
    residual = adapter.residual
    assert residual is not None
    embedding = model.get_parameter(f"{residual.embedding}.weight")
    embedding.copy_(rotation.columns(embedding))
    layers = adapter.layer_names(model, "text")
    writers = [full_name(layer, path) for layer in layers for path in residual.writers]
    entries = [
        name
        for name, _ in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in residual.entries)
    ]
    for name in (*entries, *writers):
        _rotate_output(model.get_submodule(name), rotation)
    for name in residual.vectors:
        vector = model.get_parameter(name)
        vector.copy_(rotation.columns(vector))
    for component in ("text", "head"):
        for point in points(model, adapter, component, adapter.linears(model, component)):
            norm: Any = model.get_submodule(point.source)
            if isinstance(norm, nn.Linear):
                continue
            if getattr(norm, "bias", None) is not None:
                raise ValueError(
                    f"{point.source}: has a bias, so it is no RMSNorm a rotation passes"
                )
            gain = norm.weight.double().clone()
            norm.weight.fill_(1.0)
            for name in point.targets:
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(rotation.columns(weight.double() * gain))


def _rotate_output(linear: Any, rotation: Rotation) -> None:
    """W -> Q' W, b -> b Q."""
    linear.weight.copy_(rotation.rows(linear.weight))
    if linear.bias is not None:
        linear.bias.copy_(rotation.columns(linear.bias))


@torch.no_grad()
def rotate_values(model: nn.Module, point: Point, rotation: Rotation) -> None:
    """Step 3 in place for one attention."""
    width = _width(point)
    value: Any = model.get_submodule(point.source)
    weight: Tensor = value.weight.reshape(-1, width, value.in_features)  # [heads, width, in]
    rotated = rotation.columns(weight.transpose(1, 2)).transpose(1, 2)
    value.weight.copy_(rotated.reshape(value.weight.shape))
    if value.bias is not None:
        value.bias.copy_(rotation.columns(value.bias.reshape(-1, width)).reshape(-1))
    for name in point.targets:
        output = model.get_parameter(f"{name}.weight")  # [out, heads * width]
        columns = output.reshape(len(output), -1, width)
        output.copy_(rotation.columns(columns).reshape(output.shape))
