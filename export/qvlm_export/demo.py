"""``make demo``: the embedded demo model through every stage, and what came of it.

1. Export it in float, as the reference: OUT/float.
2. Export it with INT4 decoder and INT8 vision tower by fused: OUT/w4a16, for ONNX Runtime and, where its wheels are
   installed, compiled ahead of time by TensorRT for RTX.
3. Answer held-out questions with both through the runtime, and the showcase questions in words.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qvlm.data import Question, evaluation
from qvlm.errors import QvlmError
from qvlm.progress import Progress, reporter
from qvlm.recipe import RECIPES
from qvlm_export.accuracy import compare
from qvlm_export.pipeline import Request, Result, export
from qvlm_runtime import load
from qvlm_runtime.backend import FAST
from qvlm_runtime.errors import RuntimeFault

Say = Callable[[str], None]
Rows = list[tuple[str, ...]]

QUESTIONS = 240
# Held-out draw of the demo's own evaluation scenes.
SEED = 7
TARGET = "ort"


def run(out: Path, progress: Progress, say: Say) -> Result:
    """Both exports below ``out`` and the comparison, told through ``say``; the quantized export's result."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    float_recipe = replace(RECIPES["float"], method="rtn")
    export(
        Request("demo", float_recipe, (TARGET,)), out / "float", overwrite=True, progress=progress
    )
    questions = evaluation("demo", QUESTIONS, SEED)
    recipe = replace(RECIPES["w4a16"], method="fused")
    rtx = importlib.util.find_spec("tensorrt_rtx_bindings") is not None
    targets, capabilities = ((TARGET, "rtx"), (86,)) if rtx else ((TARGET,), ())

    def accuracy(folder: Path) -> Mapping[str, Any]:
        both = compare(out / "float", folder, TARGET, questions, progress, accuracy_level=FAST)
        return asdict(both)

    result = export(
        Request("demo", recipe, targets, capabilities=capabilities),
        out / "w4a16",
        overwrite=True,
        accuracy=accuracy,
        progress=progress,
    )
    _showcase(out, say)
    _table(result, say)
    say(
        ""
        if rtx
        else "TensorRT for RTX is not installed: pip install 'qvlm[rtx]' to compile engines."
    )
    say(f"{time.perf_counter() - start:.0f} s in all. Report: {result.folder / 'report.html'}")
    say(f"Ask it yourself: qvlm-run {out / 'w4a16'} --image FILE 'QUESTION'")
    return result


def _showcase(out: Path, say: Say) -> None:
    """The shipped showcase questions, float and quantized answers side by side."""
    import qvlm_calib_data

    questions = [
        Question((sample.image,), sample.prompt, sample.answer, sample.task)
        for sample in qvlm_calib_data.showcase()
    ]
    rows: Rows = [("question", "expected", "float", "w4a16")]
    with load(out / "float", TARGET) as reference, load(out / "w4a16", TARGET) as model:
        for question in questions:
            texts = [
                m.generate(question.prompt, question.open_images()).text for m in (reference, model)
            ]
            rows.append((question.prompt, question.answer or "", *texts))
    say("")
    _print(rows, say)


def _table(result: Result, say: Say) -> None:
    report = result.report
    rows: Rows = [("component", "linears", "bits/weight", "bytes", "of float16")]
    for row in report.components:
        rows.append(
            (
                row.component,
                str(row.linears),
                f"{row.bits_per_weight:.3f}",
                f"{row.nbytes:,}",
                f"{row.nbytes / row.float16_bytes:.3f}x",
            )
        )
    say("")
    _print(rows, say)
    accuracy = report.accuracy
    assert accuracy is not None, "the demo always measures accuracy"
    sides = [accuracy["reference"], accuracy["quantized"]]
    rows = [("held-out questions", "float", "w4a16")]
    for task in sides[0]["tasks"]:
        rows.append((task, *(f"{100 * side['tasks'][task]:.1f} %" for side in sides)))
    rows.append(
        (f"all {accuracy['questions']}", *(f"{100 * s['exact_match']:.1f} %" for s in sides))
    )
    rows.append(("KL to float, nats/token", "0", f"{accuracy['kl']:.2e}"))
    rows.append(("decode, tokens/s", *(f"{s['tokens_per_second']:.0f}" for s in sides)))
    say("")
    _print(rows, say)


def _print(rows: Rows, say: Say) -> None:
    """Columns as wide as their longest cell, the first at most 60 characters."""
    cut = [(row[0] if len(row[0]) <= 60 else row[0][:59] + "…", *row[1:]) for row in rows]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))]
    for row in cut:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """``python -m qvlm_export.demo OUT``; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0].startswith("-"):
        sys.stderr.write("usage: python -m qvlm_export.demo OUT\n")
        return 2
    try:
        run(Path(words[0]), reporter(), _say)
    except (QvlmError, RuntimeFault) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
