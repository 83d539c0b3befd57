"""The Python modules of TensorRT and of TensorRT for RTX, and their log; the only file of the runtime
that imports them.
"""

from __future__ import annotations

from typing import Any

from qvlm_runtime.errors import SessionError

NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}


def tensorrt_module(backend: str, where: str) -> Any:
    """The Python module of backend "tensorrt" or "tensorrt-rtx"; SessionError if not installed."""
    try:
        if backend == "tensorrt":
            import tensorrt

            return tensorrt
        import tensorrt_rtx_bindings

        return tensorrt_rtx_bindings
    except ImportError as error:
        hint = (
            "pip install 'qvlm[rtx]'"
            if backend == "tensorrt-rtx"
            else "It comes with JetPack (use a virtual environment with --system-site-packages); "
            "elsewhere pip install tensorrt"
        )
        raise SessionError(
            f"{where}: {NAMES[backend]} is not installed ({error}). {hint}"
        ) from error


def message_log(trt: Any, detail: str = "WARNING") -> Any:
    """A logger that keeps the messages of severity ``detail`` and worse."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """TensorRT says why something failed in its log only."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(getattr(trt.ILogger, detail)):
                self.messages.append((severity, message))

        def errors(self) -> str:
            """The error messages in one line."""
            bad = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            return "; ".join(" ".join(m.split()) for s, m in self.messages if s in bad)

    return Log()
