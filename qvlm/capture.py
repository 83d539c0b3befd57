"""What the layers of a model see on calibration samples: inputs of a component's first layer, inputs of its linears.

Samples run one at a time, so nothing is padded. A ``Stream`` then runs a component layer by layer without the model
around it, which is how a method sees a block of layers. Nothing here quantizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import CalibrationError
from qvlm.modality import image_tokens
from qvlm.models.adapter import Adapter


@dataclass(frozen=True)
class Sample:
    """One prompt with its images and (teacher-forced) answer, as the model takes it.

    input_ids int64 [1, S] with the image token repeated once per image feature; pixel_values float32 as the family's
    processor gives them ([N, 3, H, W], or a row per patch), None without images; image_mask bool [S], True on image
    tokens; answer_mask bool [S], True on tokens of the answer (the logits at t-1 predict the token at t); others:
    further keyword arguments of the model's forward; image_sizes: height and width of each picture, before any
    processing.
    """

    input_ids: Tensor
    pixel_values: Tensor | None
    image_mask: Tensor
    answer_mask: Tensor
    others: Mapping[str, Any] = field(default_factory=dict)
    image_sizes: tuple[tuple[int, int], ...] = ()

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward (without a cache)."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, **self.others, "use_cache": False}
        if self.pixel_values is not None:
            inputs["pixel_values"] = self.pixel_values
        return inputs


def build_sample(
    processor: Any, images: Sequence[Any], prompt: str, answer: str, image_token_id: int
) -> Sample:
    """A sample from PIL images, a prompt and an answer ("" for none) through the processor's chat template.

    The answer's tokens are those after the longest common prefix with the prompt that asks for a generation.
    CalibrationError if a text holds the image token, or the processor is another model's.
    """
    for kind in ("image_token", "video_token"):
        placeholder = str(getattr(processor, kind, None) or "")  # BLIP-2's is no plain text
        for text in (prompt, answer):
            if placeholder and placeholder in text:
                raise CalibrationError(
                    f"question {text[:80]!r}: holds {placeholder!r}, which stands for pictures. Leave it out of the "
                    'text and name the picture under "image".'
                )
    asked = _tokenize(processor, images, _messages(images, prompt, None), True)
    ids = asked["input_ids"]
    prefix = ids.shape[1]
    if answer:
        full = _tokenize(processor, images, _messages(images, prompt, answer), False)
        length = min(prefix, full["input_ids"].shape[1])
        differs = (full["input_ids"][0, :length] != ids[0, :length]).nonzero()
        prefix = int(differs[0]) if len(differs) else length
        asked, ids = full, full["input_ids"]
    answer_mask = torch.arange(ids.shape[1]) >= prefix
    if images and not bool((ids == image_token_id).any()):
        raise CalibrationError(
            f"the processor writes no image token ({image_token_id}) for a picture. Its files do not belong to this "
            "model: copy the model's own processor_config.json and tokenizer files beside its weights."
        )
    known = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
    return Sample(
        ids,
        asked["pixel_values"].float() if len(images) else None,
        ids[0] == image_token_id,
        answer_mask,
        {key: value for key, value in asked.items() if key not in known},
        tuple((image.height, image.width) for image in images),
    )


def _messages(images: Sequence[Any], prompt: str, answer: str | None) -> list[dict[str, Any]]:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _tokenize(processor: Any, images: Sequence[Any], messages: Any, generation: bool) -> Any:
    text = processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    bos = processor.tokenizer.bos_token
    # A template that writes the begin token itself must not get a second one from the tokenizer.
    special = not (bos and text.startswith(bos))
    return processor(
        images=list(images) or None, text=text, add_special_tokens=special, return_tensors="pt"
    )


@dataclass
class Stream:
    """One component's layers and what enters them.

    names and layers: full module name and module of each layer. For each sample i that reaches the component:
    samples[i] is its index in the calibration list, inputs[i] the hidden state entering layer 0 ([1, S, hidden] for
    text, [N, tokens, hidden] or [tokens, hidden] for vision), arguments[i][k] what layer k gets besides the hidden
    state, image_masks[i] bool of the shape [..., tokens] that the linears see (all True in vision and projector).

    additions[i]: layer -> what the model adds to the hidden state in front of that layer; empty where it adds nothing.
    Additions and arguments are those of the float model, also where a quantized stream runs: a cross attention reads
    what the float tower gave. entries: empty where each layer reads what left the one before; otherwise the layers
    stand side by side, and entries[k][i] is what enters layer k.

    Text only: answer_masks[i] bool of inputs[i].shape[:-1], True where the logits predict a token of the answer;
    ``logits`` turns the hidden state that leaves the last layer, any tokens of it, into logits.
    """

    component: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    samples: tuple[int, ...]
    inputs: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
    image_masks: list[Tensor]
    additions: list[dict[int, Tensor]] = field(default_factory=list)
    entries: list[list[Tensor]] = field(default_factory=list)
    answer_masks: list[Tensor] = field(default_factory=list)
    logits: Callable[[Tensor], Tensor] | None = None

    def expect_inputs(self) -> None:
        """CalibrationError if no sample reaches the component."""
        if not self.inputs:
            raise CalibrationError(
                f"{self.names[0]}: no calibration sample reaches it. Give samples that do (with images, for the vision "
                "part) or keep it in float."
            )

    def entering(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        """What enters layer ``index`` of the float model for each sample, ``hidden`` having left the layer before."""
        return self.entries[index] if self.entries else hidden

    def forward(self, index: int, hidden: Tensor, sample: int) -> Tensor:
        """Layer ``index`` on a hidden state of sample ``sample`` (its position in this stream)."""
        args, kwargs = self.arguments[sample][index]
        added = self.additions[sample].get(index) if self.additions else None
        if added is not None:
            hidden = hidden + added
        with image_tokens(self.image_masks[sample]):
            output = self.layers[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run(self, start: int, stop: int, hidden: Tensor, sample: int) -> Tensor:
        """Layers start .. stop-1 in order."""
        for index in range(start, stop):
            hidden = self.forward(index, hidden, sample)
        return hidden


class _Stop(Exception):
    """Ends a forward once everything wanted was seen."""


def capture_stream(
    model: nn.Module, adapter: Adapter, component: str, samples: Sequence[Sample]
) -> Stream:
    """Run each sample up to the component's last layer and keep what enters its layers. Shapes as in ``Stream``."""
    names = adapter.layer_names(model, component)
    layers = tuple(model.get_submodule(name) for name in names)
    stream = Stream(component, names, layers, (), [], [], [])
    if component == "text":
        stream.logits = _tail(model, adapter)
    apart = component == "projector" and bool(adapter.projectors)
    stream.entries = [[] for _ in layers] if apart else []
    for number, sample in enumerate(samples):
        seen = _Seen(len(layers))
        _run_hooked(
            model, sample, dict.fromkeys(layers, seen.enter), dict.fromkeys(layers, seen.leave)
        )
        if not seen.inputs:
            continue
        stream.samples = (*stream.samples, number)
        stream.inputs.append(seen.inputs[0])
        stream.arguments.append(seen.arguments)
        stream.additions.append({} if apart else seen.additions())
        for index, entries in enumerate(stream.entries):
            entries.append(seen.inputs[index])
        stream.image_masks.append(_image_mask(stream, sample))
        if component == "text":
            predicts = torch.zeros(seen.inputs[0].shape[:-1], dtype=torch.bool)
            predicts[..., :-1] = sample.answer_mask[1:]
            stream.answer_masks.append(predicts)
    return stream


