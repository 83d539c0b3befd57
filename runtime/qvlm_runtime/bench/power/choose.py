"""Which power readers this machine has, and which of them to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qvlm_runtime.bench.power.ina3221 import Ina3221
from qvlm_runtime.bench.power.nvml import NvmlPower
from qvlm_runtime.bench.power.rapl import Rapl
from qvlm_runtime.bench.power.reader import PowerReader, Unavailable
from qvlm_runtime.bench.power.tegrastats import Tegrastats

_BOARDS: dict[str, Callable[[Path], PowerReader]] = {
    "ina3221": Ina3221,
    "tegrastats": lambda _: Tegrastats(),
}
# Name to constructor, a board's own sensors first.
SENSORS: dict[str, Callable[[Path], PowerReader]] = {
    **_BOARDS,
    "rapl": Rapl,
    "nvml": lambda _: NvmlPower(),
}


def choose(wanted: str, root: Path = Path("/")) -> tuple[list[PowerReader], dict[str, str]]:
    """The readers to use, and for each sensor that is not used the reason.

    wanted: "auto" (a board's own sensors if it has them, else processor and GPU together), "none",
    or a name of SENSORS, which must then be there (Unavailable). root: where /sys is, for tests.
    """
    if wanted == "none":
        return [], {"all": "switched off"}
    boards = False
    readers: list[PowerReader] = []
    reasons: dict[str, str] = {}
    for name in SENSORS if wanted == "auto" else (wanted,):
        if boards:
            # What a board measures at its input contains its processor and GPU.
            reasons[name] = f"not needed beside {readers[0].source}"
            continue
        try:
            readers.append(SENSORS[name](root))
            boards = name in _BOARDS
        except Unavailable as error:
            if wanted != "auto":
                raise
            reasons[name] = str(error)
    return readers, reasons
