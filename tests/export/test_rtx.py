"""Proves from TensorRT for RTX's own kernel list that integer weights stay integers in its products,
for every format and GPU generation, and that the check sees a graph that loses them.

Run: python -m pytest tests/export/test_rtx.py   (the compiler's tests need the extra [rtx])
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm_export import rtx
from qvlm_export.build import build, image_spec, model_spec
from qvlm_export.builder import profiles
from qvlm_export.facts import GraphFacts, Product, graph_facts
from qvlm_export.kernels import Kernel, KernelTensor, check_kernels, parse_kernels
from qvlm_export.package import add_engines, write_manifest
from qvlm_export.rtx import compile_target
from qvlm_export.targets import named_target
from qvlm_runtime import SessionError
from qvlm_runtime.manifest import read_manifest, verify_files


@pytest.fixture
def compiler() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")


# Two lines as release 1.7.1 prints them, shortened, and one that launches nothing.
LOG = """Layers:
Name: __mye11257_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0
Name: __myl_ReplCastMulCastFc_myl0_2, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [1,-1,384], Strides: [1], Datatype: Half, Format: (Linear) } ], Constants: [ { Name: w, Dimensions: [1,384,640], Datatype: Int4 }, { Name: s, Dimensions: [1,6,640], Datatype: Half } ], Outputs: [ { Name: y, Dimensions: [1,-1,640], Datatype: Half } ], TacticName: __myl, StreamId: 0
Name: fc1/MatMul_myl1_9, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,10,96], Datatype: Int8 } ], Constants: [ { Name: w, Dimensions: [1,96,160], Datatype: Int8 } ], Outputs: [ { Name: y, Dimensions: [1,10,160], Datatype: Half } ], TacticName: sm80, StreamId: 0"""  # noqa: E501


def test_kernels_are_read_from_the_log() -> None:
    int4, int8 = parse_kernels(["Parsing done", LOG])
    assert (int4.kind, int4.profile, int8.kind, int8.profile) == ("runtime_fusion", 0, "gemm", 1)
    assert int4.inputs == (KernelTensor((1, -1, 384), "Half"),)
    assert int4.constant_elements("Int4") == 384 * 640
    assert int8.constants == (KernelTensor((1, 96, 160), "Int8"),)


def _facts(dtype: str, elements: int) -> GraphFacts:
    return GraphFacts("g", 1, 1, (Product("n", ("a",), elements, 4, dtype),), 1, 1, 4)


def _kernel(kind: str, source: str, constant: str) -> Kernel:
    half = KernelTensor((8, 6), "Half")
    return Kernel(
        "k", kind, 0, (KernelTensor((1, 8), source),), (KernelTensor((8, 6), constant),), (half,)
    )


def test_a_fused_and_an_integer_product_pass() -> None:
    check_kernels([_kernel("runtime_fusion", "Half", "Int4")], _facts("INT4", 48), "g")
    check_kernels([_kernel("gemm", "Int8", "Int8")], _facts("INT8", 48), "g")


@pytest.mark.parametrize(
    ("kernels", "facts", "message"),
    [
        ([_kernel("kgen", "Half", "Int4")], _facts("INT4", 48), "expands an INT4 weight"),
        (
            [_kernel("runtime_fusion", "Half", "Int4")],
            _facts("INT4", 96),
            "48 elements, expected 96",
        ),
        ([_kernel("gemm", "Half", "Int8")], _facts("INT8", 48), "0 elements, expected 48"),
    ],
)
def test_a_lost_integer_weight_is_found(kernels: Any, facts: GraphFacts, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_kernels(kernels, facts, "g")


def test_missing_wheels_are_one_line(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, checkpoint = built("float", "rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(SessionError, match=r"pip install 'qvlm\[rtx\]'"):
        compile_target(folder, spec, model_spec(checkpoint), image_spec(checkpoint), silent)


@pytest.mark.rtx
def test_a_log_without_kernels_is_an_error(
    compiler: None, built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a release with another log would pass unchecked."""
    folder, spec, _ = built("float", "rtx")
    monkeypatch.setattr(rtx, "parse_kernels", lambda log: [])
    with pytest.raises(ExportError, match="no kernel list"):
        rtx.compile_graph(folder / spec.graphs["vision"], {}, 86)


@pytest.mark.rtx
@pytest.mark.parametrize(
    "recipe", ["float", "w4a16", "w4a16-g64", "w8a8", "w8a8-static", "w8a8-split"]
)
def test_every_graph_compiles_with_its_integers(
    compiler: None, built: Callable[..., Any], recipe: str
) -> None:
    folder, spec, checkpoint = built(recipe, "rtx")
    compiled, rows = compile_target(
        folder, spec, model_spec(checkpoint), image_spec(checkpoint), silent
    )
    assert set(compiled.engines) == {
        f"sm{sm}/{g}" for sm in (86, 89) for g in ("vision", "decoder")
    }
    for row in rows:
        stem = row.engine.rpartition("/")[2]
        facts = graph_facts(folder / spec.graphs[stem])
        assert row.int8_products == facts.count("INT8")
        # The compiler joins the separate INT4 q/k/v (and gate/up) into one product.
        layers = 2 if facts.count("INT4") else 0
        assert row.int4_products == 4 * layers
        plan = folder / compiled.engines[row.engine].path
        assert plan.stat().st_size == row.bytes > 0
    assert not list(folder.rglob("*.partial"))


