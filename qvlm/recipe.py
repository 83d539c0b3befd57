"""What to quantize and how: frozen values, JSON both ways, no torch.

A recipe is an ordered list of rules over linear names; the first rule that matches wins, and a linear that no
rule matches stays float. Formats have names (``w4a16`` ...) so that a recipe file stays short. A recipe file:

    {"schema": 1, "method": "q-vlm", "samples": 64, "seed": 0, "options": {"depth": 3}, "transforms": ["rotate"],
     "untie": true, "rules": [{"pattern": "text.*", "format": "w4a16"}, {"pattern": "vision.*", "format": "w8a8"}]}

Patterns are matched (fnmatch) on ``component.module_name``, component one of vision, projector, text, head:
``text.model.language_model.layers.0.mlp.up_proj``. A fifth component, embedding, holds the token table (format w8a16)
and the patch projection (w4a16, w4a16-g64); only patterns that begin with "embedding" reach it, so that ``*`` means
the linears.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from qvlm.errors import RecipeError

SCHEMA = 1
# What methods walk, in the order they walk it; then what is rounded once, before them (``embedding``).
COMPONENTS = ("vision", "projector", "text", "head")
EMBEDDING = "embedding"

Granularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["tensor", "token", "channel", "modality"]


@dataclass(frozen=True)
class WeightScheme:
    """Integer format of a weight [out, in].

    granularity "tensor": one scale; "channel": one per output row; "group": one per row and ``group_size``
    consecutive input columns. Symmetric integers are signed, in [-2^(bits-1), 2^(bits-1)-1]; ``symmetric=False``
    adds an integer zero point per scale (simulation only: no TensorRT release takes one, rule Q-01).
    ``signed_scales``: a scale may be negative, which puts the grid's longer side on the positive weights (simulation
    only, rule Q-04); a method that searches scales may use it, as ``fused`` does.
    """

    bits: int
    granularity: Granularity = "group"
    group_size: int | None = 128
    symmetric: bool = True
    signed_scales: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"weight scheme: bits {self.bits}, expected 2 to 8")
        if (self.granularity == "group") != (self.group_size is not None):
            raise RecipeError(
                f"weight scheme: granularity {self.granularity!r} with group_size {self.group_size}; "
                "give a group_size with granularity 'group' and none otherwise"
            )
        if self.signed_scales and not self.symmetric:
            raise RecipeError(
                "weight scheme: signed scales with a zero point, expected one of them"
            )
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(
                f"weight scheme: group_size {self.group_size}, expected a positive integer"
            )

    def groups(self, in_features: int, where: str) -> int:
        """Scales per output row; RecipeError naming ``where`` if the group size does not divide."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (256, 128, 64, 32, 16) if in_features % g == 0]
            hint = f"Use group_size {fits[0]}, or keep" if fits else "Keep"
            raise RecipeError(
                f"{where}: group_size {self.group_size} does not divide in_features {in_features}. "
                f"{hint} this layer in float."
            )
        return in_features // self.group_size


@dataclass(frozen=True)
class ActivationScheme:
    """Integer format of a linear's input [tokens, in].

    "token" is dynamic: the token-normalised INT8 form, scale = max|x| of the token / qmax, symmetric.
    "tensor", "modality" and "channel" are static, fixed by calibration: one scale, one for text and one for image
    tokens (symmetric; decoder only, elsewhere all tokens are of one kind), one per input channel. "channel" is
    simulation only, as no integer GEMM can factor a scale out of its contraction index.
    """

    bits: int
    granularity: ActivationGranularity = "token"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"activation scheme: bits {self.bits}, expected 2 to 8")
        if self.granularity in ("token", "modality") and not self.symmetric:
            raise RecipeError(
                f"activation scheme: granularity {self.granularity!r} is symmetric only"
            )

    @property
    def static(self) -> bool:
        """True if the scale comes from calibration."""
        return self.granularity != "token"


@dataclass(frozen=True)
class Format:
    """A named pair of schemes. ``deployable`` is False where no engine runs it: simulated in torch only."""

    name: str
    weights: WeightScheme | None
    activations: ActivationScheme | None = None
    deployable: bool = True

    @property
    def by_modality(self) -> bool:
        """Does it tell image tokens from text? Only the decoder has both."""
        return self.activations is not None and self.activations.granularity == "modality"


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float", None),
        Format("w4a16", WeightScheme(4, "group", 128)),
        Format("w4a16-g64", WeightScheme(4, "group", 64)),
        Format("w4a16-g32", WeightScheme(4, "group", 32)),
        Format("w8a8", WeightScheme(8, "channel", None), ActivationScheme(8, "token")),
        Format("w8a8-static", WeightScheme(8, "channel", None), ActivationScheme(8, "tensor")),
        Format("w8a8-split", WeightScheme(8, "channel", None), ActivationScheme(8, "modality")),
        # Rows of a token table: looked up, never multiplied, so only the row's own scale is needed.
        Format("w8a16", WeightScheme(8, "channel", None)),
        Format("w2a16", WeightScheme(2, "group", 128, signed_scales=True), deployable=False),
        Format("w3a16", WeightScheme(3, "group", 128, signed_scales=True), deployable=False),
        Format(
            "w4a4",
            WeightScheme(4, "group", 128),
            ActivationScheme(4, "channel", symmetric=False),
            deployable=False,
        ),
        Format(
            "w6a6",
            WeightScheme(6, "group", 128),
            ActivationScheme(6, "channel", symmetric=False),
            deployable=False,
        ),
    )
}


