"""Power rails of a Jetson (or another board with TI INA3221 monitors) through sysfs.

JetPack 5 and later, mainline driver: class/hwmon/hwmonN/{name = ina3221, in1_label, in1_input (mV),
curr1_input (mA)}, channels 1 to 3. JetPack 4, NVIDIA's driver: bus/i2c/drivers/ina3221x/*/
iio:deviceN/{rail_name_0, in_power0_input (mW)}, channels 0 to 2. Readable without root.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qvlm_runtime.bench.power.reader import Sampler, Unavailable, total_rails

# The monitors average over milliseconds and a read costs an I2C transfer: 20 a second is plenty.
_INTERVAL = 0.05


class Ina3221:
    """Every labelled channel of every monitor."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._channels = channels(root)
        if not self._channels:
            raise Unavailable(f"{root / 'sys'}: no INA3221 power monitor")
        self.source = "INA3221 (sysfs)"
        self.rails = tuple(self._channels)
        self.total = total_rails(self.rails)
        try:
            self._sampler = Sampler(self.watts, _INTERVAL)
        except (OSError, ValueError) as error:
            raise Unavailable(f"INA3221: not readable ({error})") from error

    def watts(self) -> dict[str, float]:
        """Power of each rail now."""
        return {rail: read() for rail, read in self._channels.items()}

    def joules(self) -> dict[str, float]:
        """Joules of every rail since the start."""
        return self._sampler.joules()

    def close(self) -> None:
        """Stop sampling."""
        self._sampler.close()


def channels(root: Path) -> dict[str, Callable[[], float]]:
    """Rail name to a function that reads its watts."""
    found: dict[str, Callable[[], float]] = {}
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        name = folder / "name"
        if not name.is_file() or name.read_text().strip() != "ina3221":
            continue
        for n in (1, 2, 3):
            label = folder / f"in{n}_label"
            millivolts, milliamperes = folder / f"in{n}_input", folder / f"curr{n}_input"
            if label.is_file() and millivolts.is_file() and milliamperes.is_file():
                found[label.read_text().strip()] = _product(millivolts, milliamperes)
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-2]")):
        milliwatts = label.with_name(f"in_power{label.name[-1]}_input")
        if milliwatts.is_file():
            found[label.read_text().strip()] = _milli(milliwatts)
    return found


def _product(millivolts: Path, milliamperes: Path) -> Callable[[], float]:
    return lambda: int(millivolts.read_text()) * int(milliamperes.read_text()) * 1e-6


def _milli(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) * 1e-3
