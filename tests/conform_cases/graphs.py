"""Cases of the rules P-* (placement), G-* (graph), X-* (file) and R-* (ONNX Runtime)."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from conform_cases.build import Case, case, f16, full, graph, half, i8, i64, int4, ramp
from onnx import ModelProto

X = "float16[4,256] x"
Y = "float16[4,64] y"
Q = "q = QuantizeLinear ({0}, s, z) d = DequantizeLinear (q, s, z) "
V = "v = DequantizeLinear <axis=1> (w, c) "
S, Z = f16(0.02), i8(0)
I8, C = ramp(np.int8, 256, 64), half(64)
INT8 = {"s": S, "z": Z, "w": I8, "c": C}
PRODUCT = Q.format("x") + V + "y = MatMul (d, v) "
GOOD = graph(X, Y, PRODUCT, **INT8)
# One power-of-two scale per weight and the rest behind the product.
SPLIT = graph(
    X,
    Y,
    Q.format("x") + "v = DequantizeLinear (w, c) p = MatMul (d, v) y = Mul (p, r)",
    **{**INT8, "c": f16(2.0**-12), "r": half(64)},
)


def attention(rows: int = 64, quantized: str = "") -> ModelProto:
    """Primitive attention of one head; the letters of ``quantized`` (q, t for K, b, v) get a Q/DQ pair."""
    pair = "i{0} = QuantizeLinear ({0}, s, z) d{0} = DequantizeLinear (i{0}, s, z) "
    pairs = {n: pair.format(n) if n in quantized else "" for n in "qtbv"}
    q, t, b, v = (f"d{n}" if n in quantized else n for n in "qtbv")
    text = (
        f"t = Transpose <perm=[0,1,3,2]> (k) {pairs['q']}{pairs['t']}{pairs['v']} a = MatMul ({q}, {t}) "
        f"b = Softmax <axis=-1> (a) {pairs['b']} y = MatMul ({b}, {v})"
    )
    shape = f"float16[1,1,{rows},64]"
    constants = {"s": S, "z": Z} if quantized else {}
    return graph(f"{shape} q, {shape} k, {shape} v", f"{shape} y", text, **constants)


PLAIN_ATTENTION = attention()
GQA_IN = "float16[1,8,16,64] q, float16[1,2,16,64] k, float16[1,2,16,64] v"
GQA_TAIL = (
    " t = Transpose <perm=[0,1,3,2]> (kk) a = MatMul (q, t) b = Softmax <axis=-1> (a) "
    "y = MatMul (b, vv)"
)
EXPAND = (
    "k1 = Unsqueeze (k, two) k2 = Expand (k1, rep) kk = Reshape (k2, heads) "
    "v1 = Unsqueeze (v, two) v2 = Expand (v1, rep) vv = Reshape (v2, heads)"
)
BY_MAP = "kk = Gather <axis=1> (k, map) vv = Gather <axis=1> (v, map)"
BY_EXPAND = graph(
    GQA_IN,
    "float16[1,8,16,64] y",
    EXPAND + GQA_TAIL,
    two=i64(2),
    rep=i64(1, 1, 4, 1, 1),
    heads=i64(0, 8, -1, 64),
)
# Context [1, heads, 16, 64] to an INT4 projection, in two or three dimensions.
PROJECT_IN = "float16[1,4,16,64] q, float16[1,4,64,16] t, float16[1,4,16,64] v"
PROJECT = (
    "a = MatMul (q, t) b = Softmax <axis=-1> (a) o = MatMul (b, v) "
    "p = Transpose <perm=[0,2,1,3]> (o) r = Reshape (p, flat) u = DequantizeLinear <axis=0> (w, c) "
)
PROJECT_CONSTANTS = {"w": int4(256, 256), "c": half(2, 256)}
ROPE_IN = ", ".join(f"float16[1,4,1,32] {n}" for n in "abde") + ", int64[1,4] ids"
ROPE_OUT = ", ".join(f"float16[1,4,1,32] {n}" for n in "fghi")
ROPE_MULS = " f = Mul (a, c) g = Mul (b, c) h = Mul (d, c) i = Mul (e, c)"
MOE = (
    "float16[1,2,4,16,64] q, float16[1,2,1,64,16] k, float16[1,2,1,16,64] v, float16[1,1,1,16,16] m"
)
DECODER = "float16[1,16,256] x"
HEAD = {"g": half(256), "b": half(256), "w": ramp(np.float16, 256, 64), "i": i64(15)}


def external(edit: str, folder: Path) -> Path:
    """A model whose weights lie in weights.bin; ``edit`` damages the file or its entry."""
    path = folder / "model.onnx"
    model = graph(X, Y, "y = MatMul (x, w)", w=ramp(np.float16, 256, 64))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(path, load_external_data=False)
    if edit == "outside":
        entries = stored.graph.initializer[0].external_data
        next(e for e in entries if e.key == "location").value = "../weights.bin"
        (folder.parent / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
        onnx.save(stored, path)
    if edit == "cut":
        data = (folder / "weights.bin").read_bytes()
        (folder / "weights.bin").write_bytes(data[:-2])
    return path


def huge(folder: Path) -> Path:
    """A valid model in a sparse file above 2 GiB: protobuf ends at what it declares."""
    path = folder / "huge.onnx"
    onnx.save(GOOD, path)
    with path.open("r+b") as file:
        file.truncate(1 << 31)
    return path


CASES: tuple[Case, ...] = (
    case(
        "P-01",
        graph(
            X,
            Y,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) f = Cast <to=1> (d) "
            + V
            + "u = Cast <to=1> (v) p = MatMul (f, u) y = Cast <to=10> (p)",
            **INT8,
        ),
        GOOD,
    ),
    case(
        "P-02",
        graph(X, Y, Q.format("x") + V + "m = Mul (d, r) y = MatMul (m, v)", r=half(256), **INT8),
        GOOD,
    ),
    case(
        "P-03",
        graph(X, Y + ", float16[4,256] e", PRODUCT + "e = Add (d, r)", r=half(256), **INT8),
        graph(X, Y + ", float16[4,256] e", PRODUCT + "e = Add (x, r)", r=half(256), **INT8),
    ),
    case(
        "P-04",
        graph(X, "float16[4,256] y", Q.format("x") + "y = Add (d, r)", r=half(256), s=S, z=Z),
        GOOD,
    ),
    case(
        "P-05",
        graph(
            X,
            Y + ", float16[4,64] o",
            PRODUCT + "i = QuantizeLinear (x, s2, z) "
            "j = DequantizeLinear (i, s2, z) o = MatMul (j, v)",
            s2=f16(0.03),
            **INT8,
        ),
        graph(X, Y + ", float16[4,64] o", PRODUCT + "o = MatMul (d, v)", **INT8),
    ),
    case("P-06", graph(X, Y, V + "y = MatMul (x, v)", w=I8, c=C), GOOD),
    case("P-07", attention(1024, "qtbv"), attention(64, "qtbv")),
    case(
        "P-08",
        graph(X, Y, V + "y = MatMul (x, v)", w=full(ml_dtypes.float8_e4m3fn, 256, 64), c=C),
        GOOD,
    ),
    case("P-09", graph(X, Y, PRODUCT, **{**INT8, "c": half(64, value=1e-3)}), GOOD),
    case("P-10", GOOD, SPLIT),
    case("P-11", attention(64, "qt"), attention(64, "qtbv")),
    case(
        "P-12",
        graph(
            "float16[1,1,64,64] q, float16[1,1,64,64] k, float16[1,1,64,64] v",
            "float16[1,1,64,64] y",
            "t = Transpose <perm=[0,1,3,2]> (k) e = MatMul (q, t) h = QuantizeLinear (e, s, z) "
            "a = DequantizeLinear (h, s, z) b = Softmax <axis=-1> (a) y = MatMul (b, v)",
            s=S,
            z=Z,
        ),
        PLAIN_ATTENTION,
    ),
    case(
        "P-13",
        graph(
            X,
            Y,
            Q.format("x")
            + "i = QuantizeLinear (d, s, z) j = DequantizeLinear (i, s, z) "
            + V
            + "y = MatMul (j, v)",
            **INT8,
        ),
        GOOD,
    ),
    case(
        "P-14",
        graph(X, Y + ", float16[4,256] d", PRODUCT, **INT8),
        GOOD,
    ),
    case(
        "R-01",
        graph(X, Y + ", float16[4,64] o", PRODUCT + "o = MatMul (d, v)", **INT8),
        GOOD,
        "ort",
    ),
    case(
        "R-02",
        graph(
            "float[1,8,1,64] q, float[1,8,128,64] past, float[1,8,1,64] new, int64[1] at",
            "float[1,8,1,64] y, float[1,8,128,64] k",
            "k = TensorScatter <axis=-2> (past, new, at) y = Attention (q, k, k)",
            opset=24,
        ),
        graph(
            "float[1,8,1,64] q, float[1,8,128,64] past, float[1,8,1,64] new, int64[1] at, int64[1] n",
            "float[1,8,1,64] y, float[1,8,128,64] k",
            "k = TensorScatter <axis=-2> (past, new, at) u = Slice (k, o, n, a) y = Attention (q, u, u)",
            opset=24,
            o=i64(0),
            a=i64(2),
        ),
        "ort",
    ),
    case(
        "R-03",
        graph(
            X,
            Y,
            "v = trt.TRT_INT4DequantizeLinear <axis=0> (w, c) y = MatMul (x, v)",
            w=int4(256, 64),
            c=half(2, 64),
        ),
        graph(
            X,
            Y,
            "v = DequantizeLinear <axis=0> (w, c) y = MatMul (x, v)",
            w=int4(256, 64),
            c=half(2, 64),
        ),
        "ort",
    ),
    case("X-01", huge, GOOD),
    case("X-02", lambda folder: external("outside", folder), lambda folder: external("", folder)),
    case("X-03", lambda folder: external("cut", folder), lambda folder: external("", folder)),
    case(
        "X-04",
        graph(X, "float16[4,256] y", "y = Softmax <axes=-1> (x)"),
        graph(X, "float16[4,256] y", "y = Softmax <axis=-1> (x)"),
    ),
    case(
        "G-01",
        graph("float16[1,?,64] x", "float16[1,?,64] y", "y = Mul (x, x)"),
        graph("float16[1,S,64] x", "float16[1,S,64] y", "y = Mul (x, x)"),
    ),
    case(
        "G-02",
        graph(
            "float16[1,S,256] x",
            "float16[1,S,4,64] y",
            "h = Shape (x) n = Gather <axis=0> (h, one) m = Unsqueeze (n, zero) "
            "e = Concat <axis=0> (keep, m, tail) y = Reshape (x, e)",
            one=full(np.int64, value=1),
            zero=i64(0),
            keep=i64(1),
            tail=i64(4, 64),
        ),
        graph(
            "float16[1,S,256] x", "float16[1,S,4,64] y", "y = Reshape (x, e)", e=i64(0, 0, 4, 64)
        ),
    ),
    case(
        "G-03",
        graph("float16[N,3,32] x", "float16[N,3,32] y", "y = Mul (x, x)"),
        graph("float16[1,3,32] x", "float16[1,3,32] y", "y = Mul (x, x)"),
    ),
    case(
        "G-04",
        graph(X, "float16[4,1] y", "p = Mul (x, x) y = ReduceMean (p, a)", a=i64(-1)),
        graph(
            X, "float[4,1] y", "f = Cast <to=1> (x) p = Mul (f, f) y = ReduceMean (p, a)", a=i64(-1)
        ),
    ),
    case(
        "G-05",
        graph(
            PROJECT_IN,
            "float16[1,16,256] y",
            PROJECT + "y = MatMul (r, u)",
            flat=i64(0, 0, 256),
            **PROJECT_CONSTANTS,
        ),
        graph(
            PROJECT_IN,
            "float16[1,16,256] y",
            PROJECT + "e = MatMul (r, u) y = Reshape (e, back)",
            flat=i64(-1, 256),
            back=i64(1, -1, 256),
            **PROJECT_CONSTANTS,
        ),
    ),
    case(
        "G-06",
        graph(GQA_IN, "float16[1,8,16,64] y", BY_MAP + GQA_TAIL, map=i64(0, 0, 0, 0, 1, 1, 1, 1)),
        BY_EXPAND,
    ),
    case(
        "G-07",
        graph(
            MOE,
            "float16[1,2,4,16,64] y",
            "a = MatMul (q, k) e = Add (a, m) b = Softmax <axis=-1> (e) y = MatMul (b, v)",
        ),
        BY_EXPAND,
    ),
    case(
        "G-08",
        graph(
            ROPE_IN,
            ROPE_OUT,
            "r = Gather <axis=0> (table, ids) c = Unsqueeze (r, two)" + ROPE_MULS,
            table=ramp(np.float16, 128, 32),
            two=i64(2),
        ),
        graph(
            ROPE_IN,
            ROPE_OUT,
            "j = Unsqueeze (ids, two) c = Gather <axis=0> (table, j)" + ROPE_MULS,
            table=ramp(np.float16, 128, 32),
            two=i64(2),
        ),
    ),
    case(
        "G-09",
        graph(
            "float16[1,1,64,64] q, float16[1,1,64,64] t, float16[1,1,64,64] v",
            "float16[1,1,64,64] y",
            "e = MatMul (q, t) a = Div (e, h) b = Softmax <axis=-1> (a) y = MatMul (b, v)",
            h=f16(8.0),
        ),
        PLAIN_ATTENTION,
    ),
    case(
        "G-10",
        graph(X, "float[4,256] y", "m = Mul (x, x) y = Cast <to=1> (m)"),
        graph(X, "float16[4,256] y", "y = Mul (x, x)"),
    ),
    case(
        "G-11",
        graph(
            DECODER,
            "float16[1,1,64] y",
            "n = LayerNormalization <axis=-1> (x, g, b) l = Gather <axis=1> (n, i) y = MatMul (l, w)",
            **HEAD,
        ),
        graph(
            DECODER,
            "float16[1,1,64] y",
            "l = Gather <axis=1> (x, i) n = LayerNormalization <axis=-1> (l, g, b) y = MatMul (n, w)",
            **HEAD,
        ),
    ),
)
