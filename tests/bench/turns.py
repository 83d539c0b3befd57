"""Runners of one decoder in turn, each in its own process: what decode_peers.py and threads.py share."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from decode import Shape

from qvlm_runtime.bench.figure import figure, ratio

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNNERS = HERE / "peers"


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line's common part: where models are kept, the decoder's size, how often."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder that keeps environments and models")
    add("--layers", type=int, default=22)
    add("--hidden", type=int, default=2048, help="a multiple of 256; 64 a head, 8 heads a KV head")
    add("--prompt", type=int, default=128)
    add("--steps", type=int, default=24)
    add("--rounds", type=int, default=9)
    add("--json", type=Path)
    return parser


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
