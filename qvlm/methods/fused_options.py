"""Options of the method ``fused``: names, defaults, and what is refused. What each does: ``methods.fused``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qvlm import modality
from qvlm.errors import RecipeError
from qvlm.hessian import Factored, Statistics
from qvlm.methods import block_rounding, gptaq, gptq
from qvlm.methods.held_out import split
from qvlm.recipe import Recipe
from qvlm.scales import OBJECTIVES
from qvlm.signed_rounding import Settings as Descent


@dataclass(frozen=True)
class Settings:
    """All options with their defaults; RecipeError on a value that makes no sense."""

    weights: str = "uniform"
    temper: float = 0.5
    mix: float = 0.5  # image tokens' share of the weight under "modality"
    scales: str = "conditional"
    start: str = "residual"
    alpha: str | float = "auto"
    signed_bits: int = 2  # scales of either sign at so few bits, in formats that have them
    damping: float = 0.01
    shrinkage: float = 0.05
    sweeps: int = 4
    refits: int = 1
    partition: str = "entropy"
    depth: int = 3
    solver: str = "gradient"
    solver_bits: int = 3
    loss: str = "output"
    steps: int = 60  # at most
    passes: float = 5.0  # over the fitted samples, at most
    batch: int = 4
    rate: float | None = None  # of the roundings; None: 1 / steps
    scale_rate: float = 0.1  # of the scales, as a share of rate
    every: int = 20

    def __post_init__(self) -> None:
        choices = {
            "weights": ("curvature", "modality", "vlmq", "uniform"),
            "scales": (*OBJECTIVES, "max"),
            "start": ("gptq", "gptaq", "residual", "nearest"),
            "partition": ("entropy", "fixed"),
            "solver": ("gradient", "grid", "none"),
            "loss": block_rounding.LOSSES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"option {name}: {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name in ("depth", "steps", "batch", "every", "passes"):
            value = getattr(self, name)
            if not 1 <= value < math.inf:
                raise RecipeError(f"option {name}: {value!r}, expected at least 1")
        if self.rate is not None and not (
            isinstance(self.rate, int | float) and 0 < self.rate < math.inf
        ):
            raise RecipeError(f"option rate: {self.rate!r}, expected a positive number")
        for name in ("temper", "shrinkage", "sweeps", "refits", "scale_rate"):
            if getattr(self, name) < 0:
                raise RecipeError(f"option {name}: {getattr(self, name)!r}, expected 0 or more")
        modality.check_mix(self.mix)
        _ = self.kernel  # refuses a damping that makes no sense

    @staticmethod
    def of(recipe: Recipe) -> Settings:
        """The recipe's values over the defaults."""
        gptaq.check_alpha(recipe)
        names = {field.name for field in fields(Settings)}
        return Settings(**{k: v for k, v in recipe.options.items() if k in names})

    @property
    def kernel(self) -> gptq.Settings:
        """What GPTQ's sweep takes."""
        return gptq.Settings(damping=self.damping)

    def factored(self, fit: Statistics) -> Factored:
        """The shrunk H with its factors."""
        return self.kernel.factored(fit.hessian, self.shrinkage)

    def descent(self, samples: int, seed: int) -> Descent:
        """Step 3's plan for so many samples: few samples are not gone through more than ``passes`` times."""
        fitted = len(split(samples)[0])
        steps = max(1, min(self.steps, math.ceil(self.passes * fitted / self.batch)))
        rate = self.rate or 1 / steps
        return Descent(steps, self.batch, rate, rate * self.scale_rate, self.every, seed)

    @property
    def staged(self) -> bool:
        """Is there anything behind the start, so that there is something to choose?"""
        return self.scales != "max" or self.sweeps > 0

    @property
    def asymmetric(self) -> bool:
        """Does the start aim at the float stream?"""
        return self.start in ("gptaq", "residual")
