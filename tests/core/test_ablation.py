"""The ablation table: its judge agrees with greedy decoding, shared work changes nothing,
interrupted runs continue.

Run: python -m pytest tests/core/test_ablation.py -q
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import IMAGE_TOKEN, greedy, prompts, tiny_llava

from qvlm.capture import Sample
from qvlm.errors import CalibrationError
from qvlm.generate import decode, stop_tokens
from qvlm.methods import METHODS, Context
from qvlm.models import ADAPTERS
from qvlm.plan import resolve
from qvlm.recipe import Recipe, component_recipe
from qvlm.trials import ablation
from qvlm.trials.ablation import Case, Partitions, ablate, correlation, measure_ded
from qvlm.trials.job import Job
from qvlm.trials.judge import Judge

ADAPTER = ADAPTERS["llava"]
OPTIONS = {"percentiles": [1.0, 0.98], "clip_ratios": [1.0, 0.9], "veo_epochs": 1, "depth": 2}
RECIPE = component_recipe("w4a16", "w8a8", "w8a8").with_options(**OPTIONS)
END = 2


def answered(model: Any, seed: int, tokens: list[int]) -> Sample:
    """The first tiny prompt with this answer."""
    ids, pixels = prompts(model, seed)[0]
    whole = torch.tensor([ids + tokens])
    return Sample(whole, pixels, whole[0] == IMAGE_TOKEN, torch.arange(whole.shape[1]) >= len(ids))


def make_samples(model: Any, count: int) -> list[Sample]:
    """Prompts answered with the model's own greedy tokens and the end token."""
    found = []
    for seed in range(count):
        ids, pixels = prompts(model, seed)[0]
        found.append(answered(model, seed, [*greedy(model, ids, pixels, 2), END]))
    return found


def make_context(model: Any, recipe: Recipe, samples: list[Sample]) -> Context:
    recipe = replace(recipe, method="q-vlm")
    return Context(model, ADAPTER, samples, recipe, resolve(model, ADAPTER, recipe))


def test_judge_agrees_with_greedy_decoding() -> None:
    """Answers that begin as the model would, some that do not; the end token must be its own
    choice.
    """
    model = tiny_llava()
    stop = stop_tokens(model)
    assert stop == {END}
    samples, right = [], []
    for seed in range(6):
        ids, pixels = prompts(model, seed)[0]
        own = greedy(model, ids, pixels, 3)
        token = own[1]
        answer = {0: own[:2], 1: [own[0] ^ 1, token], 2: own[:1]}[seed % 3]
        samples.append(answered(model, seed, [*answer, END, 9]))
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
        forced = decode(model, inputs, len(answer) + 1).tokens[0].tolist()
        right.append(forced == [*answer, END])
    judge = Judge(model, samples)
    found = judge.measure(model)
    assert found["kl"] == 0.0
    assert found["exact_match"] == sum(right) / 6
    # What stands behind the end token does not count: two or three tokens and the end.
    assert sum(len(batch.wanted) for batch in judge.batches) == 2 * (3 + 3 + 2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += 0.01 * torch.randn_like(other.lm_head.weight)
    assert judge.measure(other)["kl"] > 0


def test_judge_counts_right_answers() -> None:
    """With the end token made certain everywhere, an empty answer is right and a longer one is
    not.
    """
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda m, a, out: out + 5.0 * torch.nn.functional.one_hot(torch.tensor(END), out.shape[-1])
    )
    samples = [answered(model, 0, [END]), answered(model, 1, [END]), answered(model, 2, [5, END])]
    assert Judge(model, samples).measure(model)["exact_match"] == pytest.approx(2 / 3)
    with pytest.raises(CalibrationError, match="no answer"):
        Judge(model, [answered(model, 0, [])])


