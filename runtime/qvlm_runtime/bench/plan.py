"""What to measure: a matrix from a JSON or YAML file, flags, or both; a flag replaces the file's value.

    {"prompt_tokens": [64, 512], "images": [0, 1], "output_tokens": [32], "threads": [2, 4],
     "contexts": [128, 1024], "image_size": [640, 480], "rounds": 6, "max_rounds": 20,
     "spread": 0.05, "warmup": 1, "steps": 16, "energy_seconds": 2.0}

Every key is optional. A file that ends in .yaml or .yml is YAML, which needs the extra `yaml`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_runtime.bench.figure import ENOUGH
from qvlm_runtime.errors import PromptError

_CONTEXTS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """One cell of the matrix.

    prompt_tokens: text tokens, the chat template's included; an image's tokens come on top.
    """

    prompt_tokens: int
    images: int
    output_tokens: int


@dataclass(frozen=True)
class Plan:
    """The matrix and how often.

    threads: 0 leaves the number to the engine. contexts: cached tokens at which decode is timed;
    empty means the powers of two from 128 to 2,048 that the model has room for. image_size: width,
    height of the frames. rounds: at least so many; more, up to max_rounds, until every figure's
    half-interval is within ``spread`` of its median. steps: decode steps timed per context and
    round. energy_seconds: how long a part is repeated for its energy.
    """

    prompt_tokens: tuple[int, ...] = (64,)
    images: tuple[int, ...] = (1,)
    output_tokens: tuple[int, ...] = (32,)
    threads: tuple[int, ...] = (0,)
    contexts: tuple[int, ...] = ()
    image_size: tuple[int, int] = (640, 480)
    rounds: int = ENOUGH
    max_rounds: int = 20
    spread: float = 0.05
    warmup: int = 1
    steps: int = 16
    energy_seconds: float = 2.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    raise PromptError(f"plan: {name} is {value!r}, expected numbers.")
                if number < least or (name not in _REALS and not isinstance(number, int)):
                    kind = "numbers" if name in _REALS else "integers"
                    raise PromptError(f"plan: {name} is {value!r}, expected {kind} from {least}.")
        for name in ("prompt_tokens", "images", "output_tokens", "threads"):
            if not getattr(self, name):
                raise PromptError(f"plan: {name} is empty, expected at least one value.")
        if len(self.image_size) != 2:
            raise PromptError(f"plan: image_size is {self.image_size!r}, expected [width, height].")
        if self.max_rounds < self.rounds:
            raise PromptError(
                f"plan: max_rounds {self.max_rounds} is less than rounds {self.rounds}."
            )

    def cases(self) -> Iterator[Case]:
        """The cells, prompt by prompt."""
        for cell in itertools.product(self.prompt_tokens, self.images, self.output_tokens):
            yield Case(*cell)

    def fitting_contexts(self, max_rows: int) -> tuple[int, ...]:
        """The contexts to time on a model of ``max_rows`` cache rows.

        PromptError if one that was asked for has no room for its steps.
        """
        wanted = self.contexts or tuple(c for c in _CONTEXTS if c + self.steps <= max_rows)
        for context in wanted:
            if context + self.steps > max_rows:
                raise PromptError(
                    f"context {context} and {self.steps} decode steps exceed the cache of "
                    f"{max_rows} rows. Give a smaller --context or --steps."
                )
        return tuple(sorted(set(wanted))) or (max(1, max_rows // 2),)


# The least value of each field; those of _REALS need not be integers.
_LEAST = {
    "prompt_tokens": 1,
    "images": 0,
    "output_tokens": 1,
    "threads": 0,
    "contexts": 1,
    "image_size": 1,
    "rounds": 1,
    "max_rounds": 1,
    "spread": 0,
    "warmup": 0,
    "steps": 1,
    "energy_seconds": 0,
}
_REALS = ("spread", "energy_seconds")
_YAML = (".yaml", ".yml")


def read_plan(path: Path | None, flags: Mapping[str, Any]) -> Plan:
    """The plan of a file (None: the defaults) with the flags that are not None in their place.

    PromptError if the file is not readable, neither JSON nor YAML, or has a key that is not a plan's.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            values = _yaml(path, text) if path.suffix in _YAML else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            kind = "YAML" if path.suffix in _YAML else "JSON"
            raise PromptError(f"{path}: not a plan in {kind} ({error}).") from error
        if not isinstance(values, dict):
            raise PromptError(f"{path}: {type(values).__name__}, expected an object.")
    names = {f.name for f in dataclasses.fields(Plan)}
    if unknown := sorted(map(str, set(values) - names)):
        raise PromptError(
            f"{path}: unknown key {unknown[0]!r}, expected {', '.join(sorted(names))}."
        )
    values |= {name: value for name, value in flags.items() if value is not None}
    lists = {name for name in names if isinstance(getattr(Plan, name), tuple)}
    for name, value in values.items():
        if (name in lists) != isinstance(value, (list, tuple)):
            raise PromptError(
                f"plan: {name} is {value!r}, expected {'a list' if name in lists else 'a number'}."
            )
    chosen: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in values.items()}
    return Plan(**chosen)


def _yaml(path: Path, text: str) -> Any:
    """The file's one document; ValueError in one line if it is none."""
    try:
        import yaml
    except ImportError as error:
        raise PromptError(
            f"{path}: PyYAML is not installed, which reads YAML ({error}). "
            "pip install 'qvlm[yaml]', or give the plan as JSON."
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
