"""What the runtime adds to each token beside the engine's own work: the Python of the loop, piece by piece.

A decoder of the wanted number of layers and vocabulary, but with next to no arithmetic, is exported and driven as an
application drives it. Each piece of the loop is timed by itself over the same number of steps:

    bind     telling the engine where the new rows go (append form: four calls a layer; scatter form: two numbers)
    engine   run_with_iobinding: what is left when nothing is computed is ONNX Runtime's own cost per node
    logits   one copy of the last position's logits to float32
    choose   the next token from the logits, greedy or with temperature 0.8, top-k 40 and top-p 0.95
    text     detokenizing and stop strings

overhead is everything but engine. "loop" is the whole of a token as `tokens` and the detokenizer run it.

Run: python tests/bench/overhead.py [--layers 22] [--vocab 32000] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from decode import HEAD, PREFIX, Shape, write_checkpoint

from qvlm.progress import silent
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.llama import decoder
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.backend import FAST, open_session
from qvlm_runtime.decoder import Decoder, DecoderState
from qvlm_runtime.generate import StopText, Timings, tokens
from qvlm_runtime.manifest import TargetSpec
from qvlm_runtime.ort import OrtBinding
from qvlm_runtime.sample import Sampling
from qvlm_runtime.tokenizer import Detokenizer, Tokenizer

STEPS = 200
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=0),
}


def open_small(folder: Path, shape: Shape, target_name: str, threads: int) -> Decoder:
    """The decoder exported for a target, float weights."""
    target = named_target(target_name)
    checkpoint = write_checkpoint(folder / f"{target_name}-checkpoint", shape, quantized=False)
    builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
    decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
    path = folder / target_name / "decoder.onnx"
    write_model(builder.model("bench"), path, silent)
    session = open_session(path, threads=threads, accuracy_level=FAST)
    spec = TargetSpec(target.dtype, target.opset, target.cache, {"decoder": str(path)})
    return Decoder(session, shape.spec(), spec, target_name)


def write_tokenizer(path: Path, vocab: int) -> Tokenizer:
    """As many words as the vocabulary has ids, decoded as SentencePiece words are."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    words = {f"\u2581word{i}": i for i in range(vocab)}
    fast = Fast(models.WordLevel(words, unk_token="\u2581word0"))
    fast.decoder = decoders.Metaspace()
    fast.save(str(path))
    return Tokenizer(path)


def median_us(work: Callable[[], object]) -> float:
    """Median microseconds of STEPS calls."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def pieces(
    state: DecoderState, tokenizer: Tokenizer, vocab: int, sampling: Sampling
) -> dict[str, float]:
    """Microseconds of each piece of a step, on a state that has decoded before."""
    binding, cache, logits = state._binding, state._cache, state._logits
    assert isinstance(binding, OrtBinding)
    native, raw = binding._session.native(), binding._binding
    # Logits as flat as random weights make them are the worst case for top-p.
    values = np.random.default_rng(0).standard_normal(vocab).astype(np.float32)
    choose, detokenizer, stops = sampling.chooser(), Detokenizer(tokenizer), StopText(["\n\n"])
    ids: Iterator[int] = iter(np.random.default_rng(1).integers(0, vocab, 4 * STEPS).tolist())
    return {
        "bind": median_us(lambda: cache.bind(binding, 1)),
        "engine": median_us(lambda: native.run_with_iobinding(raw)),
        "logits": median_us(lambda: logits[0, 0].astype(np.float32)),
        "choose": median_us(lambda: choose(values)),
        "text": median_us(lambda: stops.push(detokenizer.push(next(ids)))),
    }


def loop_us(decoder_: Decoder, tokenizer: Tokenizer, sampling: Sampling) -> float:
    """Median microseconds of a token in the real loop."""
    state, detokenizer, stops = decoder_.start(512), Detokenizer(tokenizer), StopText(["\n\n"])
    positions, limit = np.arange(32)[None], STEPS + 20
    stream = tokens(state, [5] * 32, [-1] * 32, positions, sampling.chooser(), (), limit, Timings())
    for _ in range(19):
        next(stream)
    return median_us(lambda: stops.push(detokenizer.push(next(stream))))


def measure(decoder_: Decoder, tokenizer: Tokenizer, vocab: int, name: str) -> dict[str, Any]:
    """Pieces and loop of one target and one way of sampling."""
    sampling, state = SAMPLINGS[name], decoder_.start(512)
    state.step([5] * 32)
    state.step((5,))
    found = pieces(state, tokenizer, vocab, sampling)
    found["loop"] = loop_us(decoder_, tokenizer, sampling)
    return {"target": decoder_.where, "sampling": name, **found} | {
        "overhead": sum(found[p] for p in ("bind", "logits", "choose", "text"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = Shape(args.layers, hidden=128, heads=2, kv_heads=1, mlp=128, vocab=args.vocab)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder) / "tokenizer.json", args.vocab)
        print(f"{args.layers} layers, {args.vocab} tokens; microseconds of one token, medians")
        print("target    sampling    bind  engine  logits  choose   text   loop  overhead")
        for target in ("ort", "jetpack6"):
            decoder_ = open_small(Path(folder), shape, target, args.threads)
            for name in SAMPLINGS:
                row = measure(decoder_, tokenizer, args.vocab, name)
                rows.append(row)
                columns = ("bind", "engine", "logits", "choose", "text", "loop")
                numbers = "  ".join(f"{row[c]:6.0f}" for c in columns)
                print(f"{target:8s}  {name:8s}  {numbers}  {row['overhead']:8.0f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
