"""What the three runners share: one JSON line a call, one a result. Standard library only, because each runner is
started with another environment's Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def memory() -> dict[str, int]:
    """Resident bytes of this process now and at most, and the part of now that is no file's."""
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {
        name: 1024 * int(lines[key].split()[0])
        for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"), ("own", "RssAnon"))
    }


def serve(
    load: Callable[[], dict[str, Any]],
    prefill: Callable[[list[int]], None],
    step: Callable[[], int],
) -> None:
    """Answer "load", "round" and "memory" until the parent closes the pipe.

    prefill: run the prompt on an empty cache and choose a token. step: run that token and choose the next.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        call = json.loads(line)
        if call["call"] == "load":
            before, start = memory(), time.perf_counter()
            about = load()
            result = {"seconds": time.perf_counter() - start, "before": before, "about": about}
            result["after"] = memory()
        elif call["call"] == "round":
            start = time.perf_counter()
            prefill(call["prompt"])
            result, steps = {"prefill": time.perf_counter() - start}, []
            for _ in range(call["steps"]):
                start = time.perf_counter()
                step()
                steps.append(time.perf_counter() - start)
            result["steps"] = steps
        else:
            result = memory()
        answers.write(json.dumps(result) + "\n")
        answers.flush()
