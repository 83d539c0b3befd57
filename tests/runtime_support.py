"""What the runtime's tests share: a fake engine, toy ONNX graphs that keep the folder contract, and
a writer of whole toy folders. The toy decoder has one attention layer and learnt positions; its
answers are computed in NumPy beside it (``reference_logits``), so tests compare with arithmetic and
not with stored numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from qvlm_runtime.backend import TensorInfo
from qvlm_runtime.image_spec import ImageSpec, PixelSpec, WholeImage
from qvlm_runtime.manifest import Manifest, ModelSpec, TargetSpec, digest
from qvlm_runtime.positions import AXES

# Bytes are tokens 4..259; a prompt therefore has one token per UTF-8 byte.
PAD, BOS, EOS, IMAGE = range(4)
FIRST_BYTE = 4
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
IMAGE_SIDE = 6
IMAGE_ROWS = 3
FAN = 3 * IMAGE_SIDE * IMAGE_SIDE // IMAGE_ROWS
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)

# TensorScatter is of opset 24; ONNX Runtime reads it from 1.24, the last for Python 3.10 is 1.23.
SCATTERS = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24)
FORMS = ["grown", "scatter", "append"] if SCATTERS else ["append"]
PLAN_FORMS = [form for form in FORMS if form != "grown"]  # of engines


def model_spec(**changes: Any) -> ModelSpec:
    """The toy model: hidden 12, two heads of 6, 260 tokens, 3 tokens per image, context 64."""
    spec = ModelSpec(
        family="toy",
        hidden_size=12,
        vocab_size=260,
        layers=1,
        kv_heads=2,
        head_dim=6,
        max_context=64,
        eos_token_ids=(EOS,),
        image_token="<image>",
        image_token_id=IMAGE,
        feature_size=12,
        template_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )
    return dataclasses.replace(spec, **changes)


def target_spec(cache: str, dtype: str = "float32", folder: str = "ort") -> TargetSpec:
    graphs = {name: f"{folder}/{name}.onnx" for name in ("vision", "decoder")}
    opset = {"scatter": 24, "grown": 24, "append": 21}[cache]
    return TargetSpec(dtype=dtype, opset=opset, cache=cache, graphs=graphs)  # type: ignore[arg-type]


def byte_ids(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def write_byte_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {name: i for i, name in enumerate(SPECIALS)}
    vocab |= {letters[byte]: FIRST_BYTE + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    tokenizer.save(str(path))


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


# --- a fake engine -------------------------------------------------------------------------------


class FakeBuffer:
    def __init__(self, elements: int, dtype: str) -> None:
        self.array = np.zeros(elements, dtype)
        self.nbytes = self.array.nbytes

    def read(self, start: int, shape: Sequence[int]) -> np.ndarray:
        return self.array[start : start + int(np.prod(shape))].reshape(shape).copy()


class FakeBinding:
    """Answers a sequence with its session's tokens, one per run, whatever it is fed."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.answer = iter(session.answer)
        self.hosts: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}

    def host(self, name: str, array: np.ndarray) -> None:
        self.hosts[name] = array

    def fetch(self, name: str, array: np.ndarray) -> None:
        self.outputs[name] = array

    def place(self, name: str, buffer: FakeBuffer, start: int, shape: Sequence[int]) -> None:
        assert start + int(np.prod(shape)) <= buffer.array.size
        if name == "image_features":  # what a sequence is fed; the rest is its cache
            self.hosts[name] = buffer.read(start, shape)

    def run(self) -> None:
        self.session.runs.append({name: array.copy() for name, array in self.hosts.items()})
        self.outputs["logits"][:] = 0
        self.outputs["logits"][0, 0, next(self.answer, EOS)] = 1


class FakeSession:
    """A decoder that says ``answer``, then end tokens; ``runs`` is what it was fed."""

    def __init__(self, answer: Sequence[int], model: ModelSpec) -> None:
        self.answer = tuple(answer)
        self.runs: list[dict[str, np.ndarray]] = []
        pairs = [(k, i) for i in range(model.layers) for k in ("key", "value")]
        cache = (1, model.kv_heads, None, model.head_dim)
        names = ["input_ids", "image_index", "position_ids", "image_features"]
        names += ["write_index", "kv_len"]
        self.inputs = {name: TensorInfo("int64", (1, None)) for name in names}
        self.inputs |= {f"past_{k}_{i}": TensorInfo("float32", cache) for k, i in pairs}
        self.outputs = {f"present_{k}_{i}": TensorInfo("float32", cache) for k, i in pairs}
        self.outputs["logits"] = TensorInfo("float32", (1, 1, model.vocab_size))
        self.closed = False

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("a decoder runs through a binding")

    def buffer(self, elements: int, dtype: str) -> FakeBuffer:
        return FakeBuffer(elements, dtype)

    def upload(self, array: np.ndarray) -> FakeBuffer:
        buffer = FakeBuffer(array.size, array.dtype.name)
        buffer.array[:] = array.reshape(-1)
        return buffer

    def join(self, buffers: Sequence[FakeBuffer]) -> FakeBuffer:
        return self.upload(np.concatenate([buffer.array for buffer in buffers]))

    def in_place(self, output: str, source: str) -> bool:
        return True

    def binding(self) -> FakeBinding:
        return FakeBinding(self)

    def close(self) -> None:
        self.closed = True


