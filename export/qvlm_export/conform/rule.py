"""What a rule is: a row with an id, the releases it holds for, what to do, and a function that finds breaches.

Evidence for the rules: NVIDIA's headers, the ONNX importer's source and operator tables, the guides, and compiling
with TensorRT for RTX. Ids are stable: they are what a message, an issue and a fix refer to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from onnx import NodeProto

from qvlm.errors import ExportError
from qvlm_export.conform.view import GraphView, label

Level = Literal["error", "warning", "info"]
# One column of the rule book; "ort" is ONNX Runtime, for what holds without TensorRT.
Release = Literal["10.3", "10.13", "10.15", "11", "rtx-1.7", "ort"]

TENSORRT: tuple[Release, ...] = ("10.3", "10.13", "10.15", "11", "rtx-1.7")
EVERYWHERE: tuple[Release, ...] = (*TENSORRT, "ort")
ONLY_10_3: tuple[Release, ...] = ("10.3",)


def release_column(release: str | None) -> Release:
    """The column that speaks for a release: the newest one not above it; None means ONNX Runtime.

    ExportError for a release that no column covers.
    """
    if release is None:
        return "ort"
    if release.startswith("rtx-"):
        return "rtx-1.7"
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.\d+)*", release)
    if found and int(found[1]) == 11:
        return "11"
    if found and int(found[1]) == 10:
        minor = int(found[2] or 0)
        return "10.15" if minor >= 15 else "10.13" if minor >= 13 else "10.3"
    raise ExportError(f"TensorRT release {release!r} has no rules. Known: 10.x, 11.x and rtx-1.7.")


@dataclass(frozen=True)
class Consumer:
    """Whom the graph is checked for: a column of the rule book and the compute capabilities named by the target."""

    release: Release
    sm: tuple[int, ...] = ()


@dataclass(frozen=True)
class Breach:
    """One place where a rule does not hold."""

    node: str
    tensor: str
    found: str
    allowed: str


Check = Callable[[GraphView, Consumer], Iterator[Breach]]


@dataclass(frozen=True)
class Rule:
    """One row. error: does not build, or wrong numbers. warning: builds, but slower or larger. info: worth knowing."""

    id: str
    title: str
    level: Level
    releases: tuple[Release, ...]
    fix: str
    check: Check


@dataclass(frozen=True)
class Finding:
    """One breach of one rule in one graph; every field is text, so ``dataclasses.asdict`` is ready for JSON."""

    rule: str
    level: Level
    graph: str
    node: str
    tensor: str
    found: str
    allowed: str
    fix: str

    def line(self) -> str:
        """One line: level, rule, place, what was found, what is allowed, what to do."""
        place = ", ".join(part for part in (self.graph, self.node, self.tensor) if part)
        return (
            f"{self.level} {self.rule} {place}: {self.found}, allowed: {self.allowed}. {self.fix}"
        )


def breach(node: NodeProto, tensor: str, found: str, allowed: str) -> Breach:
    """A breach at a node."""
    return Breach(label(node), tensor, found, allowed)
