"""Proves that the graphs of Qwen2-VL, Qwen2.5-VL and Qwen3-VL compute what Hugging Face's own forward
computes: pictures of several shapes, up to three in a prompt, 40 cached steps, both cache forms, and
that the quantized ones compute what fake quantization does.

Run: python -m pytest tests/export/test_qwen.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_qwen import FAMILIES, tiny_questions, vision_feeds, write_tiny_source

from qvlm.checkpoint import Checkpoint, Golden
from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm_export import rtx
from qvlm_export.bounds import epsilon, graph_bound, relative_error
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.facts import graph_facts
from qvlm_export.kernels import check_kernels
from qvlm_export.models.qwen_vl import QwenConfig
from qvlm_export.targets import Variant, named_target
from qvlm_runtime.backend import EXACT, open_session
from qvlm_runtime.decoder import Decoder

# What the issue asks of a float32 export; measured: below 2e-6.
LOGIT_TOLERANCE = 1e-4
STEPS = 40
TIED = {"tie_word_embeddings": True, "text_tie_word_embeddings": True}


class Graphs:
    """Opened graphs of one built target."""

    def __init__(self, folder: Path, spec: Any, checkpoint: Checkpoint) -> None:
        self.spec, self.checkpoint = spec, checkpoint
        self.paths = {stem: folder / path for stem, path in spec.graphs.items()}
        self.vision = open_session(self.paths["vision"], accuracy_level=EXACT)
        session = open_session(self.paths["decoder"], accuracy_level=EXACT)
        self.decoder = Decoder(session, model_spec(checkpoint), spec)

    def features(self, golden: Golden) -> np.ndarray[Any, Any]:
        feeds = vision_feeds(golden, self.checkpoint.config, self.spec.dtype)
        return np.concatenate([self.vision.run(feed)["image_features"] for feed in feeds])

    def logits(self, golden: Golden, pieces: int = 1) -> np.ndarray[Any, Any]:
        """Prefill in so many pieces, then a cached step per token: [T, vocab]."""
        x = golden.inputs
        tokens = [int(token) for token in x["tokens"][:-1]]
        state = self.decoder.start(len(x["input_ids"]) + len(tokens), self.features(golden))
        for part in np.array_split(np.arange(len(x["input_ids"])), pieces):
            last = state.step(
                x["input_ids"][part], x["image_index"][part], x["position_ids"][:, part]
            )
        return np.stack([last, *(state.step([token]) for token in tokens)])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """(family, recipe name, changes) -> the quantized tiny checkpoint, made once."""
    made: dict[Any, Checkpoint] = {}

    def make(family: str, recipe: str, **changes: Any) -> Checkpoint:
        key = (family, recipe, repr(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            source = write_tiny_source(folder / "source", family, **changes)
            out = folder / "checkpoint"
            quantize(str(source), out, RECIPES[recipe], questions=tiny_questions(3), goldens=3)
            made[key] = Checkpoint(out)
        return made[key]

    return make


@pytest.fixture(scope="module")
def graphs(
    checkpoints: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Graphs]:
    made: dict[Any, Graphs] = {}

    def make(family: str, recipe: str, target: str, **changes: Any) -> Graphs:
        key = (family, recipe, target, repr(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("graphs")
            checkpoint = checkpoints(family, recipe, **changes)
            spec = build(checkpoint, named_target(target), folder, None, silent)
            made[key] = Graphs(folder, spec, checkpoint)
        return made[key]

    return make


CASES = [(family, {}) for family in FAMILIES] + [("qwen2_5_vl", TIED)]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_float32_equals_transformers(
    graphs: Callable[..., Graphs], family: str, changes: dict[str, Any]
) -> None:
    built = graphs(family, "float", "ort", **changes)
    goldens = built.checkpoint.goldens()
    assert [len(g.inputs["image_sizes"]) for g in goldens] == [1, 2, 3]
    for golden in goldens:
        expected = golden.outputs["float"]
        error = relative_error(built.features(golden), expected["image_features"])
        assert error.largest <= LOGIT_TOLERANCE
        found = built.logits(golden)
        assert len(found) >= STEPS
        for row, reference in zip(found, expected["logits"], strict=True):
            assert relative_error(row, reference).largest <= LOGIT_TOLERANCE
        np.testing.assert_array_equal(found.argmax(-1), expected["logits"].argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_is_within_its_rounding(graphs: Callable[..., Graphs], family: str) -> None:
    built = graphs(family, "float", "jetpack6")
    both = sum(epsilon(graph_facts(path), "float16") for path in built.paths.values())
    golden = built.checkpoint.goldens()[2]
    error = relative_error(built.logits(golden), golden.outputs["float"]["logits"])
    assert error.rms <= 4 * both  # as for LLaVA: 4 is what softmax enlarges here


@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_prefill_in_pieces_equals_prefill_at_once(
    graphs: Callable[..., Graphs], target: str
) -> None:
    """A row's rotary position is not its cache slot: the mask must come from the slot."""
    built = graphs("qwen2_5_vl", "float", target)
    golden = built.checkpoint.goldens()[2]
    positions = golden.inputs["position_ids"]
    assert positions.max() < len(golden.inputs["input_ids"]) - 1
    bound = 4 * epsilon(graph_facts(built.paths["decoder"]), built.spec.dtype)
    whole, pieces = built.logits(golden), built.logits(golden, pieces=4)
    assert relative_error(pieces, whole).largest <= bound


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_equals_fake_quantization(graphs: Callable[..., Graphs], family: str) -> None:
    built = graphs(family, "w4a16", "ort")
    facts = {stem: graph_facts(path) for stem, path in built.paths.items()}
    assert {n for f in facts.values() for n in f.linears} == set(built.checkpoint.linears)
    for golden in built.checkpoint.goldens():
        expected, unquantized = golden.outputs["quant"], golden.outputs["float"]
        moved = relative_error(expected["image_features"], unquantized["image_features"])
        bound = graph_bound(facts["vision"], "float32", 0, moved)
        error = relative_error(built.features(golden), expected["image_features"])
        assert error.rms <= bound.rms and error.largest <= bound.largest
        found = built.logits(golden)
        np.testing.assert_array_equal(found.argmax(-1), expected["logits"].argmax(-1))


