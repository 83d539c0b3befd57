"""Opens the float model: a Hugging Face directory, a hub id or ``demo``; refuses what cannot work before loading it.

Everything that can be wrong with a download is found from config.json and the safetensors headers, in milliseconds:
no code from the checkpoint ever runs, and a missing or truncated file, or a quantization that cannot be kept, is named.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvlm import imported
from qvlm.checkpoint import QuantizedLinear, load_json
from qvlm.errors import CheckpointError, UnsupportedModelError
from qvlm.models import ADAPTERS, Adapter
from qvlm.progress import Progress, silent

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Settings files that may name Python code to run (transformers' ``auto_map``).
_SETTINGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
# Larger headers are refused by the safetensors library too.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Source:
    """A checkpoint whose files were checked. ``shards``: safetensors file names in order.

    quantized: how others quantized it, None for a float one (``imported``).
    """

    name: str
    directory: Path
    config: dict[str, Any]
    adapter: Adapter
    shards: tuple[str, ...]
    quantized: imported.Settings | None = None


@dataclass(frozen=True)
class Loaded:
    """The model in float32, eval mode, eager attention, and its processor (Pillow, never torchvision).

    imported: the integers that some of its linears stand for, if the source was quantized.
    """

    model: nn.Module
    processor: Any
    imported: Mapping[str, QuantizedLinear] = field(default_factory=dict)


def open_source(name: str) -> Source:
    """Find and check a source without loading weights.

    Raises CheckpointError (missing, truncated, remote code, quantized in a way that cannot be kept) or
    UnsupportedModelError.
    """
    directory = _locate(name)
    config = load_json(directory / "config.json")
    _refuse_remote_code(directory)
    quantized = imported.settings(config, str(directory / "config.json"))
    adapter = _adapter(config, directory)
    shards = _shards(directory)
    for shard in shards:
        _check_complete(directory / shard)
    return Source(name, directory, config, adapter, shards, quantized)


def _locate(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if name == "demo":
        import qvlm_calib_data

        return Path(qvlm_calib_data.demo_model())
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: not a directory. Give a Hugging Face model directory, a hub id (owner/name) or 'demo'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: no such directory, and the hub did not deliver it ({reason}). Check the name or the network."
        ) from error


def _refuse_remote_code(directory: Path) -> None:
    for settings in _SETTINGS:
        path = directory / settings
        if path.is_file() and "auto_map" in load_json(path):
            raise CheckpointError(
                f"{path}: asks to run Python code from the checkpoint (auto_map), which qvlm never does. "
                "Use a checkpoint in the format that transformers itself supports."
            )


def _adapter(config: dict[str, Any], directory: Path) -> Adapter:
    model_type = config.get("model_type")
    if model_type not in ADAPTERS:
        raise UnsupportedModelError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not supported. Supported: "
            f"{', '.join(ADAPTERS)}. A new family is one file in qvlm/models and one line in its __init__.py."
        )
    return ADAPTERS[model_type]


def _shards(directory: Path) -> tuple[str, ...]:
    """Names of the safetensors files; every name in the index must exist inside the directory."""
    index = directory / _INDEX
    if not index.is_file():
        if not (directory / _SINGLE).is_file():
            raise CheckpointError(
                f"{directory}: neither {_SINGLE} nor {_INDEX}. Download the safetensors files (other weight formats "
                "can run code when loaded and are not read)."
            )
        return (_SINGLE,)
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map. Download the file again.")
    shards = tuple(sorted({str(name) for name in weight_map.values()}))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name")
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory / shard}: listed in {_INDEX} but absent. Download the checkpoint again."
            )
    return shards


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file; CheckpointError if it is damaged."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
            raise CheckpointError(
                f"{path}: truncated or not safetensors ({path.stat().st_size} bytes). Download it again."
            )
        try:
            header = json.loads(file.read(length))
            return {name: entry for name, entry in header.items() if name != "__metadata__"}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: header is not JSON ({error}). Download it again."
            ) from error


def _check_complete(path: Path) -> None:
    header = read_header(path)
    try:
        declared = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path}: header without data_offsets ({error}). Download it again."
        ) from error
    with path.open("rb") as file:
        expected = 8 + int(struct.unpack("<Q", file.read(8))[0]) + declared
    if path.stat().st_size != expected:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, expected {expected}: truncated. Download it again."
        )


def check_finite(source: Source, progress: Progress = silent) -> None:
    """Read every float tensor once, one in memory at a time; CheckpointError naming the first with NaN or Inf."""
    from safetensors import safe_open

    for number, shard in enumerate(source.shards):
        progress("check weights", number, len(source.shards))
        with safe_open(str(source.directory / shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise CheckpointError(
                        f"{source.directory / shard}: tensor {name} has {bad} NaN or Inf values. The checkpoint is "
                        "damaged: download it again."
                    )
    progress("check weights", len(source.shards), len(source.shards))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own progress bars and advice off; our command line reports instead."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load(source: Source, progress: Progress = silent) -> Loaded:
    """Check every weight and load model and processor.

    Raises CheckpointError for NaN or Inf, a tensor that is absent or has another shape than config.json says.
    """
    from transformers import AutoModelForImageTextToText

    check_finite(source, progress)
    if source.quantized is not None:
        tree = skeleton(source.directory)
        tensors, linears = imported.read(
            source.quantized, source.directory, source.shards, imports(source, tree), tree
        )
        model = build_model(source.directory, tensors, "Download the checkpoint again")
        return Loaded(model, load_processor(source.directory), linears)
    auto: Any = AutoModelForImageTextToText
    with _quiet():
        try:
            model, info = auto.from_pretrained(
                source.directory,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{source.directory}: transformers cannot load it ({_first_line(error)})"
            ) from error
        if info["missing_keys"]:
            raise CheckpointError(
                f"{source.directory}: tensor {min(info['missing_keys'])} is in none of the shards "
                f"({len(info['missing_keys'])} missing). Download the checkpoint again."
            )
    return Loaded(model.eval().requires_grad_(False), load_processor(source.directory))


def load_processor(directory: Path) -> Any:
    """Tokenizer and image processor of a directory; CheckpointError if transformers cannot make them.

    A processor's video part is left out: it is made of torchvision, and no video is read here.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    auto: Any = AutoProcessor
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            known: Any = PROCESSOR_MAPPING.get(type(config), None)
            if known is not None and "video_processor" in known.get_attributes():
                auto = _without_video(known)
            processor = auto.from_pretrained(directory, local_files_only=True, backend="pil")
            if processor.chat_template is None:  # older directories have it with the tokenizer
                processor.chat_template = processor.tokenizer.chat_template
            return processor
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(
                f"{directory}: tokenizer or image processor not loadable ({_first_line(error)})"
            ) from error


