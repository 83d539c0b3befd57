"""This project's runtime: the exported decoder graph on ONNX Runtime. Arguments: graph, manifest spec as JSON,
threads (0: the engine's choice), settings as JSON: "prepared", a folder, session config entries of ONNX Runtime and,
without a point in the name, flags of its SessionOptions. Started by decode_peers.py and threads.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from protocol import serve

PATH, SPEC, THREADS = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
SETTINGS: dict[str, str] = json.loads(sys.argv[4])
state: Any = None
decoder: Any = None
token = 0


def load() -> dict[str, Any]:
    global decoder
    import onnxruntime

    from qvlm_runtime.backend import FAST, open_session
    from qvlm_runtime.decoder import Decoder
    from qvlm_runtime.manifest import ModelSpec, TargetSpec

    kept = SETTINGS.pop("prepared", None)
    original = onnxruntime.SessionOptions

    def options() -> Any:
        made = original()
        for entry, value in SETTINGS.items():
            if "." in entry:
                made.add_session_config_entry(entry, value)
            else:
                setattr(made, entry, value == "1")
        return made

    onnxruntime.SessionOptions = options
    model = ModelSpec(**{**SPEC["model"], "eos_token_ids": tuple(SPEC["model"]["eos_token_ids"])})
    session = open_session(
        PATH,
        threads=THREADS or None,
        accuracy_level=FAST,
        prepared=None if kept is None else Path(kept),
    )
    decoder = Decoder(session, model, TargetSpec(**SPEC["target"]), "ours")
    return {"onnxruntime": onnxruntime.__version__}


def prefill(prompt: list[int]) -> None:
    global state, token
    if state is None:
        state = decoder.start(decoder.max_rows)
    state.rewind(0)
    token = int(state.step(prompt).argmax())


def step() -> int:
    global token
    token = int(state.step((token,)).argmax())
    return token


serve(load, prefill, step)
