"""The families that can be exported: ``model_type`` of config.json -> its row."""

from qvlm.checkpoint import Checkpoint
from qvlm.errors import UnsupportedModelError
from qvlm_export.models.blip import BLIP_2
from qvlm_export.models.family import Family
from qvlm_export.models.internvl import INTERNVL
from qvlm_export.models.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from qvlm_export.models.qwen_vl import QWEN_VL
from qvlm_export.models.smolvlm import IDEFICS3, SMOLVLM

BUILDERS: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, SMOLVLM, IDEFICS3, INTERNVL),
        *QWEN_VL.values(),
        BLIP_2,
    )
}


def builder_for(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint; UnsupportedModelError listing those that exist."""
    found = checkpoint.config.get("model_type")
    if found not in BUILDERS:
        raise UnsupportedModelError(
            f"{checkpoint.directory / 'config.json'}: model_type {found!r} has no graph builder. "
            f"Supported: {', '.join(BUILDERS)}. A new family is one file in qvlm_export/models and one line in its "
            "__init__.py."
        )
    return BUILDERS[str(found)]