def test_windows_decide(graphs: Callable[..., Graphs]) -> None:
    """Attention beyond the window gives other features, so the mask is in the graph."""
    built = graphs("qwen2_5_vl", "float", "ort")
    golden = built.checkpoint.goldens()[0]
    (feed,) = vision_feeds(golden, built.checkpoint.config, "float32")
    assert feed["window_segments"].max() > 1
    feed["window_segments"] = np.zeros_like(feed["window_segments"])
    found = built.vision.run(feed)["image_features"]
    assert relative_error(found, golden.outputs["float"]["image_features"]).rms > 1e-2


def test_a_config_that_does_not_fit_is_refused(checkpoints: Callable[..., Checkpoint]) -> None:
    checkpoint = Checkpoint(checkpoints("qwen2_5_vl", "float").directory)
    checkpoint.config["text_config"]["use_sliding_window"] = True
    with pytest.raises(ExportError, match="use_sliding_window is not supported"):
        QwenConfig.of(checkpoint)
    checkpoint.config["text_config"]["use_sliding_window"] = False
    checkpoint.config["text_config"]["rope_parameters"]["mrope_section"] = [6, 10, 15]
    with pytest.raises(ExportError, match="mrope_section"):
        build(checkpoint, named_target("ort"), checkpoint.directory / "x", None, silent)


def test_a_flat_config_is_read(checkpoints: Callable[..., Checkpoint]) -> None:
    """On the hub the decoder's keys stand at the top, and rope in its older form."""
    checkpoint = Checkpoint(checkpoints("qwen2_5_vl", "float").directory)
    expected = QwenConfig.of(checkpoint)
    text = checkpoint.config.pop("text_config")
    rope = text.pop("rope_parameters")
    checkpoint.config.update(text, model_type="qwen2_5_vl", rope_theta=rope["rope_theta"])
    checkpoint.config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    found = QwenConfig.of(checkpoint)
    assert found.vision == expected.vision
    assert found.text.heads == expected.text.heads
    assert found.text.rope["mrope_section"] == rope["mrope_section"]


@pytest.mark.rtx
def test_the_cache_in_place_compiles_with_its_integers(
    checkpoints: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """The other cache form than the default's, which end_to_end/test_qwen.py compiles."""
    pytest.importorskip("tensorrt_rtx_bindings")
    target = named_target("rtx", Variant(cache="scatter"))
    spec = build(checkpoints("qwen3_vl", "w4a16"), target, tmp_path, None, silent)
    model, image = (make(checkpoints("qwen3_vl", "w4a16")) for make in (model_spec, image_spec))
    path = tmp_path / spec.graphs["decoder"]
    _, kernels = rtx.compile_graph(path, profiles("decoder", model, image, "scatter"), 86)
    check_kernels(kernels, graph_facts(path), "decoder")
