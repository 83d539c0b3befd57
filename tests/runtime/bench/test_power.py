"""Proves that every power reader reads the formats of real boards and counts joules:
python -m pytest tests/runtime/bench/test_power.py

The tegrastats lines and sysfs values have the form that Jetson Orin Nano, AGX Orin, Thor, AGX Xavier
and Nano print; the trees below are what their kernels show.
"""

import ctypes
import stat
from pathlib import Path
from typing import Any

import pytest

from qvlm_runtime.bench.power.choose import choose
from qvlm_runtime.bench.power.ina3221 import Ina3221, channels
from qvlm_runtime.bench.power.nvml import Nvml, NvmlPower
from qvlm_runtime.bench.power.rapl import Rapl
from qvlm_runtime.bench.power.reader import Integrator, Unavailable, total_rails
from qvlm_runtime.bench.power.tegrastats import Tegrastats, parse

ORIN_NANO = (
    "04-27-2026 14:59:43 RAM 775/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU "
    "[0%@729,0%@729,0%@729,0%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0% cpu@48.562C soc2@47.531C "
    "tj@49.062C VDD_IN 4761mW/4777mW VDD_CPU_GPU_CV 515mW/502mW VDD_SOC 1428mW/1428mW\n"
)
AGX_ORIN = (
    "RAM 3162/30536MB (lfb 6x4MB) SWAP 0/15268MB (cached 0MB) CPU [1%@729,off] GR3D_FREQ 0%@[305,0] "
    "gpu@46.343C VDD_GPU_SOC 3175mW/3170mW VDD_CPU_CV 792mW/792mW VIN_SYS_5V0 3540mW/3543mW "
    "NC 0mW/0mW VDDQ_VDD2_1V8AO 604mW/604mW NC 0mW/0mW\n"
)
THOR = (
    "RAM 5848/125772MB (lfb 34x4MB) CPU [0%@972] VDD_GPU 4012mW/4012mW VDD_CPU_SOC_MSS 6003mW/6003mW "
    "VIN_SYS_5V0 5020mW/5020mW VIN 24000mW/23990mW\n"
)
AGX_XAVIER = (
    "RAM 2673/31919MB (lfb 118x4MB) SWAP 0/15959MB (cached 0MB) CPU [12%@1190,off] EMC_FREQ 7% "
    "GR3D_FREQ 33% AO@35C Tboard@34C GPU 1085/1085 CPU 311/320 SOC 933/933 CV 0/0 VDDRQ 155/155 "
    "SYS5V 1496/1496\n"
)
NANO = (
    "RAM 1276/3956MB (lfb 108x4MB) IRAM 0/252kB(lfb 252kB) CPU [31%@1479] APE 25 PLL@21C "
    "POM_5V_IN 3478/3201 POM_5V_GPU 812/740 POM_5V_CPU 623/588\n"
)


@pytest.mark.parametrize(
    ("line", "watts", "total"),
    [
        (ORIN_NANO, {"VDD_IN": 4.761, "VDD_CPU_GPU_CV": 0.515, "VDD_SOC": 1.428}, 4.761),
        (
            AGX_ORIN,
            {"VDD_GPU_SOC": 3.175, "VDD_CPU_CV": 0.792, "VIN_SYS_5V0": 3.54, "NC": 0.0}
            | {"VDDQ_VDD2_1V8AO": 0.604},
            3.175 + 0.792 + 3.54,
        ),
        (
            THOR,
            {"VDD_GPU": 4.012, "VDD_CPU_SOC_MSS": 6.003, "VIN_SYS_5V0": 5.02, "VIN": 24.0},
            24.0,
        ),
        (
            AGX_XAVIER,
            {"GPU": 1.085, "CPU": 0.311, "SOC": 0.933, "CV": 0.0, "VDDRQ": 0.155, "SYS5V": 1.496},
            3.98,
        ),
        (NANO, {"POM_5V_IN": 3.478, "POM_5V_GPU": 0.812, "POM_5V_CPU": 0.623}, 3.478),
    ],
)
def test_a_tegrastats_line_gives_the_rails_now_and_their_total(
    line: str, watts: dict[str, float], total: float
) -> None:
    found = parse(line)
    assert found == pytest.approx(watts)
    assert sum(found[rail] for rail in total_rails(tuple(found))) == pytest.approx(total)


def test_a_line_without_rails_gives_none() -> None:
    assert parse("RAM 775/7620MB (lfb 3x4MB) SWAP 0/3810MB CPU [0%@729] GR3D_FREQ 0%\n") == {}


