"""Proves the whole build path against the names of four TensorRT releases, from a finished folder to
engines in its manifest and report; the timing cache, the options and the progress; every refusal;
and that a lost integer weight is seen in the inspector's list of every release.

Run: python -m pytest tests/export/test_engine.py
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from device_support import machine

from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm_export import cli
from qvlm_export.build import image_spec, model_spec
from qvlm_export.builder import Options, profiles
from qvlm_export.facts import GraphFacts, Product
from qvlm_export.kernels import check, check_kernel_names, check_kernels, kernels_of_engine
from qvlm_export.package import add_engines, write_manifest
from qvlm_export.report import Report, component_rows, to_html
from qvlm_runtime import SessionError
from qvlm_runtime.manifest import read_manifest, verify_files

BUILT = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")


@pytest.fixture
def folder(built: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """(recipe, targets) -> a finished folder, with a report."""

    def make(recipe: str = "w4a16", targets: tuple[str, ...] = ("jetpack6",)) -> Path:
        specs, checkpoint = {}, None
        for target in targets:
            source, specs[target], checkpoint = built(recipe, target)
            shutil.copytree(source / target, tmp_path / "out" / target)
        assert checkpoint is not None
        report = Report("0", "tiny", {}, component_rows(checkpoint), {"kl": 0.1, "greedy": 1.0,
                        "tokens": 4.0, "image_features": 0.1}, {t: {} for t in targets})  # fmt: skip
        (tmp_path / "out/report.json").write_text(report.to_json())
        (tmp_path / "out/report.html").write_text(to_html(report))
        write_manifest(tmp_path / "out", checkpoint, specs)
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8", "float"])
@pytest.mark.parametrize("release", BUILT)
def test_a_folder_gets_engines_with_every_release(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path], release: str, recipe: str
) -> None:
    machine(monkeypatch, release)
    out, stages = folder(recipe), list[tuple[str, int, int]]()
    rows = add_engines(out, lambda *stage: stages.append(stage))
    manifest = read_manifest(out)
    verify_files(out, manifest)
    engines = manifest.targets["jetpack6"].engines
    assert set(engines) == {"sm87/vision", "sm87/decoder"}
    decoder = engines["sm87/decoder"]
    assert decoder.path == "jetpack6/engines/decoder.sm87.plan" and decoder.path in manifest.files
    assert (decoder.backend, decoder.version, decoder.capability) == ("tensorrt", release, 87)
    assert decoder.profiles["prefill"] == {"tokens": [1, 18, 160], "past": [0, 0, 0]}
    assert decoder.profiles["decode"] == {"tokens": [1, 1, 1], "past": [1, 80, 159]}
    assert decoder.profiles["extend"] == {"tokens": [1, 18, 159], "past": [1, 80, 159]}
    modern = release not in ("10.3.0", "10.13.3.9")
    if recipe != "float":  # the fake lists integer products only
        assert {row.checked for row in rows} == {"constants" if modern else "names"}
    section = json.loads((out / "report.json").read_text())["targets"]["jetpack6"]["engines"]
    assert {row["engine"] for row in section} == {"sm87/vision", "sm87/decoder"}
    assert "decoder.sm87.plan" in (out / "report.html").read_text()
    # Two steps, the first with one inside: half, half; and the end.
    assert [stage for stage in stages if stage[0].startswith("decoder")] == [
        ("decoder: Building", done, 100) for done in (50, 50, 100)
    ]
    assert {stage for stage, _, _ in stages} == {"decoder: Building", "vision: Building"}
    assert not list(out.rglob("*.partial"))


def test_options_and_the_timing_cache_reach_the_builder(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    device, out = machine(monkeypatch, "10.3.0"), folder()
    cache = out / "jetpack6/engines/timing.sm87.cache"
    add_engines(out, silent, options=Options(workspace=512, level=5))
    assert device.trt.written[0] == {"limits": {"WORKSPACE": 512 << 20}, "level": 5}
    assert cache.read_bytes() == b"timed with 10.3.0"
    device.trt.calls.clear()
    add_engines(out, silent)
    assert device.trt.written[-1] == {"limits": {}, "level": 3}
    assert device.trt.calls.count("IBuilderConfig.create_timing_cache") == 2  # one a graph, taken
    later = machine(monkeypatch, "10.16.1.11")
    add_engines(out, silent)
    # Another release's is refused and an empty one begun, once; then its own is taken.
    assert later.trt.calls.count("IBuilderConfig.create_timing_cache") == 3
    assert cache.read_bytes() == b"timed with 10.16.1.11"
    assert len(json.loads((out / "report.json").read_text())["targets"]["jetpack6"]["engines"]) == 2


def test_a_damaged_timing_cache_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    machine(monkeypatch, "10.3.0")
    out = folder()
    cache = out / "jetpack6/engines/timing.sm87.cache"
    cache.parent.mkdir()
    cache.write_bytes(b"half of a ca")
    assert len(add_engines(out, silent)) == 2
    assert cache.read_bytes() == b"timed with 10.3.0"


def refusal(out: Path, **options: Any) -> str:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ExportError) as caught:
        add_engines(out, silent, **options)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kept = {path: data for path, data in after.items() if not path.match("timing.*")}
    assert kept == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_parser_builder_and_release_errors_are_one_line_with_the_node(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    device, out = machine(monkeypatch, "10.3.0"), folder()
    device.trt.refuse = "Softmax"
    assert "node 'layers.0/" in (line := refusal(out)) and "is not accepted: Softmax" in line
    assert "(and " in line
    device.trt.refuse, device.trt.fails = None, "Could not find any implementation for node X"
    assert "does not compile: Could not find any implementation for node X" in refusal(out)
    device.trt.release = device.trt.__version__ = "8.6.1"
    assert "TensorRT 8.6.1 is installed, its graphs are for 10.3 and later" in refusal(out)


def test_a_target_that_cannot_be_built_here_is_told(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    machine(monkeypatch, "10.3.0")
    out = folder(targets=("jetpack6", "rtx"))
    assert "expected one TensorRT target. Name one with --target" in refusal(out)
    assert "targets jetpack6, rtx, expected ort" in refusal(out, target="ort")
    assert "--sm is for target rtx" in refusal(out, target="jetpack6", capabilities=(86,))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(SessionError, match=r"TensorRT is not installed .* comes with JetPack"):
        add_engines(out, silent, "jetpack6")


def test_an_interrupt_during_a_build_ends_it(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    machine(monkeypatch, "10.3.0")
    out = folder()

    def interrupted(stage: str, done: int, total: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_engines(out, interrupted)
    assert not list(out.rglob("*.plan*"))


def _expand(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a compiler that misses the pattern: the first INT4 weight is written out, then multiplied."""
    for layer in layers:
        if layer["LayerType"] == "runtime_fusion":
            key = "Datatype" if "Constants" in layer else "Format/Datatype"
            sizes = [layer["Inputs"][0]["Dimensions"][-1], layer["Outputs"][0]["Dimensions"][-1]]
            layer["LayerType"] = "kgen"
            layer["Outputs"] = [{"Name": "w", "Dimensions": sizes, key: "Half"}]
            return layers
    raise AssertionError("no INT4 product")


