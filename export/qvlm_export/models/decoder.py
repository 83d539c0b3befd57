"""What decoders share: the inputs of the folder's contract, the way in and the way out, the manifest's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from qvlm.checkpoint import Checkpoint
from qvlm_export.attention import HeadShape
from qvlm_export.graph import GraphBuilder
from qvlm_export.linear_plan import has_linear
from qvlm_export.ops import embedding_merge
from qvlm_export.processor import eos_token_ids, template_tokens, token_text
from qvlm_export.qdq import linear, lookup
from qvlm_runtime.manifest import ModelSpec


class Sizes(Protocol):
    """What a decoder's config has, whatever its layers are."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def heads(self) -> HeadShape: ...


@dataclass(frozen=True)
class Entered:
    """x [1, S, hidden]: tokens and image features merged; further: what is added behind the first layers."""

    x: ir.Value
    further: list[ir.Value]
    position_ids: ir.Value


def decoder_inputs(
    b: GraphBuilder, c: Sizes, table: str, parts: Sequence[int], axes: int
) -> Entered:
    """Declares input_ids, image_index, position_ids [axes, S] and image_features, and looks them up in ``table``.

    parts: numbers in a row of image_features, the embedding first (``embedding_merge``).
    """
    ids, image_index = (
        b.input(name, ir.DataType.INT64, (1, "S")) for name in ("input_ids", "image_index")
    )
    position_ids = b.input("position_ids", ir.DataType.INT64, (axes, "S"))
    features = b.input("image_features", b.float_type, ("M", sum(parts)))
    with b.scope("embed"):
        text = lookup(b, ids, table, (c.vocab_size, c.hidden_size))
        x, further = embedding_merge(b, text, image_index, features, parts)
    return Entered(x, further, position_ids)


def decoder_logits(b: GraphBuilder, c: Sizes, x: ir.Value, head: str, table: str) -> None:
    """x [1, 1, hidden] behind the last norm to the output ``logits``, by the head or, where it is tied, the table."""
    if has_linear(b.weights.checkpoint, head):
        logits = linear(b, x, head)
    else:  # tied: the embedding's bytes are stored once
        shared = b.parameter(f"{table}.weight", (c.vocab_size, c.hidden_size))
        logits = b.op("MatMul", x, b.op("Transpose", shared, perm=[1, 0]))
    b.output(logits, "logits", b.float_type, (1, 1, c.vocab_size))


def decoder_spec(checkpoint: Checkpoint, c: Sizes, image_token_id: int, context: int) -> ModelSpec:
    """The manifest's numbers of a model with this decoder, one row of features as wide as a token."""
    return ModelSpec(
        family=str(checkpoint.config["model_type"]),
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        layers=c.num_hidden_layers,
        kv_heads=c.heads.kv_heads,
        head_dim=c.heads.head_dim,
        max_context=context,
        eos_token_ids=eos_token_ids(checkpoint),
        image_token=token_text(checkpoint, image_token_id),
        image_token_id=image_token_id,
        feature_size=c.hidden_size,
        template_tokens=template_tokens(checkpoint),
    )
