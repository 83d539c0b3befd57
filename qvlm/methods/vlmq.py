"""VLMQ: GPTAQ whose sums weigh each token by how much it matters to the attention of the layer.

Paper: "VLMQ: Token Saliency-Driven Post-Training Quantization for Vision-Language Models", arXiv 2508.03351 (v1: p = 1,
v2: p = 2). No code was published; what the paper leaves open is resolved below.

Most tokens of a VLM's prompt are image tokens and many of them hardly matter. Objective for each of the linears q, k,
v, o of a layer, with F and U its inputs on the float and the quantized stream [tokens, in]:

    min over integers Q of  sum_n g_n^p | Q u_n - W f_n |^2

1. Both streams through the attention sub-block (``importance``). One backward pass of |Attn(F) - Attn(U)|^2 gives g
   for q, k and v; each has its own.
2. g becomes weights c: relative to the mean of its sample; clipped at Tukey's fences; at least 0.1; to the power p;
   tempered until the effective number of tokens is 4 per input channel, 8 at two bits.
3. H = sum c u u', D = sum c (f - u) u', and GPTAQ's update quantizes q, k and v.
4. The attention again with those three quantized: g of o is the mean |2 (Attn(U) - Attn(F))| of the token. Steps 2
   and 3 for o.
5. The linears outside the attention: plain GPTAQ on the stream as it now is.
   Option ``scope`` "layer": steps 1 and 4 with the whole layer's output in the place of Attn, one more backward pass
   for o.
6. Keep the best: steps 1 to 4 with every rule of ``candidates`` on nine tenths of the samples, the attention's error
   on the rest decides, the winner is solved once more on all samples. "uniform" is GPTAQ itself, "token" is g^p,
   "blend" (1 + g^p) / 2, "modality" gives image tokens the share ``mix`` of all weight and text tokens the rest.

Gaps of the paper and our reading: the first layer, where U = F and all gradients vanish, and every sample whose two
streams differ by float32 rounding only, weigh all tokens alike; steps 2 and 6 as above (token weights are known to
lose on some models); scales, order and alpha as in ``methods.gptq`` and ``methods.gptaq``, symmetric and with static
groups, which the paper does not use; layers are assumed pre-norm with the residual added outside the attention.
Projector and head have no attention: GPTAQ.

Cost: GPTAQ's; per candidate and for the winner two more forwards of the attention, one backward and one solve of
its linears; three H's for q, k, v instead of a shared one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import importance, modality
from qvlm.errors import RecipeError
from qvlm.importance import Attention
from qvlm.methods import gptaq, gptq
from qvlm.methods.method import Block, BlockResult, State
from qvlm.methods.stages import StagedLayer, call_stages
from qvlm.models.adapter import linears_below
from qvlm.recipe import Recipe

SCOPES = ("attention", "layer")
RULES = ("uniform", "token", "blend", "modality")
OPTIONS: Mapping[str, Any] = {
    **gptaq.OPTIONS,
    "exponent": 1,  # p: 1 or 2
    "scope": "attention",  # what the importance looks at: attention, layer
    "candidates": ["uniform", "token", "blend"],
    "mix": 0.5,  # image tokens' share of the weight under "modality"
}
# One sample in so many is held out to choose among candidates.
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """All options of one run."""

    kernel: gptq.Settings
    alpha: str | float
    exponent: int
    candidates: tuple[str, ...]
    scope: str = "attention"
    mix: float = 0.5

    @staticmethod
    def of(recipe: Recipe) -> Settings:
        """The recipe's values over the defaults; RecipeError on a value that makes no sense."""
        options = {**OPTIONS, **recipe.options}
        candidates = options["candidates"]
        if options["exponent"] not in (1, 2):
            raise RecipeError(f"option exponent: {options['exponent']!r}, expected 1 or 2")
        if options["scope"] not in SCOPES:
            raise RecipeError(
                f"option scope: {options['scope']!r}, expected one of {', '.join(SCOPES)}"
            )
        if not candidates or isinstance(candidates, str) or set(candidates) - set(RULES):
            raise RecipeError(
                f"option candidates: {candidates!r}, expected a list out of {', '.join(RULES)}"
            )
        return Settings(
            gptq.Settings.of(recipe),
            gptaq.check_alpha(recipe),
            int(options["exponent"]),
            tuple(candidates),
            options["scope"],
            modality.check_mix(options["mix"]),
        )


