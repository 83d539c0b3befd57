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
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from decode import HEAD, PREFIX, Shape, write_checkpoint

from qvlm.progress import silent
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.llama import decoder
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.bench.figure import figure, ratio
from qvlm_runtime.bench.floors import measure_limits
from qvlm_runtime.bench.machine import Machine
from qvlm_runtime.bench.weights import graph_weights
from qvlm_runtime.manifest import TargetSpec

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNNERS = HERE / "peers"
GENAI = ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "tqdm", "numpy")
LLAMA = ("llama-cpp-python==0.3.36", "gguf", "numpy")
# gcc 12's code of llama.cpp's AMX kernels crashes; without them it takes AVX2 or AVX-512 with VNNI. LLAVA_BUILD is its
# image tools, a quarter of the compile time and not used here.
LLAMA_CMAKE = (
    "-DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF -DLLAVA_BUILD=OFF"
)
GGUF_TYPES = ("Q4_0", "Q4_K_M")
BLOCKS = (32, 128)


def environment(folder: Path, packages: tuple[str, ...], variables: dict[str, str]) -> Path:
    """Python of an environment with these packages, made on the first run."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.is_file() or done.read_text() != "\n".join(packages):
        print(f"installing {', '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True, env=dict(os.environ) | variables)
        done.write_text("\n".join(packages))
    return python


def write_hugging_face(folder: Path, shape: Shape) -> None:
    """A Llama checkpoint in float16, N(0, 0.02), with the tokenizer that genai's builder asks for."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return (rng.standard_normal(size, np.float32) * np.float32(0.02)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden)}
    for name, out, columns in shape.linears():
        tensors[f"{name.removeprefix(PREFIX).replace('.', 'model.', 1)}.weight"] = normal(
            out, columns
        )
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = np.ones(shape.hidden, np.float16)
    tensors["model.norm.weight"] = np.ones(shape.hidden, np.float16)
    tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_ours(folder: Path, shape: Shape) -> list[str]:
    """Our decoder graph for target ort; the runner's arguments."""
    path, target = folder / "decoder.onnx", named_target("ort")
    spec = TargetSpec(target.dtype, target.opset, target.cache, {"decoder": str(path)})
    if not path.is_file():
        checkpoint = write_checkpoint(folder / "checkpoint", shape, quantized=True)
        builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
        decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
        write_model(builder.model("bench"), path, silent)
        shutil.rmtree(folder / "checkpoint")
    return [str(path), json.dumps({"model": asdict(shape.spec()), "target": asdict(spec)})]


def write_genai(python: Path, source: Path, folder: Path, block: int, threads: int) -> str:
    """genai's own builder; torch and transformers come from this environment. Its command line."""
    options = [f"block_size={block}", "is_symmetric=true", "accuracy_level=4"]
    command = ["-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *options]
    if not (folder / "genai_config.json").is_file():
        print(f"building genai's model, block {block}", flush=True)
        # Behind its own packages, so that only what it lacks is taken from here.
        path = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        ours = sysconfig.get_paths()["purelib"]
        variables = {"PYTHONPATH": f"{path}:{ours}", "HF_HUB_OFFLINE": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.log").open("w") as log:
            variables = dict(os.environ) | variables
            subprocess.run([python, *command], check=True, env=variables, stdout=log, stderr=log)
    config = json.loads((folder / "genai_config.json").read_text())
    decoder_options = config["model"]["decoder"]["session_options"]
    decoder_options["intra_op_num_threads"] = threads
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2))
    return " ".join(command)


def genai_blocks(folder: Path) -> dict[str, int]:
    """How many MatMulNBits of each (bits, block) genai's graph has: what was asked for may be ignored."""
    import onnx

    found: dict[str, int] = {}
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            given = {a.name: a.i for a in node.attribute}
            kind = f"{given.get('bits', 4)} bits, block {given['block_size']}"
            found[kind] = found.get(kind, 0) + 1
    return found