class _Seen:
    """What enters each of ``count`` layers in one forward, up to the last; hidden states only where they differ from
    what left the layer before.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer."""
        hidden, rest, keywords = _split(args, kwargs)
        index = len(self.arguments)
        self.arguments.append((rest, keywords))
        if hidden is not self.last:
            self.inputs[index] = hidden.detach().clone()
            if self.last is not None:
                self.outputs[index] = self.last.detach().clone()
        if len(self.arguments) == self.count:
            raise _Stop

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind a layer."""
        self.last = output[0] if isinstance(output, tuple) else output

    def additions(self) -> dict[int, Tensor]:
        """Layer -> what was added in front of it."""
        return {index: self.inputs[index] - before for index, before in self.outputs.items()}


def _tail(model: nn.Module, adapter: Adapter) -> Callable[[Tensor], Tensor]:
    """What follows the last text layer, as a function [batch, tokens, hidden] -> logits.

    The module that owns the layers runs with every layer passing its input through, so the norm it ends with (and
    whatever else a family puts there) is its own; ``Adapter.tail`` runs in its place where it is given.
    """
    path = adapter.text_layers.rpartition(".")[0]
    owner, head = model.get_submodule(path), model.get_submodule(adapter.head)
    if adapter.tail:
        return nn.Sequential(*(model.get_submodule(name) for name in adapter.tail), head)
    layers = list(model.get_submodule(adapter.text_layers).children())

    def logits(hidden: Tensor) -> Tensor:
        with _passing(layers):
            found: Tensor = owner(inputs_embeds=hidden, use_cache=False).last_hidden_state
        result: Tensor = head(found)
        return result

    return logits


@contextmanager
def _passing(layers: Sequence[nn.Module]) -> Iterator[None]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def capture_inputs(model: nn.Module, layer: nn.Module, samples: Sequence[Sample]) -> list[Tensor]:
    """The hidden state entering one layer, for each sample that reaches it; the forward stops there."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0].detach().clone())
        raise _Stop

    for sample in samples:
        _run_hooked(model, sample, {layer: record})
    return found


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state, the other positional arguments, the keywords."""
    if args:
        return args[0], args[1:], dict(kwargs)
    keywords = dict(kwargs)
    return keywords.pop("hidden_states"), (), keywords


def _image_mask(stream: Stream, sample: Sample) -> Tensor:
    """The mask of the stream's last sample."""
    hidden = stream.inputs[-1]
    if stream.component in ("text", "head"):
        return sample.image_mask.expand(hidden.shape[:-1])
    if stream.component == "vision":
        return torch.ones(hidden.shape[:-1], dtype=torch.bool)
    # A projector may join tokens before its linears.
    seen: list[tuple[int, ...]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[:-1])
        raise _Stop

    args, kwargs = stream.arguments[-1][0]
    with ExitStack() as stack, torch.no_grad():
        for module in stream.layers[0].modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(record).remove)
        try:
            stream.layers[0](hidden, *args, **kwargs)
        except _Stop:
            return torch.ones(seen[0], dtype=torch.bool)
    raise RuntimeError(f"{stream.names[0]}: the projector did not call a linear")


