"""Proves that a peer's result is measured as ours is: our own quantized decoder, handed over as a peer would hand it
over, gives the same model bit for bit; weights that are not what the format says are refused.

Run: python -m pytest tests/core/test_peers.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.accuracy_peers import PEERS, PeerFailed, check_grid, imported, presets, summary
from tiny_models import prompts, tiny_llava
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.fakequant import FakeQuantLinear
from qvlm.methods import Context
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.recipe import component_recipe, named_format
from qvlm.trials.job import quantized

ADAPTER = ADAPTERS["llava"]


def decoder_of(format_: str) -> tuple[nn.Module, nn.Module, dict[str, object]]:
    """The float model, its decoder quantized by us, and inputs."""
    model = tiny_llava()
    ids, pixels = prompts(model, 0)[0]
    whole = torch.tensor([ids])
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    sample = Sample(whole, pixels, nothing, nothing)
    recipe = replace(component_recipe(format_, "float", "float"), method="rtn")
    context = Context(model, ADAPTER, [sample], recipe, resolve(model, ADAPTER, recipe))
    return model, quantized(context).model, sample.model_inputs()


def weights(quantized_model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight
        for name, module in quantized_model.named_modules()
        if isinstance(module, FakeQuantLinear)
    }


@pytest.mark.parametrize("format_", ["w4a16", "w3a16", "w8a8"])
def test_our_weights_as_a_peers_are_the_same_model(format_: str) -> None:
    model, ours, inputs = decoder_of(format_)
    theirs = imported(model, ADAPTER, weights(ours), named_format(format_))
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)


def test_column_scales_and_folded_norms_are_taken_over() -> None:
    """Weights divided by powers of two, inputs and a norm multiplied by them: the same function."""
    model, ours, inputs = decoder_of("w4a16")
    tensors = weights(ours)
    layer = ADAPTER.layer_names(model, "text")[0]
    norm = model.get_parameter(f"{layer}.input_layernorm.weight")
    tensors[f"{layer}.input_layernorm.weight"] = norm * 4
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"{layer}.self_attn.{part}"
        tensors[f"{name}.column_scale"] = torch.full((norm.numel(),), 0.25)
    theirs = imported(model, ADAPTER, tensors, named_format("w4a16"))
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)


def test_static_scales_are_taken_over() -> None:
    model, ours, inputs = decoder_of("w8a8-static")
    tensors = weights(ours)
    for name, module in ours.named_modules():
        if isinstance(module, FakeQuantLinear):
            assert module.input_scale is not None
            tensors[f"{name}.input_scale"] = module.input_scale
    theirs = imported(model, ADAPTER, tensors, named_format("w8a8"))
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)


def test_weights_that_are_not_on_a_grid_are_refused() -> None:
    model, ours, _ = decoder_of("w4a16")
    for name, weight in weights(ours).items():
        check_grid(name, weight, named_format("w4a16"))
        # Noise of a dequantization in another order of operations is none of ours.
        check_grid(name, weight * (1 + 1e-6 * torch.rand_like(weight)), named_format("w4a16"))
        with pytest.raises(PeerFailed, match="values, w3a16 has 8"):
            check_grid(name, weight, named_format("w3a16"))
    for name, linear in ADAPTER.linears(model, "text").items():
        with pytest.raises(PeerFailed, match="w4a16 has 16"):
            check_grid(name, linear.weight, named_format("w4a16"))


def test_every_peer_has_presets_for_every_format() -> None:
    assert all(presets(peer, f) for peer in PEERS for f in ("w4a16", "w4a16-g64", "w8a8"))


def test_the_summary_puts_the_best_first_and_names_failures() -> None:
    row = {"format": "w4a16", "by": "p", "draw": 0, "exact_match": 1.0, "seconds": 1.0}
    rows = [
        {**row, "method": "worse", "kl": 0.2},
        {**row, "method": "better", "kl": 0.1},
        {"format": "w4a16", "by": "p", "draw": 0, "method": "gone", "failed": "no GPU"},
    ]
    lines = summary(rows).splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["better", "worse"]
    assert lines[3].endswith("failed: no GPU")
