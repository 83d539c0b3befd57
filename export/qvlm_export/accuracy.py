"""Accuracy of an export as users meet it: questions answered by the runtime, float folder against quantized folder.

Exact match compares greedy answers as ``qvlm.match`` says. The divergence is teacher-forced: both decoders are
fed the tokens the float one chose, and KL(float || quantized) is the mean over those positions, in nats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qvlm.data import Question
from qvlm.errors import CalibrationError
from qvlm.progress import Progress, silent
from qvlm_runtime import Model, load

# Tokens past the reference's own after which an answer can no longer match it.
_SLACK = 4


@dataclass(frozen=True)
class Side:
    """One folder's answers: texts in question order, exact match in all and per task, decode speed."""

    texts: tuple[str, ...]
    exact_match: float
    tasks: dict[str, float]
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """Float against quantized: ``kl`` in nats per token, ``greedy`` the share of positions with the same argmax."""

    reference: Side
    quantized: Side
    kl: float
    greedy: float
    tokens: int
    questions: int


def compare(
    float_folder: Path,
    quantized_folder: Path,
    target: str,
    questions: Sequence[Question],
    progress: Progress = silent,
    *,
    accuracy_level: int,
) -> Comparison:
    """Answer every question with both folders' ``target`` graphs.

    accuracy_level: as ``qvlm_runtime.load``. Raises CalibrationError for no question or one without
    an answer, and the runtime's errors.
    """
    if not questions:
        raise CalibrationError("no evaluation question, expected at least one")
    floats, quants = _Tally(), _Tally()
    kl, same, positions = 0.0, 0, 0
    with (
        load(float_folder, target, accuracy_level=accuracy_level) as reference,
        load(quantized_folder, target, accuracy_level=accuracy_level) as model,
    ):
        for number, question in enumerate(questions):
            progress("evaluate", number, len(questions))
            tokens = floats.ask(reference, question)
            quants.ask(model, question)
            wanted, given = (_log_probabilities(m, question, tokens) for m in (reference, model))
            kl += float(np.sum(np.exp(wanted) * (wanted - given)))
            same += int(np.sum(wanted.argmax(-1) == given.argmax(-1)))
            positions += len(tokens)
        progress("evaluate", len(questions), len(questions))
    return Comparison(
        floats.side(), quants.side(), kl / positions, same / positions, positions, len(questions)
    )


class _Tally:
    """Answers of one model, counted."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._right: dict[str, list[bool]] = defaultdict(list)
        self._steps, self._seconds = 0, 0.0

    def ask(self, model: Model, question: Question) -> tuple[int, ...]:
        """Answer greedily and keep the score; returns the generated tokens."""
        if question.answer is None:
            raise CalibrationError(f"question {question.prompt!r} has no answer to compare with")
        limit = _SLACK + max(len(model.tokenizer.encode(t, False)) for t in question.texts())
        answer = model.generate(question.prompt, question.open_images(), max_new_tokens=limit)
        self._texts.append(answer.text)
        self._right[question.task or "all"].append(question.right(answer.text))
        self._steps += answer.timings.decode_steps
        self._seconds += answer.timings.decode_s
        return answer.token_ids

    def side(self) -> Side:
        """The score so far."""
        every = [hit for hits in self._right.values() for hit in hits]
        tasks = {task: sum(hits) / len(hits) for task, hits in sorted(self._right.items())}
        speed = self._steps / self._seconds if self._seconds else 0.0
        return Side(tuple(self._texts), sum(every) / len(every), tasks, speed)


def _log_probabilities(
    model: Model, question: Question, tokens: Sequence[int]
) -> NDArray[np.float64]:
    """log p of every token of the vocabulary at each position of ``tokens`` [T, vocab], teacher-forced."""
    prompt = model.prepare(question.prompt, question.open_images())
    features = model.image_features(prompt.pictures) if prompt.pictures else None
    state = model.decoder.start(len(prompt.token_ids) + len(tokens), features)
    rows = [state.step(prompt.token_ids, prompt.image_index, prompt.positions)]
    rows += [state.step((token,)) for token in tokens[:-1]]
    logits = np.stack(rows).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
