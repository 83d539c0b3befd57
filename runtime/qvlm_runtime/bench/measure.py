"""The measurement: subjects side by side, round by round.

1. Each folder is opened in a fresh process, several times, in turn: load time and the memory of it.
2. One process per folder stays. Its cache is filled context by context: memory against context.
3. Warm-up rounds, thrown away. They prefill a sequence for each context, which the later rounds go back on.
4. Rounds. In each, every subject decodes at every context and answers every case; the subjects run
   a context or a case one right after the other. Who comes first changes from round to round, and
   the direction in every second one: what a subject leaves in caches meets each neighbour as often.
   So a machine that gets slower with time slows all of them, and the quotient of two samples of one
   round keeps their ratio. Between two rounds the machine is looked at; a round it throttled in is
   marked.
5. Rounds end when every figure's interval is as narrow as the plan asks, or at the plan's limit.
   Looking at the width before stopping makes the stated coverage a little optimistic.
6. Energy, last: each part is repeated for some seconds between two readings of the meter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qvlm_runtime.bench.figure import Figure, figure, ratio
from qvlm_runtime.bench.machine import Snapshot, throttled
from qvlm_runtime.bench.plan import Case, Plan
from qvlm_runtime.bench.power import PowerReader
from qvlm_runtime.bench.subject import FirstToken, Load, Subject

Say = Callable[[str], None]
PARTS = ("preprocess", "vision", "prefill", "other")
_LOADS = 3


@dataclass
class Round:
    """One round: why it counts as throttled (empty: it does not), and the machine after it."""

    throttled: list[str]
    after: Snapshot


@dataclass
class Samples:
    """What one subject gave. Sample i of every list was taken in round i."""

    name: str
    target: str
    backend: str
    max_rows: int
    loads: list[Load]
    memory: dict[int, tuple[int, int]]  # context -> resident bytes, the most so far
    steps: dict[int, list[float]] = field(default_factory=dict)  # context -> seconds of a step
    first: dict[Case, dict[str, list[float]]] = field(default_factory=dict)  # seconds of each part
    prompt_tokens: dict[Case, int] = field(default_factory=dict)
    answers: dict[Case, list[float]] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0

    def add_first(self, case: Case, token: FirstToken) -> None:
        """One sample of a case's first token; "other" is the whole without the named parts."""
        parts = {"preprocess": token.preprocess, "vision": token.vision, "prefill": token.prefill}
        parts["other"] = token.whole - sum(parts.values())
        parts["whole"] = token.whole
        series = self.first.setdefault(case, {})
        for part, value in parts.items():
            series.setdefault(part, []).append(value)
        self.prompt_tokens[case] = token.prompt_tokens

    def series(self) -> dict[str, list[float]]:
        """Every series of seconds by a name, the same names for every subject of a run."""
        named = {f"decode step at context {c}": values for c, values in self.steps.items()}
        for case, parts in self.first.items():
            named[f"first token, {label(case)}"] = parts["whole"]
        for case, values in self.answers.items():
            named[f"answer, {label(case)}"] = values
        return named


def label(case: Case) -> str:
    """A case in words."""
    return (
        f"{case.prompt_tokens} text tokens, {case.images} images, {case.output_tokens} new tokens"
    )


