"""The names of TensorRT's Python API in each release, and objects that have no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fake_cuda import API

if TYPE_CHECKING:
    from fake_tensorrt import FakeTensorRT

RELEASES = list(API["releases"])


def names(release: str, kind: str) -> set[str]:
    """Members of a class in a release."""
    column = RELEASES.index(release)
    return {n for n, has in API["tensorrt"].get(kind, {}).items() if has[column] == "1"}


class Named:
    """Base of the fakes: public attributes are those of the release's class of the same name."""

    _api: FakeTensorRT

    def _allowed(self, name: str) -> None:
        kind = type(self).__name__
        if not name.startswith("_") and name not in names(self._api.release, kind):
            raise AttributeError(f"TensorRT {self._api.release}: {kind} has no attribute {name}")

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_allowed")(name)
            value = object.__getattribute__(self, name)
            if callable(value):
                self._api.calls.append(f"{type(self).__name__}.{name}")
            return value
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._allowed(name)
        object.__setattr__(self, name, value)


class Plan(bytes):
    """IHostMemory: bytes with a buffer."""
