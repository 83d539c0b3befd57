"""The driver: source, recipe, samples -> quantized checkpoint. The only file that knows the order of the work.

1. Check source and recipe (``plan.resolve``), load the model, untie its head if asked (``untie``), build the samples.
2. Float goldens; the recipe's transforms, and a check that the changed model still answers the same; the largest
   activations, and the float hidden states that enter each component, while the model is still float.
3. The method prepares; embeddings are rounded (``embedding``). Then for vision, projector, text, head the method cuts
   the layers into blocks and turns each block into integers, given the float stream and the quantized stream that
   enter it. The block is replaced by its simulation; both streams go on to the next. Each finished block is saved.
4. Goldens of the quantized model; checkpoint; rename.

Everything is deterministic in (source, recipe, samples): the same run gives the same bytes, and so does an
interrupted one that is resumed. A full disk or an interrupt leaves OUT.partial and nothing under OUT.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvlm import embedding, fakequant, magnitudes
from qvlm.block_report import describe
from qvlm.capture import Sample, Stream, build_sample, capture_inputs, capture_stream
from qvlm.checkpoint import (
    MAGNITUDES,
    Array,
    CheckpointWriter,
    QuantizedLinear,
    dump_json,
    write_goldens,
)
from qvlm.data import Question, calibration
from qvlm.errors import RecipeError
from qvlm.generate import with_own_answer
from qvlm.goldens import Recorder, twice
from qvlm.methods import METHODS, Block, Context, State
from qvlm.models.adapter import Adapter
from qvlm.plan import Formats, Plan, plan, resolve
from qvlm.progress import Progress, silent
from qvlm.recipe import COMPONENTS, EMBEDDING, Recipe
from qvlm.source import Loaded, Source, imports, load, open_source, skeleton
from qvlm.transform import fitted, transform
from qvlm.untie import untied, untied_config
from qvlm.workdir import WorkDirectory, digest

__all__ = ["Plan", "build_samples", "plan", "quantize"]

# Files of the tokenizer and processor that travel with a model.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Longest greedy answer for a calibration picture without one.
_OWN_ANSWER_TOKENS = 64


def quantize(
    source: str | Source,
    output: Path,
    recipe: Recipe,
    calib: str | None = None,
    *,
    questions: Sequence[Question] | None = None,
    resume: bool = False,
    goldens: int = 16,
    progress: Progress = silent,
) -> Path:
    """Write the quantized checkpoint ``output``, which must not exist, and return it.

    ``calib`` is a folder (see ``data``) or None for the shipped set; ``questions`` replaces it. ``resume`` continues
    what an interrupted run with the same arguments left in OUT.partial. Raises RecipeError, CheckpointError,
    UnsupportedModelError or CalibrationError before any work is written where the input is at fault.
    """
    work = WorkDirectory(output, resume)
    source = open_source(source) if isinstance(source, str) else source
    tree = untied(skeleton(source.directory), source.adapter, recipe)
    integers = imports(source, tree)
    recipe = fitted(recipe, integers)
    formats = resolve(tree, source.adapter, recipe, integers)
    chosen = questions if questions is not None else calibration(calib, recipe.samples, recipe.seed)
    loaded = load(source, progress)
    loaded = replace(loaded, model=untied(loaded.model, source.adapter, recipe))
    run = _Run(source, loaded, recipe, formats, progress)
    recorder = Recorder(loaded.model, source.adapter, loaded.processor, progress)
    prompts = recorder.prompts(chosen, goldens)
    samples = build_samples(loaded, source.adapter, chosen, progress)
    work.begin(identity(source, recipe, samples, len(prompts)))
    sides = recorder.floats(prompts)
    transforms = run.transform(samples, work)
    if transforms:
        sides = recorder.transformed(prompts, sides, list(transforms))
    largest = run.magnitudes(samples, work)
    report = run.quantize_components(samples, work)
    if transforms:
        report["transforms"] = transforms
    directory = work.checkpoint()
    run.write(directory, report)
    dump_json(directory / MAGNITUDES, largest)
    # A float recipe: both sides are the same model.
    recorded = recorder.quantized(prompts, sides) if run.linears else twice(sides)
    write_goldens(directory / "goldens.npz", recorded)
    return work.finish()


def build_samples(
    loaded: Loaded, adapter: Adapter, questions: Sequence[Question], progress: Progress = silent
) -> list[Sample]:
    """Questions as teacher-forced samples; one without answer gets the model's own."""
    samples = []
    image_token = adapter.image_token_id(loaded.model.config)
    for number, question in enumerate(questions):
        progress("read samples", number, len(questions))
        sample = build_sample(
            loaded.processor,
            question.open_images(),
            question.prompt,
            question.answer or "",
            image_token,
        )
        if question.answer is None:
            sample = with_own_answer(loaded.model, sample, _OWN_ANSWER_TOKENS)
        samples.append(sample)
    progress("read samples", len(questions), len(questions))
    return samples


