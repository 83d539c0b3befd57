"""Replay of the goldens through ONNX Runtime: does the export compute what the checkpoint's model
computed?

Three replays of every golden: the vision graph on its pixels; the decoder graph on the goldens' own
image features, prompt in one run and then each token through the cache; both graphs one behind the
other. Image and text tokens are compared apart, for they differ in size by an order of magnitude
and an error in the few would drown in the many. Bounds are derived in ``bounds.py``. INT4 products
keep float activations here (accuracy level 1), so that ONNX Runtime's own rounding does not hide
the exporter's. Targets for TensorRT run the same way, in float16 on the CPU; a bfloat16 graph runs
as its float32 twin (``twin.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from qvlm.checkpoint import Checkpoint, Golden, dump_json, load_json, read_goldens
from qvlm.errors import VerificationError
from qvlm.progress import Progress
from qvlm_export.bounds import Error, end_to_end_bound, graph_bound, relative_error
from qvlm_export.build import image_spec, model_spec
from qvlm_export.facts import GraphFacts, graph_facts
from qvlm_export.twin import float32_twin
from qvlm_export.weights import Array
from qvlm_runtime.backend import EXACT, Session, open_session
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.errors import RuntimeFault
from qvlm_runtime.image_spec import ImageSpec, parse_image
from qvlm_runtime.manifest import ModelSpec, TargetSpec, read_manifest
from qvlm_runtime.positions import AXES
from qvlm_runtime.vision import prepare

# The operator ONNX Runtime must run for an integer weight of that type.
FUSED = {"INT4": "MatMulNBits", "INT8": "MatMulIntegerToFloat"}

_GOLDEN_IMAGES = "golden_images.json"


@dataclass(frozen=True)
class VerifyRow:
    """One output: errors relative to the golden (rms over rms, largest over largest) and their
    bounds, the worst golden's. ``fused`` rows count operators: ``largest`` found, ``largest_bound``
    expected."""

    graph: str
    output: str
    tokens: str
    rms: float
    rms_bound: float
    largest: float
    largest_bound: float
    passed: bool


@dataclass(frozen=True)
class VerifyResult:
    """All rows of one target, and how many of ``positions`` greedy tokens agree with the goldens
    end to end.
    """

    target: str
    rows: tuple[VerifyRow, ...]
    agree: int
    positions: int

    def __iter__(self) -> Iterator[VerifyRow]:
        return iter(self.rows)

    @property
    def agreement(self) -> float:
        """Share of greedy tokens that agree."""
        return self.agree / max(1, self.positions)


def verify_target(
    folder: Path,
    spec: TargetSpec,
    checkpoint: Checkpoint,
    progress: Progress,
    max_context: int | None = None,
) -> VerifyResult:
    """Check one target's graphs in ``folder`` against the checkpoint they were built from.

    Raises VerificationError naming the worst output, or a quantized linear that is not in the
    graphs.
    """
    model = model_spec(checkpoint, max_context)
    facts = [graph_facts(folder / path) for path in spec.graphs.values()]
    built = {name for f in facts for name in f.linears}
    if missing := sorted(set(checkpoint.linears) ^ built):
        raise VerificationError(
            f"{missing[0]}: quantized in {'the checkpoint' if missing[0] not in built else 'the graph'} only; "
            f"{len(built)} quantized linears built, {len(checkpoint.linears)} in the checkpoint"
        )
    image = image_spec(checkpoint)
    return verify_graphs(folder, spec, model, image, checkpoint.goldens(), progress)


def verify_folder(folder: Path, progress: Progress) -> list[VerifyResult]:
    """Check every target of a finished model folder against its own goldens.npz; VerificationError
    as above.
    """
    manifest = read_manifest(folder)
    goldens = read_goldens(folder / "goldens.npz")
    image = _golden_images(folder) or manifest.image
    return [
        verify_graphs(folder, spec, manifest.model, image, goldens, progress)
        for spec in manifest.targets.values()
    ]


def write_golden_images(folder: Path, image: ImageSpec) -> None:
    """Say how the images of the goldens were cut, in a folder whose manifest has limits they do not keep."""
    dump_json(folder / _GOLDEN_IMAGES, asdict(image))


def _golden_images(folder: Path) -> ImageSpec | None:
    """None: as the manifest says. VerificationError for a file that does not say it."""
    path = folder / _GOLDEN_IMAGES
    if not path.is_file():
        return None
    try:
        return parse_image(load_json(path))
    except (KeyError, TypeError) as error:
        raise VerificationError(
            f"{path}: a key is missing or unknown ({error}). Export again."
        ) from error


def verify_graphs(
    folder: Path,
    spec: TargetSpec,
    model: ModelSpec,
    image: ImageSpec,
    goldens: Sequence[Golden],
    progress: Progress,
) -> VerifyResult:
    """Replay ``goldens``; VerificationError if an output is beyond its bound or a product is not
    fused.
    """
    target = Path(spec.graphs["decoder"]).parent.name
    if not goldens:
        raise VerificationError(f"{folder}: no goldens to replay. Quantize again.")
    with tempfile.TemporaryDirectory() as twins:
        try:
            replay = _Replay(folder, spec, (model, image), Path(twins))
            for done, golden in enumerate(goldens):
                progress(f"verify {target}", done, len(goldens))
                replay.golden(golden)
            if spec.dtype == "float32":  # ONNX Runtime has integer kernels for float32 graphs only
                replay.fused(goldens[0])
        except RuntimeFault as error:
            raise VerificationError(str(error)) from error
    progress(f"verify {target}", len(goldens), len(goldens))
    result = VerifyResult(target, tuple(replay.rows.values()), replay.agree, replay.positions)
    failed = [row for row in result.rows if not row.passed]
    if failed:
        raise VerificationError(_describe(folder, target, failed))
    return result


def _describe(folder: Path, target: str, failed: Sequence[VerifyRow]) -> str:
    compared = [row for row in failed if row.graph != "fused"]
    if not compared:
        row = failed[0]
        return (
            f"{folder / target}: ONNX Runtime ran {row.largest:.0f} {row.output} in the {row.tokens} graph, expected "
            f"{row.largest_bound:.0f}: a quantized product is computed in float"
        )
    row = max(compared, key=lambda r: max(r.rms / r.rms_bound, r.largest / r.largest_bound))
    return (
        f"{folder / target}: {row.graph} {row.output} at {row.tokens} differs from the golden by {row.rms:.3g} (rms), "
        f"{row.largest:.3g} (largest), expected at most {row.rms_bound:.3g} and {row.largest_bound:.3g}; "
        f"{len(failed)} outputs fail. The export does not reproduce the checkpoint: do not use it."
    )


class _Replay:
    """Opened graphs of one target, and the worst row per output so far.

    ``dtype`` is the graphs' float type, ``spec`` speaks of what is run: a bfloat16 graph's twin in
    ``twins`` is float32.
    """

    def __init__(
        self, folder: Path, spec: TargetSpec, specs: tuple[ModelSpec, ImageSpec], twins: Path
    ) -> None:
        self.dtype, self.spec = spec.dtype, spec
        self.model, self.image = specs
        self.paths = {stem: folder / path for stem, path in spec.graphs.items()}
        self.facts: dict[str, GraphFacts] = {s: graph_facts(p) for s, p in self.paths.items()}
        if spec.dtype == "bfloat16":
            self.spec = replace(spec, dtype="float32")
            self.paths = {stem: float32_twin(path, twins) for stem, path in self.paths.items()}
        self.vision = self._open("vision")
        where = str(self.paths["decoder"])
        self.decoder = Decoder(self._open("decoder"), self.model, self.spec, where)
        self.rows: dict[tuple[str, str, str], VerifyRow] = {}
        self.agree = self.positions = 0

    def _open(self, stem: str) -> Session:
        return open_session(self.paths[stem], accuracy_level=EXACT)

    def golden(self, golden: Golden) -> None:
        """The three replays of one golden."""
        expected, unquantized = golden.outputs["quant"], golden.outputs["float"]
        features = self._features(golden)
        moved = relative_error(expected["image_features"], unquantized["image_features"])
        bound = graph_bound(self.facts["vision"], self.dtype, 0, moved)
        difference = self._compare(
            "vision", "image_features", "image", features, expected["image_features"], bound
        )
        alone = self._decode(golden, expected["image_features"])
        behind = self._decode(golden, features)
        for (output, tokens), select in _selections(golden).items():
            reference = expected[output][select]
            change = relative_error(reference, unquantized[output][select])
            last = len(golden.inputs["input_ids"]) + len(golden.inputs["tokens"])
            bound = graph_bound(self.facts["decoder"], self.dtype, last, change)
            self._compare("decoder", output, tokens, alone[output][select], reference, bound)
            joint = end_to_end_bound(bound, difference)
            self._compare("end to end", output, tokens, behind[output][select], reference, joint)
        same = behind["logits"].argmax(-1) == expected["logits"].argmax(-1)
        self.agree += int(same.sum())
        self.positions += same.size

    def _compare(
        self, graph: str, output: str, tokens: str, found: Array, expected: Array, bound: Error
    ) -> Error:
        error = relative_error(found, expected)
        passed = error.rms <= bound.rms and error.largest <= bound.largest
        row = VerifyRow(
            graph, output, tokens, error.rms, bound.rms, error.largest, bound.largest, passed
        )
        worst = self.rows.get((graph, output, tokens))
        if worst is None or (not passed, error.rms / bound.rms) > (
            not worst.passed,
            worst.rms / worst.rms_bound,
        ):
            self.rows[graph, output, tokens] = row
        return error

    def _images(self, golden: Golden) -> list[dict[str, Array]]:
        """The vision graph's inputs, a run each: the golden's pixels, with the indices that the
        runtime makes for a picture of that size.
        """
        fixed = self.vision.inputs["pixel_values"].shape[0] == 1
        runs, start = [], 0
        for height, width in golden.inputs["image_sizes"].tolist():
            blank = np.zeros((height, width, 3), np.uint8)
            _, made = prepare(blank, self.image, str(self.paths["vision"]))
            feed = dict(made)
            pixels = golden.inputs["pixel_values"][start : start + len(feed["pixel_values"])]
            start += len(pixels)
            for part in np.split(pixels, len(pixels)) if fixed else [pixels]:
                feed = {**feed, "pixel_values": part}
                types = {name: self.vision.inputs[name].dtype for name in feed}
                runs.append({name: a.astype(types[name]) for name, a in feed.items()})
        if start != len(golden.inputs["pixel_values"]):
            raise VerificationError(
                f"{self.paths['vision']}: images of the goldens have {len(golden.inputs['pixel_values'])} "
                f"rows of pixels, its image settings make {start}. Export again."
            )
        return runs

    def _features(self, golden: Golden) -> Array:
        """image_features of all images, one behind the other."""
        runs = [self.vision.run(feed)["image_features"] for feed in self._images(golden)]
        return np.concatenate(runs)

    def _decode(self, golden: Golden, features: Array) -> dict[str, Array]:
        """Prefill and cached steps on the golden's tokens: logits [T, V], last layer's rows [S+T-1,
        heads, D].
        """
        inputs = golden.inputs
        tokens = [int(t) for t in inputs["tokens"][:-1]]
        state = self.decoder.start(len(inputs["input_ids"]) + len(tokens), features)
        positions = np.atleast_2d(inputs["position_ids"])
        logits = [state.step(inputs["input_ids"], inputs["image_index"], positions)]
        logits += [state.step([token]) for token in tokens]
        key, value = state.cache_rows(self.model.layers - 1)
        rows = {name: a[0].transpose(1, 0, 2) for name, a in (("key", key), ("value", value))}
        return {"logits": np.stack(logits), **rows}

    def fused(self, golden: Golden) -> None:
        """Count the operators that ONNX Runtime ran for the integer products of each graph."""
        for stem, feed in self._feeds(golden).items():
            facts = self.facts[stem]
            ran = executed(self.paths[stem], feed)
            for dtype, operator in FUSED.items():
                found, expected = ran.get(operator, 0), facts.count(dtype)
                row = VerifyRow(
                    "fused", operator, stem, 0.0, 0.0, found, expected, found == expected
                )
                if found or expected:
                    self.rows["fused", operator, stem] = row

    def _feeds(self, golden: Golden) -> dict[str, dict[str, Array]]:
        """One run of each graph: an image, and the first prompt token on a cache of one row."""
        dtype, inputs = self.spec.dtype, self.decoder.session.inputs
        axes = AXES[self.model.positions]
        names = [f"past_{kind}_{i}" for i in range(self.model.layers) for kind in ("key", "value")]
        decoder: dict[str, Array] = {
            "input_ids": np.zeros((1, 1), np.int64),
            "position_ids": np.zeros((axes, 1), np.int64),
            "image_index": np.full((1, 1), -1, np.int64),
            "image_features": np.zeros((1, self.model.feature_size), dtype),
            "write_index": np.zeros(1, np.int64),
            "kv_len": np.ones(1, np.int64),
            **{name: np.zeros([n or 1 for n in inputs[name].shape], dtype) for name in names},
        }
        return {"vision": self._images(golden)[0], "decoder": decoder}


def executed(path: Path, feed: dict[str, Array]) -> dict[str, int]:
    """Operators that ONNX Runtime runs for a graph, after its fusions."""
    from qvlm_runtime.ort import executed_operators

    return executed_operators(path, feed, EXACT)


def _selections(golden: Golden) -> dict[tuple[str, str], Array]:
    """(output, tokens) -> rows of that output: image, prompt text and generated tokens apart."""
    index = golden.inputs["image_index"]
    generated = len(golden.inputs["tokens"]) - 1
    image, text = np.flatnonzero(index >= 0), np.flatnonzero(index < 0)
    behind = np.arange(len(index), len(index) + generated)
    found: dict[tuple[str, str], Array] = {("logits", "prompt"): np.array([0])}
    if generated:
        found["logits", "generated"] = np.arange(1, generated + 1)
    for output in ("key", "value"):
        for tokens, rows in (("image", image), ("text", np.concatenate([text, behind]))):
            if len(rows):
                found[output, tokens] = rows
    return found
