"""The largest |activation| of every tensor on the calibration samples: what decides whether float16 is wide enough.

Measured on the float model, module by module, in the layers that are exported: what enters and what leaves each layer,
and each module below it. Tensors between modules (queries after rotation, attention scores) are not seen; the exporter
keeps headroom for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress, silent
from qvlm.recipe import COMPONENTS

Magnitudes = dict[str, dict[str, float]]


@torch.no_grad()
def measure(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], progress: Progress = silent
) -> Magnitudes:
    """Module name -> {"input", "output"}: the largest |value| over all samples, one forward pass each."""
    largest: Magnitudes = {}

    def see(name: str, side: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            sides = largest.setdefault(name, {})
            sides[side] = max(sides.get(side, 0.0), float(value.abs().max()))

    with ExitStack() as stack:
        for name in _modules(model, adapter):

            def record(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                see(name, "input", args[0] if args else kwargs.get("hidden_states"))
                see(name, "output", output)

            hook = model.get_submodule(name).register_forward_hook(record, with_kwargs=True)
            stack.callback(hook.remove)
        for number, sample in enumerate(samples):
            progress("float ranges", number, len(samples))
            model(**sample.model_inputs())
    progress("float ranges", len(samples), len(samples))
    return largest


def _modules(model: nn.Module, adapter: Adapter) -> list[str]:
    """Every layer that is exported and what is below it, in module order."""
    layers = [name for component in COMPONENTS for name in adapter.layer_names(model, component)]
    return [
        f"{layer}.{below}" if below else layer
        for layer in layers
        for below, _ in model.get_submodule(layer).named_modules()
    ]
