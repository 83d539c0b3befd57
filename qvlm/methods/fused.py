"""fused: the flagship. Rotation, scale search, GPTQ on a shifted target, descent, joint rounding; each can be left out.

Objective: the block's output on the quantized stream is the float block's. Every stage lowers a stand-in for it:

0. The float model is rotated (``rotations``, ``methods.rotate``): outlier channels spread over all, so that no group of
   weights has to reach far for a few of its columns. "auto" is R1 where the model permits it, and R2; [] neither.
1. Blocks (``partition``): Q-VLM's entropy partition of the decoder, or ``depth`` layers each ("fixed"); one layer per
   block elsewhere.
2. Each linear of each layer in turn, with H and D on the quantized stream as it now is (``methods.stages``), H shrunk
   towards its diagonal (``shrinkage``, ``hessian.shrunk``): scales that cost least under H (``scales``), at two bits
   of either sign (``signed_bits``); integers by ``start``: GPTQ's sweep, GPTAQ's, "residual" (GPTQ's sweep on the
   target w (H + alpha D) H^-1, that is GPTAQ with the residual of columns already moved, exactly), or round to
   nearest; then integer coordinate descent of ``sweeps`` rounds, and ``refits`` times the scales' least squares and
   descent again (``descent``). Descent aims where the start does: at the shifted target for gptaq and residual. One
   sample in eight is not fitted: each of searched scales, descent and re-fit is kept only if it lowers the linear's
   error on those (``methods.held_out``).
3. The block's linears together (``solver``): signed gradient descent on roundings and scales against the block's
   loss, or Q-VLM's grid in the same place (``methods.block_rounding``), in blocks with weights of at most
   ``solver_bits``.
4. Keep the best of 2 and 3 on held-out samples.

Why H is shrunk: some channels (inner ones of an MLP above all) fire for few tokens, strongly and together. In the
calibration's H they are collinear, so the search clips their scales and the sweeps move their integers as if the others
would always answer for them; an unseen token that fires them in other proportions leaves a layer half wrong. On the
demo that was one token in a hundred, in the first layer, and an answer each.

Token weights in H, D and the loss (``weights``) are off by default ("uniform"). "curvature": how much the answers move
with each token of each linear's output (``curvature``), to the power ``temper``. "modality": image tokens have the
share ``mix`` of all weight. "vlmq": ``methods.vlmq``'s factors in H and D of the attention's linears, each its own; in
the loss of a block, the mean of those of its last layer.

What each stage is worth stands in README (three draws, four and three bits): most the rotation and the searched scales;
shrinkage guards against single draws that lose; descent pays at three bits, joint rounding at three and fewer, at four
it loses, so ``solver_bits`` is 3. Scales of either sign take two fifths off the divergence at two bits; at three they
help most tokens of some draws and lost one draw in nine by far, so ``signed_bits`` is 2.

Tried and left out: scales tuned end to end (Adam on the answers' KL), which 900 further samples did not make to pay;
calibration samples of random tokens; the loss "both", whose result held-out samples reject. Curvature weights gain
nothing at four bits and lost the one draw tried at three (README).

Cost: GPTAQ's passes; a factor of H per stage; per weight two sweeps for the two scales, two descents and a re-fit,
together some ten products with H; in blocks rounded jointly ``steps`` times ``batch`` forward and backward passes of
the block, fewer where the fitted samples would be gone through more than ``passes`` times (with loss "answers" or
"both", of the decoder behind it; with curvature weights, one backward pass of the model per sample).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvlm import affine, entropy, modality
from qvlm.affine import QuantizedWeight
from qvlm.capture import Stream, capture_stream
from qvlm.checkpoint import QuantizedLinear
from qvlm.curvature import end_curvature
from qvlm.descent import coordinate_optima, descend, refit_scales, target
from qvlm.hessian import Factored, Statistics
from qvlm.methods import gptaq, gptq, vlmq
from qvlm.methods.block_rounding import BlockLoss, gradient_solver, grid_solver
from qvlm.methods.block_search import dependencies
from qvlm.methods.fused_options import Settings
from qvlm.methods.held_out import Best, split
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.methods.rotate import AUTO
from qvlm.methods.rtn import quantized_linear
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe, WeightScheme
from qvlm.scales import column_importance, search_scales
from qvlm.signed_rounding import SoftWeight

# Samples on which the decoder's partition is decided.
PARTITION_SAMPLES = 32


class Fused:
    """The method ``fused``; see the module docstring."""

    options: Mapping[str, Any] = {f.name: f.default for f in fields(Settings)} | {"rotations": AUTO}

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        Settings.of(recipe)

    def prepare(self, context: Context) -> State:
        """Step 1, and the curvature of every quantized linear's tokens if it is asked for."""
        settings = Settings.of(context.recipe)
        state: dict[str, npt.NDArray[Any]] = {}
        if settings.weights == "curvature":
            linears = {
                name: linear
                for component, formats in context.formats.items()
                for name, linear in context.adapter.linears(context.model, component).items()
                if name in formats
            }
            seed = context.recipe.seed
            for name, parts in end_curvature(context.model, context.samples, linears, seed).items():
                if parts:
                    state[f"curvature.{name}"] = torch.cat(parts).numpy()
        if context.formats.get("text"):
            state.update(_partition(context, settings))
        return state

    def partition(self, stream: Stream, recipe: Recipe, state: State) -> list[tuple[int, int]]:
        """Step 1's blocks for the decoder, one layer per block elsewhere."""
        if stream.component != "text":
            return [(i, i + 1) for i in range(len(stream.layers))]
        return [(int(a), int(b)) for a, b in state["partition"]]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Steps 2 to 4."""
        settings = Settings.of(recipe)
        bits = [s.bits for f in block.formats.values() if (s := f.weights) is not None]
        joint = settings.solver != "none" and bool(bits) and min(bits) <= settings.solver_bits
        started = LayerByLayer(block, settings, state, joint)
        report: dict[str, Any] = {"linears": started.rows}
        if block.component == "text" and block.start == 0:
            recorded = ("partition", "dependency", "entropy")
            report |= {key: state[key].tolist() for key in recorded if key in state}
        if not joint:
            return BlockResult(started.results, report)
        weights = started.loss_weights()
        loss = BlockLoss(block, started.results, started.targets, weights, settings.loss)
        if settings.solver == "grid":
            chosen, report["solver"] = grid_solver(loss, started.soft)
        else:
            plan = settings.descent(len(block.quant_inputs), recipe.seed)
            chosen, report["solver"] = gradient_solver(loss, started.soft, plan)
        return BlockResult(
            {name: _with_weight(started.results[name], q) for name, q in chosen.items()}, report
        )


def _partition(context: Context, settings: Settings) -> dict[str, npt.NDArray[Any]]:
    """Half-open ranges [blocks, 2] of decoder layers ("partition"); where the entropy decides on them also "entropy"
    [layers] and "dependency" [layers - 1] of neighbours, as ``methods.q_vlm`` has them.
    """
    stream = capture_stream(
        context.model, context.adapter, "text", context.samples[:PARTITION_SAMPLES]
    )
    found: dict[str, npt.NDArray[Any]] = {}
    layers = len(stream.layers)
    if settings.partition == "fixed" or not stream.inputs:
        blocks = entropy.fixed_partition(layers, settings.depth)
    else:
        bits = [f.weights.bits for f in context.formats["text"].values() if f.weights is not None]
        pairs, entropies = dependencies(stream, min(bits), 2)
        found = {"dependency": np.array(pairs), "entropy": np.array(entropies)}
        blocks = entropy.greedy_partition(pairs, settings.depth)
    found["partition"] = np.array([(block[0], block[-1] + 1) for block in blocks], np.int64)
    return found


def token_weights(
    block: Block, names: Sequence[str], settings: Settings, state: State
) -> list[Tensor] | None:
    """Weights [tokens] with mean 1 of every sample for linears that share their input; None for all alike."""
    if settings.weights == "modality":
        return [modality.balanced(mask.reshape(-1), settings.mix) for mask in block.image_masks]
    if settings.weights != "curvature" or not settings.temper:
        return None
    found = [
        torch.from_numpy(np.array(state[f"curvature.{name}"]))
        for name in names
        if f"curvature.{name}" in state
    ]
    found = [c / c.mean() for c in found if float(c.mean()) > 0]
    if not found:
        return None
    weights = torch.stack(found).mean(0).pow(settings.temper)
    sizes = [hidden.shape[:-1].numel() for hidden in block.quant_inputs]
    if sum(sizes) != len(weights):
        return (
            None  # a linear that sees other tokens than its layer: the projector behind a selection
        )
    return list(torch.split(weights / weights.mean(), sizes))


class LayerByLayer:
    """Step 2 on every layer of a block: ``results`` by linear, where each weight would like to be (``soft``, if
    ``joint``: for step 3), the float block's outputs (``targets``) and a report row per linear."""

    def __init__(self, block: Block, settings: Settings, state: State, joint: bool) -> None:
        self.block, self.settings, self.state, self.joint = block, settings, state, joint
        self._factors: list[Sequence[Tensor]] = []  # VLMQ's, of the layer at work
        self.results: dict[str, QuantizedLinear] = {}
        self.soft: dict[str, SoftWeight] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.targets, quants = block.float_inputs, block.quant_inputs
        for index in range(block.start, block.stop):
            linears = block.layer_linears(index)
            part = replace(
                block,
                start=index,
                stop=index + 1,
                linears=linears,
                formats={name: block.formats[name] for name in linears},
                float_inputs=self.targets,
                quant_inputs=quants,
            )
            layer = self._layer(part)
            self.results.update(layer.results)
            with torch.no_grad():
                self.targets = [part.run(h, i) for i, h in enumerate(self.targets)]
                with layer.quantized():
                    quants = [part.run(h, i) for i, h in enumerate(quants)]

    def _layer(self, block: Block) -> StagedLayer:
        layer = StagedLayer(block)
        fit, held = split(len(block.quant_inputs))
        if not self.settings.staged:  # one candidate only
            fit, held = list(range(len(block.quant_inputs))), []
        attention = self._attention(layer) if self.settings.weights == "vlmq" else None
        self._factors = []
        for names in layer.stages:
            weights: Mapping[str, Sequence[Tensor]] | None
            if attention is not None:
                weights = attention.token_weights(layer, names)
                self._factors += (weights or {}).values()
            else:
                shared = token_weights(block, names, self.settings, self.state)
                weights = None if shared is None else dict.fromkeys(names, shared)
            found, judges = (
                layer.statistics(
                    names, asymmetric=self.settings.asymmetric, weights=weights, samples=samples
                )
                for samples in (fit, held)
            )
            factors = layer.per_inputs(found, self.settings.factored)
            for name in names:
                judge = judges[name] if held else None
                self._linear(layer, name, found[name], factors[name], judge)
        return layer

    def loss_weights(self) -> list[Tensor] | None:
        """Weights [tokens] with mean 1 of every sample in the loss of the block; None for all alike."""
        if self.settings.weights == "vlmq":
            means = [torch.stack(c).mean(0) for c in zip(*self._factors, strict=True)]
            return [c / c.mean() for c in means] or None
        last = list(self.block.layer_linears(self.block.stop - 1))[-1:]
        return token_weights(self.block, last, self.settings, self.state) if last else None

    def _attention(self, layer: StagedLayer) -> vlmq.AttentionSolver | None:
        """VLMQ's factors of the layer's attention; None without one."""
        found = vlmq.find_block_attention(layer.block)
        if found is None:
            return None
        settings = vlmq.Settings(self.settings.kernel, self.settings.alpha, 1, ("token",))
        return vlmq.AttentionSolver(layer, found, settings)

    def _linear(
        self, layer: StagedLayer, name: str, fit: Statistics, h: Factored, held: Statistics | None
    ) -> None:
        settings, scheme = self.settings, layer.block.formats[name].weights
        assert scheme is not None
        weight, cost = layer.block.linears[name].weight, h.damped
        alpha = gptaq.tied_alpha(settings.alpha, fit) if settings.asymmetric else 0.0
        with layer.naming(name):
            wanted = target(weight, h, fit.shift(weight) if alpha else None, alpha)
            best = Best(weight, held)
            searched = settings.scales if scheme.symmetric else "max"
            for scales in dict.fromkeys(("max", searched) if held else (searched,)):
                tried = replace(settings, scales=scales)
                first = start(weight, wanted, h, fit.cross, alpha, scheme, tried)
                best.offer(f"scales {scales}", first)
        if settings.sweeps:
            best.offer("descent", descend(best.weight, wanted, cost, scheme.bits, settings.sweeps))
            for turn in range(settings.refits):
                fitted = refit_scales(best.weight, wanted, cost)
                fitted = descend(fitted, wanted, cost, scheme.bits, settings.sweeps)
                best.offer(f"refit {turn + 1}", fitted)
        quantized = best.weight
        layer.finish(name, quantized)
        if self.joint:
            optima = coordinate_optima(quantized, wanted, cost)
            self.soft[name] = SoftWeight(quantized, optima, scheme.bits)
        self.rows[name] = {"tokens": fit.tokens, "effective": fit.effective_tokens}
        if settings.asymmetric:
            self.rows[name]["alpha"] = alpha
        if best.errors:
            self.rows[name]["held_out"] = best.errors
        if h.dead:
            self.rows[name]["dead_columns"] = h.dead


