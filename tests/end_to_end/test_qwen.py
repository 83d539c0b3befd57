"""Proves that an exported Qwen-VL folder answers as transformers does, from pictures and a chat on:
patches, window order, interpolated positions, M-RoPE and deepstack as the runtime makes them; and that
its manifest gives the compiler profiles it takes.

Run: python -m pytest tests/end_to_end/test_qwen.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_qwen import FAMILIES, IMAGE_TOKEN, tiny_questions, write_tiny_source

from qvlm.capture import build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.generate import decode, stop_tokens
from qvlm.progress import silent
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES
from qvlm.source import Loaded, load, open_source
from qvlm_export.build import build
from qvlm_export.package import add_runtime_files, write_manifest
from qvlm_export.rtx import compile_target
from qvlm_export.targets import named_target
from qvlm_runtime import load as load_folder
from qvlm_runtime.manifest import read_manifest

TARGETS = ("ort", "rtx")
TOKENS = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Loaded]]:
    """family -> its tiny directory and model, made once."""
    made: dict[str, tuple[Path, Loaded]] = {}

    def make(family: str) -> tuple[Path, Loaded]:
        if family not in made:
            path = write_tiny_source(tmp_path_factory.mktemp(family) / "source", family)
            made[family] = path, load(open_source(str(path)))
        return made[family]

    return make


@pytest.fixture(scope="module")
def folders(
    sources: Callable[[str], tuple[Path, Loaded]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """family -> the float model's folder, with graphs for ort and rtx."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family in made:
            return made[family]
        folder = made[family] = tmp_path_factory.mktemp("folder")
        path, _ = sources(family)
        out = folder / "checkpoint"
        quantize(str(path), out, RECIPES["float"], questions=tiny_questions(1), goldens=1)
        checkpoint = Checkpoint(out)
        add_runtime_files(checkpoint, folder)
        specs = {n: build(checkpoint, named_target(n), folder, None, silent) for n in TARGETS}
        write_manifest(folder, checkpoint, specs, exclude=("checkpoint",))
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_runtime_answers_as_transformers(
    sources: Callable[[str], tuple[Path, Loaded]], folders: Callable[[str], Path], family: str
) -> None:
    _, loaded = sources(family)
    folder = folders(family)
    with load_folder(folder, backend="ort") as model:
        for question in tiny_questions(3):
            images = question.open_images()
            sample = build_sample(loaded.processor, images, question.prompt, "", IMAGE_TOKEN)
            stop = stop_tokens(loaded.model)
            expected = decode(loaded.model, sample.model_inputs(), TOKENS, stop).tokens[0].tolist()
            found = model.generate(question.prompt, images, max_new_tokens=TOKENS)
            assert list(found.token_ids) == expected


@pytest.mark.rtx
def test_the_manifest_gives_profiles_that_compile(folders: Callable[[str], Path]) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    folder = folders("qwen2_5_vl")
    manifest = read_manifest(folder)
    spec, rows = compile_target(
        folder, manifest.targets["rtx"], manifest.model, manifest.image, silent, [86]
    )
    assert set(spec.engines) == {"sm86/vision", "sm86/decoder"}
    assert all(row.bytes for row in rows)
