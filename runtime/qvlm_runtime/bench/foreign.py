"""Results of other tools, as extra bars: llama-bench and TensorRT-Edge-LLM.

    llama-bench -o json | jsonl | csv     rows of one configuration become one Foreign
    llm_bench --outputDir                 e2e_*.csv: mode, per_token_ms, throughput_tps, ...
    llm_inference --dumpProfile           profile JSON: prefill, generation, stages, peak memory

The numbers are theirs, measured by their rules: llama-bench leaves sampling out, Edge-LLM's stages
are GPU time. Nothing is recomputed here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_runtime.errors import PromptError

_VISION_STAGES = ("multimodal_processing", "vision_encoder")


@dataclass(frozen=True)
class Rate:
    """Tokens per second at a number of tokens: cached ones for decode, prompt ones for prefill.

    deviation: their standard deviation, None where the tool gives none.
    """

    tokens: int
    per_second: float
    deviation: float | None = None


@dataclass(frozen=True)
class Foreign:
    """One configuration another tool measured. first_token: seconds of the parts it tells."""

    tool: str
    name: str
    decode: tuple[Rate, ...] = ()
    prefill: tuple[Rate, ...] = ()
    first_token: Mapping[str, float] | None = None
    peak_bytes: int | None = None


def read_foreign(path: Path) -> list[Foreign]:
    """The results in one file. PromptError if it is none of the forms above."""
    try:
        text = path.read_text(encoding="utf-8")
        found = _parse(text, path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: not readable ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PromptError(
            f"{path}: a result lacks {error}. Give the unchanged output of the tool."
        ) from error
    if not found:
        raise PromptError(
            f"{path}: no result in it, expected llama-bench's JSON, JSONL or CSV, "
            "or TensorRT-Edge-LLM's e2e CSV or profile JSON."
        )
    return found


def _parse(text: str, stem: str) -> list[Foreign]:
    head = text.lstrip()[:1]
    if head not in ("[", "{"):
        rows = list(csv.DictReader(io.StringIO(text)))
        if rows and "throughput_tps" in rows[0]:
            return _edge_rows(rows, stem)
        return _llama(rows) if rows and "avg_ts" in rows[0] else []
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(data, dict) and "avg_ts" not in data:
        return _edge_profile(data, stem)
    return _llama(data if isinstance(data, list) else [data])


def _llama(rows: Sequence[Mapping[str, Any]]) -> list[Foreign]:
    """Rows with n_gen alone are decode at n_depth, with n_prompt alone prefill; mixed ones tell
    neither and are left out.
    """
    groups: dict[str, tuple[list[Rate], list[Rate]]] = {}
    for row in rows:
        name = f"{row['model_type']}, {row['backends']}, {row['n_threads']} threads"
        decode, prefill = groups.setdefault(name, ([], []))
        prompt, new = int(row["n_prompt"]), int(row["n_gen"])
        rate = (float(row["avg_ts"]), float(row["stddev_ts"]))
        if new and not prompt:
            decode.append(Rate(int(row.get("n_depth", 0)), *rate))
        elif prompt and not new:
            prefill.append(Rate(prompt, *rate))
    return [
        Foreign("llama-bench", name, tuple(decode), tuple(prefill))
        for name, (decode, prefill) in groups.items()
        if decode or prefill
    ]


def _edge_rows(rows: Sequence[Mapping[str, str]], stem: str) -> list[Foreign]:
    decode, prefill, first = list[Rate](), list[Rate](), dict[str, float]()
    for row in rows:
        per_second, milliseconds = float(row["throughput_tps"]), float(row["e2e_time_ms"])
        if row["mode"] == "decode":
            decode.append(Rate(int(row["past_kv_len"]), per_second))
        elif row["mode"] == "prefill":
            prefill.append(Rate(int(row["input_len"]), per_second))
            first["prefill"] = milliseconds * 1e-3
        elif row["mode"] == "visual":
            first["vision"] = milliseconds * 1e-3
    found = Foreign("TensorRT-Edge-LLM", stem, tuple(decode), tuple(prefill), first or None)
    return [found] if decode or prefill or first else []


def _edge_profile(data: Mapping[str, Any], stem: str) -> list[Foreign]:
    prefill, generation = data.get("prefill"), data.get("generation")
    if not prefill and not generation:
        return []
    decode_rates: tuple[Rate, ...] = ()
    prefill_rates: tuple[Rate, ...] = ()
    first: dict[str, float] = {}
    tokens = 0
    if prefill:
        tokens = round(float(prefill["average_tokens_per_run"]))
        prefill_rates = (Rate(tokens, float(prefill["tokens_per_second"])),)
        first["prefill"] = float(prefill["average_time_per_run_ms"]) * 1e-3
    if generation:
        decode_rates = (Rate(tokens, float(generation["tokens_per_second"])),)
    stages = [s for s in data.get("stages", []) if s.get("stage_id") in _VISION_STAGES]
    if stages:
        first["vision"] = sum(float(s["average_time_per_run_ms"]) for s in stages) * 1e-3
    peak = data.get("peak_unified_memory_bytes", data.get("peak_gpu_memory_bytes"))
    return [Foreign("TensorRT-Edge-LLM", stem, decode_rates, prefill_rates, first or None, peak)]