def named_format(name: str) -> Format:
    """The format of that name; RecipeError listing the names otherwise."""
    if name not in FORMATS:
        raise RecipeError(f"format {name!r} is unknown. Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class LayerRule:
    """Linears whose ``component.module_name`` matches ``pattern`` get ``format``."""

    pattern: str
    format: Format

    def matches(self, component: str, name: str) -> bool:
        """Is this rule for module ``name`` of ``component``?"""
        # "*" means the linears: an embedding has to be named.
        named = component != EMBEDDING or self.pattern.startswith(EMBEDDING)
        return named and fnmatchcase(f"{component}.{name}", self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules, method and calibration of one quantization; first matching rule wins, no match means float."""

    rules: tuple[LayerRule, ...]
    method: str = "rtn"
    samples: int = 64
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    # Equivalent changes of the float model before the method, in order (``qvlm.transform``).
    transforms: tuple[str, ...] = ()
    # A head that shares the token table's weight gets a copy of its own first (``qvlm.untie``).
    untie: bool = False

    def format_of(self, component: str, name: str) -> Format:
        """The format of linear ``name`` in ``component``."""
        found = (rule.format for rule in self.rules if rule.matches(component, name))
        return next(found, FORMATS["float"])

    @property
    def deployable(self) -> bool:
        """True if every format in it has an engine that runs it."""
        return all(rule.format.deployable for rule in self.rules)

    def with_options(self, **options: Any) -> Recipe:
        """The same recipe with some method options replaced."""
        return replace(self, options={**self.options, **options})

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``from_json`` reads it back to an equal recipe."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "samples": self.samples,
            "seed": self.seed,
            "options": dict(self.options),
            **({"transforms": list(self.transforms)} if self.transforms else {}),
            **({"untie": True} if self.untie else {}),
            "rules": [{"pattern": r.pattern, "format": r.format.name} for r in self.rules],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Read ``to_json``'s object; RecipeError on an unknown schema, key or format."""
        known = {"schema", "method", "samples", "seed", "options", "transforms", "untie", "rules"}
        if unknown := sorted(set(data) - known):
            raise RecipeError(
                f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}."
            )
        if data.get("schema") != SCHEMA:
            raise RecipeError(f"{where}: schema {data.get('schema')!r}, expected {SCHEMA}")
        try:
            rules = tuple(_rule(r, where) for r in data["rules"])
        except (KeyError, TypeError) as error:
            raise RecipeError(
                f"{where}: rules must be a list of {{pattern, format}} ({type(error).__name__}: {error})"
            ) from error
        transforms = data.get("transforms", [])
        if not isinstance(transforms, list) or not all(isinstance(t, str) for t in transforms):
            raise RecipeError(f"{where}: transforms {transforms!r}, expected a list of names")
        if not isinstance(untie := data.get("untie", False), bool):
            raise RecipeError(f"{where}: untie {untie!r}, expected true or false")
        numbers = {"samples": data.get("samples", 64), "seed": data.get("seed", 0)}
        for key, least in (("samples", 1), ("seed", 0)):
            if type(numbers[key]) is not int or numbers[key] < least:
                raise RecipeError(
                    f"{where}: {key} {numbers[key]!r}, expected a whole number, {least} or more"
                )
        if not isinstance(options := data.get("options", {}), dict):
            raise RecipeError(
                f"{where}: options {options!r}, expected an object of names and values"
            )
        method = str(data.get("method", "rtn"))
        return Recipe(
            rules, method, numbers["samples"], numbers["seed"], options, tuple(transforms), untie
        )


def _rule(data: Mapping[str, Any], where: str) -> LayerRule:
    if unknown := sorted(set(data) - {"pattern", "format"}):
        raise RecipeError(f"{where}: unknown key {unknown[0]!r} in a rule. Known: pattern, format.")
    if not isinstance(data["pattern"], str):
        raise RecipeError(f"{where}: pattern {data['pattern']!r}, expected text")
    return LayerRule(data["pattern"], named_format(data["format"]))


def component_recipe(
    text: str, vision: str, projector: str, head: str = "float", **kwargs: Any
) -> Recipe:
    """A recipe with one named format per component."""
    formats = {"text": text, "vision": vision, "projector": projector, "head": head}
    rules = tuple(LayerRule(f"{c}.*", named_format(f)) for c, f in formats.items())
    return Recipe(rules, **kwargs)


# Name -> recipe without method. Vision and projector stay at INT8, which a product of integers takes on every target.
RECIPES: dict[str, Recipe] = {
    "float": component_recipe("float", "float", "float"),
    "w4a16": component_recipe("w4a16", "w8a8", "w8a8"),
    "w4a16-g64": component_recipe("w4a16-g64", "w8a8", "w8a8"),
    "w8a8": component_recipe("w8a8", "w8a8", "w8a8"),
    "w8a8-static": component_recipe("w8a8-static", "w8a8-static", "w8a8-static"),
    "w8a8-split": component_recipe("w8a8-split", "w8a8-static", "w8a8-static"),
    "w4a4": component_recipe("w4a4", "w4a4", "w4a4"),
    "w6a6": component_recipe("w6a6", "w6a6", "w6a6"),
}


def load_recipe(name_or_file: str) -> Recipe:
    """A named recipe, or one read from a JSON file."""
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(
            f"recipe {name_or_file!r}: neither a known name ({', '.join(RECIPES)}) nor a file"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a {type(data).__name__}, expected a JSON object")
    return Recipe.from_json(data, str(path))
