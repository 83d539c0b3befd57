"""Cases of the rules T-* (types) and O-* (operators)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from conform_cases.build import Case, case, f16, f32, full, graph, half, i64, int4, ramp
from onnx import numpy_helper

X = "float16[4,64] x"
Y = "float16[4,64] y"
ADD = "y = Add (x, w)"
GOOD_ADD = graph(X, Y, ADD, w=half(64))
GATHER_DQ = "t = DequantizeLinear <axis=0> (table, s) y = Gather <axis=0> (t, ids)"
RESIZE = 'y = Resize <mode="linear", antialias={0}> (x, , , sizes)'
IMAGE, SMALL = "float16[1,3,32,32] x", "float16[1,3,16,16] y"
SIZES = i64(1, 3, 16, 16)
NORM = "y = LayerNormalization <axis=-1> (x, w, b)"

CASES: tuple[Case, ...] = (
    case(
        "T-01",
        graph(X, Y, "i = Cast <to=10> (w) y = Add (x, i)", w=full(np.uint16, 64)),
        graph(X, Y, "i = Cast <to=10> (w) y = Add (x, i)", w=full(np.int32, 64)),
    ),
    case(
        "T-02",
        graph(
            "int64[1,4] ids",
            "float16[1,4,64] y",
            "r = Gather <axis=0> (table, ids) y = DequantizeLinear (r, s)",
            table=ramp(np.int8, 32, 64),
            s=f16(0.02),
        ),
        graph(
            "int64[1,4] ids",
            "float16[1,4,64] y",
            GATHER_DQ,
            table=ramp(np.int8, 32, 64),
            s=half(32),
        ),
    ),
    case("T-03", graph(X, Y, ADD, w=full(np.float32, 64)), GOOD_ADD),
    case(
        "T-04",
        graph(X, Y, NORM, w=full(np.float32, 64), b=full(np.float32, 64)),
        graph(X, Y, NORM, w=half(64), b=half(64)),
    ),
    case(
        "T-05",
        graph(X, "float16[2,2,2,2,2,2,2,2,1] y", "y = Reshape (x, s)", s=i64(*[2] * 8, 1)),
        graph(X, "float16[2,2,2,2,2,2,2,2] y", "y = Reshape (x, s)", s=i64(*[2] * 8)),
    ),
    case(
        "T-06",
        graph("double[4,64] x", "double[4,64] y", "y = Mul (x, x)"),
        graph("float[4,64] x", "float[4,64] y", "y = Mul (x, x)"),
    ),
    case(
        "T-07",
        graph(
            "",
            "float16[N] y",
            "y = Range (a, b, c)",
            a=f16(0.0),
            b=f16(8.0),
            c=f16(1.0),
        ),
        graph("", "float[N] y", "y = Range (a, b, c)", a=f32(0.0), b=f32(8.0), c=f32(1.0)),
    ),
    case(
        "T-08",
        graph(
            "uint8[4,64] x",
            "float16[64,4] y",
            "t = Transpose <perm=[1,0]> (x) y = Cast <to=10> (t)",
        ),
        graph(
            "uint8[4,64] x",
            "float16[64,4] y",
            "t = Cast <to=10> (x) y = Transpose <perm=[1,0]> (t)",
        ),
    ),
    case(
        "T-09",
        graph(X, Y, "q = Cast <to=22> (x) y = DequantizeLinear (q, s)", s=f16(1.0)),
        graph(X, Y, "q = Cast <to=3> (x) y = DequantizeLinear (q, s)", s=f16(1.0)),
    ),
    case(
        "T-10",
        graph(
            X,
            "float16[4,8] y",
            "d = DequantizeLinear <axis=0, block_size=16> (w, s) y = MatMul (x, d)",
            opset=23,
            w=full(ml_dtypes.float4_e2m1fn, 64, 8),
            s=half(4, 8),
        ),
        graph(
            X,
            "float16[4,8] y",
            "d = DequantizeLinear <axis=0, block_size=16> (w, s) y = MatMul (x, d)",
            w=int4(64, 8),
            s=half(4, 8),
        ),
        "10.3",
    ),
    case(
        "T-11",
        graph("float[4,64] x", "float[4,8] y", "y = MatMul (x, w)", w=ramp(np.float32, 64, 8)),
        graph(X, "float16[4,8] y", "y = MatMul (x, w)", w=ramp(np.float16, 64, 8)),
    ),
    case(
        "T-12",
        graph("bfloat16[4,64] x", "bfloat16[4,64] y", "y = Mul (x, x)"),
        graph(X, "float16[4,64] y", "y = Mul (x, x)"),
        sm=75,
    ),
    case(
        "O-01",
        graph("int32[4,64] x", "int32[4,64] y", "y = BitwiseNot (x)"),
        graph("bool[4,64] x", "bool[4,64] y", "y = Not (x)"),
    ),
    case(
        "O-02",
        graph("float16[4,1,64] x, int64[1] axes", "float16[4,64] y", "y = Squeeze (x, axes)"),
        graph("float16[4,1,64] x", "float16[4,64] y", "y = Squeeze (x, axes)", axes=i64(1)),
        "10.3",
    ),
    case(
        "O-03",
        graph(
            "float16[4,64] x, float16[1,64] u",
            Y,
            'y = ScatterND <reduction="add"> (x, i, u)',
            i=numpy_helper.from_array(np.array([[1]])),
        ),
        graph(
            "float16[4,64] x, float16[1,64] u",
            Y,
            "y = ScatterND (x, i, u)",
            i=numpy_helper.from_array(np.array([[1]])),
        ),
    ),
    case(
        "O-04",
        graph(
            X,
            "float16[4,64] y, float[4,1] m",
            "y, m = LayerNormalization <axis=-1> (x, w, b)",
            w=half(64),
            b=half(64),
        ),
        graph(X, Y, NORM, w=half(64), b=half(64)),
    ),
    case(
        "O-05",
        graph("float[4,64] x", "int64[2,N] y", "y = NonZero (x)"),
        graph("float[4,64] x", "bool[4,64] y", "y = Equal (x, z)", z=f32(0.0)),
        "10.3",
    ),
    case(
        "O-06",
        graph(
            "float[2,4096] x", "float[2,4000] y, int64[2,4000] i", "y, i = TopK (x, k)", k=i64(4000)
        ),
        graph("float[2,4096] x", "float[2,50] y, int64[2,50] i", "y, i = TopK (x, k)", k=i64(50)),
    ),
    case(
        "O-07",
        graph(IMAGE, SMALL, RESIZE.format(1), sizes=SIZES),
        graph(IMAGE, SMALL, RESIZE.format(0), sizes=SIZES),
    ),
    case(
        "O-08",
        graph(X, Y, "y = LayerNormalization <axis=-1> (x, w)", w=half(64)),
        graph(X, Y, NORM, w=half(64), b=half(64)),
        "10.3",
    ),
    case("O-09", graph(X, Y, "y = Mul (x, x)", opset=25), graph(X, Y, "y = Mul (x, x)", opset=24)),
    case(
        "O-10",
        graph("float16[8,8] x, int64 k", "float16[8,8] y", "y = Trilu <upper=0> (x, k)"),
        graph(
            "float16[8,8] x",
            "float16[8,8] y",
            "y = Trilu <upper=0> (x, k)",
            k=numpy_helper.from_array(np.array(0)),
        ),
        "10.3",
    ),
    case(
        "O-11",
        graph(
            IMAGE + ", float16[8,3,3,3] w",
            "float16[1,8,30,30] y",
            "v = Mul (w, w) y = Conv (x, v)",
        ),
        graph(IMAGE, "float16[1,8,30,30] y", "y = Conv (x, w)", w=ramp(np.float16, 8, 3, 3, 3)),
        "10.3",
    ),
    case(
        "O-12",
        graph("bool[4,64] x", "int64[2,N] y", "y = NonZero (x)"),
        graph("bool[4,64] x", "int64[2,N] y", "f = Cast <to=1> (x) y = NonZero (f)"),
        "10.3",
    ),
    case(
        "O-13",
        graph(
            X + ", float16[64,8] w", "float16[4,8] y", 'y = Einsum <equation="AB,BC->AC"> (x, w)'
        ),
        graph(
            X + ", float16[64,8] w", "float16[4,8] y", 'y = Einsum <equation="ab,bc->ac"> (x, w)'
        ),
    ),
    case(
        "O-14",
        graph(
            X,
            Y,
            "y = LayerNormalization <axis=-1, stash_type=10> (x, w, b)",
            w=half(64),
            b=half(64),
        ),
        graph(X, Y, NORM, w=half(64), b=half(64)),
    ),
    case(
        "O-15",
        graph(
            "float16[0,64] x",
            "float16[0,8,8] y",
            "y = Reshape <allowzero=1> (x, s)",
            s=i64(0, 8, 8),
        ),
        graph(X, "float16[4,8,8] y", "y = Reshape (x, s)", s=i64(0, 8, 8)),
    ),
    case(
        "O-16",
        graph(X, "int64[1] y", "y = Shape <start=1, end=2> (x)"),
        graph(X, "int64[1] y", "s = Shape (x) y = Gather <axis=0> (s, i)", i=i64(1)),
        "10.3",
    ),
)
