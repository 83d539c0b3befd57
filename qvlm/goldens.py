"""The goldens of a quantization: recorded on the float model, again behind its transforms, and on the quantized model.

What one golden holds is said by ``checkpoint.Golden``; how one side is recorded, by ``generate.golden_side``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm.capture import Sample, build_sample
from qvlm.checkpoint import Array, Golden
from qvlm.data import Question
from qvlm.errors import CalibrationError
from qvlm.generate import golden_side, golden_steps
from qvlm.models.adapter import Adapter
from qvlm.progress import Progress

# Inputs and outputs of one golden on one model.
Side = tuple[dict[str, Array], dict[str, Array]]
# How far a transform may move logits, relative. Every changed weight rounds once, 2^-24; some hundred of them behind
# each other, their errors enlarged by softmax up to 32 times (as the exporter's bounds have it), stay below 2^-24 *
# sqrt(1000) * 32 = 6e-5, and outlier channels that a rotation mixes with others cost a digit more: 2^-10. A wrong fold
# moves logits by a share of themselves.
TRANSFORM_ROUNDING = 2.0**-10


@dataclass(frozen=True)
class Recorder:
    """Records goldens of ``model``, which is quantized in place between the calls."""

    model: nn.Module
    adapter: Adapter
    processor: Any
    progress: Progress

    def prompts(self, questions: Sequence[Question], count: int) -> list[Sample]:
        """The first ``count`` questions with an image, without their answers."""
        chosen = [question for question in questions if question.images][:count]
        if not chosen:
            raise CalibrationError("no calibration sample has an image. Give some that have.")
        image_token = self.adapter.image_token_id(self.model.config)
        return [
            build_sample(self.processor, q.open_images(), q.prompt, "", image_token) for q in chosen
        ]

    def floats(self, prompts: Sequence[Sample]) -> list[Side]:
        """Inputs and float outputs of every golden, on the float model's greedy tokens."""
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        steps = golden_steps(prompts, config.vocab_size, config.max_position_embeddings)
        sides = []
        for number, prompt in enumerate(prompts):
            self.progress("float goldens", number, len(prompts))
            sides.append(golden_side(self.model, self.adapter, prompt, steps))
        self.progress("float goldens", len(prompts), len(prompts))
        return sides

    def transformed(
        self,
        prompts: Sequence[Sample],
        sides: Sequence[Side],
        transforms: Sequence[str],
    ) -> list[Side]:
        """The float side of every golden after the transforms, on the original model's tokens.

        Logits and keys stay the original's; image features and values may now have another scale or basis, in which
        the quantized model is compared. Raises CalibrationError if the logits moved by more than rounding.
        """
        changed = []
        for number, (prompt, (inputs, outputs)) in enumerate(zip(prompts, sides, strict=True)):
            self.progress("transformed goldens", number, len(prompts))
            forced = torch.from_numpy(inputs["tokens"])[None]
            _, now = golden_side(self.model, self.adapter, prompt, forced.shape[1], forced)
            moved = np.linalg.norm(now["logits"] - outputs["logits"])
            if not moved <= TRANSFORM_ROUNDING * np.linalg.norm(outputs["logits"]):
                names = ", ".join(transforms)
                raise CalibrationError(
                    f"transforms {names}: golden {number} has logits that moved by {moved:.3g} (norm), expected float "
                    "rounding only. Leave the transforms out."
                )
            kept = {key: now[key] for key in ("image_features", "value")}
            changed.append((inputs, {**outputs, **kept}))
        self.progress("transformed goldens", len(prompts), len(prompts))
        return changed

    def quantized(
        self,
        prompts: Sequence[Sample],
        float_sides: Sequence[Side],
    ) -> list[Golden]:
        """The quantized model teacher-forced on the float model's tokens."""
        goldens = []
        for number, (prompt, (inputs, outputs)) in enumerate(
            zip(prompts, float_sides, strict=True)
        ):
            self.progress("quantized goldens", number, len(prompts))
            forced = torch.from_numpy(inputs["tokens"])[None]
            _, quant = golden_side(self.model, self.adapter, prompt, forced.shape[1], forced)
            goldens.append(Golden(inputs, {"float": outputs, "quant": quant}))
        self.progress("quantized goldens", len(prompts), len(prompts))
        return goldens


def twice(sides: Sequence[Side]) -> list[Golden]:
    """Goldens of a model that stayed float: both outputs are the same."""
    return [Golden(inputs, {"float": outputs, "quant": outputs}) for inputs, outputs in sides]