def identity(source: Source, recipe: Recipe, samples: Sequence[Sample], goldens: int) -> str:
    """Digest of all that decides the result."""
    from qvlm import __version__

    files = [
        [shard, (source.directory / shard).stat().st_size, _header_digest(source.directory / shard)]
        for shard in source.shards
    ]
    parts: list[Any] = [__version__, source.config, files, recipe.to_json(), goldens]
    for sample in samples:
        parts += [sample.input_ids.numpy(), sample.answer_mask.numpy()]
        if sample.pixel_values is not None:
            parts.append(sample.pixel_values.numpy())
    return digest(*parts)


def _header_digest(path: Path) -> str:
    """Digest of the first MiB and the last: enough to tell two checkpoints of the same shapes apart."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        return digest(np.frombuffer(head, np.uint8), np.frombuffer(file.read(), np.uint8))


class _Run:
    """One quantization in memory: the model that turns from float to quantized block by block."""

    def __init__(
        self,
        source: Source,
        loaded: Loaded,
        recipe: Recipe,
        formats: Formats,
        progress: Progress,
    ) -> None:
        self.source, self.adapter = source, source.adapter
        self.model, self.processor = loaded.model, loaded.processor
        self.recipe, self.formats, self.progress = recipe, formats, progress
        self.method = METHODS[recipe.method]
        self.linears: dict[str, tuple[str, QuantizedLinear]] = {}
        # Linears that are integers already: no method sees them, each takes its place when its component's turn ends.
        self.imported = loaded.imported
        # The head is then the embedding, which is stored once and under its own name.
        self.tied = source.adapter.tied(loaded.model)

    def transform(self, samples: list[Sample], work: WorkDirectory) -> dict[str, Any]:
        """Apply the recipe's transforms; what they report."""

        def load(name: str) -> State | None:
            return work.load_arrays(f"transform-{name}")

        def save(name: str, state: State) -> None:
            work.save_arrays(f"transform-{name}", state)

        context = Context(self.model, self.adapter, samples, self.recipe, self.formats)
        return transform(context, load, save, self.progress)

    def magnitudes(self, samples: Sequence[Sample], work: WorkDirectory) -> magnitudes.Magnitudes:
        """The float model's largest activations, measured once."""
        saved = work.load_arrays("magnitudes")
        if saved is None:
            found = magnitudes.measure(self.model, self.adapter, samples, self.progress)
            saved = {f"{n}/{side}": np.array(v) for n, s in found.items() for side, v in s.items()}
            work.save_arrays("magnitudes", saved)
        largest: magnitudes.Magnitudes = {}
        for key, value in saved.items():
            name, _, side = key.rpartition("/")
            largest.setdefault(name, {})[side] = float(value)
        return largest

    # -- blocks

    def quantize_components(self, samples: list[Sample], work: WorkDirectory) -> dict[str, Any]:
        """Turn every component's linears into integers; the model ends up as its own simulation."""
        streams: dict[str, Stream] = {}
        for number, component in enumerate(self.formats):
            self.progress("float streams", number, len(self.formats))
            streams[component] = capture_stream(self.model, self.adapter, component, samples)
        self.progress("float streams", len(self.formats), len(self.formats))
        state: State | None = work.load_arrays("prepared")
        if state is None:
            context = Context(self.model, self.adapter, samples, self.recipe, self.formats)
            state = self.method.prepare(context)
            work.save_arrays("prepared", state)
        # After ``prepare``, which looks at the float model, and before the first quantized stream.
        embedded = embedding.quantize(
            self.model, embedding.resolve(self.model, self.adapter, self.recipe), samples
        )
        embedding.apply(self.model, embedded)
        self.linears.update({name: (EMBEDDING, one) for name, one in embedded.items()})
        report: dict[str, Any] = {
            "name": self.recipe.method,
            "components": {},
            "versions": _versions(),
        }
        for component in COMPONENTS:
            if component in streams:
                rows = self._component(streams.pop(component), samples, state, work)
                report["components"][component] = rows
            self._place_imported(component)
        return report

    def _place_imported(self, component: str) -> None:
        names = [n for n in self.adapter.linears(self.model, component) if n in self.imported]
        fakequant.apply(self.model, {name: self.imported[name] for name in names})
        self.linears.update({name: (component, self.imported[name]) for name in names})

    def _component(
        self, stream: Stream, samples: Sequence[Sample], state: State, work: WorkDirectory
    ) -> list[dict[str, Any]]:
        component = stream.component
        blocks = work.load_partition(component)
        if blocks is None:
            blocks = self.method.partition(stream, self.recipe, state)
            _check_partition(blocks, len(stream.layers), self.recipe.method)
            work.save_partition(component, blocks)
        # Only samples with images reach vision; text samples are all of them.
        reaching = [samples[i] for i in stream.samples]
        quant = capture_inputs(self.model, stream.layers[0], reaching)
        floats = stream.inputs
        rows = []
        for start, stop in blocks:
            self.progress(component, start, len(stream.layers))
            if stream.entries and start:
                floats = stream.entries[start]
                quant = capture_inputs(self.model, stream.layers[start], reaching)
            block = self._block(stream, start, stop, floats, quant)
            linears, report = self._quantize_block(block, state, work)
            last = stop == len(stream.layers)
            floats = [] if last else _propagate(block, floats)
            fakequant.apply(self.model, linears)
            quant = [] if last else _propagate(block, quant)
            self.linears.update({name: (component, linear) for name, linear in linears.items()})
            rows.append({"layers": [start, stop], **report})
        self.progress(component, len(stream.layers), len(stream.layers))
        return rows

    def _block(
        self, stream: Stream, start: int, stop: int, floats: list[Tensor], quant: list[Tensor]
    ) -> Block:
        formats = self.formats[stream.component]
        prefixes = stream.names[start:stop]
        names = [n for n in formats if any(n == p or n.startswith(p + ".") for p in prefixes)]
        linears: dict[str, nn.Linear] = {}
        for name in names:
            linear = self.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linears[name] = linear
        return Block(stream, start, stop, linears, {n: formats[n] for n in names}, floats, quant)

    def _quantize_block(
        self, block: Block, state: State, work: WorkDirectory
    ) -> tuple[dict[str, QuantizedLinear], dict[str, Any]]:
        key = (block.component, block.start, block.stop)
        done = work.load_block(*key, block.formats)
        if done is not None or not block.linears:
            return done if done is not None else ({}, {})
        result = self.method.quantize_block(block, self.recipe, state)
        if result.linears.keys() != block.linears.keys():
            raise RuntimeError(f"method {self.recipe.method!r} left linears of {key} out")
        report = {**result.report, "measured": describe(block, result.linears, self.recipe)}
        work.save_block(*key, result.linears, report)
        return result.linears, report

    # -- result

    def write(self, directory: Path, report: dict[str, Any]) -> None:
        """The checkpoint's tensors, JSON files and companions."""
        writer = CheckpointWriter(directory)
        for component, linear_name, linear in (
            (component, name, linear) for name, (component, linear) in self.linears.items()
        ):
            writer.add_linear(component, linear_name, linear)
        dtype = _stored_dtype(self.source.config)
        for name, tensor in self._float_tensors():
            writer.add(name, to_numpy(tensor, dtype))
        floats = {
            name: component
            for component in COMPONENTS
            for name in self.adapter.linears(self.model, component)
            if name not in self.linears and not (self.tied and name == self.adapter.head)
        }
        config = self.source.config
        writer.close(
            untied_config(config) if self.recipe.untie else config, self.recipe, report, floats
        )
        for companion in _COMPANIONS:
            if (self.source.directory / companion).is_file():
                shutil.copyfile(self.source.directory / companion, directory / companion)
        template = directory / "chat_template.jinja"
        if self.processor.chat_template and not template.exists():
            template.write_text(self.processor.chat_template, encoding="utf-8")

    def _float_tensors(self) -> list[tuple[str, Tensor]]:
        """Everything that is no integer; a head that shares the embedding's weight is stored once."""
        replaced = {f"{n}.{key}" for n in self.linears for key in ("weight", *fakequant.STATIC)}
        skipped = replaced | ({f"{self.adapter.head}.weight"} if self.tied else set())
        return [(n, t) for n, t in self.model.state_dict().items() if n not in skipped]


def _versions() -> dict[str, str]:
    """What a result depends on besides the code here."""
    import transformers

    from qvlm import __version__

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"qvlm": __version__, "numpy": np.__version__, **versions}


def _check_partition(blocks: Sequence[tuple[int, int]], layers: int, method: str) -> None:
    edges = [0, *(stop for _, stop in blocks)]
    starts = [start for start, _ in blocks]
    if starts != edges[:-1] or edges[-1] != layers or sorted(set(edges)) != edges:
        raise RecipeError(f"method {method!r}: blocks {list(blocks)} do not cover {layers} layers")


@torch.no_grad()
def _propagate(block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [block.run(state, sample) for sample, state in enumerate(hidden)]


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """The source's float type."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def to_numpy(tensor: Tensor, dtype: torch.dtype) -> Array:
    """A float tensor in the source's own type where that loses nothing, float32 otherwise; others as they are."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return np.asarray(tensor.numpy())
    narrow = tensor.to(dtype)
    if not torch.equal(narrow.to(tensor.dtype), tensor):
        narrow = tensor.float()
    if narrow.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(narrow.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(narrow.numpy())
