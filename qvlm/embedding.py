"""The token table and the patch projection as integers: what turns tokens and pixels into hidden states.

Both are outside the layers that methods walk, and both count: in a small model they are a tenth of all weights, at 16
bits a third of the bytes. They are rounded once, before the components, so that every method sees what they left.

* Token table (nn.Embedding [vocab, hidden], format w8a16): each row is looked up, never summed over, so there is no
  error to trade between weights; each row gets its own scale and is rounded to nearest.
* Patch projection (nn.Conv2d whose stride is its kernel, or nn.Conv3d that reads one patch a row, format w4a16 or
  w4a16-g64): a linear [out, numbers of a patch] over non-overlapping patches, solved by GPTQ (``methods.gptq``) with H
  from the samples' own patches.
  Neighbouring pixels are alike, so H is far from diagonal and the column-by-column correction matters most here.

Cost: one product [in, in] over all patches, one sweep. Torch simulation: the weight itself is replaced, because
activations stay float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm.capture import Sample
from qvlm.checkpoint import QuantizedLinear
from qvlm.errors import CalibrationError, RecipeError
from qvlm.hessian import Statistics
from qvlm.methods.gptq import gptq_matrix
from qvlm.methods.rtn import quantized_linear, round_to_nearest
from qvlm.models.adapter import Adapter
from qvlm.recipe import EMBEDDING, Format, Recipe
from qvlm.untie import HINT

TABLE_FORMATS = ("w8a16",)
PATCH_FORMATS = ("w4a16", "w4a16-g64")


def modules(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """Name -> module of every embedding a recipe may quantize; a table shared with the head is not among them."""
    tied = adapter.tied(model)
    found = {name: model.get_submodule(name) for name in adapter.embeddings}
    return {
        name: module
        for name, module in found.items()
        if not (tied and isinstance(module, nn.Embedding))
    }


def candidates(module: nn.Module) -> tuple[str, ...]:
    """Names of the formats this module may have."""
    return TABLE_FORMATS if isinstance(module, nn.Embedding) else PATCH_FORMATS


def shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the module's weight as a matrix."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def resolve(model: nn.Module, adapter: Adapter, recipe: Recipe) -> dict[str, Format]:
    """Name -> format of the embeddings a recipe quantizes; RecipeError for a format the module cannot have."""
    formats: dict[str, Format] = {}
    known = modules(model, adapter)
    for name in adapter.embeddings:
        format_ = recipe.format_of(EMBEDDING, name)
        if format_.weights is None:
            continue
        if name not in known:
            raise RecipeError(
                f"{name}: shares its weight with the head, which multiplies it. Keep it in float, or {HINT}."
            )
        if format_.name not in candidates(known[name]):
            raise RecipeError(
                f"{name}: format {format_.name!r}, expected float, {' or '.join(candidates(known[name]))}"
            )
        format_.weights.groups(shape(known[name])[1], name)
        formats[name] = format_
    return formats


def patches(module: nn.Conv2d | nn.Conv3d, sample: Sample) -> Tensor:
    """The inputs [tokens, numbers of a patch] of a patch projection on one sample."""
    assert sample.pixel_values is not None
    if isinstance(module, nn.Conv3d):
        return sample.pixel_values.reshape(-1, shape(module)[1])
    kernel = (int(module.kernel_size[0]), int(module.kernel_size[1]))
    unfolded = F.unfold(sample.pixel_values.flatten(0, -4), kernel, stride=kernel)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def quantize(
    model: nn.Module, formats: Mapping[str, Format], samples: Sequence[Sample]
) -> dict[str, QuantizedLinear]:
    """Integers [rows, columns] of each named embedding; the model stays as it is.

    CalibrationError if a patch projection is to be quantized and no sample has an image.
    """
    found = {}
    for name, format_ in formats.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            found[name] = _patch_projection(name, module, format_, samples)
        else:
            weight = module.weight
            assert isinstance(weight, Tensor)
            found[name] = round_to_nearest(weight, format_)
    return found


def _patch_projection(
    name: str, module: nn.Conv2d | nn.Conv3d, format_: Format, samples: Sequence[Sample]
) -> QuantizedLinear:
    assert format_.weights is not None
    seen = [sample for sample in samples if sample.pixel_values is not None]
    if not seen:
        raise CalibrationError(f"{name}: no sample has an image. Give some that have.")
    statistics = Statistics(shape(module)[1])
    for sample in seen:
        statistics.add(patches(module, sample))
    solution = gptq_matrix(module.weight.flatten(1), statistics.hessian, format_.weights)
    return quantized_linear(solution.quantized, format_)


@torch.no_grad()
def apply(model: nn.Module, quantized: Mapping[str, QuantizedLinear]) -> None:
    """Replace each embedding's weight by what its integers stand for, in place."""
    for name, one in quantized.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(torch.from_numpy(one.dequantize()).reshape(weight.shape))
