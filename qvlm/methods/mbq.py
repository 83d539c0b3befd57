"""MBQ: AWQ's channel scales with the error of image and text tokens balanced by how much the loss feels them.

Paper: Li et al., "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", CVPR 2025, arXiv 2412.19509.

Objective of ``methods.awq`` with p = 1 and c_n = r on every image token, 1 on every text token. To first order the
loss L moves by at most sum_n |dL/df_n| |f_n' - f_n|, so a kind of token weighs as its mean gradient:

1. L: the cross-entropy of each sample's answer in the float model. One backward pass gives dL/df at the output f of
   every attention and MLP of the decoder.
2. r = G_image / G_text, G the mean of |dL/df_n| over channels and over the tokens of a kind, of all samples.
3. r is raised to its median over the layers where it is below it, for attentions and for MLPs apart.
4. Steps 1 to 4 of ``methods.awq``.

What we do differently: text tokens are all that are no image token (the authors: those of the answer); the vision
tower and the projector see one kind of token, all weigh alike there.

Cost: AWQ's and one forward and backward pass of the decoder per sample, whose activations are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm.capture import Sample, Stream, capture_stream
from qvlm.errors import CalibrationError
from qvlm.fold import points
from qvlm.methods.method import Context
from qvlm.progress import Progress


def gradient_ratios(context: Context, progress: Progress) -> dict[str, float]:
    """r of every attention and MLP of the decoder, by full module name.

    CalibrationError if no sample has an answer, an image and text: there is nothing to balance then.
    """
    stream = capture_stream(context.model, context.adapter, "text", context.samples)
    found = points(context.model, context.adapter, "text", context.formats["text"])
    branches = dict.fromkeys(p.branch(stream.names[p.index]) for p in found)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in branches}  # image, text
    tokens = torch.zeros(2, dtype=torch.float64)
    for number, sample in enumerate(context.samples):
        progress("gradients", number, len(context.samples))
        if not bool(sample.answer_mask[1:].any()) or not bool(sample.image_mask.any()):
            continue
        image = sample.image_mask
        for name, gradient in output_gradients(context.model, stream, sums, sample).items():
            size = gradient.abs().double().mean(-1).reshape(-1)
            sums[name] += torch.stack([size[image].sum(), size[~image].sum()])
        tokens += torch.stack([image.sum(), (~image).sum()])
    progress("gradients", len(context.samples), len(context.samples))
    if not bool((tokens > 0).all()):
        raise CalibrationError(
            "option balance: no calibration sample has an image and an answer. Give some that have, or use awq."
        )
    raw = {name: float((s[0] / tokens[0]) / (s[1] / tokens[1])) for name, s in sums.items()}
    return raised_to_median(raw)


def raised_to_median(ratios: Mapping[str, float]) -> dict[str, float]:
    """Each ratio, at least the median of those whose name ends alike (attentions, MLPs)."""
    kinds = {name: name.rpartition(".")[2] for name in ratios}
    medians = {
        kind: float(np.median([r for name, r in ratios.items() if kinds[name] == kind]))
        for kind in set(kinds.values())
    }
    return {name: max(ratio, medians[kinds[name]]) for name, ratio in ratios.items()}


def output_gradients(
    model: nn.Module, stream: Stream, names: Mapping[str, Any], sample: Sample
) -> dict[str, Tensor]:
    """dL / d(output) [1, tokens, hidden] of the named modules, L the mean cross-entropy of the sample's answer."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            # The weights ask for no gradient; the decoder's input does.
            if args:
                return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
            return args, {
                **kwargs,
                "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True),
            }

        hook = stream.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(hook.remove)
        for name in names:

            def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        logits = model(**sample.model_inputs()).logits[0, :-1]
        counted = sample.answer_mask[1:]
        loss = F.cross_entropy(logits[counted], sample.input_ids[0, 1:][counted])
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return dict(zip(outputs, gradients, strict=True))
