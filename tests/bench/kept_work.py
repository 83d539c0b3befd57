"""What kept work saves on one model folder: the time to the first token of each turn of a conversation that keeps its
cache, of one that sends all messages again to a server which keeps caches, of one that keeps image features only, and
of cold runs; and that all four answer with the same tokens.

The four run turn by turn in one process, alternating, so a drift of the machine's speed meets all alike; medians over
repeats, in milliseconds. First-token time is preprocessing + vision + prefill, as Timings counts them; all but the
conversation preprocess the image again at every turn.

Run: python tests/bench/kept_work.py OUT [--image FILE] [--turns 4] [--repeats 5] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_runtime import FeatureCache, Generation, Model, load
from qvlm_runtime.kept import KeptCaches

NEW_TOKENS = 16
QUESTIONS = ("What is in the image?", "What colour is it?", "How many are there?", "Is that all?")
MODES = ("cold", "image features", "server", "cache")


def first_token(done: Generation) -> float:
    """Seconds to the first token."""
    return done.timings.preprocess_s + done.timings.vision_s + done.timings.prefill_s


def turns(model: Model, mode: str, image: Any, count: int) -> list[Generation]:
    """One conversation in one of the four ways."""
    model.feature_cache = FeatureCache(0 if mode == "cold" else 1 << 30)
    if mode == "image features":
        model.generate("a", [image], max_new_tokens=1)
    done: list[Generation] = []
    with model.conversation() as talk, KeptCaches(model, int(mode == "server")) as kept:
        for n in range(count):
            asked = [image] if n == 0 else []
            question = QUESTIONS[n % len(QUESTIONS)]
            if mode == "cache":
                done.append(talk.ask(question, asked, max_new_tokens=NEW_TOKENS))
                continue
            parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in asked]
            parts.append({"type": "text", "text": question})
            talk.messages.append({"role": "user", "content": parts})
            done.append(kept.stream(talk.messages, max_new_tokens=NEW_TOKENS).read())
            text = [{"type": "text", "text": done[-1].text}]
            talk.messages.append({"role": "assistant", "content": text})
    return done


def measure(model: Model, image: Any, count: int, repeats: int, show: Callable[[str], None]) -> Any:
    """Rows by turn: median milliseconds and kept tokens for each mode."""
    times: dict[str, list[list[float]]] = {mode: [[] for _ in range(count)] for mode in MODES}
    kept: dict[str, list[int]] = {}
    for repeat in range(repeats + 1):  # the first is the warm-up
        answers = {}
        for mode in MODES:
            done = turns(model, mode, image, count)
            answers[mode] = [generation.token_ids for generation in done]
            kept[mode] = [generation.timings.cached_tokens for generation in done]
            if repeat:
                for n, generation in enumerate(done):
                    times[mode][n].append(1e3 * first_token(generation))
        if len({tuple(ids) for ids in answers.values()}) != 1:
            raise SystemExit(f"kept_work: the answers differ: {answers}")
        show(f"repeat {repeat}/{repeats}")
    return [
        {
            "turn": n + 1,
            "kept_tokens": kept["cache"][n],
            "server_kept_tokens": kept["server"][n],
            **{mode: round(statistics.median(times[mode][n]), 2) for mode in MODES},
        }
        for n in range(count)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--image", type=Path, help="default: noise of 480 x 640 pixels")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--target")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with load(args.folder, args.target, threads=args.threads) as model:
        rows = measure(model, args.image or noise, args.turns, args.repeats,
                       lambda line: print(line, file=sys.stderr))  # fmt: skip
    print(
        f"{'turn':>4} {'kept tokens':>12} {'by server':>10} "
        + " ".join(f"{mode + ' ms':>18}" for mode in MODES)
    )
    for row in rows:
        numbers = " ".join(f"{row[mode]:18.2f}" for mode in MODES)
        print(f"{row['turn']:4} {row['kept_tokens']:12} {row['server_kept_tokens']:10} {numbers}")
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