def test_shared_blocks_change_nothing() -> None:
    """A partition's model is the same whether its first blocks were searched for another partition
    or not.
    """
    model = tiny_llava(text_num_hidden_layers=3)
    samples = make_samples(model, 2)
    context = make_context(model, RECIPE.with_options(partition="error"), samples)
    method = METHODS["q-vlm"]
    state = method.prepare(context)
    job = Job.begin(context)
    for component in ("vision", "projector"):
        job.run_component(component, method, state)
    shared = Partitions(job, method, state)
    shared.model([(0, 2), (2, 3)])
    runs = len(shared.known)
    blocks = [(0, 2), (2, 3)]
    again = shared.model(blocks)
    assert len(shared.known) == runs
    alone = Partitions(job, method, state).model(blocks)
    plain = Job.begin(context)
    direct = {**state, "partition": np.array(blocks)}
    for component in context.formats:
        plain.run_component(component, method, direct)
    for other in (alone, plain.model):
        for (name, a), (_, b) in zip(
            again.state_dict().items(), other.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name


def test_ablate_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    samples = make_samples(model, 3)
    lines: list[str] = []
    path = tmp_path / "rows.json"
    case = Case(
        model, ADAPTER, [samples[:2]], Judge(model, samples), path, {"seed": 0}, lines.append
    )
    rows = ablate(case, {"tiny": RECIPE})
    kinds = [(r["kind"], r.get("visual_encoder"), r.get("partition")) for r in rows]
    partitions = ("entropy", "layer", "fixed", "random", "error")
    expected = [("float", None, None), ("rtn", None, None)]
    expected += [("q-vlm", step, kind) for step in (False, True) for kind in partitions]
    assert kinds == [*expected, ("ded", None, None)]
    assert rows[0]["kl"] == 0.0
    assert all(row["kl"] > 0 for row in rows[1:-1])
    assert len(lines) == 12
    saved = json.loads(path.read_text())
    assert saved["rows"] == json.loads(json.dumps(rows))
    # Interrupted after six rows: the rest comes again, the same, and nothing finished is measured
    # twice.
    path.write_text(json.dumps({**saved, "rows": saved["rows"][:6]}))
    lines.clear()
    again = ablate(case, {"tiny": RECIPE})
    assert len(lines) == 7
    assert _without_seconds(again) == _without_seconds(rows)
    monkeypatch.setattr(ablation, "measure_ded", None)  # complete results need no work
    assert _without_seconds(ablate(case, {"tiny": RECIPE})) == _without_seconds(rows)
    with pytest.raises(CalibrationError, match="other settings"):
        ablate(replace(case, identity={"seed": 1}), {"tiny": RECIPE})


def _without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_ded_is_sequential_minus_joint() -> None:
    model = tiny_llava(text_num_hidden_layers=4)
    context = make_context(model, RECIPE, make_samples(model, 2))
    found = measure_ded(context)
    assert [row["layer"] for row in found["pairs"]] == [0, 1, 2]
    for row in found["pairs"]:
        assert row["ded"] == row["sequential"] - row["joint"] >= 0
        assert row["dependency"] > 0 and row["pair_error"] > 0
    assert set(found["correlations"]) == {
        f"{proxy} ~ {measure}"
        for proxy in ("dependency", "pair_error")
        for measure in ("ded", "ded_relative")
    }


def test_correlation() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    found = correlation(x, y)
    mx, my = 2.5, 4.0
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    var = sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)
    assert found["pearson"] == pytest.approx(cov / var**0.5, abs=1e-12)
    assert found["spearman"] == pytest.approx(0.8, abs=1e-12)
    assert correlation([1.0, 1.0, 1.0], y[:3]) == {"pearson": None, "spearman": None}
    assert correlation([1.0, 2.0], [2.0, 1.0]) == {"pearson": None, "spearman": None}
    # Ties share their mean rank: 1, 1, 3 against 1, 2, 3 -> ranks .5 .5 2.
    assert correlation([1.0, 1.0, 3.0], [1.0, 2.0, 3.0])["spearman"] == pytest.approx(0.75**0.5)
