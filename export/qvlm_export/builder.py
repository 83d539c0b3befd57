"""From a graph to a plan through TensorRT's builder, for TensorRT and TensorRT for RTX alike.

The calls are those that TensorRT 10.3 to 11.4 and TensorRT for RTX 1.7 share; the module comes as
an argument, and what only one of them has is set by its own file (engine.py, rtx.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export.facts import graph_facts
from qvlm_export.image_limits import within_context
from qvlm_export.kernels import Kernel, Telling, check, integer_products
from qvlm_runtime.image_spec import AnyresImage, ImageSpec, Layout, PatchImage
from qvlm_runtime.manifest import CacheForm, EngineSpec, ModelSpec, TargetSpec
from qvlm_runtime.positions import AXES
from qvlm_runtime.trt_library import message_log
from qvlm_runtime.vision import extremes, input_shapes, layout

# Height and width of a frame that engines with shapes that follow the image are tuned for.
_USUAL = (480, 640)
# name -> (least, optimal, largest) shape
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Options:
    """workspace: MiB of scratch memory a kernel may take, None for the builder's own limit (all
    memory); level: 0 to 5, how long the builder searches, None for its default (3).
    """

    workspace: int | None = None
    level: int | None = None


@dataclass(frozen=True)
class EngineRow:
    """One engine for the report: products fused with INT4 weights and run as INT8, kernels in each
    profile. checked: what the check of its kernel list could read: "constants", "names" (the
    products are then the graph's), or "nothing": not checked.
    """

    engine: str
    file: str
    bytes: int
    kernels: str
    int4_products: int
    int8_products: int
    checked: Telling


def profiles(
    graph: str, model: ModelSpec, image: ImageSpec, cache: CacheForm = "append"
) -> dict[str, Profile]:
    """Optimization profiles of a graph by name: none for a vision graph of one tile, whose shapes
    are fixed; "image" for one whose shapes follow the image, the optimum at 640 x 480 pixels.

    prefill: S 1..max_context behind an empty cache (P = 0 exactly, which saves the past's copies).
    decode: S = 1, P 1..max_context - 1. extend: S 1..max_context - 1 behind P 1..max_context - 1,
    for a prompt in pieces and for a conversation that goes on. A "scatter" cache has fixed shapes,
    so its prefill takes any piece. image_features: from one row to as many as the context holds.
    """
    image = within_context(image, model.max_context)
    least, largest = extremes(image)
    usual = layout(image, *_USUAL)
    if graph == "vision":
        return _vision_profiles(image, (least, usual, largest))
    context, axes = model.max_context, AXES[model.positions]
    rows = min(usual.rows, context)

    def profile(tokens: Sequence[int], past: Sequence[int]) -> Profile:
        shapes: dict[str, Any] = {
            name: tuple((lines, n) for n in tokens)
            for name, lines in (("input_ids", 1), ("image_index", 1), ("position_ids", axes))
        }
        shapes["image_features"] = tuple((n, model.feature_size) for n in (1, rows, context))
        for i in range(model.layers if cache == "append" else 0):
            for kind in ("key", "value"):
                shapes[f"past_{kind}_{i}"] = tuple(
                    (1, n, model.kv_heads, model.head_dim) for n in past
                )
        return shapes

    last, middle = max(1, context - 1), max(1, context // 2)
    some = min(context, max(1, rows * 2))
    found = {
        "prefill": profile((1, some, context), (0, 0, 0)),
        "decode": profile((1, 1, 1), (1, middle, last)),
    }
    if cache == "append":
        # The optimum must be a case that can happen: both parts within the context.
        piece = min(some, last, context - middle)
        found["extend"] = profile((1, max(1, piece), last), (1, middle, last))
    return found


def _vision_profiles(image: ImageSpec, layouts: Sequence[Layout]) -> dict[str, Profile]:
    """Least, optimal and largest shapes of the inputs that differ between layouts."""
    if not isinstance(image, AnyresImage | PatchImage):
        return {}  # one tile a run, as many runs as tiles
    least, usual, largest = (input_shapes(image, one) for one in layouts)
    return {"image": {name: (least[name], usual[name], largest[name]) for name in least}}


def _ranges(shapes: Mapping[str, Profile]) -> dict[str, dict[str, tuple[int, ...]]]:
    """What the manifest says of a decoder's profiles: tokens, and cache rows before them."""
    found = {}
    for name, one in shapes.items():
        if "input_ids" not in one:
            continue
        past = one.get("past_key_0")
        found[name] = {
            "tokens": tuple(shape[1] for shape in one["input_ids"]),
            "past": tuple(shape[1] for shape in past) if past else (),
        }
    return found


class Phases:
    """The builder's outermost phases as stages of our progress, in percent: a step of an inner phase
    counts as its share of the step around it.
    """

    def __init__(self, where: str, progress: Progress) -> None:
        self._where, self._progress = where, progress
        self._steps: dict[str, int] = {}  # phases that run, outermost first
        self._done: dict[str, int] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside its parent."""
        if parent is None:
            self._steps.clear()
        self._steps[name], self._done[name] = steps, 0

    def step(self, name: str, step: int) -> None:
        """A phase's step, counted from 0, is done."""
        if name not in self._steps:
            return
        self._done[name] = step + 1
        share, fraction = 1.0, 0.0
        for phase, steps in self._steps.items():
            share /= max(1, steps)
            fraction += share * self._done[phase]
        outermost = next(iter(self._steps))
        self._progress(f"{self._where}: {outermost}", int(100 * min(fraction, 1.0)), 100)

    def finish(self, name: str) -> None:
        """A phase ends."""
        if next(iter(self._steps), None) == name:
            self._progress(f"{self._where}: {name}", 100, 100)
        self._steps.pop(name, None)


def _monitor(trt: Any, phases: Phases) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands the builder's reports on; an interrupt ends the build at its next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                phases.step(phase_name, step)
            except KeyboardInterrupt:  # must not pass through the builder's C++
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def compile_network(
    trt: Any,
    path: Path,
    shapes: Mapping[str, Profile],
    options: Options,
    progress: Progress,
    configure: Callable[[Any], None],
) -> tuple[bytes, list[str], Any]:
    """Parse and compile one graph: the plan, every message of the log, and the used config.

    Strongly typed, weights from the external data beside the graph. ``configure`` sets what one
    TensorRT only has. ExportError with the parser's node name, or with the builder's message.
    """
    log = message_log(trt, "VERBOSE")
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise ExportError(f"{path}: {_parser_errors(parser) or log.errors()}")
    if network.num_layers == 0:
        raise ExportError(f"{path}: the parser read no layer, expected a graph. Export again.")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.level is not None:
        config.builder_optimization_level = options.level
    monitor = config.progress_monitor = _monitor(trt, Phases(path.stem, progress))
    configure(config)
    for label, one in shapes.items():
        profile = builder.create_optimization_profile()
        for name, (least, optimal, largest) in one.items():
            profile.set_shape(name, least, optimal, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"{path}: profile {label} {dict(one)} refused: {log.errors()}")
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise ExportError(f"{path}: does not compile: {log.errors() or 'no reason given'}")
    return bytes(plan), [message for _, message in log.messages], config


def _parser_errors(parser: Any) -> str:
    """The parser's errors, the first one's node by name."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return ""
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    first = errors[0]
    return f"node {first.node_name()!r} is not accepted: {' '.join(first.desc().split())}{rest}"


def store_engine(
    folder: Path,
    graph: str,
    key: str,
    plan: bytes,
    kernels: Sequence[Kernel],
    spec: EngineSpec,
) -> EngineRow:
    """Check the kernels of one engine, then write it to ``folder / spec.path``, atomically.

    ``graph`` is the graph's path in the folder, ``key`` the engine's name in the manifest.
    ExportError if an integer weight is not multiplied as an integer, or the disk refuses.
    """
    facts = graph_facts(folder / graph)
    told = check(kernels, facts, f"{graph} for SM{spec.capability}")
    write_file(folder / spec.path, plan)
    each = sorted({k.profile for k in kernels})
    counts = " / ".join(str(sum(k.profile == p for k in kernels)) for p in each)
    products = (
        integer_products(kernels)
        if told == "constants"
        else (facts.count("INT4"), facts.count("INT8"))
    )
    return EngineRow(key, spec.path, len(plan), counts, *products, told)


def engine_spec(
    spec: TargetSpec, stem: str, backend: str, version: str, sm: int, shapes: Mapping[str, Profile]
) -> EngineSpec:
    """The manifest's entry of one engine, in ``engines`` beside the target's graphs."""
    path = Path(spec.graphs[stem]).parent / "engines" / f"{stem}.sm{sm}.plan"
    return EngineSpec(path.as_posix(), backend, version, sm, _ranges(shapes))


def write_file(path: Path, data: bytes) -> None:
    """Write a file that gets its name when complete; ExportError if the disk refuses."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"{path}: not written ({error}). Free disk space.") from error
    finally:
        partial.unlink(missing_ok=True)
