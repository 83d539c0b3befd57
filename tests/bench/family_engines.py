"""Every family's tiny quantized model, for every TensorRT target, through the compiler of TensorRT for RTX: does each
graph parse and compile, with integer products where weights are integers, and into how many kernels?

Each target is built with its own defaults, in bfloat16 and with the cache in place, where it has them; what gives the
same bytes is compiled once. What is compiled is the graph, not the engine that the target's own TensorRT would build.

Run: PYTHONPATH=.:export:runtime:calib_data:tests python tests/bench/family_engines.py [FAMILY ...] [--results FILE]
Needs the extra [rtx]; no GPU, no network. With --results, families that the file has already are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compiled import compile_graphs, counts
from tiny_families import FAMILIES, quantized

from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import silent
from qvlm_export.build import build
from qvlm_export.conform import check
from qvlm_export.targets import TARGETS, Target, Variant, named_target
from qvlm_runtime.manifest import TargetSpec, digest

SMS = (86, 89)
VARIANTS = (Variant(), Variant(dtype="bfloat16"), Variant(cache="scatter"))


def variants() -> Iterator[Target]:
    """The TensorRT targets, each in every variant it has."""
    for target in TARGETS.values():
        for variant in VARIANTS:
            known = variant.dtype in (None, *target.dtypes) and variant.cache in (
                None,
                *target.caches,
            )
            if target.is_tensorrt and known:
                yield named_target(target.name, variant)


def content(folder: Path, spec: TargetSpec) -> str:
    """What makes two targets' graphs the same: the digests of their files, by graph."""
    paths = [folder / path for path in spec.graphs.values()]
    files = [file for path in paths for file in (path, path.with_name(f"{path.name}.data"))]
    return " ".join(digest(file).sha256 for file in files)


def measure(family: str, work: Path) -> list[dict[str, Any]]:
    """A row for each different pair of graphs and GPU generation: the targets it is for, rules broken, kernels of an
    image, a prompt and a step, or what the compiler said.
    """
    checkpoint = quantized(family, work / "model")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for target in variants():
        spec = build(checkpoint, target, work / "out", None, silent)
        findings = [f.line() for f in check(work / "out", target) if f.level != "info"]
        for sm in SMS:
            key = (content(work / "out", spec), sm)
            if key not in rows:
                row = {"family": family, "dtype": target.dtype, "cache": target.cache, "sm": sm}
                result = _compile(work / "out", spec, checkpoint, sm)
                rows[key] = {**row, "targets": [], "findings": [], **result}
            rows[key]["targets"].append(target.name)
            rows[key]["findings"] += findings
    return list(rows.values())


def _compile(folder: Path, spec: TargetSpec, checkpoint: Checkpoint, sm: int) -> dict[str, Any]:
    start = time.monotonic()
    try:
        found = counts(compile_graphs(folder, spec, checkpoint, sm))
    except ExportError as error:
        return {"error": str(error)}
    return {"kernels": found, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="FAMILY")
    parser.add_argument("--results", type=Path, help="add the rows to this JSON file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.results and args.results.is_file():
        rows = json.loads(args.results.read_text(encoding="utf-8"))
    for family in args.families or FAMILIES:
        if any(row["family"] == family for row in rows):
            continue
        with tempfile.TemporaryDirectory() as work:
            found = measure(family, Path(work))
        rows += found
        print("\n".join(map(json.dumps, found)), flush=True)
        if args.results:
            lines = ",\n ".join(map(json.dumps, rows))
            args.results.write_text(f"[{lines}]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
