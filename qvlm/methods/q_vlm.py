"""Q-VLM: rounding functions searched jointly over blocks of layers that depend on each other.

Paper: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models", NeurIPS
2024, arXiv 2410.08119v3.

Objective (Eq. 3), for each block of consecutive decoder layers, Q_k the rounding function of layer
k:

    min over {Q_k, k in block} of  | f_block^Q(X_q) - f_block(X_r) |^2

X_q is the quantized stream (everything before the block already quantized), X_r the float stream.
Searching layer by layer (Eq. 2, GPTQ-like greed) ignores that a layer can make up for the error of
the one before it; searching over all layers is exponential. Q-VLM searches jointly only where
consecutive layers depend on each other, and measures that by the conditional entropy of their
activations.

1. Initial ranges of every linear by an l_p distance (``qvlm.ranges``).
2. Visual-encoder optimisation, Eq. 8-10: gradient steps on the vision tower's clip ranges
   (``qvlm.visual_encoder``). It comes first because it lowers the entropies that step 3 reads.
3. Dependency D(k, k+1) of consecutive decoder layers (Eq. 4-5) and the partition by Eq. 7
   (``qvlm.entropy``).
4. For each block in order: all tuples of candidates, one candidate per layer, with shared prefixes
   (``qvlm.rounding``).

Gaps in the paper and our reading (those of a step are in its module's docstring):

* Layer = decoder layer, one candidate shared by its (seven) linears; the paper's "15th layer" and
  depth 3 only make sense that way, and 5 candidates for 21 linears cannot be enumerated.
* A candidate is a percentile p of the float tensor, {1.0, 0.995, 0.99, 0.985, 0.98}: the range of a
  static activation. Within a weight group of 128 a percentile has no meaning (1 % is one weight).
  So for a weight p is the least share of its range that a group keeps, ``clip_ratios``: each group
  has its initial range of step 1, but no less than p of the full one. p = 1 is round to nearest.
  (With ``init: minmax`` every group keeps exactly p.)
* ``search`` says what p moves: "weights" (the only choice where activations are float or scaled per
  token), "activations" (the paper's, whose weights are fixed as NF4), or "both", which pairs the two
  grids by position, as 25 candidates a layer would make 15,625 tuples a block. "auto" is "both"
  where activations are static and "weights" elsewhere.
* The search is exhaustive over the block; a tie takes the wider range.
* D uses 2^b rounding points, b the activations' bits or, if those are float, the weights' bits.
* The paper searches the language model and optimises the visual encoder. So vision linears keep the
  ranges of steps 1 and 2; projector and head (which the paper does not mention) are searched as
  blocks of one layer.
* The paper gives 10 epochs to "quantization function parameters"; the default here is 5
  (``veo_epochs``), and the search uses the first 32 samples (``search_samples``), so that a small
  model takes a minute on two CPU cores.

What we do differently: ``granularity: linear`` lets, after the joint search, each linear of the
block take another weight factor whenever that lowers the block's error (coordinate descent, one
pass). "layer" is the paper's.

Controls: ``partition`` "layer" (depth 1), "fixed" (``depth`` layers each), "random" (the entropy
partition's block sizes in random order), "error" (Eq. 7 on the pair's own output error instead of
D). ``qvlm ablate`` runs them all.

Cost: layer runs per block of d layers with c candidates: c + c^2 + ... + c^d (155 for 5 and 3),
each over ``search_samples`` samples; the visual-encoder step adds epochs x samples forward and
backward passes of the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvlm import entropy, visual_encoder, visual_objective
from qvlm.affine import ActivationRange
from qvlm.capture import Sample, Stream, capture_stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import RecipeError
from qvlm.fakequant import substituted
from qvlm.methods.block_search import BlockSearch, dependencies, pair_errors
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.ranges import INITS, Rounding, initial_inputs, initial_weight, observe, quantize, simulate
from qvlm.recipe import Recipe

log = logging.getLogger(__name__)

PARTITIONS = ("entropy", "layer", "fixed", "random", "error")

OPTIONS: Mapping[str, Any] = {
    "partition": "entropy",
    "depth": 3,
    "h0": None,  # threshold of Eq. 7; None: mean of the scores
    "dependency_bits": None,  # rounding points 2^b of Eq. 5; None: from the format
    "delta_exponent": 2,  # 2: Delta^2 in Eq. 5; 1: Delta, as printed
    "init": "output",  # initial ranges: output, lp, lp-plain or minmax (qvlm.ranges)
    "init_norm": 2.0,
    "search": "auto",
    "percentiles": [1.0, 0.995, 0.99, 0.985, 0.98],
    "clip_ratios": [1.0, 0.85, 0.7, 0.55, 0.4],
    "granularity": "layer",
    "search_samples": 32,  # 0: all
    "visual_encoder": True,
    "veo_epochs": 5,
    "veo_batch": 8,
    "veo_rate": 2e-3,
    "veo_entropy": 0.01,  # lambda1
    "veo_error": 1.0,  # lambda2
    "veo_eta": 1.0,
}
_LEAST = {
    "depth": 1,
    "search_samples": 0,
    "veo_epochs": 0,
    "veo_batch": 1,
    "veo_entropy": 0,
    "veo_error": 0,
    "veo_eta": 0,
}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """All options with the recipe's own values; RecipeError on a value that makes no sense."""
    options = {**OPTIONS, **recipe.options}
    choices = {
        "partition": PARTITIONS,
        "search": ("auto", "weights", "activations", "both"),
        "granularity": ("layer", "linear"),
        "init": INITS,
        "delta_exponent": (1, 2),
    }
    for name, known in choices.items():
        if options[name] not in known:
            raise RecipeError(
                f"q-vlm option {name}: {options[name]!r}, expected one of "
                f"{', '.join(str(k) for k in known)}"
            )
    for name in ("percentiles", "clip_ratios"):
        grid = options[name]
        if not grid or any(not 0.0 < p <= 2.0 for p in grid):
            raise RecipeError(f"q-vlm option {name}: {grid!r}, expected numbers in (0, 2]")
    _check_numbers(options)
    return options


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name, least in _LEAST.items():
        if options[name] < least:
            raise RecipeError(f"q-vlm option {name}: {options[name]!r}, expected at least {least}")
    for name in ("init_norm", "veo_rate"):
        if not options[name] > 0:
            raise RecipeError(f"q-vlm option {name}: {options[name]!r}, expected a positive number")
    h0, bits = options["h0"], options["dependency_bits"]
    if h0 is not None and not (isinstance(h0, int | float) and math.isfinite(h0)):
        raise RecipeError(f"q-vlm option h0: {h0!r}, expected a number or null")
    if bits is not None and bits not in range(2, 9):
        raise RecipeError(f"q-vlm option dependency_bits: {bits!r}, expected 2 to 8 or null")


