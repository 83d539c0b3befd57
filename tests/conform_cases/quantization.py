"""Cases of the rules Q-* (QuantizeLinear, DequantizeLinear) and W-* (quantized weights)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from conform_cases.build import Case, case, f16, f32, full, graph, half, i8, int4, ramp
from onnx import ModelProto

X = "float16[4,256] x"
Y = "float16[4,64] y"
TRIP = "q = QuantizeLinear {0}(x, {1}) d = DequantizeLinear (q, {1}) y = MatMul (d, v) "
WEIGHT = "v = DequantizeLinear <axis=1> (w, c) "
S, Z = f16(0.02), i8(0)
I8, C = ramp(np.int8, 256, 64), half(64)


def trip(arguments: str = "s, z", attributes: str = "", **constants: object) -> ModelProto:
    """An INT8 product; ``arguments`` of both Q and DQ, ``constants`` in place of s, z, w, c."""
    given = {"s": S, "z": Z, "w": I8, "c": C, **constants}
    used = {
        k: v for k, v in given.items() if k in (*arguments.replace(" ", "").split(","), "w", "c")
    }
    return graph(X, Y, WEIGHT + TRIP.format(attributes, arguments), **used)  # type: ignore[arg-type]


def weight(nodes: str, **constants: object) -> ModelProto:
    """``nodes`` make v [256, 64] out of the constants; y = x v."""
    return graph(X, Y, nodes + " y = MatMul (x, v)", **constants)  # type: ignore[arg-type]


def blocks(k: int = 256, n: int = 64, scales: int = 2, attributes: str = "axis=0") -> ModelProto:
    """y [4, n] = x [4, k] times an INT4 weight of ``scales`` blocks."""
    return graph(
        f"float16[4,{k}] x",
        f"float16[4,{n}] y",
        f"v = DequantizeLinear <{attributes}> (w, c) y = MatMul (x, v)",
        w=int4(k, n),
        c=half(scales, n),
    )


GOOD = trip()
GOOD_INT4 = blocks()
DQ4 = "v = DequantizeLinear <axis=0> (w, c)"
W4 = {"w": int4(256, 64), "c": half(2, 64)}
CONV = "float16[1,64,8,8] x", "float16[1,16,H,W] y"

CASES: tuple[Case, ...] = (
    case("Q-01", trip(z=i8(3)), GOOD),
    case("Q-02", trip(z=full(np.uint8, value=0)), GOOD),
    case(
        "Q-03",
        graph(
            X,
            Y,
            WEIGHT + "m = ReduceMax <keepdims=0> (x) s = Div (m, h) " + TRIP.format("", "s, z"),
            w=I8,
            c=C,
            z=Z,
            h=f16(127.0),
        ),
        GOOD,
        "10.3",
    ),
    case("Q-04", trip(c=half(64, value=0.0)), GOOD),
    case(
        "Q-05",
        graph(
            X,
            Y,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
            "f = Cast <to=10> (d) " + WEIGHT + "y = MatMul (f, v)",
            s=f32(0.02),
            z=Z,
            w=I8,
            c=C,
        ),
        GOOD,
        "10.3",
    ),
    case(
        "Q-06",
        graph(
            X,
            Y,
            "v = DequantizeLinear <axis=1, output_dtype=10> (w, c) y = MatMul (x, v)",
            opset=23,
            w=I8,
            c=full(np.float32, 64),
        ),
        weight("v = DequantizeLinear <axis=1> (w, c)", w=I8, c=C),
    ),
    case("Q-07", weight("v = DequantizeLinear (w, c)", w=I8, c=C), GOOD, "10.3"),
    case("Q-08", trip(c=half(32)), GOOD),
    case(
        "Q-09",
        graph(
            X,
            Y,
            "q = QuantizeLinear <axis=1> (x, s, z) d = DequantizeLinear <axis=1> (q, s, z) "
            + WEIGHT
            + "y = MatMul (d, v)",
            s=half(256, value=0.02),
            z=full(np.int8, 256, value=0),
            w=I8,
            c=C,
        ),
        GOOD,
    ),
    case(
        "Q-10",
        graph(
            X,
            "float16[4,256] y",
            "b = DequantizeLinear <axis=0> (w, c) y = Add (x, b)",
            w=full(np.int32, 256),
            c=half(256),
        ),
        graph(X, "float16[4,256] y", "y = Add (x, b)", b=half(256)),
    ),
    case("Q-11", trip(attributes="<saturate=1> "), GOOD),
    case("Q-12", blocks(200, 64, 3, "axis=0, block_size=128"), GOOD_INT4),
    case(
        "Q-13",
        graph(
            X,
            Y,
            WEIGHT + "m = ReduceMax <keepdims=0> (x) s = Div (m, h) " + TRIP.format("", "s, z"),
            w=I8,
            c=C,
            z=Z,
            h=f16(127.0),
        ),
        GOOD,
    ),
    case("Q-14", trip(c=half(64, value=3e-6)), GOOD),
    case(
        "Q-15",
        graph(
            X,
            "double[4,256] y",
            "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, t, z)",
            s=S,
            z=Z,
            t=full(np.float64, value=0.02),
        ),
        GOOD,
    ),
    case("Q-16", trip(z=full(np.int8, 4, value=0)), GOOD),
    case("Q-17", blocks(256, 64, 2, "axis=1, block_size=128"), GOOD_INT4),
    case(
        "W-01",
        graph(
            "float16[4,256] x",
            "float16[4,63] y",
            DQ4 + " y = MatMul (x, v)",
            w=int4(256, 63),
            c=half(2, 63),
        ),
        GOOD_INT4,
    ),
    case(
        "W-02",
        graph(X + ", float16[256,64] r", Y, DQ4 + " u = Add (v, r) y = MatMul (x, u)", **W4),
        GOOD_INT4,
    ),
    case(
        "W-03",
        graph(
            "float16[4,256] x",
            "float16[4,256] y",
            "v = DequantizeLinear <axis=1> (w, c) y = MatMul (x, v)",
            w=int4(256, 256),
            c=half(256, 2),
        ),
        GOOD_INT4,
    ),
    case("W-04", blocks(256, 64, 16), GOOD_INT4),
    case("W-05", blocks(256, 64, 1), GOOD_INT4),
    case(
        "W-06",
        graph(
            "float[4,256] x",
            "float[4,64] y",
            DQ4 + " y = MatMul (x, v)",
            w=int4(256, 64),
            c=full(np.float32, 2, 64, value=0.01),
        ),
        GOOD_INT4,
    ),
    case(
        "W-07",
        graph(
            *CONV,
            "v = DequantizeLinear <axis=0> (w, c) y = Conv (x, v)",
            w=int4(16, 64, 3, 2),
            c=half(16),
        ),
        graph(
            *CONV,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
            "v = DequantizeLinear <axis=0> (w, c) y = Conv (d, v)",
            w=ramp(np.int8, 16, 64, 1, 1),
            c=half(16),
            s=S,
            z=Z,
        ),
    ),
    case(
        "W-09",
        graph(
            X,
            "float16[4,256] y",
            "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)",
            s=S,
            z=full(ml_dtypes.int4, value=0),
        ),
        GOOD,
    ),
    case(
        "W-10",
        graph(
            X,
            Y,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
            + DQ4
            + " y = MatMul (d, v)",
            s=S,
            z=Z,
            **W4,
        ),
        GOOD,
    ),
    case(
        "W-11",
        weight("v = DequantizeLinear <axis=0> (w, c)", w=I8, c=half(2, 64)),
        GOOD_INT4,
        "10.3",
    ),
    case(
        "W-12",
        graph(
            X,
            Y,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
            "v = DequantizeLinear <axis=0> (w, c) y = MatMul (d, v)",
            s=S,
            z=Z,
            w=I8,
            c=half(2, 64),
        ),
        GOOD,
    ),
    case(
        "W-13",
        graph(
            X,
            Y,
            "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
            "v = DequantizeLinear <axis=0> (w, c) y = MatMul (d, v)",
            s=S,
            z=Z,
            w=I8,
            c=half(256),
        ),
        GOOD,
    ),
    case("W-14", blocks(256, 8), GOOD_INT4),
)
