"""METHODS: the name in a recipe -> the method. The contract is ``qvlm.methods.method``."""

from __future__ import annotations

from qvlm.methods import fused, gptaq, gptq, q_vlm, rtn, vlmq
from qvlm.methods.method import Block, BlockResult, Context, Method, State

__all__ = ["METHODS", "Block", "BlockResult", "Context", "Method", "State"]

METHODS: dict[str, Method] = {
    "rtn": rtn.RoundToNearest(),
    "gptq": gptq.Gptq(),
    "gptaq": gptaq.Gptaq(),
    "vlmq": vlmq.Vlmq(),
    "q-vlm": q_vlm.QVlm(),
    "fused": fused.Fused(),
}
