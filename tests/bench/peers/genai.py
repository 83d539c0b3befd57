"""onnxruntime-genai. Arguments: model folder, most tokens of a sequence. Started by decode_peers.py.

``generate_next_token`` runs the model on the last token, unless its logits are there already, and then chooses: after
``append_tokens`` the first call only chooses, so a round's prefill is both, and every further call is a step.
"""

from __future__ import annotations

import sys
from typing import Any

from protocol import serve

model: Any = None
generator: Any = None


def load() -> dict[str, Any]:
    global model
    import onnxruntime_genai as og

    model = og.Model(sys.argv[1])
    return {"onnxruntime_genai": og.__version__}


def prefill(prompt: list[int]) -> None:
    global generator
    import numpy as np
    import onnxruntime_genai as og

    if generator is None:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=int(sys.argv[2]), do_sample=False)
        generator = og.Generator(model, params)
    generator.rewind_to(0)
    generator.append_tokens(np.array(prompt, np.int32))
    generator.generate_next_token()


def step() -> int:
    generator.generate_next_token()
    return int(generator.get_next_tokens()[0])


serve(load, prefill, step)
