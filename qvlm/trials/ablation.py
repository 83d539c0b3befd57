"""What each part of Q-VLM is worth: partitions x visual-encoder step x formats, and D against the
measured DED.

Everything is quantized in memory: no checkpoint, no goldens. Work that cells share is done once:
the method's preparation per (format, visual-encoder step), vision and projector likewise, and a
block's search for all partitions that begin with the same blocks. Each finished row goes to the
results file, so an interrupted run continues.

DED, the discretization error difference of two consecutive layers, is defined in words only in the
paper: output error after the sequential search minus output error after the joint one. It is
measured here on the float stream, that is for the pair alone, and compared with D(k, k+1) and with
the pair's own quantization error, the paper's other proxy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvlm import entropy, fakequant
from qvlm.capture import Sample, capture_stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.methods import METHODS, Context, Method, State
from qvlm.methods.block_search import BlockSearch, dependencies, pair_block, pair_errors
from qvlm.methods.q_vlm import PARTITIONS, resolved
from qvlm.models.adapter import Adapter
from qvlm.recipe import Recipe
from qvlm.trials.job import Job, context_of, propagate, quantized
from qvlm.trials.judge import Judge
from qvlm.trials.results import Results

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass
class Searched:
    """One block's result and the two streams that leave it."""

    linears: dict[str, QuantizedLinear]
    floats: list[Tensor]
    quants: list[Tensor]


class Partitions:
    """The decoder under several partitions; blocks with the same past are searched once."""

    def __init__(self, job: Job, method: Method, state: State) -> None:
        self.job, self.method, self.state = job, method, state
        self.inputs = job.entering("text")
        self.known: dict[tuple[tuple[int, int], ...], Searched] = {}

    def model(self, blocks: Sequence[tuple[int, int]]) -> nn.Module:
        """A copy of the job's model with its decoder (and head) quantized by these blocks."""
        job = self.job.copied()
        floats, quants = job.streams["text"].inputs, self.inputs
        for count, (start, stop) in enumerate(blocks, 1):
            key = tuple(blocks[:count])
            block = job.block("text", start, stop, floats, quants)
            if key not in self.known:
                linears = self.method.quantize_block(block, job.context.recipe, self.state).linears
                after = propagate(block, floats)
                fakequant.apply(job.model, linears)
                self.known[key] = Searched(linears, after, propagate(block, quants))
            else:
                fakequant.apply(job.model, self.known[key].linears)
            floats, quants = self.known[key].floats, self.known[key].quants
        if "head" in job.streams:
            job.run_component("head", self.method, self.state)
        return job.model


def all_partitions(
    state: State, layers: int, options: Mapping[str, Any], seed: int
) -> dict[str, list[tuple[int, int]]]:
    """The blocks of every control from one prepared state (made with ``partition: error``)."""
    depth, h0 = options["depth"], options["h0"]
    cut = entropy.greedy_partition(state["dependency"].tolist(), depth, h0)
    found = {
        "entropy": cut,
        "layer": entropy.fixed_partition(layers, 1),
        "fixed": entropy.fixed_partition(layers, depth),
        "random": entropy.random_partition(cut, seed),
        "error": entropy.greedy_partition(state["pair_error"].tolist(), depth),
    }
    return {kind: [(b[0], b[-1] + 1) for b in found[kind]] for kind in PARTITIONS}


# -- the table


@dataclass(frozen=True)
class Case:
    """A float model, its calibration samples for each draw, the questions' samples, and the results
    file (None: none).
    """

    model: nn.Module
    adapter: Adapter
    draws: list[list[Sample]]
    judge: Judge
    results: Path | None
    identity: Json
    progress: Callable[[str], None]


def ablate(case: Case, recipes: Mapping[str, Recipe]) -> list[Json]:
    """A row per format x draw x (float, rtn, visual-encoder step x partition) and per format the
    DED measurement.
    """
    results = Results(case.results, case.identity)
    if results.find({"kind": "float"}) is None:
        results.add({"kind": "float", **case.judge.measure(case.model)})
    for name, recipe in recipes.items():
        for draw, samples in enumerate(case.draws):
            _rtn_row(case, results, name, recipe, draw, samples)
            for step in (False, True):
                _partition_rows(case, results, name, recipe, (draw, samples), step)
        key = {"kind": "ded", "format": name}
        if results.find(key) is None:
            context = _context(case, recipe, case.draws[0], {})
            results.add({**key, **measure_ded(context)})
            case.progress(f"{name}: DED measured")
    return results.rows


