"""prototype"""
from __future__ import annotations
import logging, time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
import numpy as np
import torch
from torch import Tensor, nn
from qvlm import affine, importance, entropy
from qvlm.affine import QuantizedWeight
from qvlm.capture import Stream
from qvlm.curvature import end_curvature
from qvlm.descent import coordinate_optima, descend, refit_scales, row_errors, target
from qvlm.fakequant import FakeQuantLinear, substituted
from qvlm.hessian import revive_dead
from qvlm.methods import gptaq, gptq
from qvlm.methods.block_search import dependencies
from qvlm.methods.method import Block, BlockResult, Context, State
from qvlm.methods.rtn import quantized_linear
from qvlm.methods.stages import StagedLayer
from qvlm.recipe import Recipe
from qvlm.scales import search_scales
from qvlm.signed_rounding import SoftWeight

log = logging.getLogger(__name__)
OPTIONS: Mapping[str, Any] = {
    "scales": "block", "weights": "curvature", "temper": 0.5, "blend": 0.0,
    "alpha": "auto", "damping": 0.01, "start": "residual", "sweeps": 4, "refits": 1,
    "partition": "entropy", "depth": 3,
    "steps": 200, "batch": 8, "rate": None, "scale_rate": 0.1, "loss": "both", "mix": 1.0,
    "every": 20, "mse_weights": True,
}