@pytest.mark.rtx
def test_decode_attention_is_one_kernel_with_native_groups(
    compiler: None, built: Callable[..., Any]
) -> None:
    folder, spec, checkpoint = built("w4a16", "rtx")
    path, model = folder / spec.graphs["decoder"], model_spec(checkpoint)
    _, kernels = rtx.compile_graph(path, profiles("decoder", model, image_spec(checkpoint)), 86)
    decode = [k for k in kernels if k.profile == 1 and "_gemv_mha" in k.name]
    assert len(decode) == model.layers
    for kernel in decode:
        past = [t for t in kernel.inputs if t.shape == (1, -1, model.kv_heads, model.head_dim)]
        assert len(past) == 2  # keys and values are read as they lie, not repeated
    for profile in (0, 2):  # prefill, and a piece behind a past
        pieces = [k for k in kernels if k.profile == profile and "_gemm_mha" in k.name]
        assert len(pieces) == model.layers


@pytest.mark.rtx
@pytest.mark.parametrize(("sm", "recipe"), [(75, "w8a8"), (80, "w4a16"), (120, "w4a16")])
def test_other_gpu_generations_compile_too(
    compiler: None, built: Callable[..., Any], sm: int, recipe: str
) -> None:
    folder, spec, checkpoint = built(recipe, "rtx")
    compiled, rows = compile_target(
        folder, spec, model_spec(checkpoint), image_spec(checkpoint), silent, (sm,)
    )
    assert {row.engine for row in rows} == {f"sm{sm}/vision", f"sm{sm}/decoder"}
    engine = compiled.engines[f"sm{sm}/decoder"]
    assert (engine.backend, engine.capability) == ("tensorrt-rtx", sm)
    assert set(engine.profiles) == {"prefill", "decode", "extend"}


@pytest.mark.rtx
def test_sm75_has_no_int4(compiler: None, built: Callable[..., Any]) -> None:
    folder, spec, checkpoint = built("w4a16", "rtx")
    with pytest.raises(ExportError, match=r"^SM75: .* HW-specific datatypes: int4"):
        compile_target(folder, spec, model_spec(checkpoint), image_spec(checkpoint), silent, (75,))


@pytest.mark.rtx
def test_an_int4_projection_in_three_dimensions_is_found(
    compiler: None, built: Callable[..., Any], tmp_path: Path
) -> None:
    """The pitfall this form avoids: the compiler would expand o_proj to float16 at every run."""
    _, _, checkpoint = built("w4a16", "rtx", text_attention_bias=False)
    target = replace(named_target("rtx"), int4_attention_output_2d=False)
    spec = build(checkpoint, target, tmp_path, None, silent)
    with pytest.raises(ExportError, match="expands an INT4 weight"):
        compile_target(
            tmp_path, spec, model_spec(checkpoint), image_spec(checkpoint), silent, (86,)
        )
    assert not list(tmp_path.rglob("*.plan*.partial"))


@pytest.mark.rtx
def test_engines_join_a_finished_folder(
    compiler: None, built: Callable[..., Any], tmp_path: Path
) -> None:
    folder, spec, checkpoint = built("w8a8", "rtx")
    shutil.copytree(folder / "rtx", tmp_path / "rtx", ignore=shutil.ignore_patterns("engines"))
    write_manifest(tmp_path, checkpoint, {"rtx": spec})
    (row, _) = add_engines(tmp_path, silent, capabilities=(89,))
    manifest = read_manifest(tmp_path)
    assert row.file in manifest.files
    assert set(manifest.targets["rtx"].engines) == {"sm89/vision", "sm89/decoder"}
    verify_files(tmp_path, manifest)
    with pytest.raises(ExportError, match=r"no compute capability SM12\. Known: .*SM86"):
        add_engines(tmp_path, silent, capabilities=(12,))


def test_engines_need_an_rtx_target(built: Callable[..., Any], tmp_path: Path) -> None:
    folder, spec, checkpoint = built("w8a8", "ort")
    shutil.copytree(folder, tmp_path / "out")
    write_manifest(tmp_path / "out", checkpoint, {"ort": spec})
    with pytest.raises(ExportError, match="targets ort, expected rtx"):
        add_engines(tmp_path / "out", silent, capabilities=(86,))


@pytest.mark.rtx
def test_a_refused_node_is_named(compiler: None, built: Callable[..., Any]) -> None:
    folder, spec, _ = built("float", "ort")
    (folder / "engines").mkdir(exist_ok=True)
    with pytest.raises(ExportError, match=r"node '.*' is not accepted|does not compile"):
        rtx.compile_graph(folder / spec.graphs["decoder"], {}, 86)