def start(
    weight: Tensor,
    wanted: Tensor,
    factored: Factored,
    cross: Tensor | None,
    alpha: float,
    scheme: WeightScheme,
    settings: Settings,
) -> QuantizedWeight:
    """Step 2's scales and first integers of a weight [out, in] whose shifted target is ``wanted``."""
    scale, zero = affine.weight_scales(weight.detach().float(), scheme)
    if settings.scales != "max":
        importance = column_importance(factored, settings.scales)
        signed = scheme.signed_scales and scheme.bits <= settings.signed_bits
        searched = replace(scheme, signed_scales=signed)
        scale = search_scales(weight, searched, importance)
    if settings.start == "nearest":
        return affine.quantize_weight(weight.detach().float(), scheme, scale, zero)
    residual = settings.start == "residual"
    return gptq.gptq_matrix(
        wanted if residual else weight,
        factored,
        scheme,
        settings.kernel,
        cross=cross if settings.start == "gptaq" else None,
        alpha=alpha,
        scales=(scale, zero),
    ).quantized


def _with_weight(linear: QuantizedLinear, weight: QuantizedWeight) -> QuantizedLinear:
    """The same linear with other integers and scales."""

    def optional(array: npt.NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array)

    return quantized_linear(
        weight, linear.format, optional(linear.input_scale), optional(linear.input_zero_point)
    )