class Vlmq(gptaq.Gptaq):
    """The method ``vlmq``."""

    options: Mapping[str, Any] = OPTIONS

    def check(self, recipe: Recipe) -> None:
        """RecipeError for a value that makes no sense."""
        Settings.of(recipe)

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        """Steps 1 to 6."""
        settings, layer = Settings.of(recipe), StagedLayer(block)
        attention = find_block_attention(block)
        report: dict[str, Any] = {"linears": {}}
        inside: set[str] = set()
        if attention is not None:
            inside = {*attention.inputs, attention.output} & set(block.linears)
        if attention is not None and inside:
            solver = AttentionSolver(layer, attention, settings)
            report["attention"], report["linears"] = solver.solve_best()
            layer = solver.layer
        for names in layer.stages:  # 5
            if outside := [name for name in names if name not in inside]:
                rows = gptaq.quantize_stage(layer, outside, settings.kernel, settings.alpha)
                report["linears"].update(rows)
        return BlockResult(layer.results, report)


def find_block_attention(block: Block) -> Attention | None:
    """The attention of a block of one layer, from all its linears, quantized or not."""
    name, module = block.names[0], block.layers[0]
    linears = linears_below(module, "")
    full: dict[str, nn.Linear] = {f"{name}{key}": linear for key, linear in linears.items()}
    return importance.find_attention(module, name, call_stages(block, block.start, full))