def _to_float(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first INT8 product takes a float input."""
    for layer in layers:
        if layer["LayerType"] == "gemm":
            key = "Datatype" if "Constants" in layer else "Format/Datatype"
            layer["Inputs"][0][key] = "Half"
            return layers
    raise AssertionError("no INT8 product")


@pytest.mark.parametrize("release", BUILT)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [(_expand, "expands an INT4 weight|writes its INT4 weight out"), (_to_float, "INT8 x INT8")],
)
def test_a_lost_integer_weight_is_seen_in_the_inspectors_list(
    monkeypatch: pytest.MonkeyPatch,
    folder: Callable[..., Path],
    release: str,
    spoil: Any,
    match: str,
) -> None:
    device, out = machine(monkeypatch, release), folder("w4a16")
    device.trt.layers = lambda layers: spoil(layers) if _has(layers, spoil) else layers
    with pytest.raises(ExportError, match=match):
        add_engines(out, silent)
    assert "jetpack6/engines/decoder.sm87.plan" not in read_manifest(out).files


def _has(layers: list[dict[str, Any]], spoil: Any) -> bool:
    kind = "runtime_fusion" if spoil is _expand else "gemm"
    return any(layer["LayerType"] == kind for layer in layers)


# As TensorRT 8.6 to 10.x print them (trtexec --exportLayerInfo), shortened: words for types, profile
# in brackets; and a Myelin layer of 10.x with plain type names.
OLD = """{"Layers": [{"Name": "fc [profile 1]", "LayerType": "gemm", "Inputs": [{"Name": "x", "Location": "Device",
 "Dimensions": [1,8,96], "Format/Datatype": "Row major Int8 format"}], "Outputs": [{"Name": "y", "Dimensions":
 [1,8,160], "Format/Datatype": "Row major linear FP16 format"}], "Metadata": "[ONNX Layer: n]"},
 {"Name": "__myl_MulSum_myl0_7", "LayerType": "kgen", "Inputs": [{"Name": "a", "Dimensions": [8], "Format/Datatype":
 "Half"}], "Outputs": [{"Name": "b", "Dimensions": [8], "Format/Datatype": "Float"}], "Metadata": ""}]}"""


def test_both_vocabularies_of_the_inspector_are_read() -> None:
    product, other = kernels_of_engine(OLD, "g")
    assert (product.profile, other.profile) == (1, 0)
    assert [t.dtype for t in (*product.inputs, *product.outputs)] == ["Int8", "Half"]
    assert [t.dtype for t in (*other.inputs, *other.outputs)] == ["Half", "Float"]
    facts = GraphFacts("g", 1, 1, (Product("n", ("a",), 96 * 160, 96, "INT8"),), 1, 1, 96)
    check_kernel_names([product], facts, "g")
    assert check([product], facts, "g") == "names"
    assert check([other], facts, "g") == "nothing"  # as where a region stands as one layer
    with pytest.raises(ExportError, match="profile 0: node n is in no kernel with an INT8 input"):
        check_kernel_names([product, other], facts, "g")
    with pytest.raises(ExportError, match="0 elements, expected 15360"):
        check_kernels([product], facts, "g")
    for text in ('{"Layers": ["names", "only"]}', "{}", "no json"):
        with pytest.raises(ExportError, match="layer list is not understood"):
            kernels_of_engine(text, "g")


def test_a_list_that_tells_nothing_is_not_called_checked(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    device, out = machine(monkeypatch, "10.3.0"), folder()
    region = {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Inputs": [], "Outputs": []}
    device.trt.layers = lambda layers: [region]
    assert cli.main(["build", str(out), "--json"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [row["checked"] for row in json.loads(told[-1])["engines"]] == ["nothing", "nothing"]
    assert "not listed by this release, not checked" in told[-2]


def test_a_cache_in_place_needs_no_profile_for_the_past(built: Callable[..., Any]) -> None:
    _, _, checkpoint = built("w4a16", "jetpack6")
    specs = model_spec(checkpoint), image_spec(checkpoint)
    assert set(profiles("decoder", *specs, "scatter")) == {"prefill", "decode"}
    assert not any("past" in name for name in profiles("decoder", *specs, "scatter")["decode"])
    assert profiles("vision", *specs) == {}


def test_the_command_builds_and_reports(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, "10.3.0")
    out = folder()
    assert cli.main(["build", str(out), "--opt-level", "2", "--workspace", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["engine"] for row in told["engines"]} == {"sm87/vision", "sm87/decoder"}
    assert cli.main(["build", str(out), "--sm", "86"]) == 1
    assert "expected rtx" in capsys.readouterr().err
    assert cli.main(["build", str(out), "--workspace", "0"]) == 1
    assert "expected at least 1 MiB" in capsys.readouterr().err
