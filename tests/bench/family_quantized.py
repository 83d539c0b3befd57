"""Every family's tiny model quantized by a method, exported for ONNX Runtime and replayed against its simulation.

Run: PYTHONPATH=.:export:runtime:calib_data:tests python tests/bench/family_quantized.py [--method q-vlm]
Prints a line a family: tokens that the graph chooses as torch's simulation does, of how many, and whether every bound
of the replay holds. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tiny_families import FAMILIES, quantized

from qvlm.progress import silent
from qvlm_export.build import build
from qvlm_export.targets import named_target
from qvlm_export.verify import verify_target


def measure(family: str, method: str, work: Path) -> str:
    """One family: w4a16 with an INT8 tower, two samples, one golden."""
    checkpoint = quantized(family, work, method)
    spec = build(checkpoint, named_target("ort"), work / "out", None, silent)
    result = verify_target(work / "out", spec, checkpoint, silent)
    held = "all bounds hold" if all(row.passed for row in result.rows) else "a bound is broken"
    return f"{family}: {result.agree} of {result.positions} tokens, {held}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="q-vlm")
    args = parser.parse_args()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            print(measure(family, args.method, Path(work)), flush=True)


if __name__ == "__main__":
    main()
