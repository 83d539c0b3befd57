"""A subject in a process of its own, so that its memory and its load time are its own.

Parent and child talk in lines of JSON, one call and one answer each; the parent waits, so only one
of several folders computes at a time. The child's standard output is kept for the answers: whatever
a library prints goes to standard error.

Run: python -m qvlm_runtime.bench.worker FOLDER OPTIONS  (OPTIONS: FolderSubject's, as JSON)
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvlm_runtime.bench.floors import import_path
from qvlm_runtime.bench.plan import Case
from qvlm_runtime.bench.subject import FirstToken, FolderSubject, Load, Repeated
from qvlm_runtime.errors import RuntimeFault, SessionError

_CALLS = (
    *(
        "load",
        "target",
        "backend",
        "max_rows",
        "fill",
        "decode",
        "first_token",
        "answer",
        "repeat",
        "peak_bytes",
    ),
    "close",
)
_PATIENCE = 10.0  # seconds to release a model
_STRUCTURES = (Load, FirstToken, Repeated)


class WorkerSubject:
    """A FolderSubject behind a pipe. SessionError if the process ends, the child's own otherwise."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.name = str(folder)
        command = [sys.executable, "-m", "qvlm_runtime.bench.worker", str(folder)]
        self._process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ) | {"PYTHONPATH": import_path()},
            start_new_session=True,  # Ctrl-C is for the parent, which closes the pipe
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([name, *arguments]) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended(name) from None
        line = stdout.readline()
        if not line:
            raise self._ended(name)
        answer = json.loads(line)
        if "fault" in answer:
            raise RuntimeFault(answer["fault"])
        return answer["value"]

    def _ended(self, name: str) -> SessionError:
        code = self._process.wait()
        reason = (
            f"signal {-code} (9 is what Linux sends when memory runs out)"
            if code < 0
            else f"exit code {code}"
        )
        return SessionError(f"{self.name}: the worker ended during {name} with {reason}.")

    def load(self) -> Load:
        """Open the model in the worker."""
        return Load(**self._call("load"))

    def target(self) -> str:
        """The target whose graphs were opened."""
        return str(self._call("target"))

    def backend(self) -> str:
        """The engine that runs them."""
        return str(self._call("backend"))

    def max_rows(self) -> int:
        """Cache rows of a sequence."""
        return int(self._call("max_rows"))

    def fill(self, context: int) -> tuple[int, int]:
        """Resident bytes after filling, now and at most."""
        now, peak = self._call("fill", context)
        return int(now), int(peak)

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of each step."""
        return [float(t) for t in self._call("decode", context, steps)]

    def first_token(self, case: Case) -> FirstToken:
        """Parts and whole."""
        return FirstToken(**self._call("first_token", dataclasses.asdict(case)))

    def answer(self, case: Case) -> float:
        """Seconds of the answer."""
        return float(self._call("answer", dataclasses.asdict(case)))

    def repeat(self, part: str, seconds: float) -> Repeated:
        """Runs and their time."""
        return Repeated(**self._call("repeat", part, seconds))

    def peak_bytes(self) -> int:
        """The most memory that was resident in the worker."""
        return int(self._call("peak_bytes"))

    def close(self) -> None:
        """End the worker. Safe to call again, and after a failure."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            try:
                process.stdin.close()
            except BrokenPipeError:
                process.kill()  # it is gone or going; its exit code was told by the call that failed
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # interrupted in the middle of a long call
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _serve(subject: FolderSubject) -> None:
    """Answer calls until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        assert name in _CALLS, name
        values = [Case(**a) if isinstance(a, Mapping) else a for a in arguments]
        try:
            value = getattr(subject, name)(*values)
            plain = dataclasses.asdict(value) if isinstance(value, _STRUCTURES) else value
            answer = {"value": plain}
        except RuntimeFault as fault:
            answer = {"fault": str(fault)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(FolderSubject(Path(sys.argv[1]), **json.loads(sys.argv[2])))
