"""Proves that the built graphs compute what Hugging Face's own forward computes: prompt and cached
steps, several images, both cache forms, every option of the LLaVA family.

Run: python -m pytest tests/export/test_graphs.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qvlm.checkpoint import Checkpoint, Golden
from qvlm_export.bounds import UNIT_ROUNDOFF, epsilon, relative_error
from qvlm_export.build import model_spec
from qvlm_export.facts import graph_facts
from qvlm_runtime.backend import EXACT, open_session
from qvlm_runtime.decoder import Decoder, DecoderState

# What issue and paper ask of a float32 export; measured: below 1e-6.
LOGIT_TOLERANCE = 1e-4
STEPS = 40
# Each line is a set of options that the plain case does not have.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full last layer, no bias, one head per group, tied": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "tie_word_embeddings": True,
        "text_attention_bias": False,
        "text_num_key_value_heads": 6,
        "text_tie_word_embeddings": True,
        "vision_hidden_act": "gelu",
    },
    "concatenated layers, llama3 rope, other acts": {
        "vision_feature_layer": [0, -2],
        "projector_hidden_act": "quick_gelu",
        "vision_hidden_act": "gelu_pytorch_tanh",
        "text_hidden_act": "gelu",
        "text_mlp_bias": True,
        "text_rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
}


class Graphs:
    """Opened graphs of one built target."""

    def __init__(self, folder: Any, spec: Any, checkpoint: Checkpoint) -> None:
        self.spec, self.model = spec, model_spec(checkpoint)
        self.paths = {stem: folder / path for stem, path in spec.graphs.items()}
        self.vision = open_session(self.paths["vision"], accuracy_level=EXACT)
        session = open_session(self.paths["decoder"], accuracy_level=EXACT)
        self.decoder = Decoder(session, self.model, spec)

    def features(self, golden: Golden) -> np.ndarray[Any, Any]:
        pixels = golden.inputs["pixel_values"].astype(self.spec.dtype)
        return np.concatenate(
            [self.vision.run({"pixel_values": p[None]})["image_features"] for p in pixels]
        )

    def start(self, golden: Golden) -> DecoderState:
        count = len(golden.inputs["input_ids"]) + len(golden.inputs["tokens"])
        return self.decoder.start(count, self.features(golden))

    def logits(self, golden: Golden) -> np.ndarray[Any, Any]:
        """Prefill, then a cached step per token: [T, vocab]."""
        state = self.start(golden)
        rows = [state.step(golden.inputs["input_ids"], golden.inputs["image_index"])]
        rows += [state.step([int(token)]) for token in golden.inputs["tokens"][:-1]]
        return np.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transformers(built: Callable[..., Any], variant: str) -> None:
    folder, spec, checkpoint = built("float", "ort", tokens=STEPS + 1, **VARIANTS[variant])
    graphs = Graphs(folder, spec, checkpoint)
    goldens = checkpoint.goldens()
    assert {len(g.inputs["pixel_values"]) for g in goldens} == {1, 2}
    for golden in goldens:
        expected = golden.outputs["float"]["logits"]
        found = graphs.logits(golden)
        assert found.shape[0] == STEPS + 1
        for row, reference in zip(found, expected, strict=True):
            assert relative_error(row, reference).largest <= LOGIT_TOLERANCE
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float16_is_within_its_rounding(built: Callable[..., Any], variant: str) -> None:
    folder, spec, checkpoint = built("float", "jetpack6", tokens=STEPS + 1, **VARIANTS[variant])
    graphs = Graphs(folder, spec, checkpoint)
    # Both graphs one behind the other: their roundings add; 4 is bounds.SOFTMAX.
    both = sum(epsilon(graph_facts(path), "float16") for path in graphs.paths.values())
    for golden in checkpoint.goldens():
        error = relative_error(graphs.logits(golden), golden.outputs["float"]["logits"])
        assert UNIT_ROUNDOFF["float16"] / 16 < error.rms <= 4 * both


@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_prefill_in_pieces_equals_prefill_at_once(built: Callable[..., Any], target: str) -> None:
    folder, spec, checkpoint = built("float", target, tokens=STEPS + 1)
    graphs = Graphs(folder, spec, checkpoint)
    golden = checkpoint.goldens()[1]
    ids, index = golden.inputs["input_ids"], golden.inputs["image_index"]
    whole = graphs.start(golden).step(ids, index)
    state = graphs.start(golden)
    for part in np.array_split(np.arange(len(ids)), 3):
        last = state.step(ids[part], index[part])
    bound = 4 * epsilon(graph_facts(graphs.paths["decoder"]), spec.dtype)
    assert relative_error(last, whole).largest <= bound


@pytest.mark.parametrize(("target", "left"), [("ort", 1e4), ("ort-cuda", np.nan)])
def test_rows_behind_the_valid_length_do_not_matter(
    built: Callable[..., Any], target: str, left: float
) -> None:
    """A view that grows is read whole: what earlier turns left there is masked, and is finite. The
    other form does not read it at all.
    """
    folder, spec, checkpoint = built("float", target, tokens=STEPS + 1)
    graphs = Graphs(folder, spec, checkpoint)
    golden = checkpoint.goldens()[0]
    features = graphs.features(golden)
    ids, index = golden.inputs["input_ids"], golden.inputs["image_index"]

    def run(stale: float) -> dict[str, np.ndarray[Any, Any]]:
        inputs, rows = graphs.decoder.session.inputs, len(ids) + 9
        shapes = {
            name: [size or rows for size in info.shape]
            for name, info in inputs.items()
            if name.startswith("past_")
        }
        feed: dict[str, Any] = {n: np.full(s, stale, spec.dtype) for n, s in shapes.items()}
        feed |= {
            "input_ids": ids[None],
            "image_index": index[None],
            "position_ids": np.arange(len(ids))[None],
            "image_features": features.astype(spec.dtype),
            "write_index": np.zeros(1, np.int64),
            "kv_len": np.array([len(ids)]),
        }
        return graphs.decoder.session.run(feed)

    clean, stale = run(0.0), run(left)
    np.testing.assert_array_equal(clean["logits"], stale["logits"])
    valid = clean["present_key_1"][:, :, : len(ids)]
    np.testing.assert_array_equal(valid, stale["present_key_1"][:, :, : len(ids)])


def test_unused_layers_are_not_built(built: Callable[..., Any]) -> None:
    import onnx_ir as ir

    folder, spec, _ = built("float", "ort", tokens=STEPS + 1)
    names = set(ir.load(folder / spec.graphs["vision"]).graph.initializers)
    assert any("encoder.layers.1." in name for name in names)
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in names)


def test_tied_head_is_stored_once(built: Callable[..., Any]) -> None:
    import onnx_ir as ir

    changes = VARIANTS["full last layer, no bias, one head per group, tied"]
    folder, spec, _ = built("float", "ort", tokens=STEPS + 1, **changes)
    shapes = [
        tuple(value.const_value.shape)
        for value in ir.load(folder / spec.graphs["decoder"]).graph.initializers.values()
        if value.const_value is not None
    ]
    assert shapes.count((333, 384)) == 1
    assert (384, 333) not in shapes
