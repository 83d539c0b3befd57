"""Checkpoints as other quantizers write them, packed by the layouts' definitions and by no code of ours. For tests
only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_source import write_tiny_source

Grid = tuple[np.ndarray, np.ndarray]  # nibbles or int8 [out, in]; float scales [out, groups]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_rows(grid: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[rows, columns] to int32 [rows, columns/8]: nibble i, from the lowest bits, is column order[i] of eight."""
    word = sum(grid[:, column::8].astype(np.int64) << (4 * i) for i, column in enumerate(order))
    return torch.tensor(np.asarray(word).astype(np.uint32).view(np.int32))


def gptq(name: str, grid: Grid, group: int, zero: int = 8, stored: int = -1) -> dict[str, Any]:
    nibbles, scale = grid
    out, columns = nibbles.shape
    zeros = np.full((columns // group, out), zero + stored)
    return {
        f"{name}.qweight": packed_rows(nibbles).T,
        f"{name}.qzeros": packed_rows(zeros),
        f"{name}.scales": torch.tensor(scale.T.copy()),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def awq(name: str, grid: Grid, group: int, zero: int = 8) -> dict[str, Any]:
    nibbles, scale = grid
    zeros = np.full((nibbles.shape[1] // group, nibbles.shape[0]), 8)
    zeros[0, 1] = zero
    return {
        f"{name}.qweight": packed_rows(nibbles.T, AWQ_COLUMNS),
        f"{name}.qzeros": packed_rows(zeros, AWQ_COLUMNS),
        f"{name}.scales": torch.tensor(scale.T.copy()),
    }


def packed(name: str, grid: Grid, group: int) -> dict[str, Any]:
    nibbles, scale = grid
    return {
        f"{name}.weight_packed": packed_rows(nibbles),
        f"{name}.weight_shape": torch.tensor(nibbles.shape),
        f"{name}.weight_scale": torch.tensor(scale).to(torch.bfloat16),
    }


def int8(name: str, grid: Grid, group: int) -> dict[str, Any]:
    integers, scale = grid
    return {
        f"{name}.weight": torch.tensor(integers, dtype=torch.int8),
        f"{name}.weight_scale": torch.tensor(scale).to(torch.bfloat16),
    }


def compressed(layout: str, group: int | None, **inputs: Any) -> dict[str, Any]:
    bits = 4 if group else 8
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    entry = {"weights": weights, "input_activations": inputs or None, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": entry},
    }


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
KINDS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], str, int]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}, "w4a16", 128),
    "gptq_v2": (
        lambda *a: gptq(*a, stored=0),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        "w4a16-g32",
        32,
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64}, "w4a16-g64", 64),
    "w4a16": (packed, compressed("pack-quantized", 64), "w4a16-g64", 64),
    "w8a8": (int8, compressed("int-quantized", None, **DYNAMIC), "w8a8", 0),
}


def write_imported(
    source: Path, folder: Path, kind: str, modern_names: bool = False, **changes: Any
) -> dict[str, Grid]:
    """A copy of ``source`` with the decoder's linears quantized by ``kind``; what was packed, by module name."""
    pack, config, _, group = KINDS[kind]
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    grids, result = {}, {}
    for name, tensor in tensors.items():
        if not of_decoder(name):
            result[name] = tensor
            continue
        out, columns = tensor.shape
        low, high = (0, 16) if group else (-127, 128)
        scale = rng.uniform(0.5, 2, (out, columns // group if group else 1))
        scale = scale * float(tensor.abs().max()) / (high - low)
        # Eight bits of mantissa: exact as bfloat16 and as float16.
        exact = torch.tensor(scale).to(torch.bfloat16).float().numpy().astype(np.float16)
        grid = (rng.integers(low, high, (out, columns)), exact)
        stored = name.removesuffix(".weight")
        result.update({k: v.contiguous() for k, v in pack(stored, grid, group).items()})
        grids[modern(stored)] = (grid[0] - (8 if group else 0), exact)
    if modern_names:
        result = {modern(k): v for k, v in result.items()}
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    stored_config = json.loads(path.read_text())
    path.write_text(json.dumps({**stored_config, "quantization_config": {**config, **changes}}))
    return grids


def of_decoder(name: str) -> bool:
    """True for a weight of the decoder's layers, whatever the family calls their parents."""
    tower = any(part in name for part in ("vision", "visual"))
    return "layers." in name and name.endswith("_proj.weight") and not tower


def modern(name: str) -> str:
    """The name that transformers 5 has in memory for a tensor that it stores as ``name`` (as transformers 4 did)."""
    for stored, memory in (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(stored):
            return memory + name.removeprefix(stored)
    return name


def write_source(folder: Path) -> Path:
    """The float model: a decoder layer whose widths every group size divides into two groups or more."""
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    changes = {f"text_{key}": value for key, value in {**shape, **heads}.items()}
    return write_tiny_source(folder, **changes)