# --- toy graphs ----------------------------------------------------------------------------------


def toy_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    hidden, width = spec.hidden_size, spec.kv_heads * spec.head_dim

    def matrix(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "embedding": generator.standard_normal((spec.vocab_size, hidden)).astype(np.float32),
        "positions": generator.standard_normal((spec.max_context, hidden)).astype(np.float32),
        "wq": matrix(hidden, width),
        "wk": matrix(hidden, width),
        "wv": matrix(hidden, width),
        "wo": matrix(width, hidden),
        "head": 3 * matrix(hidden, spec.vocab_size),
    }


_DECODER = """
<ir_version: 10, opset_import: ["" : OPSET]>
decoder (int64[1, S] input_ids, int64[1, S] image_index, int64[AXES, S] position_ids,
         F[M, FEATURE] image_features, CACHE_INPUTS)
    => (F[1, 1, VOCAB] logits, CACHE_OUTPUTS) {
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    words = Gather (embedding, input_ids)
    row = Max (image_index, zero)
    pictures = Gather (image_features, row)
    is_text = Less (image_index, zero)
    is_text_3d = Unsqueeze (is_text, last)
    merged = Where (is_text_3d, words, pictures)
    places = Gather (positions, position_ids)
    where_am_i = ReduceSum <keepdims = 1> (places, zero)
    x = Add (merged, where_am_i)
    heads_shape = Constant <value = int64[4] {0, 0, KV, DIM}> ()
    q2 = MatMul (x, wq)
    q3 = Reshape (q2, heads_shape)
    q = Transpose <perm = [0, 2, 1, 3]> (q3)
    k2 = MatMul (x, wk)
    k_rows = Reshape (k2, heads_shape)
    v2 = MatMul (x, wv)
    v_rows = Reshape (v2, heads_shape)
    CACHE_BODY
    kt = Transpose <perm = [0, 1, 3, 2]> (keys)
    scores = MatMul (q, kt)
    scaled = Mul (scores, scale)
    key_shape = Shape (keys)
    key_count = Gather (key_shape, two)
    key_count_scalar = Squeeze (key_count)
    zero_scalar = Squeeze (zero)
    one_scalar = Squeeze (one)
    key_positions = Range (zero_scalar, key_count_scalar, one_scalar)
    new_count = Shape <start = 1, end = 2> (input_ids)
    slots_end = Add (first_slot, new_count)
    first_slot_scalar = Squeeze (first_slot)
    slots_end_scalar = Squeeze (slots_end)
    slots = Range (first_slot_scalar, slots_end_scalar, one_scalar)
    query_positions = Unsqueeze (slots, last)
    hidden_key = Greater (key_positions, query_positions)
    masked = Where (hidden_key, minus, scaled)
    weights = Softmax <axis = -1> (masked)
    mixed = MatMul (weights, values)
    mixed_rows = Transpose <perm = [0, 2, 1, 3]> (mixed)
    flat_shape = Constant <value = int64[3] {0, 0, -1}> ()
    flat = Reshape (mixed_rows, flat_shape)
    projected = MatMul (flat, wo)
    y = Add (x, projected)
    y_last = Gather <axis = 1> (y, last)
    logits = MatMul (y_last, head)
}
"""

_SCATTER = """
    first_slot = Identity (write_index)
    k_new = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_new = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    present_key_0 = TensorScatter <axis = -2> (past_key_0, k_new, write_index)
    present_value_0 = TensorScatter <axis = -2> (past_value_0, v_new, write_index)
    keys = Slice (present_key_0, zero, kv_len, two)
    values = Slice (present_value_0, zero, kv_len, two)
"""
_GROWN = """
    first_slot = Identity (write_index)
    k_new = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_new = Transpose <perm = [0, 2, 3, 1]> (v_rows)
    present_key_0 = TensorScatter <axis = -2> (past_key_0, k_new, write_index)
    present_value_0 = TensorScatter <axis = -1> (past_value_0, v_new, write_index)
    keys = Identity (present_key_0)
    values = Transpose <perm = [0, 1, 3, 2]> (present_value_0)
"""
_APPEND = """
    first_slot = Shape <start = 1, end = 2> (past_key_0)
    present_key_0 = Identity (k_rows)
    present_value_0 = Identity (v_rows)
    all_keys = Concat <axis = 1> (past_key_0, k_rows)
    all_values = Concat <axis = 1> (past_value_0, v_rows)
    keys = Transpose <perm = [0, 2, 1, 3]> (all_keys)
    values = Transpose <perm = [0, 2, 1, 3]> (all_values)
"""
_VISION = """
<ir_version: 10, opset_import: ["" : OPSET]>
vision (F[N, 3, SIDE, SIDE] pixel_values) => (F[R, HIDDEN] image_features) {
    rows_shape = Constant <value = int64[2] {-1, FAN}> ()
    rows = Reshape (pixel_values, rows_shape)
    image_features = MatMul (rows, wv)
}
"""


