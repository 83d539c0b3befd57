"""Answer questions about images with a model folder written by qvlm-export.

    from qvlm_runtime import load
    with load("out") as model:
        print(model.generate("Is the door open?", images=["door.jpg"]).text)

Layers, from the text down: model (prompts, folders), conversation and stream (answers), generate
(the loop), context and decoder (one sequence), cache, backend (the engine protocol), ort. Importing
this package loads NumPy and nothing heavier.
"""

from qvlm_runtime.aio import AsyncStream
from qvlm_runtime.conversation import Conversation
from qvlm_runtime.errors import (
    CapacityError,
    FolderError,
    ImageError,
    PromptError,
    RuntimeFault,
    SessionError,
)
from qvlm_runtime.features import FeatureCache
from qvlm_runtime.generate import Timings
from qvlm_runtime.loading import load
from qvlm_runtime.model import Model
from qvlm_runtime.options import Options
from qvlm_runtime.sample import Score
from qvlm_runtime.stream import Generation, Stream

__all__ = [
    "AsyncStream",
    "CapacityError",
    "Conversation",
    "FeatureCache",
    "FolderError",
    "Generation",
    "ImageError",
    "Model",
    "Options",
    "PromptError",
    "RuntimeFault",
    "Score",
    "SessionError",
    "Stream",
    "Timings",
    "load",
]
