"""What a float source's own files forbid, found before anything is quantized: that takes hours, reading settings does
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvlm.checkpoint import Checkpoint
from qvlm_export.build import context, image_spec
from qvlm_export.image_limits import ImageLimits
from qvlm_export.processor import chat_template, eos_token_ids


class Settings(Checkpoint):
    """A directory's settings as a checkpoint without tensors, which is all that a family's specs read."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory, self.config = directory, dict(config)
        self.linears, self.float_linears, self.method_report = {}, {}, {}


def check_settings(
    settings: Checkpoint, max_context: int | None, limits: ImageLimits, template: str = ""
) -> None:
    """ExportError or UnsupportedModelError for what the manifest could not be written from: no builder, a context the
    model does not have, image settings that do not fit the tower, limits that fit no image, no end token, no chat
    template. template: the one that quantizing gives to a family without.
    """
    context(settings, max_context)
    image_spec(settings, limits)
    eos_token_ids(settings)
    if not template:
        chat_template(settings)