def toy_decoder(spec: ModelSpec, target: TargetSpec, seed: int = 0) -> onnx.ModelProto:
    key, value, new, body = {
        "scatter": ("1, KV, C, DIM", "1, KV, C, DIM", None, _SCATTER),
        "grown": ("1, KV, C, DIM", "1, KV, DIM, C", None, _GROWN),
        "append": ("1, P, KV, DIM", "1, P, KV, DIM", "1, S, KV, DIM", _APPEND),
    }[target.cache]
    inputs = [f"F[{key}] past_key_0", f"F[{value}] past_value_0"]
    inputs += ["int64[1] write_index", "int64[1] kv_len"] if new is None else []
    text = _DECODER.replace("CACHE_INPUTS", ", ".join(inputs))
    outputs = f"F[{new or key}] present_key_0, F[{new or value}] present_value_0"
    text = text.replace("CACHE_OUTPUTS", outputs)
    text = text.replace("CACHE_BODY", body)
    weights = toy_weights(spec, seed)
    weights |= {
        "scale": np.array(spec.head_dim**-0.5, np.float32),
        "minus": np.array(-1e4, np.float32),  # finite in float16
    }
    return _parse(text, spec, target, weights)


def toy_vision_weights(spec: ModelSpec) -> np.ndarray:
    generator = np.random.default_rng(7)
    return generator.standard_normal((FAN, spec.hidden_size)).astype(np.float32)


def toy_vision(spec: ModelSpec, target: TargetSpec) -> onnx.ModelProto:
    return _parse(_VISION, spec, target, {"wv": toy_vision_weights(spec)})


def _parse(
    text: str, spec: ModelSpec, target: TargetSpec, weights: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    values = {
        "HIDDEN": spec.hidden_size,
        "FEATURE": spec.feature_size,
        "AXES": AXES[spec.positions],
        "VOCAB": spec.vocab_size,
        "KV": spec.kv_heads,
        "DIM": spec.head_dim,
        "SIDE": IMAGE_SIDE,
        "FAN": FAN,
        "OPSET": target.opset,
        "F[": "float[" if target.dtype == "float32" else "float16[",
    }
    for name, value in values.items():
        text = text.replace(name, str(value))
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        tensor = numpy_helper.from_array(array.astype(target.dtype), name)
        model.graph.initializer.append(tensor)
    onnx.checker.check_model(model)
    return model


def reference_logits(
    spec: ModelSpec,
    ids: Sequence[int],
    index: Sequence[int],
    features: np.ndarray | None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """float64 logits of the last token, by recomputing the whole sequence; positions [axes, S]."""
    w = {name: array.astype(np.float64) for name, array in toy_weights(spec).items()}
    x = w["embedding"][list(ids)].copy()
    for position, row in enumerate(index):
        if row >= 0:
            assert features is not None
            x[position] = features[row]
    rows = np.arange(len(ids))[None] if positions is None else positions
    x += w["positions"][rows].sum(axis=0)
    heads = (len(ids), spec.kv_heads, spec.head_dim)
    q, k, v = ((x @ w[name]).reshape(heads) for name in ("wq", "wk", "wv"))
    mixed = np.zeros((spec.kv_heads, spec.head_dim))
    for head in range(spec.kv_heads):
        scores = k[:, head] @ q[-1, head] / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max())
        mixed[head] = weights @ v[:, head] / weights.sum()
    return (x[-1] + mixed.reshape(-1) @ w["wo"]) @ w["head"]


def image_spec() -> WholeImage:
    half = (0.5, 0.5, 0.5)
    pixels = PixelSpec(3, 1 / 255, half, half)
    return WholeImage(pixels, IMAGE_ROWS, ("exact", IMAGE_SIDE, IMAGE_SIDE), None)


def write_folder(folder: Path, image: ImageSpec | None = None, **changes: Any) -> Manifest:
    """A whole model folder: "ort" in the first form this machine runs, "rtx" in the append form;
    with ``image``, tiles of IMAGE_SIDE.
    """
    spec = model_spec(**changes)
    targets = {"ort": target_spec(FORMS[0]), "rtx": target_spec("append", folder="rtx")}
    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    names = ["tokenizer.json", "chat_template.jinja"]
    for target in targets.values():
        for graph, path in target.graphs.items():
            model = toy_vision(spec, target) if graph == "vision" else toy_decoder(spec, target)
            (folder / path).parent.mkdir(exist_ok=True)
            data = path.rsplit("/", 1)[1] + ".data"
            onnx.save(
                model, folder / path, save_as_external_data=True, location=data, size_threshold=0
            )
            names += [path, path + ".data"]
    files = {name: digest(folder / name) for name in names}
    manifest = Manifest("0.0.1", spec, image or image_spec(), targets, files, {"method": "float"})
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest
