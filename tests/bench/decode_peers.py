"""Decode and prefill of one 1.1B Llama-shaped decoder with random weights: this project's runtime (ONNX Runtime CPU,
w4a16) against onnxruntime-genai and llama.cpp from PyPI, each in its own environment and process.

Same number of threads, same prompt, greedy, one sequence; the runners take turns round by round, which comes first
changes, so a ratio holds when the machine's speed drifts. What each computes:

    ours          INT4 symmetric, blocks of 128, head too; activations to INT8 inside the product; cache float32;
                  once as exported and once from ONNX Runtime's prepared form (qvlm_runtime/prepared.py)
    genai         MatMulNBits INT4, block as asked for (read back from its graph), head too; cache float32
    llama.cpp     Q4_0: INT4 symmetric, blocks of 32, head Q6_K; Q4_K_M: its mix of 4 and 6 bits; cache float16

Printed: tokens per second (median and the interval of figure.py), load time, memory, bytes that a step must read
(the model's file without the embedding table) against the read bandwidth measured here, and our speed over theirs.
Random weights: this says nothing about accuracy.

Run: python tests/bench/decode_peers.py --work DIR [--layers 22] [--threads 2] [--rounds 9] [--json FILE]
FILE is written after each round, and a FILE with the same settings is continued: on a machine that is quiet for a
minute at a time, start it again until all rounds are there. Loading is timed at every start.
Needs network for the first run (PyPI; llama-cpp-python is compiled: cmake and a C++ compiler, 10 to 40 minutes), 12 GB
of disk in DIR and 10 GB of memory for genai's builder. DIR keeps environments and models for the next run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode import Shape
from peer_models import environment, genai_blocks, write_genai, write_hugging_face, write_ours
from turns import RUNNERS, Kept, Runner, arguments, measure, row, show

from qvlm_runtime.bench.floors import measure_limits
from qvlm_runtime.bench.machine import Machine
from qvlm_runtime.bench.weights import graph_weights

GENAI = ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "tqdm", "numpy")
LLAMA = ("llama-cpp-python==0.3.36", "gguf", "numpy")
# gcc 12's code of llama.cpp's AMX kernels crashes; without them it takes AVX2 or AVX-512 with VNNI. LLAVA_BUILD is its
# image tools, a quarter of the compile time and not used here.
LLAMA_CMAKE = (
    "-DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF -DLLAVA_BUILD=OFF"
)
GGUF_TYPES = ("Q4_0", "Q4_K_M")
BLOCKS = (32, 128)


def prepare(args: argparse.Namespace, shape: Shape) -> tuple[list[Runner], dict[str, int], Any]:
    """Environments, models and runners; bytes a step reads by runner; how each was built."""
    work = args.work.resolve()
    models = work / f"models-{shape.layers}x{shape.hidden}"
    source, cache = models / "hugging-face", args.prompt + args.steps + 1
    if not (source / "tokenizer_config.json").is_file():
        write_hugging_face(source, shape)
    threads, table = args.threads, shape.vocab * shape.hidden
    ours, graph = [*write_ours(models / "ours", shape), str(threads)], models / "ours/decoder.onnx"
    kept = {"ours": {}, "ours, prepared": {"prepared": str(models / "prepared")}}
    runners, nbytes, built = list[Runner](), dict[str, int](), dict[str, Any]()
    for name, settings in kept.items():
        given = [*ours, json.dumps(settings)]
        runners.append(Runner(name, Path(sys.executable), "ours.py", given))
        nbytes[name] = graph_weights(graph).nbytes
        built[name] = {"graph": "qvlm_export, target ort, recipe w4a16", **settings}
    if not (models / "prepared").is_dir():  # made here, so that what is timed is a later start
        maker = Runner("", Path(sys.executable), "ours.py", given)
        maker.call("load")
        maker.close()
    if "genai" in args.peers:
        python = environment(work / "genai", GENAI, {})
        for block in BLOCKS:
            name, folder = f"onnxruntime-genai int4 block {block}", models / f"genai-{block}"
            command = write_genai(python, source, folder, block, threads)
            runners.append(Runner(name, python, "genai.py", [str(folder), str(cache)]))
            nbytes[name] = graph_weights(folder / "model.onnx").nbytes
            built[name] = {"command": command, "MatMulNBits": genai_blocks(folder)}
            built[name]["packages"] = list(GENAI)
    if "llama" in args.peers:
        python = environment(work / "llama", LLAMA, {"CMAKE_ARGS": LLAMA_CMAKE})
        files = [models / f"{kind}.gguf" for kind in GGUF_TYPES]
        if not all(path.is_file() for path in files):
            command = [python, RUNNERS / "write_gguf.py", source, models, str(threads), *GGUF_TYPES]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        for kind, path in zip(GGUF_TYPES, files, strict=True):
            name, given = f"llama.cpp {kind}", [str(path), str(cache), str(threads)]
            runners.append(Runner(name, python, "llama.py", given, quiet=True))
            # Both types keep the embedding table at 4.5 bits a weight; a step reads one row of it.
            nbytes[name] = path.stat().st_size - table * 9 // 16
            built[name] = {"packages": list(LLAMA), "CMAKE_ARGS": LLAMA_CMAKE}
    return runners, nbytes, built


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="genai,llama", type=lambda text: text.split(","))
    args = parser.parse_args()
    shape = Shape.scaled(args.layers, args.hidden)
    settings = {"threads": args.threads, "prompt": args.prompt, "steps": args.steps} | asdict(shape)
    kept = Kept(args.json, settings | {"peers": args.peers})
    runners, nbytes, built = prepare(args, shape)
    kept.resume(runners)
    kept.bandwidth = max(kept.bandwidth, measure_limits(args.threads).read)
    for runner in runners:
        runner.loads.append(runner.call("load"))
        built[runner.name] |= runner.loads[-1]["about"]
    about = {"machine": Machine().describe(), "built": built}
    measure(
        runners, shape, args.prompt, args.steps, args.rounds, lambda: kept.write(runners, **about)
    )
    rows = [row(r, runners[0], args.prompt, nbytes[r.name], kept.bandwidth) for r in runners]
    for runner in runners:
        runner.close()
    kept.write(runners, **about, rows=rows)
    print(
        f"{shape.parameters() / 1e9:.2f}B weights, {args.threads} threads, prompt {args.prompt}, decode behind it; "
        f"read bandwidth {kept.bandwidth / 1e9:.1f} GB/s; {platform.platform()}"
    )
    show(rows, "ours/theirs decode, prefill")


if __name__ == "__main__":
    main()
