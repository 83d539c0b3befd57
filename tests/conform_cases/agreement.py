"""The checker's verdicts beside NVIDIA's parser's and compiler's, as a table.

Write it again: PYTHONPATH=.:export:runtime:tests python -m conform_cases.agreement
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from conform_cases import attention, graphs, operators, quantization
from conform_cases.build import Case, save

from qvlm.errors import ExportError
from qvlm_export.conform import RULES, check_graph
from qvlm_export.conform.view import GraphView
from qvlm_export.kernels import Kernel
from qvlm_export.rtx import compile_graph
from qvlm_export.targets import TARGETS

TABLE = Path(__file__).parent.parent / "export" / "conform" / "rtx_agreement.md"
# Graphs that this checker calls an error and TensorRT for RTX compiles.
ACCEPTED = {
    "A-05": "It builds; is_causal aligned to the upper left corner hides most of the past from new rows.",
    "Q-02": "It builds with a warning and reads UINT8 as INT8, so the numbers differ from ONNX Runtime's.",
    "Q-06": "It builds where only the weight is quantized; behind an INT8 activation, or on an sm87 device with "
    "10.16, type inference fails.",
    "Q-15": "Its parser turns DOUBLE scales into FLOAT; ONNX and ONNX Runtime do not have them.",
    "W-01": "It builds by unpacking the weight to float16 at every run; releases before 11 want whole bytes per row.",
    "W-07": "It builds by expanding the weight to float16; NVIDIA's guide names INT4 for matrix products only.",
    "W-09": "It builds an Int4 product; NVIDIA's guide calls INT4 weight-only and no release runs this elsewhere.",
    "W-10": "It builds, but multiplies block scales in behind the sum over all blocks, which is another result.",
}
# Rules about speed that the kernel list shows: what the clean graph has more, or less, of.
KERNELS = {
    "A-06": "fewer kernels",
    "C-04": "fewer kernels",
    "C-05": "fewer kernels",
    "G-05": "more INT4 products",
    "P-02": "more INT8 products",
    "P-05": "fewer kernels",
    "P-06": "more INT8 products",
    "Q-13": "more INT8 products",
    "W-01": "more INT4 products",
    "W-02": "more INT4 products",
    "W-05": "more INT4 products",
}
ON_RTX = {rule.id for rule in RULES if "rtx-1.7" in rule.releases}
# X-01 would write 2 GiB for a parser that cannot read it.
CASES = [
    case
    for case in (*operators.CASES, *attention.CASES, *quantization.CASES, *graphs.CASES)
    if case.rule in ON_RTX - {"X-01"}
]
FREE = 16  # what a dynamic dimension becomes


def compile_case(case: Case, which: str, folder: Path) -> list[Kernel]:
    """Kernels of the case's graph on its GPU generation; ExportError with NVIDIA's message if it is refused."""
    path = save(getattr(case, which), folder / "model.onnx")
    view = GraphView.open(path)
    profile = {}
    for name in view.inputs:
        shape = view.shape(name) or ()
        fixed = tuple(size if isinstance(size, int) else FREE for size in shape)
        if fixed != shape:
            profile[name] = (fixed, fixed, fixed)
    return compile_graph(path, {"fixed": profile} if profile else {}, case.sm)[1]


def refused(case: Case, which: str, folder: Path) -> bool:
    try:
        compile_case(case, which, folder)
    except ExportError:
        return True
    return False


@dataclass(frozen=True)
class Verdicts:
    """Refused by the checker (an error) and by TensorRT for RTX, for the violating and the clean graph."""

    rule: str
    bad: tuple[bool, bool]
    good: tuple[bool, bool]

    def row(self) -> str:
        """The rule's line of the table."""
        rule = next(rule for rule in RULES if rule.id == self.rule)
        cells = [_word(side) for side in (*self.bad, *self.good)]
        why = ACCEPTED.get(self.rule, "")
        if self.rule in KERNELS:
            why = f"{why} Mended: {KERNELS[self.rule]}.".strip()
        return "| " + " | ".join([self.rule, rule.title, rule.level, *cells, why]) + " |"


def _word(refused_: bool) -> str:
    return "refused" if refused_ else "taken"


def verdicts(case: Case, folder: Path) -> Verdicts:
    """Both verdicts on both graphs of a case."""
    target = replace(TARGETS["rtx"], sm=(case.sm,))
    sides = []
    for which in ("bad", "good"):
        path = save(getattr(case, which), folder / "model.onnx")
        ours = any(finding.level == "error" for finding in check_graph(path, target))
        sides.append((ours, refused(case, which, folder)))
    return Verdicts(case.rule, *sides)


def table(rows: list[Verdicts]) -> str:
    """The whole file."""
    agree = sum(ours == theirs for row in rows for ours, theirs in (row.bad, row.good))
    head = [
        "rule",
        "title",
        "level",
        "violating: checker",
        "TensorRT",
        "clean: checker",
        "TensorRT",
        "",
    ]
    lines = [
        "# The checker and TensorRT for RTX 1.7.1, rule by rule",
        "",
        f"{len(rows)} rules, two graphs each: {agree} of {2 * len(rows)} verdicts agree. A graph is refused if the",
        "checker reports an error, or if NVIDIA's parser or compiler gives no engine. Rules of the level warning or",
        "info are about speed: both take their graphs unless another rule refuses them. What the compiler's kernels",
        "show of them is in the last column, as is why the two disagree. Rules for other releases alone are left out.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *(row.row() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile every case and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        TABLE.write_text(table([verdicts(case, Path(folder)) for case in CASES]), encoding="utf-8")


if __name__ == "__main__":
    main()
