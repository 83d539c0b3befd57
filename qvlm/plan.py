"""What a recipe would do to a model: formats per linear, bytes per component, peak memory. Loads no weights.

Names and shapes come from the module tree on the meta device, so a recipe that cannot be applied (a group size that
does not divide, an unknown method or option) is refused before anything long begins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qvlm import embedding, transform
from qvlm.errors import RecipeError
from qvlm.methods import METHODS, TRANSFORMS
from qvlm.models.adapter import Adapter
from qvlm.recipe import COMPONENTS, EMBEDDING, Format, Recipe
from qvlm.source import Source, imports, skeleton
from qvlm.untie import HINT, untied

Formats = dict[str, dict[str, Format]]

_OPTIONS_NOTE = 'Options belong under "options" in the recipe.'


@dataclass(frozen=True)
class ComponentPlan:
    """One component: how many linears become what; parameters of all its linears; bytes as deployed (float: 16 bit)."""

    component: str
    layers: int
    linears: int
    formats: dict[str, int]
    parameters: int
    nbytes: int
    float16_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average over the component's linears, scales included."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Plan:
    """The whole quantization; ``other_bytes``: embeddings, norms, biases, convolutions at 16 bit.

    unmatched: patterns of the recipe that match nothing.
    """

    source: str
    model_type: str
    method: str
    samples: int
    components: tuple[ComponentPlan, ...]
    other_bytes: int
    peak_bytes: int
    unmatched: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Average over every weight of the model, scales included, what stays float at 16."""
        parameters = sum(c.parameters for c in self.components) + self.other_bytes // 2
        return 8 * (sum(c.nbytes for c in self.components) + self.other_bytes) / parameters

    def to_json(self) -> dict[str, Any]:
        """A JSON object with ``bits_per_weight`` of the whole model and in every component."""
        data = {**asdict(self), "bits_per_weight": round(self.bits_per_weight, 4)}
        for row, component in zip(data["components"], self.components, strict=True):
            row["bits_per_weight"] = round(component.bits_per_weight, 4)
        return data


def _other_kind(value: Any, default: Any) -> str | None:
    """What an option with this default wants, if ``value`` is of another kind. A method checks the rest itself."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if whole else "a whole number"
    if isinstance(default, float):
        finite = whole or (isinstance(value, float) and math.isfinite(value))
        return None if finite else "a number"
    return None


def check_method(recipe: Recipe) -> None:
    """RecipeError for an unknown method or transform, an option they do not have, or a value that makes no sense."""
    if recipe.method not in METHODS:
        raise RecipeError(f"method {recipe.method!r} is unknown. Known: {', '.join(METHODS)}.")
    known = dict(METHODS[recipe.method].options)
    for name in transform.chosen(recipe):
        if name not in TRANSFORMS:
            raise RecipeError(f"transform {name!r} is unknown. Known: {', '.join(TRANSFORMS)}.")
        known.update(TRANSFORMS[name].options)
    if unknown := sorted(set(recipe.options) - set(known)):
        names = ", ".join(sorted(known)) or "none"
        raise RecipeError(
            f"method {recipe.method!r}: unknown option {unknown[0]!r}. Known: {names}. {_OPTIONS_NOTE}"
        )
    for name, value in recipe.options.items():
        if (expected := _other_kind(value, known[name])) is not None:
            raise RecipeError(f"option {name}: {value!r}, expected {expected}")
    try:
        METHODS[recipe.method].check(recipe)
    except TypeError as error:
        raise RecipeError(
            f"method {recipe.method!r}: an option's value is of another kind than its default ({error})."
        ) from error


def resolve(
    model: nn.Module, adapter: Adapter, recipe: Recipe, imported: Collection[str] = ()
) -> Formats:
    """component -> full linear name -> format, quantized linears only; RecipeError if one cannot take its format.

    imported: linears that are integers already. No rule is for them, and no transform may change the weights.
    """
    check_method(recipe)
    if imported and (names := transform.chosen(recipe)):
        raise RecipeError(
            f"transforms {', '.join(names)}: change weights that are integers already. Leave them "
            "out, with a method that begins with none, or give the float checkpoint."
        )
    transform.check(model, adapter, recipe)
    formats: Formats = {}
    for component in COMPONENTS:
        chosen = {}
        for name, linear in adapter.linears(model, component).items():
            format_ = recipe.format_of(component, name)
            if format_.weights is not None and name not in imported:
                if format_.name in embedding.TABLE_FORMATS:
                    raise RecipeError(
                        f"{name}: format {format_.name!r} is for token tables. Use w8a8 or w4a16."
                    )
                format_.weights.groups(linear.in_features, name)
                _check_split(component, name, format_)
                chosen[name] = format_
        if chosen:
            formats[component] = chosen
    _check_tied_head(model, adapter, formats)
    if not formats:
        _check_patterns(model, adapter, recipe)
    return formats


def _check_patterns(model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
    """RecipeError if rules ask for integers and none of their patterns matches a thing. A float recipe is fine."""
    asked = [rule for rule in recipe.rules if rule.format.weights is not None]
    unused = set(unmatched(model, adapter, recipe))
    if asked and all(rule.pattern in unused for rule in asked):
        names = [f"{c}.{name}" for c in COMPONENTS for name in adapter.linears(model, c)]
        if any(rule.pattern.startswith(EMBEDDING) for rule in asked):
            names = [f"{EMBEDDING}.{name}" for name in adapter.embeddings] + names
        raise RecipeError(
            f"no linear or embedding matches {', '.join(repr(rule.pattern) for rule in asked)}, so nothing would be "
            f"quantized. Patterns are matched on names like {names[0]!r}."
        )


def unmatched(model: nn.Module, adapter: Adapter, recipe: Recipe) -> tuple[str, ...]:
    """Patterns of rules that match no linear and no embedding of the model: a misspelt name, or another family's."""
    names = {c: list(adapter.linears(model, c)) for c in COMPONENTS}
    names[EMBEDDING] = list(adapter.embeddings)
    return tuple(
        dict.fromkeys(
            rule.pattern
            for rule in recipe.rules
            if not any(rule.matches(c, name) for c, found in names.items() for name in found)
        )
    )


