"""Proves when a number of threads is asked for and when the engine chooses:
python -m pytest tests/runtime/test_cores.py
"""

import os
from pathlib import Path

import pytest

from qvlm_runtime.cores import thread_limit


def machine(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    allowed: set[int],
    siblings: bool = False,
) -> Path:
    """``cores`` logical processors; with siblings, n and n + cores / 2 share a core."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    for n in range(cores):
        half = n % (cores // 2)
        text = f"{half},{half + cores // 2}\n" if siblings else f"{n}\n"
        write(root, f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list", text)
    return root


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_free_process_leaves_the_number_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, 8, set(range(8)))
    assert thread_limit(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert thread_limit(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu.max", "1600000 100000\n")  # more than there is
    assert thread_limit(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "threads"), [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_a_container_s_share_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    machine(tmp_path, monkeypatch, 64, set(range(64)))
    write(tmp_path, "sys/fs/cgroup/cpu.max", quota + "\n")
    assert thread_limit(tmp_path) == threads


def test_control_groups_of_the_first_version_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, 8, set(range(8)))
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert thread_limit(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    assert thread_limit(tmp_path) == 3


def test_allowed_processors_are_counted_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, 8, {0, 1, 4, 5}, siblings=True)
    assert thread_limit(tmp_path) == 2
    machine(tmp_path, monkeypatch, 8, set(range(8)), siblings=True)
    assert thread_limit(tmp_path) is None
    machine(tmp_path, monkeypatch, 8, {0, 1, 2, 3}, siblings=True)
    assert thread_limit(tmp_path) is None  # one hardware thread of each core


def test_a_machine_without_these_files_counts_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2})
    assert thread_limit(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert thread_limit(tmp_path) is None
