"""How good a model is: exact match on questions, divergence from the float model, bytes. Works on any ``Loaded``.

A quantized checkpoint is opened as its torch simulation, so it is measured without its source and without an engine.
Questions are batched only with others of the same length: nothing is padded, and a batch changes no token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import fakequant
from qvlm.capture import Sample, build_sample
from qvlm.checkpoint import Checkpoint
from qvlm.data import Question
from qvlm.errors import CalibrationError, UnsupportedModelError
from qvlm.generate import decode, stop_tokens
from qvlm.models import ADAPTERS
from qvlm.models.adapter import Adapter
from qvlm.processor import load_processor
from qvlm.progress import Progress, silent
from qvlm.recipe import COMPONENTS, EMBEDDING
from qvlm.source import Loaded, build_model, skeleton

BATCH = 32
# Tokens a generation may take beyond the reference before it is certainly wrong.
_SLACK = 2


def load_quantized(directory: Path | str) -> Loaded:
    """The torch simulation of a quantized checkpoint; CheckpointError or UnsupportedModelError if it cannot be."""
    checkpoint = Checkpoint(directory)
    tensors: dict[str, Tensor] = {}
    linears = {}
    suffixes = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point")
    integer = {f"{n}.{s}" for n in checkpoint.linears for s in (*suffixes, *fakequant.STATIC)}
    for name in checkpoint.names():
        if name not in integer:
            tensors[name] = torch.from_numpy(checkpoint.float_tensor(name))
    for name in checkpoint.linears:
        linear = checkpoint.linear(name)
        assert linear is not None
        tensors[f"{name}.weight"] = torch.from_numpy(linear.dequantize())
        if checkpoint.linears[name]["component"] != EMBEDDING:
            linears[name] = linear
    _shape_embeddings(checkpoint, tensors)
    model = build_model(checkpoint.directory, tensors)
    fakequant.apply(model, linears)
    return Loaded(model, load_processor(checkpoint.directory))


def _shape_embeddings(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Quantized embeddings, stored as matrices, in their module's shape (a convolution's has four dimensions)."""
    names = [n for n, entry in checkpoint.linears.items() if entry["component"] == EMBEDDING]
    tree = skeleton(checkpoint.directory) if names else None
    for name in names:
        assert tree is not None
        key = f"{name}.weight"
        tensors[key] = tensors[key].reshape(tree.get_parameter(key).shape)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a loaded model; UnsupportedModelError if its family has none."""
    model_type = str(getattr(model.config, "model_type", None))
    if model_type not in ADAPTERS:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported")
    return ADAPTERS[model_type]


@dataclass(frozen=True)
class Answers:
    """What a model answered: texts in question order; exact match in all and per task (0 to 1)."""

    texts: list[str]
    exact_match: float
    per_task: dict[str, float]


def answers(
    loaded: Loaded,
    questions: Sequence[Question],
    progress: Progress = silent,
    batch: int = BATCH,
    stage: str = "answer",
) -> Answers:
    """Greedy answers, compared with the references as ``match`` says.

    A generation ends at the end token or ``_SLACK`` tokens past the batch's longest reference, where it can no longer
    match. Raises CalibrationError for a question without a reference.
    """
    adapter = adapter_of(loaded.model)
    token = adapter.image_token_id(loaded.model.config)
    stop = stop_tokens(loaded.model)
    texts = [""] * len(questions)
    done = 0
    for indices, samples in _batches(loaded, questions, token, batch, answered=False):
        steps = _SLACK + max(
            len(_token_ids(loaded.processor, text))
            for i in indices
            for text in questions[i].texts()
        )
        tokens = decode(loaded.model, _joined(samples), steps, stop).tokens
        for index, row in zip(indices, tokens.tolist(), strict=True):
            end = next((k for k, t in enumerate(row) if t in stop), len(row))
            texts[index] = loaded.processor.tokenizer.decode(row[:end], skip_special_tokens=True)
        progress(stage, done, len(questions))
        done += len(indices)
    progress(stage, done, len(questions))
    return _score(texts, questions)


def scorer(loaded: Loaded, questions: Sequence[Question]) -> Callable[[nn.Module], list[bool]]:
    """A function that answers every question with a model (by ``loaded``'s processor) and tells right from wrong."""

    def score(model: nn.Module) -> list[bool]:
        texts = answers(Loaded(model, loaded.processor), questions).texts
        return [question.right(text) for text, question in zip(texts, questions, strict=True)]

    return score


def _score(texts: list[str], questions: Sequence[Question]) -> Answers:
    right: dict[str, list[bool]] = defaultdict(list)
    for text, question in zip(texts, questions, strict=True):
        right[question.task or "all"].append(question.right(text))
    total = [hit for hits in right.values() for hit in hits]
    return Answers(
        texts, sum(total) / len(total), {task: sum(h) / len(h) for task, h in sorted(right.items())}
    )


def _token_ids(processor: Any, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _batches(
    loaded: Loaded, questions: Sequence[Question], image_token: int, batch: int, answered: bool
) -> Iterator[tuple[list[int], list[Sample]]]:
    """(question numbers, samples) with equal token counts and image shapes; with the answers if ``answered``."""
    waiting: dict[Any, list[tuple[int, Sample]]] = defaultdict(list)
    for number, question in enumerate(questions):
        sample = build_sample(
            loaded.processor,
            question.open_images(),
            question.prompt,
            (question.answer or "") if answered else "",
            image_token,
        )
        pixels = None if sample.pixel_values is None else tuple(sample.pixel_values.shape)
        key = (sample.input_ids.shape[1], pixels)
        waiting[key].append((number, sample))
        if len(waiting[key]) == batch:
            numbers, samples = zip(*waiting.pop(key), strict=True)
            yield list(numbers), list(samples)
    for group in waiting.values():
        numbers, samples = zip(*group, strict=True)
        yield list(numbers), list(samples)


def _joined(samples: Sequence[Sample]) -> dict[str, Any]:
    """Inputs of the model's forward for samples of equal shape."""
    inputs = [sample.model_inputs() for sample in samples]
    return {
        key: torch.cat([i[key] for i in inputs]) if isinstance(value, Tensor) else value
        for key, value in inputs[0].items()
    }


@dataclass(frozen=True)
class Divergence:
    """Quantized against float model, teacher-forced on the reference answers.

    kl: mean KL(float || quantized) per answer token in nats; agreement: share of answer tokens with the same argmax;
    perplexity of the answers under each; image_error and text_error: |q - f|^2 / |f|^2 of the hidden states that
    leave the last text layer, image and text tokens apart; tokens: answer tokens counted.
    """

    kl: float
    agreement: float
    perplexity_float: float
    perplexity_quant: float
    image_error: float
    text_error: float
    tokens: int


@torch.no_grad()
def divergence(
    reference: Loaded,
    quantized: Loaded,
    questions: Sequence[Question],
    progress: Progress = silent,
    batch: int = BATCH,
) -> Divergence:
    """Compare two models on the same questions. The sums are float64."""
    adapter = adapter_of(reference.model)
    token = adapter.image_token_id(reference.model.config)
    sums: dict[str, float] = defaultdict(float)
    done = 0
    for indices, samples in _batches(reference, questions, token, batch, answered=True):
        inputs = _joined(samples)
        sides = [_forward(side.model, adapter, inputs) for side in (reference, quantized)]
        _add_logits(sums, sides[0][0], sides[1][0], samples, inputs["input_ids"])
        image = torch.stack([sample.image_mask for sample in samples])
        for name, mask in (("image", image), ("text", ~image)):
            f, q = (side[1][mask].double() for side in sides)
            sums[f"{name}_error"] += float((q - f).square().sum())
            sums[f"{name}_norm"] += float(f.square().sum())
        progress("divergence", done, len(questions))
        done += len(indices)
    progress("divergence", done, len(questions))
    count = sums["tokens"]
    if not count:
        raise CalibrationError("no question has an answer: divergence needs answer tokens")
    return Divergence(
        sums["kl"] / count,
        sums["same"] / count,
        _exp(sums["loss_float"] / count),
        _exp(sums["loss_quant"] / count),
        sums["image_error"] / sums["image_norm"] if sums["image_norm"] else 0.0,
        sums["text_error"] / sums["text_norm"],
        int(count),
    )


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())


def _forward(
    model: nn.Module, adapter: Adapter, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, vocab] and the hidden states [B, S, hidden] that leave the last text layer."""
    hidden: list[Tensor] = []

    def left(module: nn.Module, args: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    last = model.get_submodule(adapter.layer_names(model, "text")[-1])
    with ExitStack() as stack:
        stack.callback(last.register_forward_hook(left).remove)
        logits: Tensor = model(**inputs).logits
    return logits, hidden[0]


def _add_logits(
    sums: dict[str, float], f: Tensor, q: Tensor, samples: Sequence[Sample], ids: Tensor
) -> None:
    """Add what the answer tokens tell: logits at position t-1 predict the token at t."""
    mask = torch.stack([sample.answer_mask for sample in samples])[:, 1:]
    wanted = ids[:, 1:][mask]
    log_f, log_q = (side[:, :-1][mask].double().log_softmax(-1) for side in (f, q))
    sums["kl"] += float((log_f.exp() * (log_f - log_q)).sum())
    sums["same"] += float((log_f.argmax(-1) == log_q.argmax(-1)).sum())
    rows = torch.arange(len(wanted))
    sums["loss_float"] -= float(log_f[rows, wanted].sum())
    sums["loss_quant"] -= float(log_q[rows, wanted].sum())
    sums["tokens"] += len(wanted)


@dataclass(frozen=True)
class Size:
    """Stored bytes of a part of a checkpoint: parameters are its weights, scales and zero points are bytes only."""

    component: str
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Scales and zero points included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


def sizes(checkpoint: Checkpoint) -> list[Size]:
    """Bytes as deployed, a row per component's linear weights, then "other" and "total".

    Float tensors count 16 bit; "other" holds norms, biases, position tables and the embeddings that stayed float,
    "head" the output matrix.
    """
    owners = {f"{name}.weight": part for name, part in checkpoint.float_linears.items()}
    parameters: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    for name, entry in checkpoint.linears.items():
        linear = checkpoint.linear(name)
        assert linear is not None
        parameters[entry["component"]] += linear.integers.size
        nbytes[entry["component"]] += linear.nbytes()
    for name in checkpoint.names():
        if name.rpartition(".")[0] in checkpoint.linears and not name.endswith(".bias"):
            continue
        component = owners.get(name, "other")
        count = 1
        for length in checkpoint.shape(name):
            count *= length
        parameters[component] += count
        nbytes[component] += 2 * count
    rows = [
        Size(c, parameters[c], nbytes[c])
        for c in (*COMPONENTS, EMBEDDING, "other")
        if parameters[c]
    ]
    return [*rows, Size("total", sum(parameters.values()), sum(nbytes.values()))]
