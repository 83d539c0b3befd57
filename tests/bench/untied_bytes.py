"""What a copy of a tied token table costs and what the head's format saves, reckoned from shapes alone.

Run: PYTHONPATH=.:export:runtime:calib_data python tests/bench/untied_bytes.py
Prints README's table for Qwen2-VL-2B: no weights, no download, a few seconds.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm.models import ADAPTERS
from qvlm.plan import plan
from qvlm.recipe import FORMATS, LayerRule, Recipe, component_recipe
from qvlm.source import Source

# As published, what decides no shape left out.
QWEN2_VL_2B: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "hidden_size": 1536,
        "patch_size": 14,
    },
}
# Formats of head and table; tied first.
CASES = (
    ("float", "float", False),
    ("float", "float", True),
    ("w8a8", "float", True),
    ("w8a8", "w8a16", True),
    ("w4a16", "w8a16", True),
)


def recipe(head: str, table: str, untie: bool) -> Recipe:
    """The named recipe w4a16 with these."""
    base = component_recipe("w4a16", "w8a8", "w8a8", head, untie=untie)
    return replace(base, rules=(*base.rules, LayerRule("embedding.*embed_tokens", FORMATS[table])))


def main() -> None:
    table_bytes = 2 * QWEN2_VL_2B["vocab_size"] * QWEN2_VL_2B["hidden_size"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN2_VL_2B), encoding="utf-8")
        adapter = ADAPTERS["qwen2_vl"]
        source = Source("Qwen2-VL-2B", Path(folder), QWEN2_VL_2B, adapter, ())
        for case in CASES:
            head, table, untie = case
            planned = plan(source, recipe(*case))
            sizes = {row.component: row.nbytes for row in planned.components}
            looked_up = sizes.get("embedding", table_bytes if untie else 0)
            numbers = (
                sizes["head"] + looked_up,
                sum(sizes.values()) + planned.other_bytes,
                sizes["text"] + sizes["head"],
            )
            names = f"head {head}, table {table}" if untie else "tied, float"
            both, whole, step = (f"{number / 1e6:,.1f} MB" for number in numbers)
            print(f"{names}: both {both}, model {whole}, read a step {step}")


if __name__ == "__main__":
    main()
