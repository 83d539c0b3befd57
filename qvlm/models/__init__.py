"""ADAPTERS: model_type -> architecture facts. A new family is one file beside this one and one line here."""

from __future__ import annotations

from qvlm.models import blip, internvl, llava, qwen_vl, smolvlm
from qvlm.models.adapter import Adapter

__all__ = ["ADAPTERS", "Adapter"]

ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter
    for adapter in (
        *(llava.ADAPTER, llava.NEXT, llava.ONEVISION),
        *(smolvlm.ADAPTER, smolvlm.IDEFICS3, internvl.ADAPTER),
        *(qwen_vl.QWEN2, qwen_vl.QWEN2_5, qwen_vl.QWEN3, blip.ADAPTER),
    )
}
