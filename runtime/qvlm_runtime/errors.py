"""Every exception that qvlm_runtime raises on purpose.

RuntimeFault          base; qvlm-run prints it as one line and exits with 1
├── FolderError       a model folder that is missing, altered or of another schema
├── SessionError      a backend that cannot open or run a graph
├── PromptError       a prompt that cannot be answered (too long, images and markers differ,
│                     a bad option)
├── ImageError        an image that cannot be read
├── CapacityError     no memory is left now; the same request may succeed when others have ended
└── ServeError        a server that cannot start as it was asked to
"""


class RuntimeFault(Exception):
    """Base of all errors raised on purpose."""


class FolderError(RuntimeFault):
    """A model folder that is missing, altered or of another schema."""


class SessionError(RuntimeFault):
    """A backend that cannot open or run a graph."""


class PromptError(RuntimeFault):
    """A prompt that cannot be answered."""


class ImageError(RuntimeFault):
    """An image that cannot be read."""


class CapacityError(RuntimeFault):
    """What is asked exceeds the memory that is free now, not what the model can do."""


class ServeError(RuntimeFault):
    """A server that cannot start as it was asked to."""
