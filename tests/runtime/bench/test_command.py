"""Proves qvlm-bench on a real folder in real worker processes: bench.json and bench.html, ratios,
imported rows, one-line errors, exit codes: python -m pytest tests/runtime/bench/test_command.py

No time is asserted: the figures are checked for what must hold on any machine.
"""

import html.parser
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from runtime_support import model_spec, write_folder

from qvlm_runtime.bench import cli, floors, measure
from qvlm_runtime.bench.floors import decode_bytes, prefill_operations, vision_operations
from qvlm_runtime.bench.page import to_html
from qvlm_runtime.bench.plan import Case, Plan, read_plan
from qvlm_runtime.bench.subject import FolderSubject, least_words
from qvlm_runtime.bench.weights import GraphWeights
from qvlm_runtime.bench.worker import WorkerSubject
from qvlm_runtime.decoder import DecoderState
from qvlm_runtime.errors import PromptError, RuntimeFault, SessionError

FLAGS = (
    "--rounds",
    "6",
    "--max-rounds",
    "6",
    "--steps",
    "2",
    "--contexts",
    "16,32",
    "--power",
    "none",
)
FLAGS += (
    "--prompt-tokens",
    "20",
    "--output-tokens",
    "4",
    "--image-size",
    "32x24",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "toy"
    write_folder(path)
    return path


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two identical folders side by side, once, with a row of llama-bench."""
    output = tmp_path_factory.mktemp("output")
    rows = output / "llama.json"
    row = {"model_type": "llama <1B>", "backends": "CPU", "n_threads": 1, "n_prompt": 0}
    rows.write_text(
        json.dumps([{**row, "n_gen": 8, "n_depth": 16, "avg_ts": 9.5, "stddev_ts": 0.5}])
    )
    extra = ("--ratio", "--no-floors", "--with", str(rows), "--output", str(output))
    assert cli.main([str(folder), str(folder), *FLAGS, *extra]) == 0
    data = json.loads((output / "bench.json").read_text())
    data["page"] = (output / "bench.html").read_text()
    assert sorted(p.name for p in output.iterdir()) == ["bench.html", "bench.json", "llama.json"]
    return dict(data)


def test_everything_is_measured_and_adds_up(run: dict, folder: Path) -> None:
    assert run["schema"] == 1 and [s["name"] for s in run["subjects"]] == [
        str(folder),
        f"{folder} (2)",
    ]
    for subject in run["subjects"]:
        (case,) = subject["cases"]
        assert (subject["target"], subject["backend"]) == ("ort", "ort")
        # <s>, the question's bytes and ">": a token each; three rows of one image.
        assert case["total_prompt_tokens"] >= 20 + 3 and case["images"] == 1
        parts = case["first_token"]
        for i, whole in enumerate(parts["whole"]["samples"]):
            named = [parts[p]["samples"][i] for p in ("preprocess", "vision", "prefill")]
            assert all(seconds > 0 for seconds in named)
            assert parts["other"]["samples"][i] == pytest.approx(
                whole - sum(named)
            ) and whole > sum(named)
        assert case["answer_seconds"]["median"] > 0
        assert [row["context"] for row in subject["contexts"]] == [16, 32]
        for row in subject["contexts"]:
            assert row["tokens_per_second"] == pytest.approx(1 / row["step_seconds"]["median"])
            assert row["cache_bytes"] == 2 * 2 * 6 * 4 * row["context"] and row["floor"] is None
            assert 0 < row["resident_bytes"] <= row["peak_bytes"]
        load_ = subject["load"]
        assert len(load_["seconds"]["samples"]) == 3
        assert 0 < load_["before_bytes"] < load_["resident_bytes"] <= load_["peak_bytes"]
        assert subject["memory"]["host_peak_bytes"] >= load_["peak_bytes"]
        assert subject["memory"]["limit_bytes"] > subject["memory"]["host_peak_bytes"]
        assert subject["energy"] == {}
    assert len(run["rounds"]["1"]) == 6 and run["power"]["not_available"] == {"all": "switched off"}


def test_identical_folders_are_compared_figure_by_figure(run: dict) -> None:
    assert len(run["ratios"]) == 4
    for row in run["ratios"]:
        one = row["figure"]
        assert row["name"] == f"{row['against']} (2)" and one["coverage"] >= 0.95
        assert one["low"] <= one["median"] <= one["high"] and len(one["samples"]) == 6


class _Page(html.parser.HTMLParser):
    """Tags, and whether anything is loaded from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        names = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe") and not {"src", "href"} & set(names)
        self.svgs += tag == "svg"
        if tag not in ("meta", "rect", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path", "polyline", "circle"):
            assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_with_every_part(run: dict) -> None:
    page = _Page()
    page.feed(run["page"])
    assert page.open == [] and page.svgs == 3  # first token, decode, memory; no energy here
    assert "prefers-color-scheme:dark" in run["page"]
    assert "llama-bench: llama &lt;1B&gt;, CPU, 1 threads" in run["page"]
    assert "Not available on this machine (all: switched off)" in run["page"]
    assert "Throttled" not in run["page"]


def test_the_page_marks_throttling_and_draws_energy(run: dict) -> None:
    data = json.loads(json.dumps({k: v for k, v in run.items() if k != "page"}))
    data["rounds"]["1"][2]["throttled"] = ["oc3 rose by 4"]
    spent = {"joules": 0.25, "joules_above_idle": 0.1}
    data["subjects"][0]["energy"] = {"idle_watts": 5.0, "token": spent, "image": spent}
    data["power"]["sources"] = [{"source": "INA3221", "rails": ["VDD_IN"], "total": ["VDD_IN"]}]
    data["limits"] = {"1": {"read": 1e10, "product": 1e11}}
    text = to_html(data)
    assert "Throttled in 1 of 6 rounds (threads: 1): oc3 rose by 4." in text
    page = _Page()
    page.feed(text)
    assert page.svgs == 5 and "0.25 J, 0.1 above idle" in text
    for share, told in ((0.9, False), (1.5, True)):
        for row in (row for subject in data["subjects"] for row in subject["contexts"]):
            row["floor"] = {"bytes": 1e6, "seconds": 1e-3, "share": share}
        assert ("A share above 1" in to_html(data)) == told


def test_json_is_one_object_as_the_last_line_and_threads_make_subjects(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_LOADS", 1)
    limits = floors.Limits(read=2e9, product=4e9)
    monkeypatch.setattr(cli, "measure_limits", lambda threads: limits)
    quick = (
        "--rounds",
        "1",
        "--max-rounds",
        "1",
        "--warmup",
        "0",
        "--threads",
        "1,0",
        "--images",
        "0",
    )
    assert cli.main([str(folder), *FLAGS, *quick, "--json", "--output", str(tmp_path)]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["threads"] for s in data["subjects"]] == [1, 0]
    row = data["subjects"][0]["contexts"][0]
    # wq, wk, wv, wo of 12 x 12, the head of 12 x 260, two scalars, all float32; and 16 cached rows.
    assert row["floor"]["bytes"] == 4 * (4 * 144 + 12 * 260) + 8 + 16 * 96
    assert row["floor"]["seconds"] == pytest.approx(row["floor"]["bytes"] / 2e9)
    share = row["floor"]["seconds"] / row["step_seconds"]["median"]
    assert row["floor"]["share"] == pytest.approx(share)
    assert list(data["subjects"][0]["cases"][0]["floors"]) == ["prefill"]


def test_operations_count_the_head_once() -> None:
    spec = model_spec()
    weights = GraphWeights(0, 1000 + 12 * 260)
    assert prefill_operations(weights, spec, 7) == 2 * (1000 * 7 + 12 * 260)
    assert vision_operations(GraphWeights(0, 50), 6) == 2 * 50 * 6
    assert decode_bytes(GraphWeights(100, 0), spec, 2, 5) == 100 + 5 * 2 * 2 * 6 * 2


def test_the_machine_s_limits_are_measured_in_a_process_of_their_own() -> None:
    # 1 MB/s and 1 MFLOP/s: below any machine that can run this, above what a broken clock gives.
    found = floors.measure_limits(1, 1 << 22, 128)
    assert found.read > 1e6 and found.product > 1e6
    with pytest.raises(SessionError, match="floors: measuring the machine failed"):
        floors.measure_limits(0, 1 << 22, 128)


def test_a_prompt_has_the_tokens_that_were_asked_for(folder: Path) -> None:
    subject = FolderSubject(folder, image_size=(8, 8))
    subject.load()
    try:
        for wanted in (5, 20, 40):
            got = subject.first_token(Case(wanted, 1, 1)).prompt_tokens - 3
            assert wanted <= got < wanted + len(b"the ")
        with pytest.raises(PromptError, match=r"expected room|exceed the cache"):
            subject.first_token(Case(64, 1, 1))
    finally:
        subject.close()


def test_an_end_token_does_not_end_a_measured_answer(folder: Path) -> None:
    subject = FolderSubject(folder, image_size=(8, 8))
    subject.load()
    try:
        assert subject.model.manifest.model.eos_token_ids == ()
        subject.fill(16)
        first = subject.decode(16, 3)
        assert len(first) == len(subject.decode(8, 3)) == len(subject.decode(16, 3)) == 3
        assert subject.repeat("token", 0.0).count == 1 == subject.repeat("image", 0.0).count
    finally:
        subject.close()


def test_a_worker_that_dies_or_refuses_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    worker = WorkerSubject(folder, image_size=(8, 8))
    worker._process.kill()
    with pytest.raises(SessionError, match="the worker ended during load with signal 9"):
        worker.load()
    worker.close()
    worker = WorkerSubject(tmp_path, image_size=(8, 8))
    with pytest.raises(RuntimeFault, match=r"manifest.json: not found"):
        worker.load()
    worker.close()
    worker.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere"], "manifest.json: not found"),
        (["OUT", "--ratio"], "expected at least two"),
        (["OUT", "--target", "jetpack6"], "ort, rtx"),
        (["OUT", "--contexts", "63"], "exceed the cache of 64 rows"),
        (["OUT", "--prompt-tokens", "0"], "prompt_tokens is (0,), expected integers from 1"),
        (["OUT", "--prompt-tokens", "58"], "expected room for one new token"),
        (["OUT", "--rounds", "9"], "max_rounds 6 is less than rounds 9"),
        (["OUT", "--image-size", "32"], "expected [width, height]"),
        (["OUT", "--plan", "OUT/tokenizer.json"], "unknown key"),
        (["OUT", "--plan", "OUT/chat_template.jinja"], "not a plan in JSON"),
        (["OUT", "--with", "OUT/tokenizer.json"], "no result in it"),
        (["OUT", "--power", "ina3221"], "no INA3221 power monitor"),
        (["OUT", "--output", "OUT/tokenizer.json/below"], "cannot be written"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_1(
    folder: Path,
    tmp_path: Path,
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_LOADS", 1)
    words = [word.replace("OUT", str(folder)) for word in change]
    argv = [words[0], *FLAGS, "--no-floors", "--output", str(tmp_path), *words[1:]]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1] and err[-1].startswith("qvlm-bench: ")
    assert not any("Traceback" in line for line in err) and not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line_and_leaves_no_worker(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers: list[WorkerSubject] = []

    def interrupted(self: WorkerSubject) -> None:
        workers.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerSubject, "load", interrupted)
    assert cli.main([str(folder), *FLAGS, "--no-floors", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "qvlm-bench: interrupted, nothing was written" and not list(
        tmp_path.iterdir()
    )
    assert workers and all(one._process.returncode is not None for one in workers)


@pytest.mark.parametrize("argv", [[], ["out", "--rounds", "x"], ["out", "--threads", "1,x"]])
def test_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "usage: qvlm-bench" in capsys.readouterr().err


def test_a_plan_file_is_read_and_a_flag_goes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"prompt_tokens": [16, 64], "images": [0, 1], "rounds": 7, "spread": 0.02}')
    plan = read_plan(path, {"rounds": 9, "images": None})
    assert (plan.rounds, plan.spread, plan.images) == (9, 0.02, (0, 1))
    assert list(plan.cases()) == [Case(p, i, 32) for p in (16, 64) for i in (0, 1)]
    assert Plan().fitting_contexts(600) == (128, 256, 512) and Plan().fitting_contexts(64) == (32,)
    for text, message in (
        ('{"rounds": [1]}', "expected a number"),
        ('{"images": 1}', "expected a list"),
        ('{"images": ["1"]}', "expected numbers"),
        ('{"rounds": 1.5}', "expected integers"),
        ('{"threads": []}', "is empty"),
        ("[]", "expected an object"),
        ("[" * 99999, "not a plan in JSON"),
    ):
        path.write_text(text)
        with pytest.raises(PromptError, match=message):
            read_plan(path, {})


def test_a_plan_may_be_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "# a small matrix\nprompt_tokens: [16, 64]\nimages:\n  - 0\n  - 1\nspread: 0.02\n"
    )
    same = tmp_path / "plan.json"
    same.write_text('{"prompt_tokens": [16, 64], "images": [0, 1], "spread": 0.02}')
    assert read_plan(path, {"rounds": 9}) == read_plan(same, {"rounds": 9})
    for text, message in (
        ("rounds: [1", "not a plan in YAML"),
        ("images: !!python/object/apply:os.getcwd []", "not a plan in YAML"),
        ("- 1", "expected an object"),
        ("1: 2\nrounds: 3", "unknown key '1'"),
        ("threads: [yes]", "expected numbers"),
        ("[" * 99999, "not a plan in YAML"),
    ):
        path.write_text(text)
        with pytest.raises(PromptError, match=message) as caught:
            read_plan(path, {})
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(PromptError, match=r"pip install 'qvlm\[yaml\]'"):
        read_plan(path, {})


@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_decode_is_timed_at_contexts_of_several_cache_views_in_every_round(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "toy", max_context=600)
    subject = FolderSubject(tmp_path / "toy", target=target, threads=1)
    subject.load()
    for context in (100, 300, 500):
        subject.fill(context)
    ran = []
    step = DecoderState.step

    def counted(state: DecoderState, tokens: Sequence[int]) -> np.ndarray:
        ran.append(len(tokens))
        return step(state, tokens)

    monkeypatch.setattr(DecoderState, "step", counted)
    for tokens in (100 + 300 + 500 + 9, 9):  # a sequence is prefilled once, not in every round
        ran.clear()
        for context in (100, 300, 500):  # views of 128, 384 and 512 rows
            assert len(subject.decode(context, 3)) == 3
            assert subject._states[context].length == context + 3
        assert sum(ran) == tokens
    subject.close()


def test_the_number_of_words_is_the_least_and_a_tokenizer_without_words_is_refused() -> None:
    calls = []

    def tokens(words: int) -> float:
        calls.append(words)
        return 3 + 2 * words if words < 50 else math.inf

    assert [least_words(n, tokens) for n in (1, 5, 6, 7, 64, 101, 102)] == [1, 1, 2, 2, 31, 49, 50]
    with pytest.raises(PromptError, match="words make 1 tokens, expected 20"):
        least_words(20, lambda words: 1)
