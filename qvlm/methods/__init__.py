"""METHODS and TRANSFORMS: the name in a recipe -> the method or transform; BEGINNINGS: the transforms that a method
begins with. The contracts are in ``qvlm.methods.method``.
"""

from __future__ import annotations

from qvlm.methods import awq, fused, gptaq, gptq, q_vlm, rotate, rtn, smoothquant, vlmq
from qvlm.methods.method import Block, BlockResult, Context, Method, State, Transform

__all__ = [
    "BEGINNINGS",
    "METHODS",
    "TRANSFORMS",
    "Block",
    "BlockResult",
    "Context",
    "Method",
    "State",
    "Transform",
]

METHODS: dict[str, Method] = {
    "rtn": rtn.RoundToNearest(),
    "gptq": gptq.Gptq(),
    "gptaq": gptaq.Gptaq(),
    "vlmq": vlmq.Vlmq(),
    "q-vlm": q_vlm.QVlm(),
    "fused": fused.Fused(),
    "awq": awq.ClipSearch(awq.OPTIONS),
    "mbq": awq.ClipSearch(awq.BALANCED),
    "smoothquant": rtn.RoundToNearest(),
}

TRANSFORMS: dict[str, Transform] = {
    "rotate": rotate.Rotate(),
    "awq": awq.ScaleSearch(awq.OPTIONS),
    "mbq": awq.ScaleSearch(awq.BALANCED),
    "smoothquant": smoothquant.Smoothing(),
}

BEGINNINGS: dict[str, tuple[str, ...]] = {
    "fused": ("rotate",),
    "awq": ("awq",),
    "mbq": ("mbq",),
    "smoothquant": ("smoothquant",),
}
