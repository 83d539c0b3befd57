"""Proves the arithmetic of memory: stored bytes, the peak of activations against a count by hand, the
context that fits, and what a user is told.

Run: python -m pytest tests/export/test_fit.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper, numpy_helper, parser

from qvlm.errors import ExportError
from qvlm_export.build import image_spec, model_spec
from qvlm_export.cli import main
from qvlm_export.conform.view import GraphView
from qvlm_export.fit import GIB, Device, fit, named_device, peak_bytes
from qvlm_export.package import write_manifest
from qvlm_runtime.manifest import EngineSpec


def _view(text: str, folder: Path) -> GraphView:
    graph = parser.parse_graph(text)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "g.onnx")
    return GraphView.open(folder / "g.onnx")


def test_the_peak_is_what_lives_at_once(tmp_path: Path) -> None:
    # a and b (S*4 floats each) live together with their sum; c only with what it is made of.
    view = _view(
        "g (float[S,4] x) => (float[S,4] y)"
        "{ a = Relu(x) b = Neg(x) s = Add(a, b) v = Identity(s) y = Exp(v) }",
        tmp_path,
    )
    assert peak_bytes(view, {"S": 10}, {}) == 3 * 10 * 4 * 4
    # The view v is no copy but keeps s alive: a chain needs two tensors, not one.
    chain = _view(
        "g (float[S,4] x) => (float[S,4] y) { s = Relu(x) v = Identity(s) y = Exp(v) }", tmp_path
    )
    assert peak_bytes(chain, {"S": 10}, {}) == 2 * 10 * 4 * 4


def test_a_slice_to_an_input_is_counted_by_its_value(tmp_path: Path) -> None:
    view = _view(
        "g (float[8,100] x, int64[1] n) => (float[8,M] y) <int64[1] zero = {0}, int64[1] axis = {1}>"
        "{ s = Slice(x, zero, n, axis) y = Relu(s) }",
        tmp_path,
    )
    assert peak_bytes(view, {}, {"n": 7}) == 2 * 8 * 7 * 4
    with pytest.raises(ExportError, match="the shape of s is"):
        peak_bytes(view, {}, {})


@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_weights_and_cache_are_the_models(built: Callable[..., Any], target: str) -> None:
    folder, spec, checkpoint = built("float", target)
    model = model_spec(checkpoint)
    found = fit(folder, target, spec, model, image_spec(checkpoint), named_device("thor"))
    stored = sum(
        numpy_helper.to_array(tensor).nbytes
        for path in spec.graphs.values()
        for tensor in onnx.load(str(folder / path)).graph.initializer
    )
    assert found.weights == stored
    size = {"float32": 4, "float16": 2}[spec.dtype]
    assert found.cache_per_token == 2 * model.layers * model.kv_heads * model.head_dim * size
    assert (found.context, found.fits) == (model.max_context, True)
    assert (found.largest, found.largest_name.endswith("mlp.gate_proj.weight")) == (
        384 * 640 * size,
        True,
    )


def test_int4_weights_count_half_a_byte(built: Callable[..., Any]) -> None:
    sizes = {}
    for recipe in ("float", "w4a16"):
        folder, spec, checkpoint = built(recipe, "jetpack6")
        device = named_device("thor")
        sizes[recipe] = fit(
            folder, "jetpack6", spec, model_spec(checkpoint), image_spec(checkpoint), device
        ).weights
    linears = sum(
        checkpoint.tensor(f"{name}.weight_shape").prod()
        for name, entry in checkpoint.linears.items()
        if entry["format"] == "w4a16"
    )
    # Two bytes become half a byte and a 2-byte scale per 128; vision's INT8 saves the rest.
    assert sizes["float"] - sizes["w4a16"] > linears * (2 - 0.5 - 2 / 128)


def test_the_context_is_the_largest_that_fits(built: Callable[..., Any]) -> None:
    folder, spec, checkpoint = built("w4a16", "jetpack6")
    model = model_spec(checkpoint)

    def at(usable: int) -> Any:
        return fit(
            folder, "jetpack6", spec, model, image_spec(checkpoint), Device("d", 2 * GIB + usable)
        )

    whole = at(1 << 30)
    least = whole.weights + whole.activations + whole.cache_per_token * whole.context
    assert at(least).context == model.max_context
    below = at(least - 1)
    assert 0 < below.context < model.max_context
    used = below.weights + below.activations + below.cache_per_token * below.context
    assert used <= least - 1
    none = at(whole.weights)
    assert (none.context, none.fits) == (0, False)
    assert none.lines()[-1] == "does not fit: use fewer bits, or a larger device"


def test_a_tensor_too_large_for_one_piece_is_told(built: Callable[..., Any]) -> None:
    folder, spec, checkpoint = built("float", "jetpack6")
    small = Device("d", 16 * GIB, piece=200_000)
    found = fit(folder, "jetpack6", spec, model_spec(checkpoint), image_spec(checkpoint), small)
    assert found.context and not found.fits
    assert "may be refused in one piece" in found.lines()[-1]


def test_the_command(
    built: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, spec, checkpoint = built("w4a16", "jetpack6")
    shutil.copytree(folder, tmp_path / "out")
    write_manifest(tmp_path / "out", checkpoint, {"jetpack6": spec})
    assert main(["check", str(tmp_path / "out"), "--device", "orin-nano-8gb", "--json"]) == 0
    out = capsys.readouterr().out
    assert "fits up to 160 tokens, the model's whole context" in out
    answer = json.loads(out.splitlines()[-1])
    assert answer["fits"][0]["fits"] and answer["fits"][0]["device"] == "orin-nano-8gb"
    assert main(["check", str(tmp_path / "out"), "--device", "orin-micro"]) == 1
    assert "Known: orin-nano-4gb" in capsys.readouterr().err
    graph = str(tmp_path / "out" / spec.graphs["vision"])
    assert main(["check", graph, "--target", "jetpack6", "--device", "thor"]) == 1
    assert "needs an exported folder" in capsys.readouterr().err


def test_engines_count_where_there_are_some(built: Callable[..., Any], tmp_path: Path) -> None:
    folder, spec, checkpoint = built("w4a16", "rtx")
    shutil.copytree(folder, tmp_path / "out")
    engines: dict[str, EngineSpec] = {}
    for sm, size in ((86, 1000), (89, 3000)):
        for stem in ("vision", "decoder"):
            path = f"rtx/{stem}.sm{sm}.plan"
            engines[f"sm{sm}/{stem}"] = EngineSpec(path, "tensorrt-rtx", "1.7.1", sm)
            (tmp_path / "out" / path).write_bytes(bytes(size))
    with_engines = replace(spec, engines=engines)
    device = named_device("thor")
    specs = model_spec(checkpoint), image_spec(checkpoint)
    found = fit(tmp_path / "out", "rtx", with_engines, *specs, device)
    assert found.weights == 6000