class Runner:
    """One peer in its own process."""

    def __init__(
        self, name: str, python: Path, script: str, arguments: list[str], quiet: bool = False
    ) -> None:
        self.name = name
        # The system's own allocator and thread settings: only the number of threads is given.
        variables = {"PYTHONPATH": f"{ROOT / 'runtime'}"}
        self._process = subprocess.Popen(
            [python, RUNNERS / script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables,
        )
        self.rounds: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []

    def call(self, name: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the runner ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(
    runners: list[Runner],
    shape: Shape,
    prompt: int,
    steps: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
) -> None:
    """A warm-up, and rounds with the runners in turn until each has ``rounds``; ``done`` after each."""
    ids = np.random.default_rng(1).integers(300, shape.vocab, prompt).tolist()
    for runner in runners:
        runner.call("round", prompt=ids, steps=2)
    for i in range(len(runners[0].rounds), rounds):
        turn = i % len(runners)
        results = {
            r.name: r.call("round", prompt=ids, steps=steps)
            for r in runners[turn:] + runners[:turn]
        }
        for runner in runners:
            runner.rounds.append(results[runner.name])
        done()
        print(f"round {i + 1} of {rounds}", flush=True)


def row(
    runner: Runner, first: Runner, prompt: int, nbytes: int, bandwidth: float
) -> dict[str, Any]:
    """The figures of one runner, and our speed over its own."""
    steps = [float(np.median(r["steps"])) for r in runner.rounds]
    prefills = [r["prefill"] for r in runner.rounds]
    ours = [float(np.median(r["steps"])) for r in first.rounds]
    memory = runner.call("memory")
    return {
        "name": runner.name,
        "load_seconds": float(np.median([load["seconds"] for load in runner.loads])),
        "decode_seconds": asdict(figure(steps)),
        "decode_tokens_per_second": 1 / figure(steps).median,
        "prefill_seconds": asdict(figure(prefills)),
        "prefill_tokens_per_second": prompt / figure(prefills).median,
        "bytes_per_step": nbytes,
        "share_of_bandwidth": nbytes / bandwidth / figure(steps).median,
        "peak_bytes": memory["peak"],
        "resident_bytes": memory["resident"],
        "own_bytes": memory["own"],
        "ours_over_theirs": {
            "decode": asdict(ratio(steps, ours)),
            "prefill": asdict(ratio(prefills, [r["prefill"] for r in first.rounds])),
        },
    }


def show(rows: list[dict[str, Any]], heading: str) -> None:
    """The table that both benches of one decoder print."""
    print(f"decode t/s  prefill t/s  load s  resident, own MB  MB a step  share  {heading}")
    for one in rows:
        ratios = ", ".join(
            f"{f['median']:.2f} [{f['low']:.2f}, {f['high']:.2f}]"
            for f in one["ours_over_theirs"].values()
        )
        print(
            f"{one['decode_tokens_per_second']:10.2f}  {one['prefill_tokens_per_second']:11.1f}  "
            f"{one['load_seconds']:6.2f}  {one['resident_bytes'] / 1e6:9.0f}, {one['own_bytes'] / 1e6:6.0f}  "
            f"{one['bytes_per_step'] / 1e6:9.0f}  "
            f"{one['share_of_bandwidth']:5.2f}  {ratios}  {one['name']}"
        )


class Kept:
    """What earlier starts measured, in the JSON file; nothing is kept without one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path, self.settings = path, settings
        self.bandwidth = 0.0
        self._data: dict[str, Any] = {}
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise SystemExit(f"{path}: measured with {found['settings']}. Give another file.")
            self._data, self.bandwidth = found, found["bandwidth"]

    def resume(self, runners: list[Runner]) -> None:
        """Rounds and loads of earlier starts, to the runners of the same names."""
        for runner in runners:
            samples = self._data.get("samples", {}).get(runner.name, {"rounds": [], "loads": []})
            runner.rounds, runner.loads = samples["rounds"], samples["loads"]

    def write(self, runners: list[Runner], **more: Any) -> None:
        """Everything so far; the file appears whole."""
        if self._path is None:
            return
        samples = {r.name: {"loads": r.loads, "rounds": r.rounds} for r in runners}
        data = {"settings": self.settings, "bandwidth": self.bandwidth, **more, "samples": samples}
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.replace(self._path)


def prepare(args: argparse.Namespace, shape: Shape) -> tuple[list[Runner], dict[str, int], Any]:
    """Environments, models and runners; bytes a step reads by runner; how each was built."""
    work = args.work.resolve()
    models = work / f"models-{shape.layers}x{shape.hidden}"
    source, cache = models / "hugging-face", args.prompt + args.steps + 1
    if not (source / "tokenizer_config.json").is_file():
        write_hugging_face(source, shape)
    threads, table = args.threads, shape.vocab * shape.hidden
    arguments, graph = (
        [*write_ours(models / "ours", shape), str(threads)],
        models / "ours/decoder.onnx",
    )
    kept = {"ours": {}, "ours, prepared": {"prepared": str(models / "prepared")}}
    runners, nbytes, built = list[Runner](), dict[str, int](), dict[str, Any]()
    for name, settings in kept.items():
        given = [*arguments, json.dumps(settings)]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder that keeps environments and models")
    add("--layers", type=int, default=22)
    add("--hidden", type=int, default=2048, help="a multiple of 256; 64 a head, 8 heads a KV head")
    add("--threads", type=int, default=2)
    add("--prompt", type=int, default=128)
    add("--steps", type=int, default=24)
    add("--rounds", type=int, default=9)
    add("--peers", default="genai,llama", type=lambda text: text.split(","))
    add("--json", type=Path)
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
