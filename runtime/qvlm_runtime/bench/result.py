"""bench.json: everything a run of qvlm-bench measured, schema 1.

    schema       1
    version      of this package
    time         ISO 8601, UTC, when the run ended
    machine      machine.Machine.describe()
    plan         plan.Plan
    power        {"sources": [{"source", "rails", "total"}], "not_available": {sensor: reason}}
    limits       {threads: {"read": bytes/s, "product": float32 operations/s}}, empty with --no-floors
    subjects     one for each folder and number of threads:
      name, target, backend, threads (0: the engine's choice), max_rows
      load       seconds (files in the page cache, imports included), verify_seconds (hashing them):
                 FIGURE; before_bytes, resident_bytes, peak_bytes
      cases      prompt_tokens, images, output_tokens as asked; total_prompt_tokens as it came out;
                 first_token: {preprocess, vision, prefill, other, whole: FIGURE of seconds}, where
                 other = whole - the three; answer_seconds: FIGURE or null;
                 floors: {prefill, vision: {seconds, share}} or null
      contexts   context; step_seconds: FIGURE; tokens_per_second; cache_bytes; resident_bytes and
                 peak_bytes once the cache holds that many tokens; floor: {bytes, seconds, share} or null
      memory     host_peak_bytes, with a sequence kept for each context; limit_bytes: what a process can
                 have here; device_peak_bytes: most in use on all GPUs between rounds, of all processes,
                 null without NVML
      energy     {} or idle_watts and for "token" and "image": joules, joules_above_idle, runs,
                 seconds, watts, rails_watts
    ratios       [{series, name, against, figure}]: the first folder's seconds over the other's
    rounds       for each number of threads: [{throttled: [reason], after: machine.Snapshot}]
    imported     [foreign.Foreign]

    FIGURE       {"median", "low", "high", "coverage", "samples"}, see figure.py

Sizes are bytes, times seconds, clocks MHz, temperatures degrees Celsius, energy joules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qvlm_runtime.bench.figure import figure
from qvlm_runtime.bench.floors import (
    Limits,
    decode_bytes,
    prefill_operations,
    vision_operations,
)
from qvlm_runtime.bench.measure import Samples
from qvlm_runtime.bench.weights import GraphWeights
from qvlm_runtime.manifest import ModelSpec

SCHEMA = 1


@dataclass(frozen=True)
class Facts:
    """What a folder says about itself, for the floors. rows_per_image: of the plan's image size."""

    model: ModelSpec
    dtype: str
    decoder: GraphWeights
    vision: GraphWeights
    rows_per_image: int


def subject(
    samples: Samples,
    threads: int,
    facts: Facts,
    limits: Limits | None,
    memory_limit: int,
    device_peak: int | None,
) -> dict[str, Any]:
    """One entry of ``subjects``."""
    loads = samples.loads
    return {
        "name": samples.name,
        "target": samples.target,
        "backend": samples.backend,
        "threads": threads,
        "max_rows": samples.max_rows,
        "load": {
            "seconds": asdict(figure([one.seconds for one in loads])),
            "verify_seconds": asdict(figure([one.verify_seconds for one in loads])),
            "before_bytes": loads[-1].before_bytes,
            "resident_bytes": loads[-1].after_bytes,
            "peak_bytes": loads[-1].peak_bytes,
        },
        "cases": _cases(samples, facts, limits),
        "contexts": _contexts(samples, facts, limits),
        "memory": {
            "host_peak_bytes": samples.peak_bytes,
            "limit_bytes": memory_limit,
            "device_peak_bytes": device_peak,
        },
        "energy": samples.energy,
    }


def _cases(samples: Samples, facts: Facts, limits: Limits | None) -> list[dict[str, Any]]:
    rows = []
    for case, parts in samples.first.items():
        figures = {part: figure(values) for part, values in parts.items()}
        tokens = samples.prompt_tokens[case]
        floors: dict[str, Any] | None = None
        if limits is not None:
            operations = {"prefill": prefill_operations(facts.decoder, facts.model, tokens)}
            if case.images:
                image_rows = case.images * facts.rows_per_image
                operations["vision"] = vision_operations(facts.vision, image_rows)
            floors = {
                part: _share(count / limits.product, figures[part].median)
                for part, count in operations.items()
            }
        answers = samples.answers.get(case)
        rows.append(
            {
                **asdict(case),
                "total_prompt_tokens": tokens,
                "first_token": {part: asdict(one) for part, one in figures.items()},
                "answer_seconds": asdict(figure(answers)) if answers else None,
                "floors": floors,
            }
        )
    return rows


def _contexts(samples: Samples, facts: Facts, limits: Limits | None) -> list[dict[str, Any]]:
    itemsize, rows = np.dtype(facts.dtype).itemsize, []
    for context, seconds in samples.steps.items():
        step = figure(seconds)
        nbytes = decode_bytes(facts.decoder, facts.model, itemsize, context)
        floor = None
        if limits is not None:
            floor = {"bytes": nbytes, **_share(nbytes / limits.read, step.median)}
        resident, peak = samples.memory[context]
        rows.append(
            {
                "context": context,
                "step_seconds": asdict(step),
                "tokens_per_second": 1 / step.median,
                "cache_bytes": nbytes - facts.decoder.nbytes,
                "resident_bytes": resident,
                "peak_bytes": peak,
                "floor": floor,
            }
        )
    return rows


def _share(least: float, taken: float) -> dict[str, float]:
    return {"seconds": least, "share": least / taken}


def device_peak(gpus: Sequence[Sequence[dict[str, Any]]]) -> int | None:
    """Most memory in use on all GPUs together over the snapshots; None without a GPU."""
    return max((sum(g["memory_used"] for g in one) for one in gpus if one), default=None)
