"""Finished rows of a long experiment on disk, so that an interrupted one continues where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvlm.checkpoint import dump_json, load_json
from qvlm.errors import CalibrationError

Json = dict[str, Any]


class Results:
    """Rows by key, saved after each; rows of another identity are refused."""

    def __init__(self, path: Path | None, identity: Json) -> None:
        self.path, self.identity, self.rows = path, identity, list[Json]()
        check_folder(path)
        if path is not None and path.exists():
            data = load_json(path)
            if data.get("identity") != identity:
                raise CalibrationError(
                    f"{path}: results of other settings ({data.get('identity')}, now {identity}). "
                    "Give another file, or remove it."
                )
            self.rows = rows_of(path, data)

    def find(self, key: Json) -> Json | None:
        """The row with these values, if it was measured."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, row: Json) -> None:
        """Keep and save a row."""
        self.rows.append(row)
        if self.path is not None:
            dump_json(self.path, {"identity": self.identity, "rows": self.rows})


def check_folder(path: Path | None) -> None:
    """CalibrationError if a file to write has no folder to be in."""
    if path is not None and not path.parent.is_dir():
        raise CalibrationError(f"{path}: there is no folder {path.parent}. Make it first.")


def rows_of(path: Path, data: Json) -> list[Json]:
    """The rows of what a results file holds; CalibrationError if they are none."""
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CalibrationError(
            f"{path}: no rows of an experiment. Give another file, or remove it."
        )
    return rows