@dataclass
class Session:
    """One run of the plan at one number of threads."""

    plan: Plan
    open_subject: Sequence[Callable[[], Subject]]
    snapshot: Callable[[], Snapshot]
    power: Sequence[PowerReader] = ()
    say: Say = lambda _: None

    def run(self) -> tuple[list[Samples], list[Round]]:
        """Everything; the subjects are closed at the end, also after a failure."""
        loads = self._loads()
        subjects: list[Subject] = []
        try:
            samples = []
            for opener, times in zip(self.open_subject, loads, strict=True):
                subject = opener()
                subjects.append(subject)
                times.append(subject.load())
                samples.append(self._fill(subject, times))
            rounds = self._rounds(subjects, samples)
            for subject, one in zip(subjects, samples, strict=True):
                one.energy = self._energy(subject)
                one.peak_bytes = subject.peak_bytes()
            return samples, rounds
        finally:
            for subject in subjects:
                subject.close()

    def _loads(self) -> list[list[Load]]:
        """All but the last load of each folder, each in a process of its own, in turn."""
        times: list[list[Load]] = [[] for _ in self.open_subject]
        for take in range(_LOADS - 1):
            self.say(f"load {take + 1} of {_LOADS}")
            for opener, own in zip(self.open_subject, times, strict=True):
                subject = opener()
                try:
                    own.append(subject.load())
                finally:
                    subject.close()
        return times

    def _fill(self, subject: Subject, loads: list[Load]) -> Samples:
        rows = subject.max_rows()
        contexts = self.plan.fitting_contexts(rows)
        memory = {}
        for context in contexts:
            self.say(f"{subject.name}: filling the cache to {context} tokens")
            memory[context] = subject.fill(context)
        opened = subject.target(), subject.backend()
        return Samples(subject.name, *opened, rows, loads, memory)

    def _rounds(self, subjects: Sequence[Subject], samples: Sequence[Samples]) -> list[Round]:
        plan, rounds = self.plan, list[Round]()
        for _ in range(plan.warmup):
            self.say("warm-up")
            spare = [
                Samples(one.name, one.target, one.backend, one.max_rows, [], one.memory)
                for one in samples
            ]
            self._round(list(zip(subjects, spare, strict=True)))
        before = self.snapshot()
        while len(rounds) < plan.max_rounds:
            pairs = list(zip(subjects, samples, strict=True))
            back, turn = len(rounds) % 2, len(rounds) // 2 % len(pairs)
            order = pairs[turn:] + pairs[:turn]
            self._round(order[::-1] if back else order)
            after = self.snapshot()
            rounds.append(Round(throttled(before, after), after))
            before = after
            width = max(figure(s).spread for one in samples for s in one.series().values())
            self.say(f"round {len(rounds)}: widest spread {100 * width:.1f} %")
            if len(rounds) >= plan.rounds and width <= plan.spread:
                break
        return rounds

    def _round(self, pairs: Sequence[tuple[Subject, Samples]]) -> None:
        """One sample of everything; what is compared runs one right after the other."""
        plan = self.plan
        for context in sorted({c for _, one in pairs for c in one.memory}):
            for subject, one in pairs:
                if context in one.memory:
                    step = statistics.median(subject.decode(context, plan.steps))
                    one.steps.setdefault(context, []).append(step)
        for case in plan.cases():
            for subject, one in pairs:
                one.add_first(case, subject.first_token(case))
            if case.output_tokens > 1:
                for subject, one in pairs:
                    one.answers.setdefault(case, []).append(subject.answer(case))

    def _energy(self, subject: Subject) -> dict[str, Any]:
        """Joules of a token and of an image, all of what the meter sees, and above idle."""
        if not self.power:
            return {}
        found: dict[str, Any] = {}
        idle = self._watts(self._wait)
        found["idle_watts"] = idle["watts"]
        parts = ["token"] + (["image"] if any(self.plan.images) else [])
        for part in parts:
            self.say(f"{subject.name}: energy of a {part}")
            count = [0]

            def repeat(part: str = part, count: list[int] = count) -> None:
                count[0] = subject.repeat(part, self.plan.energy_seconds).count

            spent = self._watts(repeat)
            each = spent["joules"] / count[0]
            above = (spent["watts"] - idle["watts"]) * spent["seconds"] / count[0]
            found[part] = {"joules": each, "joules_above_idle": above, "runs": count[0]} | {
                "seconds": spent["seconds"],
                "watts": spent["watts"],
                "rails_watts": spent["rails"],
            }
        return found

    def _wait(self) -> None:
        time.sleep(self.plan.energy_seconds)

    def _watts(self, work: Callable[[], None]) -> dict[str, Any]:
        """Energy, seconds, mean power and rails of ``work``."""
        start, before = time.perf_counter(), [reader.joules() for reader in self.power]
        work()
        seconds, after = time.perf_counter() - start, [reader.joules() for reader in self.power]
        total, rails = 0.0, dict[str, float]()
        for reader, first, last in zip(self.power, before, after, strict=True):
            spent = {rail: last[rail] - first.get(rail, 0.0) for rail in last}
            rails |= {rail: joules / seconds for rail, joules in spent.items()}
            total += sum(spent[rail] for rail in reader.total)
        return {"joules": total, "seconds": seconds, "watts": total / seconds, "rails": rails}


def ratios(samples: Sequence[Samples]) -> list[dict[str, Any]]:
    """Speed of every other subject against the first: the first's seconds over its own.

    Series that both have, paired round by round: ``{series, name, against, figure}``.
    """
    first, rows = samples[0], list[dict[str, Any]]()
    for other in samples[1:]:
        own = other.series()
        for series, seconds in first.series().items():
            if series in own:
                quotient: Figure = ratio(seconds, own[series])
                row = {"series": series, "name": other.name, "against": first.name}
                rows.append({**row, "figure": asdict(quotient)})
    return rows
