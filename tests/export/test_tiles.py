"""Proves that the graphs of the families that cut images into tiles compute what Hugging Face's own forward computes:
one image and three, of different numbers of tiles, prompt and cached steps, each option of a family.

Run: python -m pytest tests/export/test_tiles.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import IMAGE_TOKEN
from tiny_tiles import Answer, Prompt, answer, feature_index, float_checkpoint, prompt, tiny_model

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm_export.bounds import relative_error
from qvlm_export.build import build, model_spec
from qvlm_export.conform import check
from qvlm_export.targets import TARGETS, named_target
from qvlm_runtime.backend import EXACT, open_session
from qvlm_runtime.decoder import Decoder

# What the issue asks of a float32 export; measured: below 2e-6.
LOGIT_TOLERANCE = 1e-4
STEPS = 33
# variant -> (family, rows of a tile, changes)
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "smolvlm": ("smolvlm", 9, {}),
    "smolvlm, tied, three by three": (
        "smolvlm",
        4,
        {"scale_factor": 3, "tie_word_embeddings": True, "text__attention_bias": True},
    ),
    "idefics3": ("idefics3", 9, {"vision__hidden_act": "gelu"}),
    "internvl": ("internvl", 9, {"tie_word_embeddings": False}),
    "internvl, norms, biases, tied": (
        "internvl",
        9,
        {
            "vision__use_qk_norm": True,
            "vision__attention_bias": True,
            "vision__norm_type": "rms_norm",
            "vision__use_mean_pooling": False,
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "internvl, an earlier layer": (
        "internvl",
        9,
        {"vision_feature_layer": -2},
    ),
    "internvl, Qwen3": ("internvl", 9, {"text__model_type": "qwen3", "text__head_dim": 96}),
    "llava_next": ("llava_next", 36, {}),
    "llava_next, Mistral": (
        "llava_next",
        36,
        {"text__model_type": "mistral", "text__sliding_window": None},
    ),
    "llava_onevision": ("llava_onevision", 36, {}),
}
# For the pinpoints of ``tiny_tiles``: two pieces with padding above and below, three with none, four with padding.
SIZES = ((40, 96), (120, 40), (90, 100))
PIECES = (3, 4, 5)


class Case:
    """A tiny model, its float graphs for ONNX Runtime, and a prompt of one image and one of three."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.family, self.rows, changes = VARIANTS[variant]
        self.model = tiny_model(self.family, **changes)
        self.folder = folder
        self.checkpoint = Checkpoint(float_checkpoint(self.model, folder / "checkpoint"))
        self.spec = build(self.checkpoint, named_target("ort"), folder, None, silent)
        self.vision = open_session(folder / self.spec.graphs["vision"], accuracy_level=EXACT)
        session = open_session(folder / self.spec.graphs["decoder"], accuracy_level=EXACT)
        self.decoder = Decoder(session, model_spec(self.checkpoint), self.spec)

    @property
    def packed(self) -> bool:
        return "llava" in self.family

    def prompts(self) -> list[Prompt]:
        found = []
        for texts, counts, images in (
            ((3, 9), PIECES[2:], (2,)),
            ((2, 4, 1, 6), PIECES, (0, 1, 2)),
        ):
            if self.packed:
                sizes = tuple(SIZES[i] for i in images)
                one = Prompt([], prompt(self.model, texts, (), counts=counts).tiles, counts, sizes)
                rows = [len(index) for index in feature_index(self.model, one)]
                found.append(prompt(self.model, texts, rows, counts=counts, sizes=sizes))
            else:
                counts = tuple(n - 2 for n in counts)
                rows = [self.rows * n for n in counts]
                found.append(prompt(self.model, texts, rows, counts=counts))
        return found

    def features(self, p: Prompt) -> np.ndarray[Any, Any]:
        """image_features of every image, one run each."""
        tiles = np.split(p.tiles.numpy(), np.cumsum(p.counts)[:-1])
        feeds = [{"pixel_values": part} for part in tiles]
        if self.packed:
            for feed, index in zip(feeds, feature_index(self.model, p), strict=True):
                feed["feature_index"] = index
        return np.concatenate([self.vision.run(feed)["image_features"] for feed in feeds])

    def logits(self, p: Prompt, expected: Answer) -> np.ndarray[Any, Any]:
        """Prefill, then a cached step per token: [T, vocab]."""
        ids = np.array(p.ids)
        image = ids == IMAGE_TOKEN
        index = np.where(image, np.cumsum(image) - 1, -1)
        state = self.decoder.start(len(ids) + STEPS, self.features(p))
        rows = [state.step(p.ids, index)]
        rows += [state.step([token]) for token in expected.tokens[:-1]]
        return np.stack(rows)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(variant: str) -> Case:
        if variant not in made:
            made[variant] = Case(tmp_path_factory.mktemp("tiles"), variant)
        return made[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transformers(case: Callable[[str], Case], variant: str) -> None:
    made = case(variant)
    for p in made.prompts():
        expected = answer(made.family, made.model, p, STEPS)
        features = made.features(p)
        assert features.shape == expected.image_features.shape
        assert relative_error(features, expected.image_features).largest <= LOGIT_TOLERANCE
        found = made.logits(p, expected)
        for row, reference in zip(found, expected.logits, strict=True):
            assert relative_error(row, reference).largest <= LOGIT_TOLERANCE
        np.testing.assert_array_equal(found.argmax(-1), expected.tokens)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_norms_and_biases_of_internvl_have_no_findings(
    case: Callable[[str], Case], name: str, tmp_path: Path
) -> None:
    """What no family's plain model has; those are in test_family_targets.py."""
    checkpoint = case("internvl, norms, biases, tied").checkpoint
    build(checkpoint, TARGETS[name], tmp_path, None, silent)
    found = [finding for finding in check(tmp_path, TARGETS[name]) if finding.level != "info"]
    assert [finding.line() for finding in found] == []


@pytest.mark.parametrize("side", [26, 27, 32])  # Idefics3-8B, SmolVLM2-2.2B, SmolVLM-256M and 500M
def test_patches_of_published_sizes_have_their_own_position(side: int) -> None:
    import torch
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    module = SmolVLMVisionEmbeddings(
        SmolVLMVisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    )
    with torch.no_grad():
        module.patch_embedding.weight.zero_()
        module.patch_embedding.bias.zero_()
        module.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        mask = torch.ones(1, side, side, dtype=torch.bool)
        found = module(torch.zeros(1, 3, side, side), mask)[0, :, 0]
    np.testing.assert_array_equal(found.numpy(), np.arange(side**2))


@pytest.mark.parametrize(
    ("variant", "part", "change", "message"),
    [
        ("smolvlm", "vision_config", {"model_type": "vit"}, "expected smolvlm_vision"),
        ("smolvlm", "text_config", {"model_type": "gemma"}, "expected llama"),
        ("internvl", "vision_config", {"image_size": [48, 96]}, "expected a square"),
        ("internvl", "vision_config", {"patch_size": [16, 16]}, "expected a multiple of 2"),
        ("internvl", "vision_config", {"norm_type": "batch"}, "expected layer_norm or rms_norm"),
        (
            "llava_next",
            "text_config",
            {"model_type": "mistral", "sliding_window": 16},
            "sliding window of 16",
        ),
    ],
)
def test_what_no_graph_can_do_is_named(
    case: Callable[[str], Case],
    variant: str,
    part: str,
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    import json
    import shutil

    source = case(variant).checkpoint.directory
    shutil.copytree(source, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message) as error:
        build(Checkpoint(tmp_path / "checkpoint"), named_target("ort"), tmp_path, None, silent)
    assert "config.json: " in str(error.value)
    assert "\n" not in str(error.value)