def _without_video(processor: Any) -> Any:
    """A processor class whose ``video_processor`` is None."""
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

    makers: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}

    class Pictures(processor):  # type: ignore[misc]
        # SmolVLM's own asks the video part for its settings, whatever the conversation holds.
        apply_chat_template = ProcessorMixin.apply_chat_template

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def _get_arguments_from_pretrained(
            cls, directory: Any, processor_dict: Any = None, **kwargs: Any
        ) -> list[Any]:
            return [
                makers[name].from_pretrained(directory, **kwargs) if name in makers else None
                for name in cls.get_attributes()
            ]

    return Pictures


def require_float(source: Source) -> None:
    """CheckpointError for a source that others quantized: trials of formats have to start from float weights."""
    if source.quantized is not None:
        raise CheckpointError(
            f"{source.directory}: already quantized ({source.quantized.method}), and trials of formats start from "
            "float weights. Give the float checkpoint it was made from."
        )


def imports(source: Source, tree: nn.Module) -> dict[str, imported.Entry]:
    """The linears of the module tree ``tree`` whose integers the source holds; none for a float one."""
    if source.quantized is None:
        return {}
    headers = {
        name: entry
        for shard in source.shards
        for name, entry in read_header(source.directory / shard).items()
    }
    where = str(source.directory)
    return imported.entries(source.quantized, headers, tree, source.adapter, where)


def build_model(
    directory: Path, tensors: dict[str, torch.Tensor], remedy: str = "Quantize again"
) -> nn.Module:
    """The model of a directory's config.json with the given float32 tensors; CheckpointError if one is missing."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    auto: Any = AutoModelForImageTextToText
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            config.__dict__.pop("quantization_config", None)
            model, info = auto._model_mapping[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
            if (directory / "generation_config.json").is_file():
                # Holds the end tokens; only a directory's own loading reads it.
                model.generation_config = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{directory}: transformers cannot build it ({_first_line(error)})"
            ) from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{directory}: tensor {min(info['missing_keys'])} is not stored. {remedy}."
        )
    built: nn.Module = model.eval().requires_grad_(False)
    return built


def skeleton(config_directory: Path) -> nn.Module:
    """The module tree of a checkpoint on the meta device: names and shapes, no memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with _quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(config_directory, local_files_only=True)
            config.__dict__.pop("quantization_config", None)
            model: nn.Module = auto.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
            return model.eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{config_directory / 'config.json'}: transformers cannot build it ({_first_line(error)})"
            ) from error


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"
