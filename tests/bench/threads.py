"""ONNX Runtime's settings for one decoder, one process each, in turn: how many threads, whether they spin, what is
packed. Decode and prefill of the 1.1B shape at w4a16; speeds are against the runtime's own default, with intervals.

    default         what the runtime does: ONNX Runtime's choice, one thread a physical core, each tied to its core;
                    fewer where a container or taskset allows fewer (qvlm_runtime/cores.py)
    threads n       n threads, not tied
    no spinning     a thread that waits for work sleeps at once: waking costs time at every product, and another
                    program gets the core meanwhile
    stop spinning   threads spin inside a run and sleep as soon as it ends: for applications that do other work
                    between two tokens on the same cores
    spin 50 us      threads that wait sleep after 50 microseconds
    spin backoff 8  threads that wait look less and less often, up to 8 pauses of the processor between two looks
    no arena        memory of activations comes from the system's allocator at every step
    no memory pattern  places of activations are not planned for a repeated shape
    parallel prepacking  weights are packed by all threads at once when the graph is opened
    block base 4    a product is cut into more, uneven pieces: for cores of unequal speed (big.LITTLE)
    no prepacking   weights are not packed when the graph is opened: INT4 products then take many times as long
    prepared        the packed form is mapped from disk, see qvlm_runtime/prepared.py

Run: python tests/bench/threads.py --work DIR [--layers 22] [--rounds 9] [--only NAME ...]
DIR is as for decode_peers.py. With --json a run that was ended goes on, as decode_peers.py does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from decode import Shape
from peer_models import write_ours
from turns import Kept, Runner, arguments, measure, row, show

from qvlm_runtime.bench.floors import measure_limits
from qvlm_runtime.bench.weights import graph_weights


def settings(models: Path, cores: int) -> dict[str, tuple[int, dict[str, str]]]:
    """Name -> threads and ONNX Runtime's settings; the runtime's default first."""
    counts = sorted({1, 2, max(1, cores // 2), cores, 2 * cores})
    return {
        "default": (0, {}),
        **{f"threads {n}": (n, {}) for n in counts},
        "no spinning": (0, {"session.intra_op.allow_spinning": "0"}),
        "stop spinning": (0, {"session.force_spinning_stop": "1"}),
        "spin 50 us": (0, {"session.intra_op.spin_duration_us": "50"}),
        "spin backoff 8": (0, {"session.intra_op.spin_backoff_max": "8"}),
        "no arena": (0, {"enable_cpu_mem_arena": "0"}),
        "no memory pattern": (0, {"enable_mem_pattern": "0"}),
        "parallel prepacking": (0, {"session.prepack.enable_parallel": "1"}),
        "block base 4": (0, {"session.dynamic_block_base": "4"}),
        "no prepacking": (0, {"session.disable_prepacking": "1"}),
        "prepared": (0, {"prepared": str(models / "prepared")}),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings beside default")
    args = parser.parse_args()
    shape = Shape.scaled(args.layers, args.hidden)
    models = args.work.resolve() / f"models-{args.layers}x{args.hidden}"
    base, cores = write_ours(models / "ours", shape), len(os.sched_getaffinity(0))
    kept = Kept(
        args.json, {"cores": cores, "prompt": args.prompt, "steps": args.steps, "only": args.only}
    )
    kept.bandwidth = max(kept.bandwidth, measure_limits(cores).read)
    nbytes = graph_weights(models / "ours/decoder.onnx").nbytes
    runners = list[Runner]()
    for name, (threads, entries) in settings(models, cores).items():
        if args.only and name not in ("default", *args.only):
            continue
        given = [*base, str(threads), json.dumps(entries)]
        # The first start makes what the second maps.
        for take in range(2 if name == "prepared" else 1):
            runner = Runner(name, Path(sys.executable), "ours.py", given)
            kept.resume([runner])
            runner.loads.append(runner.call("load"))
            if name == "prepared" and take == 0:
                runner.close()
        runners.append(runner)
    measure(runners, shape, args.prompt, args.steps, args.rounds, lambda: kept.write(runners))
    rows = [row(r, runners[0], args.prompt, nbytes, kept.bandwidth) for r in runners]
    for runner in runners:
        runner.close()
    kept.write(runners, rows=rows)
    print(f"{cores} cores; read bandwidth {kept.bandwidth / 1e9:.1f} GB/s")
    show(rows, "decode time over default's, prefill")


if __name__ == "__main__":
    main()
