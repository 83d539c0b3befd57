"""Proves how many kernels each graph form compiles to with TensorRT for RTX: why the cache is
appended and not scattered by default, that bfloat16 costs nothing, and that a token-normalised INT8
linear is one quantize kernel, one product and one epilogue.

Run: python -m pytest tests/export/test_kernel_counts.py   (needs the extra [rtx])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiled import Kernels, compile_graphs, counts
from tiny_models import make_case

from qvlm.checkpoint import Checkpoint
from qvlm.progress import silent
from qvlm.recipe import RECIPES, Recipe
from qvlm_export import rtx
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.graph import GraphBuilder
from qvlm_export.qdq import linear
from qvlm_export.targets import Target, Variant, named_target
from qvlm_export.weights import Weights, write_model

pytestmark = pytest.mark.rtx

# Kernels of the tiny model's decoder (two layers), prefill and decode, by recipe and cache. In place
# costs four to six more in prefill and one to four more in decode.
DECODER = {
    ("float", "append"): (23, 17),
    ("float", "scatter"): (27, 19),
    ("w4a16", "append"): (26, 21),
    ("w4a16", "scatter"): (30, 25),
    ("w8a8", "append"): (23, 22),
    ("w8a8", "scatter"): (28, 23),
}
VISION = {"float": 26, "w4a16": 27, "w8a8": 27}


@pytest.fixture(autouse=True)
def compiler() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")


def compiled(folder: Path, target: Target, checkpoint: Checkpoint, sm: int) -> dict[str, Kernels]:
    """Build and compile: graph -> kernels of each profile."""
    spec = build(checkpoint, target, folder, None, silent)
    return compile_graphs(folder, spec, checkpoint, sm)


@pytest.mark.parametrize(("recipe", "cache"), DECODER)
def test_appending_the_cache_takes_the_fewest_kernels(
    tiny_case: Callable[..., Any], tmp_path: Path, recipe: str, cache: Any
) -> None:
    checkpoint = Checkpoint(tiny_case(recipe).directory)
    found = compiled(tmp_path, named_target("rtx", Variant(cache=cache)), checkpoint, 86)
    assert counts(found) == (VISION[recipe], *DECODER[recipe, cache])
    appended = DECODER[recipe, "append"]
    assert all(n >= least for n, least in zip(DECODER[recipe, cache], appended, strict=True))


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_ada_and_bfloat16_take_as_many(
    tiny_case: Callable[..., Any], tmp_path: Path, recipe: str
) -> None:
    checkpoint = Checkpoint(tiny_case(recipe).directory)
    target = named_target("rtx", Variant(dtype="bfloat16"))
    found = compiled(tmp_path, target, checkpoint, 89)
    assert counts(found) == (VISION[recipe], *DECODER[recipe, "append"])


def test_token_normalised_int8_is_three_kernels(
    tiny_case: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_case("w8a8").directory)
    target = named_target("rtx")
    b = GraphBuilder("linear", target, Weights(checkpoint, target.dtype))
    x = b.input("x", b.float_type, (1, 64, 384))
    name = "model.language_model.layers.0.self_attn.q_proj"
    b.output(linear(b, x, name), "y", b.float_type, (1, 64, 384))
    path = tmp_path / "linear.onnx"
    write_model(b.model("test"), path, silent)
    _, (quantize, product, epilogue) = rtx.compile_graph(
        path, profiles("vision", model_spec(checkpoint), image_spec(checkpoint)), 86
    )
    assert {t.dtype for t in quantize.inputs} == {"Half"}
    assert sorted(t.dtype for t in quantize.outputs) == ["Half", "Int8"]  # the values, and m
    assert all(word in quantize.name for word in ("Abs", "Max", "Div", "Roun"))
    assert product.kind == "gemm"
    assert "Int8" in {t.dtype for t in product.inputs}
    assert product.constant_elements("Int8") == 384 * 384
    assert "MulMulAdd" in epilogue.name  # c[n], m, bias
    assert [t.dtype for t in epilogue.outputs] == ["Half"]


def test_a_split_head_stays_split(tmp_path: Path) -> None:
    """Pieces along N would be joined again into the one allocation that they are to avoid."""
    data = RECIPES["w4a16"].to_json()
    data["rules"] = [{"pattern": "head.*", "format": "w4a16-g64"}, *data["rules"]]
    checkpoint = Checkpoint(
        make_case(tmp_path / "c", Recipe.from_json(data), text_vocab_size=1024).directory
    )
    limit = 384 * 1024 // 4  # half of the head's INT4 bytes
    target = named_target("rtx", Variant(max_constant=limit))
    found = compiled(tmp_path / "out", target, checkpoint, 86)["decoder"]
    for kernels in found:
        heads = [
            t.elements
            for kernel in kernels
            for t in kernel.constants
            if t.dtype == "Int4" and t.shape[-1] == 1024
        ]
        assert heads == [192 * 1024] * 2
