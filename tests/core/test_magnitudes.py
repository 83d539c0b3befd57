"""Proves that the recorded magnitudes are the largest activations of the exported layers, image and
text samples together, and that they reach the checkpoint.

Run: python -m pytest tests/core/test_magnitudes.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import IMAGE_TOKEN
from tiny_source import picture

from qvlm.capture import Sample, build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.magnitudes import measure
from qvlm.models import ADAPTERS
from qvlm.source import Loaded, load, open_source

ADAPTER = ADAPTERS["llava"]


@pytest.fixture(scope="module")
def loaded(tiny_source: Path) -> Loaded:
    return load(open_source(str(tiny_source)))


def _sample(loaded: Loaded, images: int, prompt: str) -> Sample:
    pictures = [picture(i) for i in range(images)]
    return build_sample(loaded.processor, pictures, prompt, "a cat", IMAGE_TOKEN)


def test_they_are_the_largest_values_of_the_forward_pass(loaded: Loaded) -> None:
    samples = [_sample(loaded, 1, "What?"), _sample(loaded, 0, "Hello?")]
    found = measure(loaded.model, ADAPTER, samples)
    layers = "model.language_model.layers."
    with torch.no_grad():
        outs = [
            loaded.model(**sample.model_inputs(), output_hidden_states=True) for sample in samples
        ]
    for index in (0, 1):
        entering = max(float(out.hidden_states[index].abs().max()) for out in outs)
        assert found[f"{layers}{index}"]["input"] == entering
    assert found["lm_head"]["output"] == max(float(out.logits.abs().max()) for out in outs)
    # What enters a linear is seen: gate times up is no module's output.
    assert found[f"{layers}1.mlp.down_proj"]["input"] > 0


def test_one_large_activation_is_seen_and_dead_layers_are_not(loaded: Loaded) -> None:
    sample = _sample(loaded, 1, "What?")
    before = measure(loaded.model, ADAPTER, [sample])
    norm = loaded.model.get_submodule("model.language_model.layers.1.input_layernorm")
    with torch.no_grad():
        norm.weight.mul_(100.0)
        after = measure(loaded.model, ADAPTER, [sample])
        norm.weight.div_(100.0)
    name = "model.language_model.layers.1.self_attn.q_proj"
    assert after[name]["input"] == pytest.approx(100 * before[name]["input"], rel=1e-6)
    towers = {name.split(".")[4] for name in before if ".encoder.layers." in name}
    assert towers == {"0", "1"}  # the third vision layer reaches nobody


def test_the_checkpoint_holds_them(tiny_checkpoint: Path) -> None:
    found = Checkpoint(tiny_checkpoint).magnitudes()
    assert all(value > 0 for sides in found.values() for value in sides.values())
    assert {"lm_head", "model.language_model.layers.0"} <= set(found)
