"""Proves what is read of a machine, and that throttling is found by each of its signs:
python -m pytest tests/runtime/bench/test_machine.py
"""

from dataclasses import replace
from pathlib import Path

import pytest

from qvlm_runtime.bench.machine import Machine, Snapshot, parse_power_mode, throttled
from qvlm_runtime.bench.power.nvml import Nvml
from qvlm_runtime.bench.power.reader import Unavailable


def no_gpu() -> Nvml:
    raise Unavailable("no GPU")


def orin(root: Path, events: int = 27, heat: int = 63625) -> Machine:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd42\n",
        "proc/meminfo": "MemTotal:        7803000 kB\nMemFree: 1 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1510400\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1510400\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": f"{heat}\n",
        "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
        "sys/class/thermal/thermal_zone0/trip_point_0_temp": "104500\n",
        "sys/class/thermal/thermal_zone0/trip_point_1_type": "passive\n",
        "sys/class/thermal/thermal_zone0/trip_point_1_temp": "99000\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",  # has no temp that can be read
        "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": f"{events}\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root, no_gpu)


def test_a_jetson_is_described(tmp_path: Path) -> None:
    found = orin(tmp_path).describe()
    assert found["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert found["memory_bytes"] == 7803000 * 1024
    assert (found["cpu_max_mhz"], found["governor"]) == (1510.4, "schedutil")
    assert "onnxruntime" in found["libraries"] and "gpus" not in found


def test_the_control_group_s_limit_is_the_memory_limit_if_it_is_less(tmp_path: Path) -> None:
    machine = orin(tmp_path)
    path = tmp_path / "sys/fs/cgroup/memory.max"
    path.parent.mkdir(parents=True)
    path.write_text("max\n")
    assert machine.memory_limit() == 7803000 * 1024
    path.write_text("1000000\n")
    assert machine.memory_limit() == 1_000_000


def test_a_snapshot_has_clocks_heat_and_counters(tmp_path: Path) -> None:
    one = orin(tmp_path).snapshot()
    assert one.cpu_mhz == (729.6, 1510.4)
    assert one.temperatures == {"cpu-thermal": pytest.approx(63.625)}
    assert one.counters == {
        "sys/class/hwmon/hwmon3/oc1_event_cnt": 0,
        "sys/class/hwmon/hwmon3/oc3_event_cnt": 27,
    }


def test_each_sign_of_throttling_is_found_and_nothing_else(tmp_path: Path) -> None:
    cool = orin(tmp_path).snapshot()
    assert throttled(cool, cool) == []
    events = orin(tmp_path, events=30).snapshot()
    assert throttled(cool, events) == ["sys/class/hwmon/hwmon3/oc3_event_cnt rose by 3"]
    hot = orin(tmp_path, heat=99000).snapshot()
    assert throttled(cool, hot) == ["cpu-thermal is at its passive trip point"]
    gpu = replace(cool, gpus=({"name": "RTX", "throttled": ("power cap",)},))
    assert throttled(cool, gpu) == ["RTX: power cap"]


def test_a_machine_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    one = Machine(tmp_path, no_gpu).snapshot()
    assert (one.cpu_mhz, one.temperatures, one.counters, one.gpus) == (None, {}, {}, ())
    assert isinstance(one, Snapshot) and Machine(tmp_path, no_gpu).describe()["cores"] >= 1


def test_nvpmodel_s_answer_is_read() -> None:
    assert parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER (2)"
    assert parse_power_mode("NVPM VERB: Current mode: NV Power Mode: 15W\n0\n") == "15W (0)"
    assert parse_power_mode("NVPM ERROR: no config\n") is None
