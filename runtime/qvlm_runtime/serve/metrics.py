"""Counters of a server in Prometheus' text format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from qvlm_runtime.generate import Timings

_HELP = {
    "requests_total": "Requests to /v1 by HTTP status; 499: the client left.",
    "images_total": "Images in answered prompts.",
    "images_cached_total": "Images whose features were known.",
    "prompt_tokens_total": "Tokens of answered prompts.",
    "prompt_tokens_reused_total": "Those whose cache rows were kept from another answer.",
    "prompt_tokens_run_total": "Those that were run; an answer that is left may run fewer.",
    "generated_tokens_total": "Tokens of answers, also of those that were left.",
    "preprocess_seconds_total": "Time in templates, tokens and pixels.",
    "vision_seconds_total": "Time in the vision graph.",
    "prefill_seconds_total": "Time in prompts.",
    "decode_seconds_total": "Time in tokens after the first.",
}


class Metrics:
    """Used from the event loop alone."""

    def __init__(self) -> None:
        self._requests = Counter[int]()
        self._sums = {name: 0.0 for name in _HELP if name != "requests_total"}

    def request(self, status: int) -> None:
        """Count a request by its outcome."""
        self._requests[status] += 1

    def answer(self, timings: Timings, generated: int) -> None:
        """Add an answer's counts and times."""
        for name, value in (
            ("images_total", timings.images),
            ("images_cached_total", timings.cached_images),
            ("prompt_tokens_total", timings.prompt_tokens),
            ("prompt_tokens_reused_total", timings.cached_tokens),
            ("prompt_tokens_run_total", timings.run_tokens),
            ("generated_tokens_total", generated),
            ("preprocess_seconds_total", timings.preprocess_s),
            ("vision_seconds_total", timings.vision_s),
            ("prefill_seconds_total", timings.prefill_s),
            ("decode_seconds_total", timings.decode_s),
        ):
            self._sums[name] += value

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page. gauges: name to the value of this moment."""
        lines = []
        for name, description in _HELP.items():
            lines += [f"# HELP qvlm_{name} {description}", f"# TYPE qvlm_{name} counter"]
            if name == "requests_total":
                counts = sorted(self._requests.items())
                lines += [f'qvlm_{name}{{status="{status}"}} {n}' for status, n in counts]
            else:
                lines.append(f"qvlm_{name} {self._sums[name]:.6f}")
        for name, value in {**gauges, **_peak_memory()}.items():
            lines += [f"# TYPE qvlm_{name} gauge", f"qvlm_{name} {value}"]
        return "\n".join(lines) + "\n"


def _peak_memory() -> dict[str, float]:
    """The largest resident size of this process so far; nothing where there is no /proc.

    Not getrusage: a child begins with the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return {"peak_memory_bytes": 1024 * int(found[1])} if found else {}
