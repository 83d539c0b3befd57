"""Our methods and the quantizers people use, on one model, one calibration set, one format and one judge.

Each peer runs in an environment of its own below --work, made here with pinned versions (PEERS), through
peer_worker.py; its result is read back as the weights it stands for and measured like ours. Only the
decoder's linears are quantized (vision tower, projector and head stay float, as the peers leave them), with the same
calibration samples, questions and seed. What a peer's weights claim to be is checked: no group of a weight may hold
more values than its integers can take, else the row is refused. A peer that fails is a row with its last line of
output, not a gap.

Formats: w4a16, w4a16-g64, w8a8, and w3a16, w2a16. A peer's static W8A8 is imported with its scales, its dynamic one
with the token-normalised activations of w8a8, which is the same arithmetic.

With --whole the formats are those of `qvlm compare` (recipes, their files, number formats): vision tower, projector and
embeddings as they say, bits of the whole model in each row, no peers.

Run: python tests/bench/accuracy_peers.py --work DIR [--formats w4a16 ...] [--peers ...] [--methods ...] [--draws 3]
Rows are kept in DIR/rows.json; an interrupted run continues. What a peer wrote stays in DIR/out: without rows.json it
is measured again (on other questions, say: --eval-seed) and not made again. Needs PyPI for the environments. pip must
find a CPU build of torch first (PIP_EXTRA_INDEX_URL or a local wheel), else it downloads CUDA's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.data import calibration, evaluation, refuse_overlap
from qvlm.errors import QvlmError
from qvlm.fakequant import FakeQuantLinear
from qvlm.methods import METHODS, Context
from qvlm.models.adapter import Adapter
from qvlm.plan import plan, resolve
from qvlm.quantize import build_samples
from qvlm.recipe import Format, component_recipe, named_format
from qvlm.source import Source, load, open_source
from qvlm.trials.compare import parse_format, spread, with_method
from qvlm.trials.job import quantized
from qvlm.trials.judge import Judge
from qvlm.trials.memory import peak_memory
from qvlm.trials.results import Results

Json = dict[str, Any]
WORKER = Path(__file__).with_name("peer_worker.py")
TORCH = "torch==2.13.0"
# No peer needs longer on the demo with a core to itself; more means that it hangs.
TIMEOUT = 3 * 3600
# Block errors are sums over tens of tokens a question: a hundred questions make them steady, a divergence needs more.
BLOCK_QUESTIONS = 100


@dataclass(frozen=True)
class Peer:
    """requirements: what its environment gets besides torch; presets by kind of format, its default first."""

    requirements: tuple[str, ...]
    weight_only: tuple[str, ...]
    w8a8: tuple[str, ...]


PEERS = {
    "nvidia-modelopt": Peer(
        ("nvidia-modelopt==0.47.0", "transformers==5.14.1", "accelerate", "datasets", "requests"),
        ("awq_lite", "awq_full"),
        ("smoothquant",),
    ),
    "auto-round": Peer(
        ("auto-round==0.16.1", "transformers==5.24.0", "pillow"), ("default", "best"), ("default",)
    ),
    "llmcompressor": Peer(
        ("llmcompressor==0.14.0.1", "transformers==5.17.0"),
        ("gptq", "awq", "awq+gptq", "rtn"),
        ("gptq", "smoothquant+gptq"),
    ),
}


# -- a peer's run


def environment(work: Path, name: str) -> Path:
    """The interpreter of the peer's environment, made if it is not there."""
    folder = work / "env" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        constraint = work / "constraints.txt"
        constraint.write_text(TORCH + "\n", encoding="utf-8")
        for wanted in ((TORCH,), PEERS[name].requirements):
            command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraint)]
            subprocess.run([*command, *wanted], check=True)
        (folder / "ready").touch()
    return python


class PeerFailed(Exception):
    """A peer's process ended with an error, or what it wrote is not what the format says."""


def run_peer(
    work: Path, peer: str, preset: str, format_: str, model: Path, samples: Path
) -> tuple[dict[str, Tensor], Json]:
    """The decoder's tensors as the peer left them, and its report; those of an earlier run if they are there."""
    from safetensors.torch import load_file

    out = work / "out" / f"{peer}-{preset}-{format_}-{samples.stem}"
    out.parent.mkdir(exist_ok=True)
    # The worker writes its report last.
    if not out.with_name(out.name + ".json").exists():
        work_on(work, peer, preset, format_, model, samples, out)
    report: Json = json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8"))
    return load_file(out.with_name(out.name + ".safetensors")), report


