"""Cases of the rules A-* (attention, rotary embedding) and C-* (cache)."""

from __future__ import annotations

import numpy as np
from conform_cases.build import Case, case, full, graph, i64, ramp

QKV = "float16[1,8,64,64] q, float16[1,8,64,64] k, float16[1,8,64,64] v"
OUT = "float16[1,8,64,64] y"
PLAIN = graph(QKV, OUT, "y = Attention (q, k, v)", opset=23)
MASK = "y = Attention (q, k, v, m)"
WIDE = QKV.replace("64,64]", "64,{0}]")
ROPE = "y = RotaryEmbedding <{0}> (x, c, s, ids)"
TABLE = ramp(np.float16, 128, 32)
CACHE = "float16[1,2,128,64] past, float16[1,2,1,64] new, int64[1] at"
FULL = "float16[1,2,128,64] present"
SCATTER = "present = TensorScatter <axis=-2> (past, new, at)"
IN_PLACE = graph(CACHE, FULL, SCATTER, opset=24)
GROW = "float16[1,{0},64] past, float16[1,{1},64] new"

CASES: tuple[Case, ...] = (
    case("A-01", graph(QKV, OUT, "y = Attention <softcap=30.0> (q, k, v)", opset=23), PLAIN),
    case(
        "A-02",
        graph(
            "float16[1,64,512] q, float16[1,64,512] k, float16[1,64,512] v",
            "float16[1,64,512] y",
            "y = Attention <q_num_heads=8, kv_num_heads=8> (q, k, v)",
            opset=23,
        ),
        PLAIN,
        "10.13",
    ),
    case(
        "A-03",
        graph(QKV + ", float[1,1,64,64] m", OUT, MASK, opset=23),
        graph(QKV + ", float16[1,1,64,64] m", OUT, MASK, opset=23),
    ),
    case(
        "A-04",
        graph(QKV.replace("16", ""), OUT.replace("16", ""), "y = Attention (q, k, v)", opset=23),
        PLAIN,
    ),
    case(
        "A-05",
        graph(
            "float16[1,8,1,64] q, float16[1,8,63,64] past, float16[1,8,1,64] new, float16[1,8,64,64] v",
            "float16[1,8,1,64] y",
            "k = Concat <axis=2> (past, new) y = Attention <is_causal=1> (q, k, v)",
            opset=23,
        ),
        graph(QKV, OUT, "y = Attention <is_causal=1> (q, k, v)", opset=23),
    ),
    case(
        "A-06",
        graph(QKV + ", bool[1,1,64,64] m", OUT, MASK, opset=23),
        graph(QKV + ", float16[1,1,64,64] m", OUT, MASK, opset=23),
    ),
    case(
        "A-07",
        graph(WIDE.format(320), OUT.replace("64]", "320]"), "y = Attention (q, k, v)", opset=23),
        PLAIN,
    ),
    case(
        "A-12",
        graph(WIDE.format(60), OUT.replace("64]", "60]"), "y = Attention (q, k, v)", opset=23),
        PLAIN,
    ),
    case(
        "A-08",
        graph(QKV, OUT, "y = Attention <TRT_decomposable=1> (q, k, v)", opset=23),
        PLAIN,
    ),
    case(
        "A-09",
        graph(
            QKV,
            OUT,
            "i = QuantizeLinear (q, s, z) d = DequantizeLinear (i, s, z) y = Attention (d, k, v)",
            opset=23,
            s=full(np.float16, value=0.02),
            z=full(np.int8, value=0),
        ),
        PLAIN,
    ),
    case(
        "A-10",
        graph(
            "float16[1,4,512] x, int64[1,4] ids",
            "float16[1,4,512] y",
            ROPE.format("interleaved=0"),
            opset=23,
            c=TABLE,
            s=TABLE,
        ),
        graph(
            "float16[1,4,512] x, int64[1,4] ids",
            "float16[1,4,512] y",
            ROPE.format("num_heads=8"),
            opset=23,
            c=TABLE,
            s=TABLE,
        ),
    ),
    case(
        "A-11",
        graph(
            "float16[1,8,4,64] x, int64[1,4] ids",
            "float16[1,8,4,64] y",
            ROPE.format("interleaved=0"),
            opset=23,
            c=ramp(np.float16, 1, 4, 32),
            s=ramp(np.float16, 1, 4, 32),
        ),
        graph(
            "float16[1,8,4,64] x, int64[1,4] ids",
            "float16[1,8,4,64] y",
            ROPE.format("interleaved=0"),
            opset=23,
            c=TABLE,
            s=TABLE,
        ),
    ),
    case(
        "C-01",
        graph(CACHE, FULL, SCATTER.replace("-2>", '-2, mode="circular">'), opset=24),
        IN_PLACE,
    ),
    case(
        "C-02",
        graph(
            CACHE,
            "float16[1,2,128,64] y",
            "present = TensorScatter <axis=-2> (past, new, at) y = Mul (present, present)",
            opset=24,
        ),
        IN_PLACE,
    ),
    case(
        "C-03",
        graph(CACHE.replace("128", "C"), FULL.replace("128", "C"), SCATTER, opset=24),
        IN_PLACE,
    ),
    case(
        "C-04",
        graph(
            "float16[128,64] past, float16[1,64] new, int64[1,1] at",
            "float16[128,64] present",
            "present = ScatterND (past, at, new)",
        ),
        graph("float16[1,64] new", "float16[1,64] present", "present = Identity (new)"),
    ),
    case(
        "C-05",
        graph(
            CACHE,
            FULL + ", float16[1,2,4,128,64] y",
            SCATTER + " u = Unsqueeze (present, a) y = Expand (u, e)",
            opset=24,
            a=i64(2),
            e=i64(1, 1, 4, 1, 1),
        ),
        IN_PLACE,
    ),
    case(
        "C-06",
        graph(
            GROW.format("127,2", "1,2"),
            "float16[1,128,2,64] present",
            "present = Concat <axis=1> (past, new)",
        ),
        graph(
            GROW.format("127,2", "1,2"),
            "float16[1,2,128,64] y",
            "k = Concat <axis=1> (past, new) y = Transpose <perm=[0,2,1,3]> (k)",
        ),
    ),
    case(
        "C-07",
        graph(
            GROW.format("2,P", "2,1"),
            "float16[1,2,64,T] y",
            "k = Concat <axis=2> (past, new) y = Transpose <perm=[0,1,3,2]> (k)",
        ),
        graph(
            GROW.format("P,2", "1,2"),
            "float16[1,2,64,T] y",
            "k = Concat <axis=1> (past, new) y = Transpose <perm=[0,2,3,1]> (k)",
        ),
    ),
    case(
        "K-02",
        graph(
            "float16[1,P,1,64] past, float16[1,1,1,64] x",
            "float16[1,1,1,64] new, float16[1,1,T,64] y",
            "new = Mul (x, x) k = Concat <axis=1> (past, new) y = Transpose <perm=[0,2,1,3]> (k)",
        ),
        graph(
            "float16[1,P,2,64] past, float16[1,1,2,64] x",
            "float16[1,1,2,64] new, float16[1,2,T,64] y",
            "new = Mul (x, x) k = Concat <axis=1> (past, new) y = Transpose <perm=[0,2,1,3]> (k)",
        ),
    ),
)