class Fused:
    options = OPTIONS
    def prepare(self, context: Context) -> State:
        o = {**OPTIONS, **context.recipe.options}
        state = {}
        linears = {n: m for c, f in context.formats.items() for n, m in context.adapter.linears(context.model, c).items() if n in f}
        if o["weights"] == "curvature":
            found = end_curvature(context.model, context.samples, linears, context.recipe.seed)
            for name, parts in found.items():
                state[f"curvature.{name}"] = torch.cat(parts).numpy()
        if context.formats.get("text"):
            from qvlm.capture import capture_stream
            stream = capture_stream(context.model, context.adapter, "text", context.samples[:32])
            pairs, _ = dependencies(stream, 4, 2)
            cut = entropy.greedy_partition(pairs, o["depth"])
            if o["partition"] == "fixed": cut = entropy.fixed_partition(len(stream.layers), o["depth"])
            state["partition"] = np.array([(b[0], b[-1] + 1) for b in cut])
        return state

    def partition(self, stream: Stream, recipe: Recipe, state: State):
        if stream.component != "text":
            return [(i, i + 1) for i in range(len(stream.layers))]
        return [(int(a), int(b)) for a, b in state["partition"]]

    def quantize_block(self, block: Block, recipe: Recipe, state: State) -> BlockResult:
        o = {**OPTIONS, **recipe.options}
        t = time.process_time()
        results, reals = {}, {}
        floats, quants = block.float_inputs, block.quant_inputs
        for index in range(block.start, block.stop):
            linears = block.layer_linears(index)
            part = replace(block, start=index, stop=index + 1, linears=linears, formats={n: block.formats[n] for n in linears}, float_inputs=floats, quant_inputs=quants)
            layer = StagedLayer(part)
            for names in layer.stages:
                reals.update(self._stage(layer, names, o, state))
            results.update(layer.results)
            with torch.no_grad():
                floats = [block.stream.forward(index, h, i) for i, h in enumerate(floats)]
                with layer.quantized():
                    quants = [block.stream.forward(index, h, i) for i, h in enumerate(quants)]
        t1 = time.process_time()
        report = {}
        if o["steps"] and block.component == "text":
            results, report = self._joint(block, results, reals, floats, o, state, recipe)
        print(f"  block {block.component} {block.start}-{block.stop}: layer stage {t1-t:.1f}s joint {time.process_time()-t1:.1f}s {report}", flush=True)
        return BlockResult(results, report)

    def _weights(self, block, name, o, state):
        if f"curvature.{name}" not in state or o["weights"] != "curvature": return None
        c = torch.from_numpy(np.array(state[f"curvature.{name}"]))
        c = c / c.mean().clamp_min(1e-30)
        c = c.clamp_min(1e-12).pow(o["temper"])
        c = c / c.mean()
        c = o["blend"] + (1 - o["blend"]) * c
        sizes = [h.shape[:-1].numel() for h in block.quant_inputs]
        if sum(sizes) != len(c): return None
        return list(c.split(sizes))

    def _stage(self, layer, names, o, state):
        block = layer.block
        ws = [self._weights(block, n, o, state) for n in names]
        weights = None
        if ws[0] is not None:
            shared = [sum(x) / len(ws) for x in zip(*ws)]
            weights = {n: shared for n in names}
        st = layer.statistics(names, asymmetric=True, weights=weights)
        reals = {}
        for name in names:
            s = st[name]; scheme = block.formats[name].weights
            w = block.linears[name].weight
            alpha = gptaq.tied_alpha(o["alpha"], s)
            h, _ = revive_dead(s.hessian)
            t = target(w, h, s.cross, alpha, o["damping"])
            settings = gptq.Settings(scales="search", damping=o["damping"])
            scale = search_scales(t.float(), scheme, h, o["scales"]) if o["scales"] != "gptq" else None
            if o["start"] == "residual":
                q = gptq.gptq_matrix(t, s.hessian, scheme, settings, scale=scale).quantized
            elif o["start"] == "gptaq":
                q = gptq.gptq_matrix(w, s.hessian, scheme, settings, cross=s.cross, alpha=alpha, scale=scale).quantized
            elif o["start"] == "gptq":
                q = gptq.gptq_matrix(w, s.hessian, scheme, settings, scale=scale).quantized
            else:
                q = affine.quantize_weight(w.float(), scheme, scale)
            mean = float(h.diagonal().mean())
            damped = h + o["damping"] * mean * torch.eye(len(h), dtype=h.dtype)
            hh = damped
            if o["sweeps"]:
                q = descend(q, t, hh, scheme.bits, o["sweeps"])
                for _ in range(o["refits"]):
                    q = descend(refit_scales(q, t, hh), t, hh, scheme.bits, o["sweeps"])
            layer.finish(name, q)
            reals[name] = (q, coordinate_optima(q, t, hh))
        return reals

    def _joint(self, block, results, reals, float_out, o, state, recipe):
        n = len(block.quant_inputs)
        held = list(range(7, n, 8)); fit = [i for i in range(n) if i % 8 != 7]
        stream = block.stream; L = len(stream.layers)
        use_kl = o["loss"] in ("kl", "both"); use_mse = o["loss"] in ("mse", "both")
        answers = []
        if use_kl:
            with torch.no_grad():
                for i, h in enumerate(float_out):
                    h = stream.run(block.stop, L, h, i)
                    answers.append(stream.logits(h[:, stream.answer_masks[i][0]]).log_softmax(-1))
        cw = None
        if o["mse_weights"]:
            last = [nm for nm in block.layer_linears(block.stop - 1)][-1]
            cw = self._weights(block, last, o, state)
        soft = {nm: SoftWeight(q, real, block.formats[nm].weights.bits) for nm, (q, real) in reals.items()}
        energy = sum(float(((1 if cw is None else cw[i][:, None]) * float_out[i].reshape(-1, float_out[i].shape[-1]).square()).sum()) for i in fit) / len(fit)
        def modules(weights):
            return {nm: FakeQuantLinear(weights[nm], block.linears[nm].bias, block.formats[nm].activations,
                    *(None if x is None else torch.as_tensor(x) for x in (results[nm].input_scale, results[nm].input_zero_point))).forward for nm in soft}
        def losses(i, h):
            kl = mse = torch.zeros(())
            if use_mse:
                e = (h - float_out[i]).reshape(-1, h.shape[-1]).square().sum(-1)
                if cw is not None: e = e * cw[i]
                mse = e.sum() / energy
            if use_kl:
                h = stream.run(block.stop, L, h, i)
                lp = stream.logits(h[:, stream.answer_masks[i][0]]).log_softmax(-1)
                kl = (answers[i].exp() * (answers[i] - lp)).sum(-1).mean()
            return kl, mse
        def total(k, m): return k / k0 + o["mix"] * m / m0 if use_kl and use_mse else (k if use_kl else m)
        @torch.no_grad()
        def held_loss():
            ms = modules({nm: s.weight() for nm, s in soft.items()})
            ks = es = 0.0
            with substituted(block.linears, ms):
                for i in held:
                    k, e = losses(i, block.run(block.quant_inputs[i], i)); ks += float(k); es += float(e)
            return ks / len(held), es / len(held)
        k0, m0 = held_loss()
        first = (k0, m0)
        k0 = max(k0, 1e-12); m0 = max(m0, 1e-12)
        best = total(k0, m0); bests = {nm: s.snapshot() for nm, s in soft.items()}; trace = [(0, *first)]
        g = torch.Generator().manual_seed(recipe.seed)
        rate = o["rate"] or 1.0 / o["steps"]
        order = []
        for step in range(o["steps"]):
            lr = rate * (1 - step / o["steps"])
            leaves = {nm: s.weight().requires_grad_(True) for nm, s in soft.items()}
            ms = modules(leaves)
            if len(order) < o["batch"]: order = [fit[j] for j in torch.randperm(len(fit), generator=g).tolist()]
            batch, order = order[:o["batch"]], order[o["batch"]:]
            with torch.enable_grad(), substituted(block.linears, ms):
                for i in batch:
                    total(*losses(i, block.run(block.quant_inputs[i], i))).backward()
            for nm, s in soft.items():
                s.step(leaves[nm].grad, lr, lr * o["scale_rate"])
            if (step + 1) % o["every"] == 0 or step + 1 == o["steps"]:
                k, m = held_loss(); v = total(k, m)
                trace.append((step + 1, k, m))
                if v < best: best = v; bests = {nm: s.snapshot() for nm, s in soft.items()}
        report = {"trace": [(a, float(f"{b:.3g}"), float(f"{c:.3g}")) for a, b, c in trace]}
        flips = sum(int((bests[nm].integers != reals[nm][0].integers).sum()) for nm in soft) / sum(bests[nm].integers.numel() for nm in soft)
        report["flipped"] = round(flips, 4)
        out = {nm: quantized_linear(bests[nm], block.formats[nm], *(None if x is None else torch.as_tensor(x) for x in (results[nm].input_scale, results[nm].input_zero_point))) for nm in soft}
        return out, report
