"""ONNX Runtime's settings for one decoder, one process each, in turn: how many threads, whether they spin, what is
packed. Decode and prefill of the 1.1B shape at w4a16; speeds are against the runtime's own default, with intervals.

    default         what the runtime does: ONNX Runtime's choice, one thread a physical core, each tied to its core;
                    fewer where a container or taskset allows fewer (qvlm_runtime/cores.py)
    threads n       n threads, not tied
    no spinning     a thread that waits for work sleeps at once: waking costs time at every product, and another
                    program gets the core meanwhile
    stop spinning   threads spin inside a run and sleep as soon as it ends: for applications that do other work
                    between two tokens on the same cores
    block base 4    a product is cut into more, uneven pieces: for cores of unequal speed (big.LITTLE)
    no prepacking   weights are not packed when the graph is opened: INT4 products then take many times as long
    prepared        the packed form is mapped from disk, see qvlm_runtime/prepared.py

Run: python tests/bench/threads.py --work DIR [--layers 22] [--rounds 9]   (DIR as for decode_peers.py)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from decode import Shape
from decode_peers import Runner, measure, row, show, write_ours

from qvlm_runtime.bench.floors import measure_limits
from qvlm_runtime.bench.weights import graph_weights


def settings(models: Path, cores: int) -> dict[str, tuple[int, dict[str, str]]]:
    """Name -> threads and session config entries; the runtime's default first."""
    counts = sorted({1, 2, max(1, cores // 2), cores, 2 * cores})
    return {
        "default": (0, {}),
        **{f"threads {n}": (n, {}) for n in counts},
        "no spinning": (0, {"session.intra_op.allow_spinning": "0"}),
        "stop spinning": (0, {"session.force_spinning_stop": "1"}),
        "block base 4": (0, {"session.dynamic_block_base": "4"}),
        "no prepacking": (0, {"session.disable_prepacking": "1"}),
        "prepared": (0, {"prepared": str(models / "prepared")}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True)
    add("--layers", type=int, default=22)
    add("--hidden", type=int, default=2048)
    add("--prompt", type=int, default=128)
    add("--steps", type=int, default=24)
    add("--rounds", type=int, default=9)
    add("--json", type=Path)
    args = parser.parse_args()
    shape = Shape.scaled(args.layers, args.hidden)
    models = args.work.resolve() / f"models-{args.layers}x{args.hidden}"
    base, cores = write_ours(models / "ours", shape), len(os.sched_getaffinity(0))
    bandwidth = measure_limits(cores).read
    nbytes = graph_weights(models / "ours/decoder.onnx").nbytes
    runners = list[Runner]()
    for name, (threads, entries) in settings(models, cores).items():
        arguments = [*base, str(threads), json.dumps(entries)]
        for take in range(
            2 if name == "prepared" else 1
        ):  # the first start makes what the second maps
            runner = Runner(name, Path(sys.executable), "ours.py", arguments)
            runner.loads.append(runner.call("load"))
            if name == "prepared" and take == 0:
                runner.close()
        runners.append(runner)
    measure(runners, shape, args.prompt, args.steps, args.rounds)
    rows = [row(r, runners[0], args.prompt, nbytes, bandwidth) for r in runners]
    for runner in runners:
        runner.close()
    print(f"{cores} cores; read bandwidth {bandwidth / 1e9:.1f} GB/s")
    show(rows, "decode time over default's, prefill")
    if args.json:
        result = {"cores": cores, "bandwidth": bandwidth, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