def work_on(
    work: Path, peer: str, preset: str, format_: str, model: Path, samples: Path, out: Path
) -> None:
    """Runs the worker; PeerFailed with the last line it printed."""
    command = [str(environment(work, peer)), str(WORKER), peer, preset, format_]
    command += [str(model), str(samples), str(out)]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with out.with_name(out.name + ".log").open("w+", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=work, timeout=TIMEOUT
        )
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    if done.returncode:
        raise PeerFailed((lines or [f"exit {done.returncode}"])[-1][:300])


class Scaled(nn.Module):
    """A linear behind an input scale per column."""

    def __init__(self, scale: Tensor, linear: nn.Module) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)  # type: ignore[operator, no-any-return]


def imported(
    model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], format_: Format
) -> nn.Module:
    """A copy of the float model with a peer's decoder; PeerFailed if a weight is none of the format's."""
    model = copy.deepcopy(model)
    for name, linear in adapter.linears(model, "text").items():
        weight = tensors[f"{name}.weight"]
        check_grid(name, weight, format_)
        activations, scale = format_.activations, tensors.get(f"{name}.input_scale")
        if activations is not None and scale is not None:
            activations = named_format("w8a8-static").activations
        module: nn.Module = FakeQuantLinear(weight, linear.bias, activations, scale)
        if f"{name}.column_scale" in tensors:
            module = Scaled(tensors[f"{name}.column_scale"], module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]
    return model


def check_grid(name: str, weight: Tensor, format_: Format) -> None:
    """PeerFailed if a group holds more different values than 2^bits, or none was rounded at all."""
    assert format_.weights is not None
    out, columns = weight.shape
    groups = format_.weights.groups(columns, name)
    ordered = weight.reshape(out * groups, -1).sort(-1).values
    # A step far below the grid's is float noise of the peer's own dequantization.
    span = (ordered[:, -1:] - ordered[:, :1]).clamp(min=1e-30)
    steps = (ordered.diff(dim=-1) / span > 2.0**-format_.weights.bits / 64).sum(-1) + 1
    if int(steps.max()) > 2**format_.weights.bits:
        raise PeerFailed(
            f"{name}: a group of {columns // groups} holds {int(steps.max())} values, "
            f"{format_.name} has {2**format_.weights.bits}"
        )


# -- rows


@dataclass(frozen=True)
class Bench:
    """The model, samples of each draw (and their files for the peers), the judge, and one of fewer questions for block
    errors.
    """

    source: Source
    model: nn.Module
    adapter: Adapter
    draws: list[list[Sample]]
    files: list[Path]
    judge: Judge
    blocks: Judge


def prepare(
    work: Path, source_name: str, samples: int, seeds: range, questions: int, asked_seed: int
) -> Bench:
    source = open_source(source_name)
    loaded = load(source)
    asked = evaluation(None, questions, asked_seed)
    drawn = [calibration(None, samples, seed) for seed in seeds]
    refuse_overlap((q for draw in drawn for q in draw), asked)
    built = [build_samples(loaded, source.adapter, draw) for draw in drawn]
    files = []
    for seed, group in zip(seeds, built, strict=True):
        path = work / f"{Path(source_name).name}-{samples}-{seed}.pt"
        inputs = [s.model_inputs() for s in group]
        torch.save([{**i, "attention_mask": torch.ones_like(i["input_ids"])} for i in inputs], path)
        files.append(path)
    questioned = build_samples(loaded, source.adapter, asked)
    judges = [Judge(loaded.model, part) for part in (questioned, questioned[:BLOCK_QUESTIONS])]
    return Bench(source, loaded.model, source.adapter, built, files, *judges)


def measured(bench: Bench, reference: nn.Module, model: nn.Module) -> Json:
    return {
        **bench.judge.measure(model),
        **bench.blocks.block_errors(reference, model, bench.adapter),
    }


def peer_row(bench: Bench, work: Path, peer: str, preset: str, format_: str, draw: int) -> Json:
    try:
        tensors, report = run_peer(
            work, peer, preset, format_, bench.source.directory, bench.files[draw]
        )
        model = imported(bench.model, bench.adapter, tensors, named_format(format_))
    except (PeerFailed, subprocess.SubprocessError) as error:
        return {"failed": str(error)}
    return {**measured(bench, bench.model, model), **report}