def fake_tegrastats(folder: Path, line: str) -> tuple[str, ...]:
    program = folder / "tegrastats"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --interval ] || exit 2\n'
        f"while :; do cat <<'LINE' || exit\n{line}LINE\nsleep 0.02; done\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return (str(program),)


def test_tegrastats_runs_is_integrated_and_is_ended(tmp_path: Path) -> None:
    reader = Tegrastats(fake_tegrastats(tmp_path, ORIN_NANO))
    try:
        assert reader.total == ("VDD_IN",) and len(reader.rails) == 3
        first = reader.joules()
        while (last := reader.joules())["VDD_IN"] < first["VDD_IN"] + 0.1:
            pass
        # Constant power: energies are in the ratio of the powers, whatever the time was.
        assert last["VDD_SOC"] / last["VDD_IN"] == pytest.approx(1.428 / 4.761, rel=1e-6)
    finally:
        reader.close()
    assert reader._process.returncode is not None


def test_tegrastats_without_rails_or_absent_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no power rail"):
        Tegrastats(fake_tegrastats(tmp_path, "RAM 775/7620MB\n"))
    with pytest.raises(Unavailable, match="not installed"):
        Tegrastats((str(tmp_path / "nowhere"),))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def jetpack6(root: Path) -> Path:
    base = "sys/class/hwmon"
    return write(
        root,
        {
            f"{base}/hwmon0/name": "pwmfan\n",
            f"{base}/hwmon1/name": "ina3221\n",
            **{f"{base}/hwmon1/in{n}_label": f"{rail}\n" for n, rail in
               ((1, "VDD_IN"), (2, "VDD_CPU_GPU_CV"), (3, "VDD_SOC"), (7, "sum of shunt voltages"))},
            **{f"{base}/hwmon1/in{n}_input": f"{mv}\n" for n, mv in ((1, 4984), (2, 4976), (3, 4976), (7, 5))},
            **{f"{base}/hwmon1/curr{n}_input": f"{ma}\n" for n, ma in ((1, 1856), (2, 264), (3, 360))},
        },
    )  # fmt: skip


def test_ina3221_of_jetpack_6_is_volts_times_amperes(tmp_path: Path) -> None:
    found = {rail: read() for rail, read in channels(jetpack6(tmp_path)).items()}
    assert found == pytest.approx(
        {"VDD_IN": 9.250304, "VDD_CPU_GPU_CV": 1.313664, "VDD_SOC": 1.79136}
    )


def test_ina3221_of_jetpack_4_is_the_driver_s_milliwatts(tmp_path: Path) -> None:
    base = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rails = ("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU")
    names = {f"{base}/rail_name_{n}": f"{rail}\n" for n, rail in enumerate(rails)}
    power = {f"{base}/in_power{n}_input": f"{mw}\n" for n, mw in enumerate((3478, 812, 623))}
    found = {rail: read() for rail, read in channels(write(tmp_path, names | power)).items()}
    assert found == pytest.approx({"POM_5V_IN": 3.478, "POM_5V_GPU": 0.812, "POM_5V_CPU": 0.623})


def test_ina3221_counts_energy(tmp_path: Path) -> None:
    reader = Ina3221(jetpack6(tmp_path))
    try:
        assert reader.total == ("VDD_IN",)
        first = reader.joules()
        assert reader.joules()["VDD_IN"] > first["VDD_IN"] > 0
        ratio = first["VDD_SOC"] / first["VDD_IN"]
        assert ratio == pytest.approx(1.79136 / 9.250304, rel=1e-6)
    finally:
        reader.close()


def test_a_sensor_that_fails_on_the_way_makes_the_energy_fail(tmp_path: Path) -> None:
    reader = Ina3221(jetpack6(tmp_path))
    try:
        (tmp_path / "sys/class/hwmon/hwmon1/in1_input").write_text("")
        with pytest.raises(Unavailable, match="a sensor failed"):
            reader.joules()
    finally:
        reader.close()
    stats = Tegrastats(fake_tegrastats(tmp_path, ORIN_NANO))
    stats._process.terminate()
    stats._process.wait()
    with pytest.raises(Unavailable, match="tegrastats ended"):
        stats.joules()
    stats.close()


