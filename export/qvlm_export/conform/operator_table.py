"""Which ONNX operators each TensorRT release imports: data only.

Sources: NVIDIA's importer tables of 8.5, 10.1, 10.14, 10.16 and 11.1 as read for the rule book, and the operators that
the parser of TensorRT for RTX 1.7.1 names itself. An operator whose first release is not known stands under the first
release that is known to have it, so a release below may refuse too much, never too little.
"""

from __future__ import annotations

from onnx import NodeProto

from qvlm_export.conform.rule import TENSORRT, Release

# In every column.
_PORTABLE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil
Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div
Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU
HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax Loop LpNormalization LpPool LRN LSTM MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
Reshape Resize ReverseSequence RNN RoiAlign Round Scan Scatter ScatterElements ScatterND Selu Shape Shrink
Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
PORTABLE = frozenset(_PORTABLE.split())

# First column that has it; every column to the right in ``TENSORRT`` has it too.
SINCE: dict[str, Release] = {
    "Attention": "10.13",
    "BlackmanWindow": "10.13",
    "HammingWindow": "10.13",
    "HannWindow": "10.13",
    "STFT": "10.13",
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
    "TensorScatter": "10.15",
    "Swish": "11",
    "CausalConvWithState": "rtx-1.7",
    "LinearAttention": "rtx-1.7",
}

# Domain "trt" (also written as TRT_* in the standard domain); ONNX Runtime has none of them.
TRT_SINCE: dict[str, Release] = {
    "TRT_INT4QuantizeLinear": "10.3",
    "TRT_INT4DequantizeLinear": "10.3",
    "TRT_FP8QuantizeLinear": "10.3",
    "TRT_FP8DequantizeLinear": "10.3",
    "TRT_FP4DynamicQuantize": "10.13",
    "TRT_MXFP8DequantizeLinear": "10.13",
    "TRT_MXFP8DynamicQuantize": "10.13",
    "TRT_Attention": "11",
    "TRT_MoE": "11",
    "TRT_KVCacheUpdate": "11",
}

# Microsoft's domain, or no domain at all: TensorRT for RTX only.
RTX_EXTRAS = frozenset({"SimplifiedLayerNormalization", "MatMulNBits"})

# Named by the parser of TensorRT for RTX, but the plugin that it asks for is not in its registry.
RTX_LACKS = frozenset({"NonZero"})

# Highest opset of the release's table. 10.3 says 20, but its checks of INT4 and block scales go by
# type and shape.
MAX_OPSET: dict[Release, int] = {"10.3": 21, "10.13": 24, "10.15": 24, "11": 24, "rtx-1.7": 24}

# What to write instead, where it is short.
INSTEAD: dict[str, str] = {
    "Attention": "MatMul, Add, Softmax, MatMul",
    "RMSNormalization": "Cast, Mul, ReduceMean, Add, Sqrt, Div, Mul",
    "SimplifiedLayerNormalization": "Cast, Mul, ReduceMean, Add, Sqrt, Div, Mul",
    "RotaryEmbedding": "Slice, Mul, Sub, Add, Concat",
    "TensorScatter": "return the new rows only and place them outside",
    "Swish": "Mul(x, Sigmoid(x))",
    "SwiGLU": "Mul(Mul(gate, Sigmoid(gate)), up)",
    "MatMulNBits": "MatMul of DequantizeLinear on an INT4 initializer",
    "FusedMatMul": "Mul and MatMul",
    "GroupQueryAttention": "Concat, Expand, MatMul, Add, Softmax, MatMul",
    "MatMulInteger": "QuantizeLinear, DequantizeLinear and MatMul",
    "QLinearMatMul": "QuantizeLinear, DequantizeLinear and MatMul",
    "DynamicQuantizeLinear": "the token form: Div by the largest magnitude, then QuantizeLinear of scale 1/127",
    "BitwiseAnd": "And on BOOL",
}


def has_operator(release: Release, node: NodeProto) -> bool:
    """Whether the release imports this node's operator, the attributes aside."""
    if release == "rtx-1.7" and node.op_type in RTX_LACKS:
        return False
    if release == "rtx-1.7" and node.op_type in RTX_EXTRAS:
        return node.domain in ("", "ai.onnx", "com.microsoft")
    if node.op_type in TRT_SINCE and node.domain in ("", "trt"):
        first = TRT_SINCE[node.op_type]
    elif node.domain not in ("", "ai.onnx"):
        return False
    elif node.op_type in PORTABLE:
        return True
    elif node.op_type in SINCE:
        first = SINCE[node.op_type]
    else:
        return False
    return TENSORRT.index(release) >= TENSORRT.index(first)
