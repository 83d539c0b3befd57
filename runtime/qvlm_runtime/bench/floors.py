"""What the hardware allows: the least time of a decode step, a prefill and an image, and the share
of it that was reached.

    decode   bytes(weights read) + bytes(cache rows)   over the measured read bandwidth
    prefill  2 * (weights * tokens)                    over the measured matrix product
    vision   2 * (weights * image tokens)              over the same

The bandwidth is that of summing an array much larger than the caches, the peak that of a float32
matrix product, both by NumPy with the same number of threads, in a process of their own (its BLAS
takes the number of threads from the environment, at import). Floors leave out what cannot be told
from the graph: attention's products, and patches that are merged into one token. So a floor is
never above the truth, and a share never flatters. Integer kernels may pass 1.0 in prefill: their
peak is above float32's, and the share says by how much.

Run: python -m qvlm_runtime.bench.floors THREADS BYTES SIDE  (prints one JSON object)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qvlm_runtime.bench.weights import GraphWeights
from qvlm_runtime.errors import SessionError
from qvlm_runtime.manifest import ModelSpec

_READ = 1 << 29  # bytes; several times the last cache of any processor with few cores
_SIDE = 1536
_TAKES = 5
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Limits:
    """read: bytes per second. product: float32 operations per second."""

    read: float
    product: float


def measure_limits(threads: int, nbytes: int = _READ, side: int = _SIDE) -> Limits:
    """Both limits with that many threads, in a fresh process. SessionError if it fails.

    nbytes: of the array that is summed; side: of the square matrices.
    """
    environment = dict(os.environ) | dict.fromkeys(_THREAD_VARIABLES, str(threads))
    environment["PYTHONPATH"] = import_path()
    run = subprocess.run(
        [sys.executable, "-m", "qvlm_runtime.bench.floors", *map(str, (threads, nbytes, side))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if run.returncode:
        line = run.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SessionError(f"floors: measuring the machine failed ({line[0]}). Use --no-floors.")
    return Limits(**json.loads(run.stdout))


def import_path() -> str:
    """PYTHONPATH under which a child process finds this package, installed or not."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


def decode_bytes(weights: GraphWeights, model: ModelSpec, itemsize: int, context: int) -> int:
    """Bytes one decode step must read behind ``context`` cached tokens."""
    row = 2 * model.layers * model.kv_heads * model.head_dim * itemsize
    return weights.nbytes + context * row


def prefill_operations(weights: GraphWeights, model: ModelSpec, tokens: int) -> float:
    """Operations of a prefill; the output projection runs for the last token only."""
    head = model.hidden_size * model.vocab_size
    return 2.0 * ((weights.elements - head) * tokens + head)


def vision_operations(weights: GraphWeights, rows: int) -> float:
    """Operations of the vision graph, counted at its output rows: a tower that merges positions
    behind its layers does more.
    """
    return 2.0 * weights.elements * rows


def read_bandwidth(threads: int, nbytes: int) -> float:
    """Bytes per second of summing an array, the better of two ways, best of five.

    NumPy's sum in ``threads`` threads, and the dot product with itself by BLAS' own threads.
    """
    data = np.ones(nbytes // 4, np.float32)
    parts = np.array_split(data, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        ways: tuple[Callable[[], object], ...] = (
            lambda: list(pool.map(np.add.reduce, parts)),
            lambda: np.dot(data, data),
        )
        for way in ways:
            for _ in range(_TAKES):
                start = time.perf_counter()
                way()
                best = max(best, nbytes / (time.perf_counter() - start))
    return best


def matrix_product(side: int) -> float:
    """Float32 operations per second of a square product, best of five."""
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    out, best = np.empty_like(a), 0.0
    for _ in range(_TAKES):
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = max(best, 2.0 * side**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    limits = Limits(read_bandwidth(given[0], given[1]), matrix_product(given[2]))
    sys.stdout.write(json.dumps(asdict(limits)) + "\n")