def _check_split(component: str, name: str, format_: Format) -> None:
    if format_.by_modality and component != "text":
        raise RecipeError(
            f"{name}: format {format_.name!r} tells image tokens from text, in component {component!r} all tokens are "
            "of one kind. Use w8a8-static there."
        )


def _check_tied_head(model: nn.Module, adapter: Adapter, formats: Formats) -> None:
    if "head" in formats and adapter.tied(model):
        raise RecipeError(
            f"{adapter.head}: shares its weight with the embedding, which stays float. Keep the head in float, or "
            f"{HINT}."
        )


def linear_bytes(out_features: int, in_features: int, format_: Format | None) -> int:
    """Bytes of one linear's weight as deployed: packed integers, float16 scales, int8 zero points; float at 16 bit."""
    scheme = None if format_ is None else format_.weights
    if scheme is None:
        return 2 * out_features * in_features
    rows = 1 if scheme.granularity == "tensor" else out_features
    scales = rows * scheme.groups(in_features, "plan")
    integers = -(-out_features * in_features * scheme.bits // 8)
    return integers + 2 * scales + (0 if scheme.symmetric else scales)


def plan(source: Source, recipe: Recipe) -> Plan:
    """The plan of quantizing ``source`` by ``recipe``; RecipeError or CheckpointError as the real run would raise."""
    adapter = source.adapter
    model = untied(skeleton(source.directory), adapter, recipe)
    entries = imports(source, model)
    recipe = transform.fitted(recipe, entries)
    own = resolve(model, adapter, recipe, entries)
    formats = {component: dict(own.get(component, {})) for component in COMPONENTS}
    for name, entry in entries.items():
        formats[entry.component][name] = entry.format
    rows, counted = [], 0
    for component in COMPONENTS:
        linears = adapter.linears(model, component)
        sizes = {
            name: linear_bytes(
                linear.out_features, linear.in_features, formats.get(component, {}).get(name)
            )
            for name, linear in linears.items()
        }
        kinds = Counter(
            formats[component][name].name if name in formats.get(component, {}) else "float"
            for name in linears
        )
        parameters = sum(linear.weight.numel() for linear in linears.values())
        counted += parameters
        layers = len(adapter.layer_names(model, component))
        rows.append(
            ComponentPlan(
                component,
                layers,
                len(linears),
                dict(kinds),
                parameters,
                sum(sizes.values()),
                2 * parameters,
            )
        )
    if embedded := embedding.resolve(model, adapter, recipe):
        rows.append(_embedding_plan(model, embedded))
        counted += rows[-1].parameters
    total = sum(parameter.numel() for parameter in model.parameters())
    return Plan(
        source.name,
        source.adapter.model_type,
        recipe.method,
        recipe.samples,
        tuple(rows),
        2 * (total - counted),
        _peak_bytes(model, adapter, recipe, own, total),
        unmatched(model, adapter, recipe),
    )


def _embedding_plan(model: nn.Module, formats: Mapping[str, Format]) -> ComponentPlan:
    """The embeddings that are quantized; float ones belong to ``other_bytes``."""
    shapes = {name: embedding.shape(model.get_submodule(name)) for name in formats}
    parameters = sum(rows * columns for rows, columns in shapes.values())
    nbytes = sum(linear_bytes(*shapes[name], format_) for name, format_ in formats.items())
    kinds = Counter(format_.name for format_ in formats.values())
    return ComponentPlan(
        EMBEDDING, len(formats), len(formats), dict(kinds), parameters, nbytes, 2 * parameters
    )


def _peak_bytes(
    model: nn.Module, adapter: Adapter, recipe: Recipe, formats: Formats, parameters: int
) -> int:
    """The float32 model, plus the float and quantized hidden states entering and leaving a block for every sample.

    A sample is taken as its image tokens and as many again of text; widths are each component's.
    """
    tokens = 2 * adapter.image_tokens(model.config)
    streams = 0
    for linears in formats.values():
        width = max(int(model.get_parameter(f"{name}.weight").shape[1]) for name in linears)
        # The float stream of every component is kept from the start, the block at work holds three more.
        streams += 4 * 4 * recipe.samples * tokens * width
    return 4 * parameters + streams