def rapl_tree(root: Path, package: int, dram: int) -> Path:
    base = "sys/class/powercap"
    domains = {
        "intel-rapl:0": ("package-0", package, 262143328850),
        "intel-rapl:0:0": ("core", 5, 262143328850),
        "intel-rapl:0:1": ("dram", dram, 65712999613),
        "intel-rapl:1": ("psys", 0, 262143328850),
    }
    files = {}
    for folder, (name, energy, wrap) in domains.items():
        files |= {f"{base}/{folder}/name": f"{name}\n", f"{base}/{folder}/energy_uj": f"{energy}\n"}
        files |= {f"{base}/{folder}/max_energy_range_uj": f"{wrap}\n"}
    return write(root, files)


def test_rapl_counts_microjoules_and_survives_the_wrap(tmp_path: Path) -> None:
    reader = Rapl(rapl_tree(tmp_path, 1_000_000, 65_712_000_000))
    try:
        assert reader.total == ("package-0", "dram-0")
        rapl_tree(tmp_path, 3_500_000, 387)  # dram wrapped
        assert reader.joules() == pytest.approx(
            {"package-0": 2.5, "core-0": 0.0, "dram-0": 1.0, "psys": 0.0}
        )
        rapl_tree(tmp_path, 4_500_000, 1_000_387)
        assert reader.joules()["package-0"] == pytest.approx(3.5)
        assert reader.joules()["dram-0"] == pytest.approx(2.0)
    finally:
        reader.close()


class FakeNvml:
    """Two GPUs as the library answers for them: 0 counts energy, 1 (before Volta) tells power only."""

    energy, reasons = 5_000_000, 0

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not a function this reader may call")

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> int:
        text.value = b"NVIDIA RTX A2000" if handle.value == 1 else b"Quadro P400"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        value._obj.value = self.energy
        return 0 if handle.value == 1 else 3

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:
        value._obj.value = 12_500
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, value: Any) -> int:
        value._obj.value = self.reasons
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, value: Any) -> int:
        value._obj.value = {1: 1410, 2: 6001}[kind.value]
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, kind: Any, value: Any) -> int:
        value._obj.value = 61
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.used, memory._obj.total = 3 << 30, 6 << 30
        return 0


def test_nvml_counts_millijoules_where_it_can_and_integrates_power_where_not() -> None:
    library = FakeNvml()
    reader = NvmlPower(library)
    try:
        assert reader.rails == ("GPU 0 NVIDIA RTX A2000", "GPU 1 Quadro P400") == reader.total
        library.energy += 7_250
        found = reader.joules()
        assert found["GPU 0 NVIDIA RTX A2000"] == pytest.approx(7.25)
        assert 0 < found["GPU 1 Quadro P400"] < reader.joules()["GPU 1 Quadro P400"]
    finally:
        reader.close()


def test_nvml_names_throttling_and_not_idling() -> None:
    library = FakeNvml()
    library.reasons = 0x1 | 0x2 | 0x20 | 0x80  # idle, application clocks; thermal, power brake
    nvml = Nvml(library)
    gpu = nvml.state(nvml.devices[0])
    assert gpu.throttled == ("thermal (software)", "power brake")
    assert (gpu.clocks, gpu.temperature, gpu.memory_used) == (
        {"sm": 1410, "memory": 6001},
        61,
        3 << 30,
    )


def test_an_nvml_call_that_fails_is_unavailable_with_its_code() -> None:
    library = FakeNvml()
    library.nvmlDeviceGetCount_v2 = lambda count: 999  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="nvmlDeviceGetCount_v2 failed with code 999"):
        Nvml(library)
    assert ctypes.sizeof(ctypes.c_void_p) in (4, 8)


def test_power_is_integrated_by_trapezoids_and_held_at_the_end() -> None:
    integrator = Integrator()
    assert integrator.until(9.0) == {}
    for when, watts in ((1.0, 2.0), (3.0, 4.0), (4.0, 4.0)):
        integrator.add(when, {"rail": watts})
    assert integrator.until(4.0) == {"rail": pytest.approx(2 * 3.0 + 4.0)}
    assert integrator.until(4.5) == {"rail": pytest.approx(12.0)}


def test_the_choice_prefers_a_board_s_own_sensor_and_names_what_is_absent(tmp_path: Path) -> None:
    readers, reasons = choose("auto", rapl_tree(jetpack6(tmp_path), 1, 1))
    assert [r.source for r in readers] == ["INA3221 (sysfs)"]
    assert "not needed beside" in reasons["rapl"]
    readers[0].close()
    readers, reasons = choose("rapl", tmp_path)
    assert [r.source for r in readers] == ["RAPL (powercap)"] and reasons == {}
    readers[0].close()
    with pytest.raises(Unavailable, match="no INA3221"):
        choose("ina3221", tmp_path / "empty")
    assert choose("none") == ([], {"all": "switched off"})
