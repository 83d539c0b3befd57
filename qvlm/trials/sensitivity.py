"""How much each layer and each component costs in each format, one at a time: divergence of the answers.

The calibration samples are split: every fourth is held out to measure, the others calibrate. Evaluation questions are
never looked at. Everything happens in memory, from one pass of the float model over the samples:

1. Streams: what enters every layer of every component in the float model.
2. For each layer and format: the method quantizes that layer alone (its two streams are both the float one), the judge
   measures KL(float || quantized) on the held-out answers, and the layer is float again.
3. For each component and format: all of its layers, one after the other as a real run would.
4. Embeddings (``embedding``) likewise, each on its own.

A format that a layer cannot have is left out: a group size that does not divide, fewer INT4 blocks along K than the
target needs (rule W-05), an odd number of outputs (rule W-01). "float" is always there, at no divergence.
Each finished row goes to the results file; an interrupted run continues.

Cost: (layers + components) x formats quantizations of one layer and passes over the held-out samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qvlm import embedding, fakequant
from qvlm.capture import Sample
from qvlm.errors import CalibrationError
from qvlm.methods import METHODS, Block, Context, State
from qvlm.models.adapter import Adapter
from qvlm.plan import Formats, linear_bytes
from qvlm.recipe import COMPONENTS, EMBEDDING, Format, Recipe, named_format
from qvlm.trials.job import Job, propagate, quantized
from qvlm.trials.judge import Judge
from qvlm.trials.results import Results

Json = dict[str, Any]

HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Unit:
    """What gets one format: a layer, a one-layer component or an embedding.

    shapes: [out, in] of each weight by full name. formats: those every weight in it can have, float not among them.
    """

    component: str
    name: str
    shapes: Mapping[str, tuple[int, int]]
    formats: tuple[str, ...]

    @property
    def key(self) -> str:
        """``component.module_name``, as recipes match it."""
        return f"{self.component}.{self.name}"

    @property
    def parameters(self) -> int:
        """Weights in it."""
        return sum(out * columns for out, columns in self.shapes.values())

    def nbytes(self, format_name: str) -> int:
        """Bytes as deployed, scales included."""
        format_ = named_format(format_name)
        return sum(linear_bytes(*shape, format_) for shape in self.shapes.values())


@dataclass(frozen=True)
class Case:
    """A float model with samples, and what to try. min_blocks: least INT4 blocks along K (the target's)."""

    model: nn.Module
    adapter: Adapter
    samples: Sequence[Sample]
    recipe: Recipe  # method, options, seed; its rules are not looked at
    formats: tuple[str, ...]
    min_blocks: int

    def split(self) -> tuple[list[Sample], list[Sample]]:
        """Samples that calibrate, samples that measure; CalibrationError if there are too few for both."""
        held = list(self.samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        fit = [s for i, s in enumerate(self.samples) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        if not held:
            raise CalibrationError(
                f"{len(self.samples)} samples, expected at least {HELD_OUT_EVERY}: "
                "every fourth is held out to measure"
            )
        return fit, held


def units(
    model: nn.Module, adapter: Adapter, formats: Sequence[str], min_blocks: int
) -> list[Unit]:
    """Every unit of a model (weights may be on the meta device) with the formats it can have."""
    found = []
    for component in COMPONENTS:
        linears = adapter.linears(model, component)
        if component == "head" and adapter.tied(model):
            continue
        for layer in adapter.layer_names(model, component):
            shapes = {
                name: (linear.out_features, linear.in_features)
                for name, linear in linears.items()
                if name == layer or name.startswith(layer + ".")
            }
            if shapes:
                possible = [
                    f for f in formats if component == "text" or not named_format(f).by_modality
                ]
                fits = _fitting(shapes, possible, min_blocks)
                found.append(Unit(component, layer, shapes, fits))
    for name, module in embedding.modules(model, adapter).items():
        shapes = {name: embedding.shape(module)}
        known = embedding.candidates(module)
        found.append(Unit(EMBEDDING, name, shapes, _fitting(shapes, known, min_blocks)))
    return found


def _fitting(
    shapes: Mapping[str, tuple[int, int]], formats: Sequence[str], min_blocks: int
) -> tuple[str, ...]:
    def fits(format_: Format, out: int, columns: int) -> bool:
        scheme = format_.weights
        assert scheme is not None
        size = scheme.group_size
        if size is None:
            return True
        whole = columns % size == 0 and columns // size >= min_blocks
        return whole and (scheme.bits != 4 or out % 2 == 0)

    return tuple(
        name
        for name in formats
        if all(fits(named_format(name), *shape) for shape in shapes.values())
    )


@contextmanager
def _restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While open the named modules may be replaced; afterwards the model is as before."""
    kept = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in kept.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


class _Measurement:
    """The rows of one case, made in the order of the module docstring."""

    def __init__(self, case: Case, results: Results, say: Callable[[str], None]) -> None:
        self.case, self.results, self.say = case, results, say
        fit, held = case.split()
        self.units = units(case.model, case.adapter, case.formats, case.min_blocks)
        self.judge = Judge(case.model, held)
        self.fit = fit
        # No rule reaches the embeddings: they are measured one at a time as well.
        recipe = replace(case.recipe, rules=())
        every = Context(case.model, case.adapter, list(fit), recipe, self._formats(None))
        self.job = Job.begin(every)
        self.states: dict[str, State] = {}

    def _context(self, formats: Formats) -> Context:
        """The job's, whose model has the recipe's transforms, with these formats."""
        return replace(self.job.context, formats=formats)

    def _formats(self, chosen: str | None) -> Formats:
        """Component -> linear -> ``chosen`` where it fits (None: any format that fits)."""
        formats: Formats = {}
        for unit in self.units:
            if unit.component == EMBEDDING or not unit.formats:
                continue
            if chosen is None or chosen in unit.formats:
                format_ = named_format(chosen or unit.formats[0])
                formats.setdefault(unit.component, {}).update(dict.fromkeys(unit.shapes, format_))
        return formats

    def state(self, format_name: str) -> State:
        """What the method prepares when everything is to have this format."""
        if format_name not in self.states:
            context = self._context(self._formats(format_name))
            self.states[format_name] = METHODS[self.case.recipe.method].prepare(context)
        return self.states[format_name]

    def _row(self, key: Json, nbytes: int, parameters: int, seconds: float) -> None:
        measured = self.judge.measure(self.job.model)
        self.results.add(
            {**key, **measured, "bytes": nbytes, "parameters": parameters, "seconds": seconds}
        )
        self.say(
            f"{key['kind']} {key['component']} {key['name']} {key['format']}: KL {measured['kl']:.3e}"
        )

    def layers(self, component: str) -> None:
        """A row per layer and format, the float stream walking along."""
        mine = {u.name: u for u in self.units if u.component == component}
        stream = self.job.streams[component]
        method, hidden = METHODS[self.case.recipe.method], stream.inputs
        for index, name in enumerate(stream.names):
            hidden = stream.entering(index, hidden)
            for format_name in mine[name].formats if name in mine else ():
                key = _key("layer", component, name, format_name)
                if self.results.find(key) is not None:
                    continue
                unit = mine[name]
                self.job.context = self._context(self._formats(format_name))
                state, started = self.state(format_name), time.perf_counter()
                block = self.job.block(component, index, index + 1, hidden, hidden)
                linears = method.quantize_block(block, self.case.recipe, state).linears
                seconds = time.perf_counter() - started
                with _restored(self.job.model, list(linears)):
                    fakequant.apply(self.job.model, linears)
                    self._row(key, unit.nbytes(format_name), unit.parameters, seconds)
            block = Block(stream, index, index + 1, {}, {}, hidden, hidden)
            hidden = propagate(block, hidden)

    def component(self, component: str, format_name: str) -> None:
        """A row for all layers of a component that can have the format."""
        mine = [u for u in self.units if u.component == component and format_name in u.formats]
        key = _key("component", component, component, format_name)
        if not mine or self.results.find(key) is not None:
            return
        self.job.context = self._context(self._formats(format_name))
        state, started = self.state(format_name), time.perf_counter()
        with _restored(self.job.model, [name for unit in mine for name in unit.shapes]):
            self.job.run_component(component, METHODS[self.case.recipe.method], state)
            seconds = time.perf_counter() - started
            nbytes = sum(unit.nbytes(format_name) for unit in mine)
            self._row(key, nbytes, sum(unit.parameters for unit in mine), seconds)

    def embeddings(self) -> None:
        """A row per embedding and format."""
        for unit in self.units:
            for format_name in unit.formats if unit.component == EMBEDDING else ():
                key = _key("layer", EMBEDDING, unit.name, format_name)
                if self.results.find(key) is not None:
                    continue
                started = time.perf_counter()
                chosen = {unit.name: named_format(format_name)}
                found = embedding.quantize(self.job.context.model, chosen, self.fit)
                seconds = time.perf_counter() - started
                kept = self.job.model.get_parameter(f"{unit.name}.weight").detach().clone()
                embedding.apply(self.job.model, found)
                self._row(key, unit.nbytes(format_name), unit.parameters, seconds)
                self.job.model.get_parameter(f"{unit.name}.weight").copy_(kept)


def _key(kind: str, component: str, name: str, format_name: str) -> Json:
    return {"kind": kind, "component": component, "name": name, "format": format_name}


def measure(case: Case, results: Results, say: Callable[[str], None]) -> list[Json]:
    """Rows {kind: layer or component, component, name, format, kl, exact_match, bytes, parameters, seconds}.

    ``say`` gets a line per new row. Raises CalibrationError for fewer than four samples or samples without answers.
    """
    run = _Measurement(case, results, say)
    for component in run.job.streams:
        run.layers(component)
        for format_name in case.formats:
            run.component(component, format_name)
    run.embeddings()
    return results.rows


def measure_recipe(case: Case, recipe: Recipe, formats: Formats) -> dict[str, float]:
    """KL and exact match of a whole recipe on the held-out samples, calibrated on the others."""
    fit, held = case.split()
    context = Context(case.model, case.adapter, fit, recipe, formats)
    return Judge(case.model, held).measure(quantized(context).model)
