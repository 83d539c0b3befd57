"""What a model folder holds: manifest.json as one frozen dataclass. Owned here, written by export.

    out/
      manifest.json               this file's ``Manifest``; sha256 of every other file
      tokenizer.json  chat_template.jinja
      ort/vision.onnx  ort/vision.onnx.data  ort/decoder.onnx  ort/decoder.onnx.data
      rtx/...  rtx/engines/vision.sm86.plan ...  jetpack6/engines/vision.sm87.plan ...
      goldens.npz  recipe.json  report.html  report.json

Contract of the two graphs (batch is always 1; F is the target's float type):

    vision    by the image spec's kind (image_spec.py), one image a run:
      whole, split, canvas    pixel_values F [N, 3, H, W], N tiles; a graph with N fixed to 1 is run
                              tile by tile  ->  image_features F [N * rows, feature]
      anyres                  also feature_index int64 [M]: which of the tiles' rows in order, with
                              the newline row behind them, become the image's
                              ->  image_features F [M, feature]
      patches                 pixel_values F [P, 3 * temporal * patch * patch]; patch_positions int64
                              [P, 2], line and column of each patch
                              with ``window``: window_index int64 [P / merge^2], the order of groups
                              of patches; window_inverse, its inverse; window_segments int64 [P], the
                              window of each patch in that order
                              with ``position_side``: position_index int64 [4, P], position_weights
                              F [4, P]: corners in the table of positions, and their shares
                              ->  image_features F [P / merge^2, feature]
    decoder   input_ids, image_index (row of image_features or -1): int64 [1, S]; position_ids int64
              [1, S], or [3, S] (time, line, column) where positions is "mrope";
              image_features F [M, feature], M >= 1 also when no token uses it
              ->  logits F [1, 1, vocab], last position
      cache "scatter": past_key_i, past_value_i F [1, kv_heads, C, head_dim], write_index int64 [1]
              (slot of the first new row), kv_len int64 [1] (= write_index + S)
              -> present_key_i, present_value_i of the same shape, to be bound to the same buffer
      cache "grown": as "scatter", but all C rows are read (those behind kv_len weigh exactly 0 and must
              be finite), and past_value_i and present_value_i are
              F [1, kv_heads, head_dim, C]
      cache "append":  past_key_i, past_value_i F [1, P, kv_heads, head_dim], P >= 0
              -> present_key_i, present_value_i F [1, S, kv_heads, head_dim]: the new rows only
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qvlm_runtime.errors import FolderError
from qvlm_runtime.image_spec import ImageSpec, parse_image, wrong_values

SCHEMA = 2
CacheForm = Literal["scatter", "grown", "append"]
CACHE_FORMS = ("scatter", "grown", "append")
DTYPES = ("float32", "float16", "bfloat16")
Positions = Literal["sequential", "mrope"]
POSITIONS = ("sequential", "mrope")


@dataclass(frozen=True)
class MarkerSpec:
    """The text that stands in the prompt for one image, in place of its marker (the image token).

    "{image}" is a run of image tokens, one for each row of the image's features. ``whole`` is for
    an image that is not cut. Where ``tile`` is given and the image is cut: ``tile`` for each tile
    ("{line}" and "{column}" count from 1, "{image}" is that tile's rows), ``line`` behind each line
    of tiles, ``last`` for the tile of the whole image. leading: the images' texts stand before the
    first token that the tokenizer adds, and markers, which the template need not write, vanish.
    """

    whole: str = "{image}"
    tile: str = ""
    line: str = ""
    last: str = ""
    leading: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """The numbers generic code needs to drive the graphs.

    feature_size: width of a row of image_features. positions: rule of position_ids, see
    positions.py. template_tokens holds the tokenizer's special_tokens_map ("bos_token": "<s>", …):
    the names a chat template reads. images: the most that a prompt may have, None for any number.
    """

    family: str
    hidden_size: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    image_token: str
    image_token_id: int
    feature_size: int
    positions: Positions = "sequential"
    marker: MarkerSpec = MarkerSpec()
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    images: int | None = None


@dataclass(frozen=True)
class EngineSpec:
    """One plan, and what it runs on.

    backend: "tensorrt" or "tensorrt-rtx"; version: its release, exactly; capability: 87 for compute
    capability 8.7. profiles maps "prefill", "decode" and "extend" to {"tokens": [least, optimal,
    largest], "past": [...]}; a vision engine has none.
    """

    path: str
    backend: str
    version: str
    capability: int
    profiles: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetSpec:
    """One target's graphs inside the folder.

    ``dtype`` is numpy's name of F; ``graphs`` maps "vision" and "decoder" to a path, ``engines``
    maps "sm86/decoder" to a plan.
    """

    dtype: str
    opset: int
    cache: CacheForm
    graphs: Mapping[str, str]
    engines: Mapping[str, EngineSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole folder."""

    version: str
    model: ModelSpec
    image: ImageSpec
    targets: Mapping[str, TargetSpec]
    files: Mapping[str, FileEntry]
    recipe: Mapping[str, Any]
    schema: int = SCHEMA

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse and check.

        FolderError on another schema, a missing or unknown key, a value of another type, or a path
        that leaves the folder.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FolderError(f"{where}: not JSON ({error}). Copy the folder again.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise FolderError(
                f"{where}: schema {found!r}, expected {SCHEMA}. "
                "Export again with this version of qvlm."
            )
        unknown = sorted(set(data) - set(Manifest.__dataclass_fields__))
        try:
            if unknown:
                raise KeyError(unknown[0])
            manifest = _parse(data)
            wrong = next(_wrong_values(manifest), None)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FolderError(
                f"{where}: a key is missing or unknown ({error}). "
                "Export again with this version of qvlm."
            ) from error
        if wrong is not None:
            raise FolderError(f"{where}: {wrong}. Export again with this version of qvlm.")
        for path in manifest.paths():
            _check_relative(path, where)
        return manifest

    def paths(self) -> list[str]:
        """Every path the manifest names."""
        named = list(self.files)
        for target in self.targets.values():
            named += [*target.graphs.values(), *(e.path for e in target.engines.values())]
        return named


def _parse(data: dict[str, Any]) -> Manifest:
    model = dict(data["model"])
    model["eos_token_ids"] = tuple(model["eos_token_ids"])
    model["marker"] = MarkerSpec(**model["marker"])
    return Manifest(
        str(data["version"]),
        ModelSpec(**model),
        parse_image(data["image"]),
        {name: _target(target) for name, target in data["targets"].items()},
        {name: FileEntry(**entry) for name, entry in data["files"].items()},
        data["recipe"],
    )


def _target(data: dict[str, Any]) -> TargetSpec:
    engines = {key: EngineSpec(**engine) for key, engine in data["engines"].items()}
    return TargetSpec(**{**data, "engines": engines})


def _wrong_values(manifest: Manifest) -> Iterator[str]:
    """A hand-edited value is named here, with its key, and not by a TypeError in a later layer."""
    yield from _wrong_model(manifest.model)
    yield from wrong_values(manifest.image)
    maps: dict[str, Any] = {"model.template_tokens": manifest.model.template_tokens}
    for name, target in manifest.targets.items():
        maps[f"targets.{name}.graphs"] = target.graphs
        yield from _wrong_engines(name, target)
        if target.dtype not in DTYPES:
            yield f"targets.{name}.dtype is {target.dtype!r}, expected one of {DTYPES}"
        if target.cache not in CACHE_FORMS:
            yield f"targets.{name}.cache is {target.cache!r}, expected one of {CACHE_FORMS}"
    for key, value in maps.items():
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            yield f"{key} is {value!r}, expected a map of strings"


def _wrong_model(model: ModelSpec) -> Iterator[str]:
    for key, value in vars(model).items():
        kind = ModelSpec.__annotations__[key]
        if kind == "str" and not isinstance(value, str):
            yield f"model.{key} is {value!r}, expected a string"
        if kind == "int" and (type(value) is not int or value < (key != "image_token_id")):
            yield f"model.{key} is {value!r}, expected a positive integer"
    if model.images is not None and (type(model.images) is not int or model.images < 1):
        yield f"model.images is {model.images!r}, expected a positive integer or null"
    if not all(type(token) is int for token in model.eos_token_ids):
        yield f"model.eos_token_ids is {model.eos_token_ids!r}, expected integers"
    if model.positions not in POSITIONS:
        yield f"model.positions is {model.positions!r}, expected one of {POSITIONS}"
    for key, value in vars(model.marker).items():
        if not isinstance(value, bool if key == "leading" else str):
            yield f"model.marker.{key} is {value!r}, expected a string (leading: true or false)"


def _wrong_engines(name: str, target: TargetSpec) -> Iterator[str]:
    for key, engine in target.engines.items():
        texts = (engine.path, engine.backend, engine.version)
        if type(engine.capability) is not int or not all(isinstance(text, str) for text in texts):
            yield f"targets.{name}.engines.{key} is {engine!r}, expected strings and a number"


def _check_relative(path: str, where: str) -> None:
    pure = PurePosixPath(path)
    odd = any(sign in path for sign in "\\:\0")
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or odd:
        raise FolderError(
            f"{where}: path {path!r} leaves the folder. "
            "This folder was not written by qvlm-export; do not use it."
        )


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json; FolderError if there is none."""
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FolderError(
            f"{path}: not found. Give a folder written by qvlm-export "
            "(an interrupted export has none: run it again with --resume)."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: not readable ({error})") from error
    return Manifest.from_json(text, str(path))


def digest(path: Path) -> FileEntry:
    """Size and sha256 of a file, read once in 1 MiB pieces."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
            size += len(piece)
    return FileEntry(size, sha.hexdigest())


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file that the manifest lists with it; sizes first, which cost nothing.

    FolderError naming the first file that is absent, outside the folder, resized or altered.
    """
    names = list(manifest.files)
    check_sizes(folder, manifest, names)
    check_digests(folder, manifest, names)


def check_sizes(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """FolderError naming the first file that is not listed, absent, outside the folder or resized."""
    root = folder.resolve()
    for name in names:
        path = folder / name
        if name not in manifest.files:
            raise FolderError(f"{path}: not listed under files of manifest.json. Export again.")
        if not path.resolve().is_relative_to(root):
            raise FolderError(f"{path}: a link that leaves the folder. Copy the file itself.")
        if not path.is_file():
            raise FolderError(f"{path}: listed in manifest.json but absent. Copy the folder again.")
        size, expected = path.stat().st_size, manifest.files[name].bytes
        if size != expected:
            raise FolderError(f"{path}: {size} bytes, expected {expected}. Copy the folder again.")


def check_digests(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """FolderError naming the first file whose contents differ from the manifest's sha256."""
    for name in names:
        path = folder / name
        try:
            found = digest(path)
        except OSError as error:
            raise FolderError(f"{path}: not readable ({error})") from error
        if found != manifest.files[name]:
            raise FolderError(f"{path}: sha256 differs from manifest.json. Copy the folder again.")
