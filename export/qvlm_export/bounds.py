"""How far an exported graph may be from its goldens, from number formats and the graph's size.

Float part. Every node rounds its result once, by a relative u at most (unit roundoff: 2^-24 for
float32, 2^-11 for float16). A product of depth K accumulated in float32 rounds K more times, in at
least 16 partial sums (one SIMD register), so it counts K/16; in a float16 graph it counts one more,
for its weight. The signs are independent, so R roundings give u * sqrt(R) relative to the tensor's
root mean square. In a residual network of L layers the errors of a branch are relative to that
branch, and the 2L branches share the stream between them: one layer's roundings count once, and
the 2L additions to the stream each. Two implementations differ by sqrt(2) of that:

    R = roundings / L + 2 L,  epsilon = sqrt(2) * u * sqrt(R),  bound = SOFTMAX * (epsilon + T * 2^-24)

SOFTMAX = 32: softmax turns an absolute error of a score into a relative one of a weight, so a score
of size s enlarges the error of queries and keys s times, and the scores of trained models reach
tens. T * 2^-24: torch forms rope angles of up to T radians in float32, the graph's tables come from
float64; that error sits in queries and keys, so it is enlarged too. Measured: the demo's float32
graphs reach a quarter of this bound, random weights a thirtieth.

bfloat16. Such a graph is replayed in float32 with its own constants (``twin.py``), which were rounded
once, by 2^-8: a node that reads a stored float tensor counts one such rounding, on one side only.

    epsilon = epsilon(float32) + 2^-8 * sqrt(constants / L)

INT8 part. A value quantizes differently in two implementations if a rounding boundary lies between
its two versions. One such flip moves an input by a whole step, which is enough to flip values in
the layers behind it, so from the first flip on the two hold independent roundings of the same
numbers. What rounding does to an output is known: E = |quantized - float| of the goldens. Two
independent roundings differ by at most sqrt(2) * E, and the largest of a few rows spreads by as
much again: 2 E. Graphs without INT8 products have no such term.

End to end. The decoder sees the exported tower's features instead of the goldens': a relative
change f of its input. Norms keep relative size and softmax enlarges as above: SOFTMAX * f.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from qvlm_export.facts import GraphFacts
from qvlm_export.weights import Array

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SOFTMAX = 32.0
PARTIAL_SUMS = 16
INDEPENDENT_ROUNDINGS = 2.0


@dataclass(frozen=True)
class Error:
    """Relative difference of two arrays: root mean square over root mean square, largest over
    largest.
    """

    rms: float
    largest: float

    def scaled(self, factor: float) -> Error:
        """Both numbers times ``factor``."""
        return Error(self.rms * factor, self.largest * factor)

    def __add__(self, other: Error) -> Error:
        return Error(self.rms + other.rms, self.largest + other.largest)


def relative_error(found: Array, expected: Array) -> Error:
    """``Error`` of ``found`` against ``expected``; infinite where either holds NaN or shapes
    differ.
    """
    if found.shape != expected.shape:
        return Error(np.inf, np.inf)
    wide, reference = found.astype(np.float64), expected.astype(np.float64)
    difference = wide - reference
    if not (np.isfinite(difference).all() and reference.any()):
        return Error(np.inf, np.inf)
    norms = np.linalg.norm(difference), np.linalg.norm(reference)
    largest = np.abs(difference).max(), np.abs(reference).max()
    return Error(float(norms[0] / norms[1]), float(largest[0] / largest[1]))


def epsilon(facts: GraphFacts, dtype: str) -> float:
    """Expected relative difference of two implementations of the graph in this float type."""
    layers = max(1, facts.layers)
    if dtype == "bfloat16":
        constants = UNIT_ROUNDOFF[dtype] * sqrt(facts.constants / layers)
        return epsilon(facts, "float32") + constants
    products = facts.depths / PARTIAL_SUMS if dtype == "float32" else facts.roundings
    roundings = (facts.roundings + products) / layers + 2 * layers
    return sqrt(2.0 * roundings) * UNIT_ROUNDOFF[dtype]


def graph_bound(facts: GraphFacts, dtype: str, positions: int, quantization: Error) -> Error:
    """Bound for one output of one graph.

    positions: largest rope position T (0 for vision). quantization: E, the same output's
    difference between quantized and float goldens.
    """
    float_part = SOFTMAX * (epsilon(facts, dtype) + positions * UNIT_ROUNDOFF["float32"])
    bound = Error(float_part, float_part)
    if facts.count("INT8"):
        bound += quantization.scaled(INDEPENDENT_ROUNDINGS)
    return bound


def end_to_end_bound(decoder: Error, features: Error) -> Error:
    """Bound for an output behind both graphs.

    decoder: the decoder's own bound. features: measured difference of image_features from the
    goldens'.
    """
    return decoder + features.scaled(SOFTMAX)
