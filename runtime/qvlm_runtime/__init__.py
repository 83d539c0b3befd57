"""Answer questions about images with a model folder written by qvlm-export.

    from qvlm_runtime import load
    with load("out") as model:
        print(model.generate("Is the door open?", images=["door.jpg"]).text)

Layers, from the text down: model (prompts, folders), generate (the loop), decoder (one sequence),
cache, backend (the engine protocol), ort. Importing this package loads NumPy and nothing heavier.
"""

from qvlm_runtime.errors import FolderError, ImageError, PromptError, RuntimeFault, SessionError
from qvlm_runtime.generate import Timings
from qvlm_runtime.model import Generation, Model, Stream, load

__all__ = [
    "FolderError",
    "Generation",
    "ImageError",
    "Model",
    "PromptError",
    "RuntimeFault",
    "SessionError",
    "Stream",
    "Timings",
    "load",
]
