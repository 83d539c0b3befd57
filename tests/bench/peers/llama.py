"""llama.cpp through llama-cpp-python's low-level calls (its high-level class copies every logit it does not need).
Arguments: GGUF, most tokens of a sequence, threads. Started by decode_peers.py.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from protocol import serve

model: Any = None
context: Any = None
vocabulary = token = 0


def load() -> dict[str, Any]:
    global model, context, vocabulary
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        sys.argv[1].encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = int(sys.argv[2])
    params.n_threads = params.n_threads_batch = int(sys.argv[3])
    context = llama_cpp.llama_init_from_model(model, params)
    assert model and context, "llama.cpp did not open the model"
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    system = llama_cpp.llama_print_system_info().decode()
    return {"llama_cpp_python": llama_cpp.__version__, "system": " ".join(system.split())}


def run(tokens: list[int]) -> int:
    """Run tokens behind the cached ones and choose the largest logit of the last."""
    import llama_cpp
    import numpy as np

    array = (ctypes.c_int32 * len(tokens))(*tokens)
    code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
    assert code == 0, f"llama_decode failed with {code}"
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())


def prefill(prompt: list[int]) -> None:
    global token
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    token = run(prompt)


def step() -> int:
    global token
    token = run([token])
    return token


serve(load, prefill, step)