def our_row(bench: Bench, method: str, format_: str, draw: int, whole: bool) -> Json:
    base = parse_format(format_) if whole else component_recipe(format_, "float", "float")
    recipe = with_method(base, method)
    formats = resolve(bench.model, bench.adapter, recipe)
    context = Context(bench.model, bench.adapter, bench.draws[draw], recipe, formats)
    try:
        with peak_memory() as peak:
            started, worked = time.perf_counter(), time.process_time()
            job = quantized(context)
            seconds = time.perf_counter() - started
            cpu_seconds = time.process_time() - worked
    except QvlmError as error:
        return {"failed": str(error)}
    found = measured(bench, job.context.model, job.model)
    cost = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak.megabytes}
    return {**found, **cost, "bits_per_weight": plan(bench.source, recipe).bits_per_weight}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="environments, logs, rows.json")
    parser.add_argument("--source", default="demo")
    parser.add_argument("--formats", nargs="+", default=["w4a16", "w4a16-g64", "w8a8"])
    parser.add_argument("--peers", nargs="*", default=[f"{n}:{p}" for n, p in every_preset()])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first draw and the questions")
    parser.add_argument("--eval-samples", type=int, default=400)
    parser.add_argument("--eval-seed", type=int, help="of the questions, if not --seed")
    parser.add_argument("--whole", action="store_true", help="the whole model; see above")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    if args.whole:
        args.peers = []
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    asked_seed = args.seed if args.eval_seed is None else args.eval_seed
    identity = {
        "source": args.source, "samples": args.samples, "questions": args.eval_samples,
        "seed": args.seed, "eval_seed": asked_seed, **({"whole": True} if args.whole else {}),
    }  # fmt: skip
    results = Results(args.work / "rows.json", identity)
    seeds = range(args.seed, args.seed + args.draws)
    bench = prepare(args.work, args.source, args.samples, seeds, args.eval_samples, asked_seed)
    key = {"by": "float", "method": "float", "format": "float", "draw": 0}
    if results.find(key) is None:
        results.add({**key, **bench.judge.measure(bench.model), "seconds": 0.0})
    wanted = [("qvlm", method) for method in args.methods]
    wanted += chosen_presets(args.peers)
    for format_ in args.formats:
        for by, what in wanted:
            if by != "qvlm" and what not in presets(by, format_):
                continue
            for draw in range(args.draws):
                key = {"by": by, "method": what, "format": format_, "draw": draw}
                if results.find(key) is None:
                    row = (
                        our_row(bench, what, format_, draw, args.whole)
                        if by == "qvlm"
                        else peer_row(bench, args.work, by, what, format_, draw)
                    )
                    results.add({**key, **row})
                    print(line(results.rows[-1]), flush=True)
    print(summary(results.rows))
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        data = {"settings": identity, "versions": versions, "rows": results.rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def every_preset() -> list[tuple[str, str]]:
    return [
        (name, preset)
        for name, peer in PEERS.items()
        for preset in dict.fromkeys((*peer.weight_only, *peer.w8a8))
    ]


def chosen_presets(names: list[str]) -> list[tuple[str, str]]:
    """peer:preset, or a peer for all of its presets; SystemExit for a name that is neither."""
    known = every_preset()
    found = [[one for one in known if name in (one[0], ":".join(one))] for name in names]
    for name, chosen in zip(names, found, strict=True):
        if not chosen:
            listed = ", ".join(":".join(one) for one in known)
            raise SystemExit(f"--peers {name}: expected one of {listed}, or a peer's name")
    return [one for chosen in found for one in chosen]


def presets(peer: str, format_: str) -> tuple[str, ...]:
    """Those that exist for a format."""
    return PEERS[peer].w8a8 if format_ == "w8a8" else PEERS[peer].weight_only


def line(row: Json) -> str:
    what = f"kl {row['kl']:.3e}" if "kl" in row else f"failed: {row['failed']}"
    return f"{row['format']} {row['by']} {row['method']} draw {row['draw']}: {what}"


def summary(rows: list[Json]) -> str:
    """Format by format, best mean KL first."""
    groups: dict[tuple[str, str, str], list[Json]] = defaultdict(list)
    for row in rows:
        if "kl" in row:
            groups[(row["format"], row["by"], row["method"])].append(row)
    lines = [
        f"{'format':10} {'by':16} {'method':22} {'KL':>22} {'KL trimmed':>22} {'exact match':>18} {'seconds':>8}"
    ]
    order = sorted(groups, key=lambda k: (k[0], statistics.fmean(r["kl"] for r in groups[k])))
    for key in order:
        group = groups[key]
        kl, trimmed, match = (
            spread([r.get(k) for r in group], f)
            for k, f in (("kl", ".3e"), ("kl_trimmed", ".3e"), ("exact_match", ".4f"))
        )
        seconds = statistics.fmean(r["seconds"] for r in group)
        lines.append(
            f"{key[0]:10} {key[1]:16} {key[2]:22} {kl:>22} {trimmed:>22} {match:>18} {seconds:8.1f}"
        )
    lines += [line(row) for row in rows if "failed" in row]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
