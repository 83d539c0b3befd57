"""From a checkpoint to the graphs of one target. The public entry of the graph exporter."""

from __future__ import annotations

from pathlib import Path

from qvlm import __version__
from qvlm.checkpoint import Checkpoint
from qvlm.errors import ExportError
from qvlm.progress import Progress
from qvlm_export.graph import GraphBuilder
from qvlm_export.image_limits import NO_LIMITS, ImageLimits, limited
from qvlm_export.linear_plan import check_deployable
from qvlm_export.models import builder_for
from qvlm_export.targets import Target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.image_spec import ImageSpec
from qvlm_runtime.manifest import ModelSpec, TargetSpec


def build(
    checkpoint: Checkpoint,
    target: Target,
    out_dir: Path,
    max_context: int | None,
    progress: Progress,
) -> TargetSpec:
    """Write ``out_dir/<target>/<graph>.onnx`` and ``.onnx.data`` for every graph of the model's
    family.

    ``max_context`` bounds the tokens (default: what the model was made for). Reads one tensor at a
    time; the same checkpoint gives the same bytes. Raises ExportError (a format no engine runs, a
    tensor that does not fit the target, a full disk) or UnsupportedModelError; files already
    complete stay, none is half-written.
    """
    family = builder_for(checkpoint)
    check_deployable(checkpoint)
    positions = context(checkpoint, max_context)
    graphs: dict[str, str] = {}
    for stem, fill in family.graphs.items():
        builder = GraphBuilder(stem, target, Weights(checkpoint, target.dtype))
        fill(builder, positions)
        graphs[stem] = f"{target.name}/{stem}.onnx"
        write_model(builder.model(__version__), out_dir / graphs[stem], progress)
    return TargetSpec(target.dtype, target.opset, target.cache, graphs)


def context(checkpoint: Checkpoint, max_context: int | None) -> int:
    """Tokens the decoder holds; ExportError for more than the model was made for."""
    limit = builder_for(checkpoint).max_context(checkpoint)
    if max_context is None:
        return limit
    if not 2 <= max_context <= limit:
        raise ExportError(f"max_context {max_context}: the model takes 2 to {limit} positions")
    return max_context


def model_spec(checkpoint: Checkpoint, max_context: int | None = None) -> ModelSpec:
    """The numbers the runtime needs, from the checkpoint's config and tokenizer files."""
    return builder_for(checkpoint).model_spec(checkpoint, context(checkpoint, max_context))


def image_spec(checkpoint: Checkpoint, limits: ImageLimits = NO_LIMITS) -> ImageSpec:
    """The image processor's settings, within the limits. ExportError as ``limited``."""
    return limited(builder_for(checkpoint).image_spec(checkpoint), limits)
