"""Proves that scenes are functions of their seed, that answers are true of what is drawn, and that training,
calibration and evaluation never share a seed, an image or a scene.

Run: python -m pytest tests/calib_data/test_scenes.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import qvlm_calib_data
from qvlm_calib_data import scenes

HERE = Path(qvlm_calib_data.__file__).parent


def digest(image: object) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def content(scene: scenes.Scene) -> tuple[object, ...]:
    return (scene.word, scene.number, scene.shapes, scene.bars, scene.word_colour)


def test_a_scene_is_a_function_of_its_seed() -> None:
    for seed in (3, 1_000_017):
        one, two = scenes.make_scene(seed), scenes.make_scene(seed)
        assert one == two
        assert digest(scenes.render(one)) == digest(scenes.render(two))
        assert digest(scenes.render(one)) != digest(scenes.render(scenes.make_scene(seed + 1)))
        for task in scenes.TASKS:
            asked = [scenes.ask(one, task, np.random.default_rng(5)) for _ in range(2)]
            assert asked[0] == asked[1]


def test_seed_ranges_of_the_uses_are_disjoint() -> None:
    for one, two in itertools.combinations(scenes.SEED_RANGES.values(), 2):
        assert one.stop <= two.start or two.stop <= one.start


def test_a_draw_past_its_range_is_refused() -> None:
    with pytest.raises(IndexError):
        scenes.seed_at("evaluation", len(scenes.SEED_RANGES["evaluation"]))


def test_the_actual_draws_share_no_image_and_no_scene() -> None:
    shipped = {digest(sample.image) for sample in qvlm_calib_data.samples()}
    assert len(shipped) == 256
    evaluated = {
        digest(s.image) for seed in (0, 1) for s in qvlm_calib_data.evaluation_samples(200, seed)
    }
    assert len(evaluated) == 400
    shown = {digest(sample.image) for sample in qvlm_calib_data.showcase()}
    assert not shipped & evaluated
    assert not shown & (shipped | evaluated)
    drawn = {
        use: {content(scenes.make_scene(scenes.seed_at(use, i))) for i in range(count)}
        for use, count in (
            ("calibration", 256),
            ("evaluation", 1600),
            ("train", 4000),
            ("tuning", 800),
        )
    }
    for one, two in itertools.combinations(drawn.values(), 2):
        assert not one & two


def test_training_draws_stay_in_the_training_range() -> None:
    card = json.loads((HERE / "demo" / "card.json").read_text(encoding="utf-8"))["training"]
    first = card["seed"] * 10_000_000
    last = scenes.seed_at("train", first + card["steps"] * card["batch"] - 1)
    used = range(scenes.seed_at("train", first), last + 1)
    for use, seeds in scenes.SEED_RANGES.items():
        if use != "train":
            assert seeds.stop <= used.start or used.stop <= seeds.start


def test_shipped_samples_are_the_calibration_scenes() -> None:
    fresh = scenes.draw_samples("calibration", 256)
    for sample, (image, question) in zip(qvlm_calib_data.samples(), fresh, strict=True):
        assert (sample.prompt, sample.answer, sample.task) == (
            question.prompt,
            question.answer,
            question.task,
        )
        assert np.array_equal(np.asarray(sample.image), np.asarray(image))


def test_draws_are_without_replacement_and_differ_by_seed() -> None:
    draws = [[digest(s.image) for s in qvlm_calib_data.samples(64, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 64
    with pytest.raises(ValueError, match="0 to 256 samples are shipped"):
        qvlm_calib_data.samples(257)


def test_every_task_is_asked_equally_often() -> None:
    tasks = [sample.task for sample in qvlm_calib_data.samples()]
    assert {task: tasks.count(task) for task in scenes.TASKS} == dict.fromkeys(scenes.TASKS, 32)
    assert sorted(s.task for s in qvlm_calib_data.showcase()) == sorted(scenes.TASKS)


def test_answers_are_true_of_the_marks() -> None:
    for seed in range(200):
        scene = scenes.make_scene(seed)
        rng = np.random.default_rng(seed)
        marks = scene.marks
        assert "".join(m.kind for m in marks if m.group == "word") == scene.word
        assert scenes.ask(scene, "number", rng).answer == "".join(
            m.kind for m in marks if m.group == "number"
        )
        assert len([m for m in marks if m.group == "shape"]) == len(scene.shapes)
        described = scenes.ask(scene, "describe", rng).answer
        assert all(f"{m.colour} {m.kind}" in described for m in marks if m.group == "shape")
        chart = scenes.ask(scene, "chart", rng)
        if chart.prompt.startswith("What is the value"):
            height = {m.kind: m.value for m in marks if m.group == "bar"}[chart.prompt[-2]]
            assert chart.answer == str(height)


def test_every_mark_is_on_the_image() -> None:
    for seed in range(300):
        for mark in scenes.make_scene(seed).marks:
            tall = mark.value * 8 / 2 if mark.group == "bar" else mark.size / 2
            wide = 6.5 if mark.group in ("word", "number") else mark.size / 2
            assert wide <= mark.x <= scenes.SIZE - wide, mark
            assert tall - 1 <= mark.y <= scenes.SIZE + 1 - tall, mark
