"""What a model family is to the exporter: a row of functions.

Families differ in this table and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qvlm.checkpoint import Checkpoint
from qvlm_export.graph import GraphBuilder
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec


@dataclass(frozen=True)
class Family:
    """Builder of one ``model_type``.

    graphs: file stem -> function (builder, positions) that fills a builder with that graph;
    ``positions`` is the number of tokens the decoder's tables hold.
    max_context: tokens the model was made for.
    model_spec(checkpoint, max_context) and image_spec(checkpoint): what the manifest says about the
    model.
    """

    model_type: str
    graphs: Mapping[str, Callable[[GraphBuilder, int], None]]
    max_context: Callable[[Checkpoint], int]
    model_spec: Callable[[Checkpoint, int], ModelSpec]
    image_spec: Callable[[Checkpoint], ImageSpec]