class AttentionSolver:
    """The attention linears of one layer under different rules for the weights of tokens.

    ``layer`` is the layer with the winner's integers after ``solve_best``.
    """

    def __init__(self, layer: StagedLayer, attention: Attention, settings: Settings) -> None:
        self.layer, self.attention, self.settings = layer, attention, settings
        block = layer.block
        self.count = len(block.quant_inputs)
        self.inputs = [name for name in attention.inputs if name in block.linears]
        with torch.no_grad():
            self.targets = [
                self._output(layer, hidden, i) for i, hidden in enumerate(block.float_inputs)
            ]
        self.factors = self._gradients(layer, self.inputs)  # step 1

    def _output(self, layer: StagedLayer, hidden: Tensor, sample: int) -> Tensor:
        """Attn(X), or the layer's output, as ``scope`` says."""
        stream, scope = layer.block.stream, self.settings.scope
        return importance.scope_output(stream, layer.index, self.attention, scope, hidden, sample)

    def _gradients(self, layer: StagedLayer, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Relative factors [tokens] of linears of the attention, by one backward pass a sample."""
        block, scope = layer.block, self.settings.scope
        linears = {name: block.linears[name] for name in names}
        found: dict[str, list[Tensor]] = {name: [] for name in linears}
        if not linears:
            return found
        for i, hidden in enumerate(block.quant_inputs):
            g, output = importance.input_importance(
                block.stream,
                layer.index,
                self.attention,
                linears,
                hidden,
                self.targets[i],
                i,
                scope,
            )
            noise = importance.is_noise(output, self.targets[i])
            for name, factors in g.items():
                found[name].append(
                    torch.ones_like(factors) if noise else importance.relative(factors)
                )
        return found

    def _output_factors(self, layer: StagedLayer) -> list[Tensor]:
        """Step 4: relative factors [tokens] of o, with q, k and v quantized."""
        name = self.attention.output
        if self.settings.scope == "layer":
            with layer.quantized():
                return self._gradients(layer, [name])[name]
        found = []
        for output, target in zip(
            self._outputs(layer, range(self.count)), self.targets, strict=True
        ):
            factors = importance.output_importance(output, target)
            noise = importance.is_noise(output, target)
            found.append(torch.ones_like(factors) if noise else importance.relative(factors))
        return found

    def _outputs(self, layer: StagedLayer, samples: Sequence[int]) -> list[Tensor]:
        """Attn(U), or the layer's output, with the finished linears quantized."""
        block = layer.block
        with torch.no_grad(), layer.quantized():
            return [self._output(layer, block.quant_inputs[i], i) for i in samples]

    def _weights(self, factors: list[Tensor], rule: str) -> list[Tensor]:
        """Step 2 after the factors are relative, without temper."""
        p = self.settings.exponent
        if rule == "token":
            return [g.pow(p) for g in factors]
        if rule == "blend":
            return [0.5 + 0.5 * g.pow(p) for g in factors]
        mix = self.settings.mix
        return [modality.balanced(mask.reshape(-1), mix) for mask in self.layer.block.image_masks]

    def _tempered(
        self, name: str, weights: Sequence[Tensor], samples: Sequence[int]
    ) -> tuple[list[Tensor], float]:
        """Step 2's last guard for linear ``name``."""
        block = self.layer.block
        scheme = block.formats[name].weights
        assert scheme is not None
        channels = block.linears[name].in_features
        return importance.tempered(weights, channels, scheme.bits, samples)

    def token_weights(
        self, layer: StagedLayer, names: Sequence[str]
    ) -> dict[str, list[Tensor]] | None:
        """Weights c by rule "token" on all samples for a stage of ``layer``; None for one outside the attention."""
        factors = self.factors
        if list(names) == [self.attention.output]:
            factors = {self.attention.output: self._output_factors(layer)}
        if not set(names) <= set(factors):
            return None
        every = range(self.count)
        return {
            name: self._tempered(name, self._weights(factors[name], "token"), every)[0]
            for name in names
        }

    def solve(self, rule: str, samples: Sequence[int]) -> tuple[StagedLayer, dict[str, Any]]:
        """Steps 2 to 4 under one rule: the layer with its attention quantized, and a row per linear."""
        layer = self.layer.fork()
        rows: dict[str, Any] = {}
        if self.inputs:
            self._solve_stage(layer, self.inputs, self.factors, rule, samples, rows)
        if self.attention.output in layer.block.linears:
            name = self.attention.output
            factors = {name: self._output_factors(layer)}
            self._solve_stage(layer, [name], factors, rule, samples, rows)
        return layer, rows

    def _solve_stage(
        self,
        layer: StagedLayer,
        names: list[str],
        factors: Mapping[str, list[Tensor]],
        rule: str,
        samples: Sequence[int],
        rows: dict[str, Any],
    ) -> None:
        weights: dict[str, list[Tensor]] | None = None
        if rule != "uniform":
            weights = {}
            for name in names:
                mine = self._weights(factors[name], rule)
                weights[name], temperature = self._tempered(name, mine, samples)
                rows[name] = {"temperature": temperature}
        statistics = layer.statistics(names, asymmetric=True, weights=weights, samples=samples)
        alphas = {n: gptaq.tied_alpha(self.settings.alpha, sums) for n, sums in statistics.items()}
        for name, row in gptq.solve(layer, statistics, self.settings.kernel, alphas).items():
            effective = statistics[name].effective_tokens
            rows[name] = {
                **rows.get(name, {}),
                **row,
                "alpha": alphas[name],
                "effective_tokens": effective,
            }

    def error(self, layer: StagedLayer, samples: Sequence[int]) -> float:
        """Mean squared error of Attn, or of the layer's output, over the samples, between both streams."""
        outputs = self._outputs(layer, samples)
        total = sum(
            float((output - self.targets[i]).double().square().sum())
            for i, output in zip(samples, outputs, strict=True)
        )
        return total / sum(self.targets[i].numel() for i in samples)

    def solve_best(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Step 6: what the choice was made on, and a row per linear of the winner."""
        candidates = self.settings.candidates
        report: dict[str, Any] = {"rule": candidates[0]}
        if len(candidates) > 1:
            held = list(range(HELD_OUT_EVERY - 1, self.count, HELD_OUT_EVERY)) or [self.count - 1]
            fit = [i for i in range(self.count) if i not in set(held)]
            errors: dict[str, float] = {}
            if fit:
                for rule in candidates:
                    errors[rule] = self.error(self.solve(rule, fit)[0], held)
                report["rule"] = min(errors, key=lambda rule: errors[rule])
            report["held_out_error"] = errors
        self.layer, rows = self.solve(report["rule"], range(self.count))
        return report, rows