def _context(
    case: Case, recipe: Recipe, samples: list[Sample], options: Mapping[str, Any]
) -> Context:
    recipe = replace(recipe, method="q-vlm").with_options(**options)
    return context_of(case.model, case.adapter, samples, recipe)


def _rtn_row(
    case: Case, results: Results, name: str, recipe: Recipe, draw: int, samples: list[Sample]
) -> None:
    key = {"kind": "rtn", "format": name, "draw": draw}
    if results.find(key) is not None:
        return
    started = time.perf_counter()
    recipe = replace(recipe, method="rtn", options={})
    job = quantized(context_of(case.model, case.adapter, samples, recipe))
    seconds = time.perf_counter() - started
    results.add({**key, "seconds": seconds, **case.judge.measure(job.model)})
    case.progress(f"{name} draw {draw}: rtn kl {results.rows[-1]['kl']:.5f}")


def _partition_rows(
    case: Case,
    results: Results,
    name: str,
    recipe: Recipe,
    draw: tuple[int, list[Sample]],
    step: bool,
) -> None:
    number, samples = draw
    base = {"kind": "q-vlm", "format": name, "draw": number, "visual_encoder": step}
    if all(results.find({**base, "partition": kind}) for kind in PARTITIONS):
        return
    context = _context(case, recipe, samples, {"visual_encoder": step, "partition": "error"})
    method = METHODS["q-vlm"]
    job = Job.begin(context)
    state = method.prepare(job.context)
    for component in ("vision", "projector"):
        if component in context.formats:
            job.run_component(component, method, state)
    options = resolved(context.recipe)
    cuts = all_partitions(state, len(job.streams["text"].layers), options, context.recipe.seed)
    search = Partitions(job, method, state)
    for kind, blocks in cuts.items():
        if results.find({**base, "partition": kind}) is not None:
            continue
        started = time.perf_counter()
        model = search.model(blocks)
        row = {**base, "partition": kind, "blocks": [stop - start for start, stop in blocks]}
        row["seconds"] = time.perf_counter() - started
        results.add({**row, **case.judge.measure(model)})
        with_step = "with" if step else "without"
        case.progress(
            f"{name} draw {number} {with_step} visual encoder, {kind}: "
            f"kl {results.rows[-1]['kl']:.5f}"
        )


# -- DED


def measure_ded(context: Context) -> Json:
    """DED and D of every pair of consecutive decoder layers, and their correlations.

    ded: sequential minus joint output error; ded_relative: divided by the sequential one.
    Correlations are Pearson's and Spearman's, None where one side is constant or there are fewer
    than three pairs.
    """
    options = resolved(context.recipe)
    stream = capture_stream(context.model, context.adapter, "text", context.samples)
    bits = [
        (f.activations or f.weights).bits  # type: ignore[union-attr]
        for f in context.formats["text"].values()
    ]
    chosen = options["dependency_bits"] or bits[-1]
    dependency, _ = dependencies(stream, chosen, options["delta_exponent"])
    errors = pair_errors(context, stream, options)
    rows: list[Json] = []
    hidden: list[Tensor] = stream.inputs
    for k in range(len(stream.layers) - 1):
        search = BlockSearch(pair_block(context, stream, k, k + 2, hidden), options)
        joint, sequential = search.joint(), search.layerwise()
        ded = sequential.error - joint.error
        rows.append(
            {
                "layer": k,
                "dependency": dependency[k],
                "pair_error": errors[k],
                "sequential": sequential.error,
                "joint": joint.error,
                "ded": ded,
                "ded_relative": ded / sequential.error if sequential.error else 0.0,
            }
        )
        with torch.no_grad():
            hidden = [stream.forward(k, h, i) for i, h in enumerate(hidden)]
    correlations = {
        f"{proxy} ~ {measure}": correlation([r[proxy] for r in rows], [r[measure] for r in rows])
        for proxy in ("dependency", "pair_error")
        for measure in ("ded", "ded_relative")
    }
    return {"pairs": rows, "correlations": correlations}


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Pearson's and Spearman's coefficient (ties share their mean rank)."""
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y))}


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(np.array(x), np.array(y))[0, 1])


def _ranks(x: Sequence[float]) -> list[float]:
    values = np.array(x)
    return [float((values < v).sum() + ((values == v).sum() - 1) / 2) for v in values]