def _refuse_split(context: Context) -> None:
    for formats in context.formats.values():
        for name, format_ in formats.items():
            if format_.by_modality:
                raise RecipeError(
                    f"{name}: q-vlm searches one range per input, format {format_.name!r} has one for each kind of "
                    "token. Use another method or format."
                )


class QVlm:
    """The method ``q-vlm``; see the module docstring."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        resolved(recipe)

    def prepare(self, context: Context) -> State:
        """Steps 1 to 3: clip ranges of vision (after the visual-encoder step), D, and the decoder's
        partition.
        """
        options = resolved(context.recipe)
        _refuse_split(context)
        state: dict[str, npt.NDArray[Any]] = {}
        roundings = _initial_roundings(context, "vision", options)
        simulated: dict[str, Rounding] = {}
        if options["visual_encoder"] and roundings:
            for component in ("projector", "text", "head"):
                simulated.update(_initial_roundings(context, component, options))
            found = _optimise_vision(context, roundings, simulated, options)
            roundings = found.roundings
            for name in found.objective[0]:
                state[f"veo.{name}"] = np.array([terms[name] for terms in found.objective])
            state["veo.best"] = np.array(found.best)
        for name, rounding in {**simulated, **roundings}.items():
            _store(state, name, rounding)
        if context.formats.get("text"):
            projector = {
                n: r for n, r in simulated.items() if n in context.formats.get("projector", {})
            }
            _store_partition(state, context, {**roundings, **projector}, options)
        return state

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        """Step 3's blocks for the decoder, one layer per block elsewhere."""
        if stream.component != "text":
            return [(i, i + 1) for i in range(len(stream.layers))]
        return [(int(a), int(b)) for a, b in state["partition"]]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Step 4, or the ranges of step 2 for a vision layer."""
        if block.component == "vision":
            return BlockResult(
                {
                    name: quantize(linear, block.formats[name], _load(state, name))
                    for name, linear in block.linears.items()
                },
                {},
            )
        options = resolved(recipe)
        known = {name: _load(state, name).clip for name in block.linears if f"clip.{name}" in state}
        search = BlockSearch(block, options, known)
        found = search.joint()
        picked = {
            name: found.choice[index - block.start]
            for index in range(block.start, block.stop)
            for name in block.layer_linears(index)
        }
        report: dict[str, Any] = {
            "choice": list(found.choice),
            "error": found.error,
            "layer_runs": found.runs,
        }
        if options["granularity"] == "linear":
            picked, report["error_linear"] = search.refined(found.choice)
            report["choice_linear"] = picked
        if block.component == "text" and block.start == 0:
            report["partition"] = state["partition"].tolist()
            report["dependency"] = state["dependency"].tolist()
            report["entropy"] = state["entropy"].tolist()
            report["visual_encoder"] = {
                name: np.asarray(values).tolist()
                for name, values in state.items()
                if name.startswith("veo.")
            }
        linears: dict[str, QuantizedLinear] = {
            name: quantize(linear, block.formats[name], search.rounding(name, picked[name]))
            for name, linear in block.linears.items()
        }
        return BlockResult(linears, report)


# ------------------------------------------------------------------------------------------------
# preparation


def _store(state: dict[str, npt.NDArray[Any]], name: str, rounding: Rounding) -> None:
    state[f"clip.{name}"] = rounding.clip.numpy()
    if rounding.inputs is not None:
        state[f"low.{name}"] = rounding.inputs.low.numpy()
        state[f"high.{name}"] = rounding.inputs.high.numpy()


def _load(state: State, name: str) -> Rounding:
    inputs = None
    if f"low.{name}" in state:
        inputs = ActivationRange(
            torch.from_numpy(np.array(state[f"low.{name}"])),
            torch.from_numpy(np.array(state[f"high.{name}"])),
        )
    return Rounding(torch.from_numpy(np.array(state[f"clip.{name}"])), inputs)


def _initial_roundings(
    context: Context, component: str, options: Mapping[str, Any]
) -> dict[str, Rounding]:
    """Step 1 for every quantized linear of a component, on the float stream."""
    formats = context.formats.get(component, {})
    if not formats:
        return {}
    linears = {
        n: m for n, m in context.adapter.linears(context.model, component).items() if n in formats
    }
    stream = capture_stream(context.model, context.adapter, component, context.samples)
    found: dict[str, Rounding] = {}
    hidden: list[Tensor] = stream.inputs
    for index, layer in enumerate(stream.names):
        mine = {n: m for n, m in linears.items() if n == layer or n.startswith(layer + ".")}
        hidden = stream.entering(index, hidden)
        seen, hidden = observe(
            stream, index, mine, formats, hidden, options["init_norm"], options["init"]
        )
        for name, linear in mine.items():
            format_, init = formats[name], options["init"]
            found[name] = Rounding(
                initial_weight(linear.weight, format_, seen[name], init),
                initial_inputs(format_, seen[name], init),
            )
    return found


def _settings(recipe: Recipe, options: Mapping[str, Any], bits: int) -> visual_objective.Settings:
    return visual_objective.Settings(
        epochs=options["veo_epochs"],
        batch=options["veo_batch"],
        rate=options["veo_rate"],
        entropy=options["veo_entropy"],
        error=options["veo_error"],
        eta=options["veo_eta"],
        bits=bits,
        exponent=options["delta_exponent"],
        seed=recipe.seed,
    )


def _optimise_vision(
    context: Context,
    vision: Mapping[str, Rounding],
    others: Mapping[str, Rounding],
    options: Mapping[str, Any],
) -> visual_encoder.Found:
    """Step 2."""
    model = visual_objective.Model(context.model, context.adapter)
    samples: list[Sample] = context.samples
    targets = visual_objective.reference_pass(model, samples)
    formats = {n: f for component in context.formats.values() for n, f in component.items()}
    ranges = {
        name: visual_encoder.Ranges.at(_linear(context, name), formats[name], rounding)
        for name, rounding in vision.items()
    }
    functions = {n: simulate(_linear(context, n), formats[n], r) for n, r in others.items()}
    with ExitStack() as stack:
        stack.enter_context(substituted({n: _linear(context, n) for n in others}, functions))
        with (
            torch.no_grad(),
            visual_encoder.quantized(ranges, {n: r.fake_weight() for n, r in ranges.items()}),
        ):
            last = [model.run(sample).hidden[-1] for sample in samples]
    importance = visual_objective.layer_importance(model, samples, last)
    targets = visual_objective.Targets(targets.references, targets.ranges, importance)
    settings = _settings(context.recipe, options, _bits(context, options))

    def progress(epoch: int, value: float) -> None:
        log.info("visual encoder: epoch %d, held-out objective %.6g", epoch, value)

    with substituted({n: _linear(context, n) for n in others}, functions):
        return visual_encoder.optimise(model, samples, targets, ranges, settings, progress)


def _linear(context: Context, name: str) -> torch.nn.Linear:
    linear = context.model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear), f"{name} is not a linear"
    return linear


def _bits(context: Context, options: Mapping[str, Any]) -> int:
    """b of the 2^b rounding points: the option, else the decoder's activation bits, else its weight
    bits.
    """
    if options["dependency_bits"] is not None:
        return int(options["dependency_bits"])
    found = [4]
    for format_ in context.formats.get("text", {}).values():
        scheme = format_.activations or format_.weights
        if scheme is not None:
            found.append(scheme.bits)
    return found[-1]


def _store_partition(
    state: dict[str, npt.NDArray[Any]],
    context: Context,
    before: Mapping[str, Rounding],
    options: Mapping[str, Any],
) -> None:
    """Step 3 on the float decoder fed by the quantized vision tower and projector (``before``)."""
    formats = {n: f for component in context.formats.values() for n, f in component.items()}
    functions = {n: simulate(_linear(context, n), formats[n], r) for n, r in before.items()}
    with substituted({n: _linear(context, n) for n in before}, functions):
        stream = capture_stream(context.model, context.adapter, "text", context.samples)
    pairs, entropies = dependencies(stream, _bits(context, options), options["delta_exponent"])
    state["dependency"], state["entropy"] = np.array(pairs), np.array(entropies)
    layers, depth, h0 = len(stream.layers), options["depth"], options["h0"]
    kind = options["partition"]
    if kind in ("layer", "fixed"):
        blocks = entropy.fixed_partition(layers, 1 if kind == "layer" else depth)
    elif kind == "error":
        scores = pair_errors(context, stream, options)
        state["pair_error"] = np.array(scores)
        blocks = entropy.greedy_partition(scores, depth, h0)
    else:
        blocks = entropy.greedy_partition(pairs, depth, h0)
        if kind == "random":
            blocks = entropy.random_partition(blocks, context.recipe.seed)
    state["partition"] = np.array([(block[0], block[-1] + 1) for block in blocks], np.int64)
