"""Writes README's table of families from test results: a cell is what the tests behind it said, never a claim by hand.

Run: python tests/families.py            (runs the tests, then writes the table)
     python tests/families.py --junit F  (from the results of a run with --junitxml=F)
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
START, END = "<!-- families -->", "<!-- /families -->"
FAMILIES = {
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "smolvlm": "SmolVLM, SmolVLM2",
    "idefics3": "Idefics3",
    "internvl": "InternVL3",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "blip-2": "BLIP-2 (OPT)",
}
_GRAPHS, _TILES, _QWEN = (f"tests/export/test_{n}.py" for n in ("graphs", "tiles", "qwen"))
_QUANTIZED, _TARGETS = (f"tests/export/test_{n}.py" for n in ("tiles_quantized", "family_targets"))
_BLIP = "tests/export/test_blip.py"
_KINDS, _PROMPTS = "tests/runtime/test_image_kinds.py", "tests/runtime/test_prompt_text.py"


@dataclass(frozen=True)
class Proof:
    """A test function. families: those it speaks for; empty where its parameters name the family."""

    file: str
    function: str
    families: tuple[str, ...] = ()

    def speaks_for(self, family: str, case: str) -> bool:
        """True if the result of parameters ``case`` is one of ``family``."""
        if self.families:
            return family in self.families
        return re.search(rf"(^|-){family}($|[-,])", case) is not None


COLUMNS: dict[str, tuple[Proof, ...]] = {
    "float exact": (
        Proof(_GRAPHS, "test_float32_equals_transformers", ("llava",)),
        Proof(_TILES, "test_float32_equals_transformers"),
        Proof(_QWEN, "test_float32_equals_transformers"),
        Proof(_BLIP, "test_float32_equals_transformers", ("blip-2",)),
    ),
    "quantized exact, ort": (
        Proof("tests/export/test_verify.py", "test_a_correct_export_passes", ("llava",)),
        Proof(_QUANTIZED, "test_verify_accepts_the_export"),
        Proof(_QWEN, "test_quantized_equals_fake_quantization"),
        Proof(_BLIP, "test_quantized_equals_fake_quantization", ("blip-2",)),
    ),
    "answers through ort": (
        Proof(_QUANTIZED, "test_a_folder_answers_as_transformers_does"),
        Proof("tests/end_to_end/test_qwen.py", "test_the_runtime_answers_as_transformers"),
        Proof(
            "tests/end_to_end/test_blip.py", "test_the_runtime_answers_as_transformers", ("blip-2",)
        ),
    ),
    "rtx compiled": (Proof(_TARGETS, "test_engines_have_their_integers_and_kernels"),),
    "every target checked": (Proof(_TARGETS, "test_graphs_of_every_target_have_no_findings"),),
    "images equal": (
        Proof("tests/runtime/test_image.py", "test_equal_to_transformers_bit_for_bit", ("llava",)),
        Proof(_KINDS, "test_split_equals_idefics3_and_smolvlm", ("smolvlm", "idefics3")),
        Proof(_KINDS, "test_canvas_equals_got_ocr2", ("internvl",)),
        Proof(_KINDS, "test_anyres_equals_llava_next", ("llava_next",)),
        Proof(_KINDS, "test_anyres_equals_llava_onevision", ("llava_onevision",)),
        Proof(_KINDS, "test_patches_equal_qwens", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
        Proof("tests/runtime/test_image.py", "test_equal_to_blips_bit_for_bit", ("blip-2",)),
    ),
    "prompts equal": (
        Proof(_PROMPTS, "test_token_ids_are_the_processors"),
        Proof(_PROMPTS, "test_blips_own_template_gives_the_processors_token_ids", ("blip-2",)),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One test case of a run: its file, function, parameters, and whether it passed, failed or was skipped."""

    file: str
    function: str
    case: str
    result: str


def outcomes(junit: Path) -> list[Outcome]:
    """The test cases of a JUnit file that pytest wrote."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        function, _, rest = case.attrib["name"].partition("[")
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        result = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
        file = case.attrib["classname"].replace(".", "/") + ".py"
        found.append(Outcome(file, function, rest.removesuffix("]"), result))
    return found


def cell(family: str, proofs: Iterable[Proof], results: Iterable[Outcome]) -> str:
    """ "yes" if tests ran and all passed, "failed" if one did not, "-" where none ran."""
    seen = {
        one.result
        for one in results
        for proof in proofs
        if (one.file, one.function) == (proof.file, proof.function)
        and proof.speaks_for(family, one.case)
    }
    return "failed" if "failed" in seen else "yes" if "passed" in seen else "-"


def table(results: list[Outcome]) -> str:
    """The table in Markdown."""
    lines = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for family, name in FAMILIES.items():
        lines.append([name, *(cell(family, proofs, results) for proofs in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--junit", type=Path, help="results of a run of pytest with --junitxml")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        junit = args.junit or Path(work) / "results.xml"
        if args.junit is None:
            files = {f"{p.file}::{p.function}" for proofs in COLUMNS.values() for p in proofs}
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *sorted(files)]
            subprocess.run(command, cwd=ROOT, check=False)
        results = outcomes(junit)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        print(f"{readme}: no {START} ... {END} to write between", file=sys.stderr)
        return 1
    readme.write_text(f"{before}{START}\n{table(results)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
