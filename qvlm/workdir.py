"""The unfinished quantization on disk: finished blocks, so that an interrupted run continues where it stopped.

    OUT.partial/
      state.json            digest of everything the result depends on
      prepared.npz          what the method prepared
      vision.json ...       the partition of each component
      vision.000-001.npz    one finished block: integers, scales, the method's report
      checkpoint/           written last, then renamed to OUT

Each file appears under its name only when complete. numpy only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from qvlm.checkpoint import Array, QuantizedLinear, dump_json, load_json
from qvlm.errors import CheckpointError
from qvlm.recipe import Format

_ARRAYS = ("integers", "scale", "zero_point", "input_scale", "input_zero_point")


def digest(*parts: object) -> str:
    """sha256 over JSON values and arrays, in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(str((part.dtype, part.shape)).encode())
            sha.update(np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()


class WorkDirectory:
    """Work kept beside ``output`` until it is whole.

    Raises CheckpointError if ``output`` exists or has no name, or work exists and either ``resume`` is False or it was
    begun with another model, recipe or calibration set.
    """

    def __init__(self, output: Path, resume: bool) -> None:
        if not output.name:
            raise CheckpointError(f"{output}: no directory's name. Give one to write to.")
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self._resume = resume
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output}: exists. Give another directory or remove it.")
        if self.path.exists() and not self._begun_by_us():
            raise CheckpointError(
                f"{self.path}: holds no state.json, so it is no interrupted run's work. Move it away, or give another "
                "directory."
            )
        if self.path.exists() and not resume:
            raise CheckpointError(
                f"{self.path}: an interrupted run left work here. Continue it with --resume, or remove it."
            )

    def _begun_by_us(self) -> bool:
        """Is there a state, or nothing but what a run leaves that ended before it wrote one?"""
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir()}
        return "state.json" in names or names <= {"state.json.partial"}

    def begin(self, identity: str) -> None:
        """Create or check the directory; ``identity`` is the digest of everything the result depends on."""
        state = self.path / "state.json"
        if state.exists():
            if load_json(state).get("identity") != identity:
                raise CheckpointError(
                    f"{self.path}: was begun with another model, recipe or calibration set. Remove it, or give the "
                    "same ones."
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        dump_json(state, {"identity": identity})

    def load_arrays(self, name: str) -> dict[str, Array] | None:
        """Arrays saved under ``name``, or None if that step was not finished."""
        path = self.path / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise CheckpointError(
                f"{path}: not readable ({error}). Remove this file and resume."
            ) from error

    def save_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Save atomically."""
        path = self.path / f"{name}.npz"
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        os.replace(partial, path)

    def load_partition(self, component: str) -> list[tuple[int, int]] | None:
        """A component's blocks, or None if not cut yet."""
        path = self.path / f"{component}.json"
        if not path.is_file():
            return None
        return [(int(start), int(stop)) for start, stop in load_json(path)["blocks"]]

    def save_partition(self, component: str, blocks: list[tuple[int, int]]) -> None:
        """Save atomically."""
        dump_json(self.path / f"{component}.json", {"blocks": blocks})

    def load_block(
        self, component: str, start: int, stop: int, formats: Mapping[str, Format]
    ) -> tuple[dict[str, QuantizedLinear], dict[str, Any]] | None:
        """A finished block's linears and report, or None."""
        arrays = self.load_arrays(_block_name(component, start, stop))
        if arrays is None:
            return None
        linears = {
            name: QuantizedLinear(
                arrays[f"{name}/integers"],
                arrays[f"{name}/scale"],
                formats[name],
                *(arrays.get(f"{name}/{key}") for key in _ARRAYS[2:]),
            )
            for name in formats
        }
        return linears, json.loads(str(arrays["report"]))

    def save_block(
        self,
        component: str,
        start: int,
        stop: int,
        linears: Mapping[str, QuantizedLinear],
        report: Mapping[str, Any],
    ) -> None:
        """Save atomically."""
        arrays: dict[str, Array] = {"report": np.array(json.dumps(report, sort_keys=True))}
        for name, linear in linears.items():
            for key in _ARRAYS:
                if (value := getattr(linear, key)) is not None:
                    arrays[f"{name}/{key}"] = value
        self.save_arrays(_block_name(component, start, stop), arrays)

    def checkpoint(self) -> Path:
        """An empty directory for the finished checkpoint."""
        path = self.path / "checkpoint"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def finish(self) -> Path:
        """Give the checkpoint its final name and drop the rest."""
        if self.output.exists():
            self.output.rmdir()
        os.replace(self.path / "checkpoint", self.output)
        shutil.rmtree(self.path)
        return self.output


def _block_name(component: str, start: int, stop: int) -> str:
    return f"{component}.{start:03d}-{stop:03d}"
