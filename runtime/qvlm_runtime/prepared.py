"""ONNX Runtime's own form of a graph, kept on disk between starts.

Opening a graph, ONNX Runtime fuses it and packs its weights for this processor: most of the load time, and memory
for a second copy of what it packs. Both can be done once: the fused graph and the packed weights are written to a
folder, and a later start maps them. Measured on a decoder of 1.1 billion weights at w4a16: a quarter of the time to
open, 0.10 GB resident instead of 0.67. Of what is left half is packing still, piece by piece: ONNX Runtime finds the
packed form in the file by the hash of what it packed. The files take up to twice the disk of the graph's, which they
hold too, and making them takes about twice the memory of a plain load, once.

What is kept holds for one graph, one version of ONNX Runtime, one processor and the settings of the session; all four
make its name, so a change makes a new one and an old one is never opened. Old ones are not deleted. The folder is
trusted: keep it where only the application writes. The model folder's weights are compared with its manifest when they
are prepared, unless that load was told not to; later loads do not read them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from qvlm_runtime.errors import SessionError


def kept_graph(path: Path, folder: Path, version: str, entries: Mapping[str, str]) -> Path:
    """Where ``folder`` keeps, or would keep, the prepared form of the graph at ``path``."""
    return folder / f"{path.stem}-{_key(path, version, entries)}" / path.name


def prepared_graph(
    path: Path,
    folder: Path,
    version: str,
    entries: Mapping[str, str],
    write: Callable[[Path], None],
) -> Path:
    """The prepared form of the graph at ``path``, made by ``write`` if ``folder`` has none.

    entries: the session's, by name. write: gets the path to write the graph to, its data beside it. Several processes
    may do this at once: the first to finish is kept. SessionError if the folder cannot be written.
    """
    graph = kept_graph(path, folder, version, entries)
    if graph.is_file():
        return graph
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            write(Path(unfinished) / path.name)
            try:
                os.rename(unfinished, graph.parent)
            except OSError:
                if not graph.is_file():  # else another process was first
                    raise
            else:
                os.mkdir(unfinished)  # what TemporaryDirectory removes
    except OSError as error:
        raise SessionError(
            f"{folder}: prepared graphs cannot be kept here ({error}). Give another folder, or none."
        ) from error
    return graph


def prepared_entries(target: Path) -> dict[str, str]:
    """ONNX Runtime's session config entries that write weights packed, in a file beside the graph."""
    return {
        "session.optimized_model_external_initializers_file_name": f"{target.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }


def _key(path: Path, version: str, entries: Mapping[str, str]) -> str:
    """Names what a prepared graph depends on. Data files by size and time: hashing takes as long as loading."""
    words = [
        version,
        *(f"{name}={value}" for name, value in sorted(entries.items())),
        _processor(),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    ]
    for data in sorted(path.parent.glob(f"{path.name}*")):
        stat = data.stat()
        words.append(f"{data.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets: packed weights of another processor would be wrong or slow."""
    words = [platform.machine(), platform.processor()]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return " ".join(words)
    for field in ("model name", "flags", "Features", "CPU part"):
        found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
        words += [found[1]] if found else []
    return " ".join(words)
