"""Energy counters of boards and processors behind one reader: ``choose`` finds what is there."""

from qvlm_runtime.bench.power.choose import choose
from qvlm_runtime.bench.power.reader import PowerReader, Unavailable

__all__ = ["PowerReader", "Unavailable", "choose"]
