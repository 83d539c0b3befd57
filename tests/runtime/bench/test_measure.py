"""Proves the order of a measurement on a fake model with a fake clock: interleaving, pairing, stopping,
marks of throttled rounds, energy: python -m pytest tests/runtime/bench/test_measure.py
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from qvlm_runtime.bench.machine import Snapshot
from qvlm_runtime.bench.measure import Session, ratios
from qvlm_runtime.bench.plan import Case, Plan
from qvlm_runtime.bench.subject import FirstToken, Load, Repeated
from qvlm_runtime.errors import SessionError

QUIET = Snapshot(0.0, 0.0, None, {}, (), {}, ())


class World:
    """A clock that subjects share, on a machine that gets slower with every call."""

    def __init__(self, drift: float = 0.0) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.joules = 0.0
        self._drift = drift

    def seconds(self, base: float) -> float:
        return base * (1 + self._drift * len(self.calls))


class FakeSubject:
    """A step takes ``step`` seconds and a hundredth more for each 100 cached tokens."""

    open = 0

    def __init__(self, world: World, name: str, step: float) -> None:
        self.name, self._world, self._step = name, world, step
        self.filled = 0
        FakeSubject.open += 1

    def _note(self, *call: object) -> None:
        self._world.calls.append((self.name, *map(str, call)))

    def load(self) -> Load:
        self._note("load")
        return Load(1.0, 0.5, 10, 100, 120)

    def backend(self) -> str:
        return "ort"

    def target(self) -> str:
        return "ort"

    def max_rows(self) -> int:
        return 600

    def fill(self, context: int) -> tuple[int, int]:
        self._note("fill", context)
        assert context > self.filled
        self.filled = context
        return 100 + context, 130 + context

    def decode(self, context: int, steps: int) -> list[float]:
        self._note("decode", context)
        return [self._world.seconds(self._step * (1 + context / 1e4))] * steps

    def first_token(self, case: Case) -> FirstToken:
        self._note("first", case.prompt_tokens)
        unit = self._world.seconds(self._step)
        return FirstToken(
            unit, 2 * unit, 3 * unit, 6.5 * unit, case.prompt_tokens + 3 * case.images
        )

    def answer(self, case: Case) -> float:
        self._note("answer", case.output_tokens)
        return self._world.seconds(self._step * case.output_tokens)

    def repeat(self, part: str, seconds: float) -> Repeated:
        self._note("repeat", part)
        self._world.joules += {"token": 8.0, "image": 30.0}[part]
        return Repeated(4, seconds)

    def peak_bytes(self) -> int:
        return 999

    def close(self) -> None:
        FakeSubject.open -= 1


def session(world: World, plan: Plan, *steps: float, **options: object) -> Session:
    openers = [
        lambda s=step, i=i: FakeSubject(world, f"m{i}", s)  # type: ignore[misc]
        for i, step in enumerate(steps)
    ]
    return Session(plan, openers, lambda: QUIET, **options)  # type: ignore[arg-type]


def test_two_identical_models_have_ratio_one_and_a_half_speed_one_has_a_half() -> None:
    world = World()
    samples, _ = session(world, Plan(), 0.01, 0.01, 0.02).run()
    rows = ratios(samples)
    assert {row["name"] for row in rows} == {"m1", "m2"} and {r["against"] for r in rows} == {"m0"}
    for row in rows:
        wanted = 1.0 if row["name"] == "m1" else 0.5
        assert row["figure"]["median"] == pytest.approx(wanted)
        assert row["figure"]["coverage"] >= 0.95


def test_on_a_machine_that_slows_down_the_interval_of_identical_models_still_holds_one() -> None:
    # 5 % slower with every call: over the run the same step takes many times as long.
    samples, _ = session(World(drift=0.05), Plan(max_rounds=20, spread=0.0), 0.01, 0.01).run()
    steps = samples[0].steps[128]
    assert max(steps) / min(steps) > 5
    rows = ratios(samples)
    assert len(rows) == 5  # three contexts, the first token, the answer
    for row in rows:
        assert row["figure"]["low"] <= 1.0 <= row["figure"]["high"]


def test_compared_runs_stand_side_by_side_and_take_turns_to_be_first() -> None:
    world = World()
    plan = Plan(contexts=(64,), warmup=0, rounds=2, max_rounds=2, spread=0.0)
    session(world, plan, 0.01, 0.01).run()
    rounds = [call[:2] for call in world.calls if call[1] in ("decode", "first", "answer")]
    assert rounds == [
        *(("m0", "decode"), ("m1", "decode"), ("m0", "first"), ("m1", "first")),
        *(("m0", "answer"), ("m1", "answer")),
        *(("m1", "decode"), ("m0", "decode"), ("m1", "first"), ("m0", "first")),
        *(("m1", "answer"), ("m0", "answer")),
    ]
    loads = [call[0] for call in world.calls if call[1] == "load"]
    assert loads == ["m0", "m1"] * 3


def test_of_three_each_runs_behind_each_other_one_as_often() -> None:
    """What the one before leaves in the caches would else make two identical folders differ."""
    world = World()
    plan = Plan(contexts=(64,), warmup=0, rounds=6, max_rounds=6, spread=0.0)
    session(world, plan, 0.01, 0.01, 0.01).run()
    order = [call[0] for call in world.calls if call[1] == "decode"]
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    behind = Counter(pair for one in rounds for pair in itertools.pairwise(one))
    assert set(behind.values()) == {2} and len(behind) == 6
    assert Counter(one[0] for one in rounds) == {"m0": 2, "m1": 2, "m2": 2}


def test_the_parts_and_the_rest_are_the_whole() -> None:
    samples, _ = session(World(), Plan(), 0.01).run()
    (parts,) = samples[0].first.values()
    for i, whole in enumerate(parts["whole"]):
        named = sum(parts[p][i] for p in ("preprocess", "vision", "prefill", "other"))
        assert named == pytest.approx(whole, rel=1e-12)
    assert parts["other"][0] == pytest.approx(0.005)
    assert list(samples[0].prompt_tokens.values()) == [67]


def test_rounds_end_when_the_intervals_are_narrow_or_at_the_limit() -> None:
    assert len(session(World(), Plan(rounds=6, max_rounds=20), 0.01).run()[1]) == 6
    drifting = Plan(rounds=6, max_rounds=9, spread=0.001)
    assert len(session(World(drift=0.05), drifting, 0.01).run()[1]) == 9
    single = Plan(rounds=1, max_rounds=1)
    samples, rounds = session(World(), single, 0.01).run()
    assert len(rounds) == 1 and samples[0].steps[128] == [pytest.approx(0.010128)]


def test_a_throttled_round_is_marked_and_the_others_are_not() -> None:
    counts = iter([0, 0, 0, 4, 4, 4, 4, 4])
    one = session(World(), Plan(), 0.01)
    one.snapshot = lambda: replace(QUIET, counters={"oc3": next(counts)})
    marks = [r.throttled for r in one.run()[1]]
    assert marks == [[], [], ["oc3 rose by 4"], [], [], []]


class FakeMeter:
    source, rails, total = "fake", ("in", "soc"), ("in",)

    def __init__(self, world: World) -> None:
        self._world = world

    def joules(self) -> dict[str, float]:
        return {"in": self._world.joules, "soc": self._world.joules / 2}

    def close(self) -> None: ...


def test_energy_is_the_total_rail_s_joules_over_the_runs() -> None:
    world = World()
    plan = Plan(energy_seconds=0.0)
    samples, _ = session(world, plan, 0.01, power=[FakeMeter(world)]).run()
    energy = samples[0].energy
    assert energy["token"]["joules"] == pytest.approx(2.0)
    assert energy["image"]["joules"] == pytest.approx(7.5)
    assert energy["idle_watts"] == 0.0
    rails = energy["image"]["rails_watts"]
    assert rails["soc"] / rails["in"] == pytest.approx(0.5)
    without = session(
        World(), Plan(images=(0,), energy_seconds=0.0), 0.01, power=[FakeMeter(world)]
    )
    assert "image" not in without.run()[0][0].energy
    assert session(World(), Plan(), 0.01).run()[0][0].energy == {}


def test_memory_is_taken_as_the_cache_grows() -> None:
    samples, _ = session(World(), Plan(), 0.01).run()
    assert samples[0].memory == {128: (228, 258), 256: (356, 386), 512: (612, 642)}
    assert samples[0].peak_bytes == 999


def test_subjects_are_closed_also_after_a_failure() -> None:
    FakeSubject.open = 0
    session(World(), Plan(), 0.01, 0.01).run()
    assert FakeSubject.open == 0
    one = session(World(), Plan(), 0.01, 0.01)
    one.snapshot = lambda: (_ for _ in ()).throw(SessionError("gone"))
    with pytest.raises(SessionError):
        one.run()
    assert FakeSubject.open == 0


def test_one_round_states_that_its_interval_covers_nothing() -> None:
    samples, _ = session(World(), Plan(rounds=1, max_rounds=1), 0.01, 0.02).run()
    assert {row["figure"]["coverage"] for row in ratios(samples)} == {0.0}
    assert math.isfinite(ratios(samples)[0]["figure"]["median"])