def _run_hooked(
    model: nn.Module,
    sample: Sample,
    before: Mapping[nn.Module, Any],
    behind: Mapping[nn.Module, Any] | None = None,
) -> None:
    with ExitStack() as stack, torch.no_grad():
        for module, hook in before.items():
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for module, hook in (behind or {}).items():
            stack.callback(module.register_forward_hook(hook).remove)
        try:
            model(**sample.model_inputs())
        except _Stop:
            return


def linear_inputs(
    stream: Stream, index: int, linears: Mapping[str, nn.Module], hidden: Tensor, sample: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs [..., in] of the given linears (by name) while layer ``index`` runs, and the layer's output."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen[name] = args[0].detach()

            stack.callback(linear.register_forward_pre_hook(record).remove)
        output = stream.forward(index, hidden, sample)
    return seen, output


def linears_entered(
    stream: Stream, index: int, linears: Mapping[str, nn.Module], hidden: Tensor, sample: int
) -> dict[str, Tensor]:
    """``linear_inputs`` without the layer's output: the layer stops once each of the linears was called.

    Layers are measured linear by linear, so what lies behind a linear would run for nothing. No layer of a known
    family calls a linear twice; of one that did this sees the first call.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen[name] = args[0].detach()
                if len(seen) == len(linears):
                    raise _Stop

            stack.callback(linear.register_forward_pre_hook(record).remove)
        try:
            stream.forward(index, hidden, sample)
        except _Stop:
            return seen
    return seen
