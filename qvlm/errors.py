"""Every exception that qvlm and qvlm_export raise on purpose.

QvlmError                    base; a command line prints it as one line and exits with 1
├── RecipeError              a recipe that cannot be applied (unknown name, group size that does not divide, ...)
├── CheckpointError          a model directory that is missing, truncated or inconsistent
│   └── UnsupportedModelError  a model_type without an adapter or builder
├── CalibrationError         calibration or evaluation data that cannot be used
├── ExportError              a graph that cannot be built for a target, or an engine that does not compile
└── VerificationError        an export that does not reproduce its goldens

A message says where, what was found, what was expected and what to do.
"""


class QvlmError(Exception):
    """Base of all errors raised on purpose."""


class RecipeError(QvlmError):
    """A recipe that cannot be applied."""


class CheckpointError(QvlmError):
    """A model directory that is missing, truncated or inconsistent."""


class UnsupportedModelError(CheckpointError):
    """A model_type without an adapter or a builder."""


class CalibrationError(QvlmError):
    """Calibration or evaluation data that cannot be used."""


class ExportError(QvlmError):
    """A graph that cannot be built for a target, or an engine that does not compile."""


class VerificationError(QvlmError):
    """An export that does not reproduce its goldens."""
