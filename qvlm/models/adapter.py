"""Where a model keeps its parts: one frozen value per architecture, and the few functions that read it.

Generic code asks the adapter and holds no fact about any family. A new architecture is one file with one ``Adapter``
and one line in ``qvlm/models/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qvlm.errors import CheckpointError


@dataclass(frozen=True)
class ScalePair:
    """A scale per channel of what ``targets`` read folds here: into their columns, and its inverse into ``source``.

    Paths are relative to each layer of ``component``; a leading "/" makes one a full module name, "" is the layer.
    source: a norm (gain and bias) or a linear (rows and bias) whose output reaches the targets through operations
    that commute with a scale per channel only. owner: the module whose output error judges a candidate scale.
    values: the source is an attention's value projection, the target what reads its heads; query heads that share a
    value head share its scales.
    """

    component: str
    source: str
    targets: tuple[str, ...]
    owner: str
    values: bool = False


@dataclass(frozen=True)
class Residual:
    """A decoder's residual stream behind RMSNorms without bias, so that a rotation of it passes them.

    embedding: full name of the token embedding; entries: linears outside the decoder whose outputs enter the stream,
    behind its first layers too, as fnmatch patterns on full names; writers: paths in each layer of linears that add to
    it; vectors: full names of parameters [hidden] that enter as they are. What reads the stream are the targets of the
    text and head pairs whose source is a norm.
    """

    embedding: str
    entries: tuple[str, ...]
    writers: tuple[str, ...]
    vectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """Architecture facts. Paths are module names in the tree that transformers builds.

    vision_layers and text_layers name the ModuleLists of repeated layers; projector and head name single modules,
    each treated as a component of one layer (``projectors`` beside the projector are layers too). ``pixels`` names the
    module whose one argument are the pixels of all images, [N, 3, H, W] or a row per patch. ``image_tokens``: tokens of
    a usual image. ``live_vision_layers``: how many vision layers (from the first) reach the language model; later ones
    are dead, not quantized and not exported.
    ``embeddings`` names what turns tokens and pixels into hidden states: nn.Embedding, nn.Conv2d without bias, or
    nn.Conv3d whose inputs are patches already.
    ``keep_float`` maps fnmatch patterns on full linear names to the reason they are never quantized. scale_pairs:
    where channel scales fold; ``unfolded`` maps patterns of the linears without a pair to the reason. head_dim(config,
    component): width of an attention head. residual: None where no rotation folds. remembered: attributes in which the
    model keeps something of the last prompt; they are None before each new one. projectors: a ModuleList of
    further projectors that read the outputs of single vision layers, "" for none; they run before ``projector``.
    deepstack: the decoder's argument with their features, which it adds behind its first layers.
    projector_layers: a ModuleList of layers that run in order before ``projector`` and are part of the component.
    vision_output: the module whose output enters the projector, where what the first argument of ``projector`` holds
    is something else. tail: what a hidden state passes between the last text layer and the head, where the module that
    owns the layers adds something in front of them too.
    refusal(config): why a config.json of this model type is not supported, "" if it is. chat_template: for processors
    that have none. images: most images that the processor takes in one prompt, None for any number. forward_hook: a
    pre-hook with keywords that gives the model's forward what it wants besides ids, pixels and a cache.
    """

    model_type: str
    vision_layers: str
    projector: str
    text_layers: str
    head: str
    pixels: str
    image_token_id: Callable[[Any], int]
    image_tokens: Callable[[Any], int]
    live_vision_layers: Callable[[Any], int]
    head_dim: Callable[[Any, str], int]
    embeddings: tuple[str, ...] = ()
    keep_float: Mapping[str, str] = field(default_factory=dict)
    scale_pairs: tuple[ScalePair, ...] = ()
    unfolded: Mapping[str, str] = field(default_factory=dict)
    residual: Residual | None = None
    remembered: tuple[str, ...] = ()
    projectors: str = ""
    deepstack: str = ""
    projector_layers: str = ""
    vision_output: str = ""
    tail: tuple[str, ...] = ()
    refusal: Callable[[Mapping[str, Any]], str] = lambda config: ""
    chat_template: str = ""
    images: int | None = None
    forward_hook: Callable[..., tuple[Any, Any]] | None = None

    def forget(self, model: nn.Module) -> None:
        """Make the model as it is before its first prompt."""
        for path in self.remembered:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, None)

    def tied(self, model: nn.Module) -> bool:
        """True if the head's weight is the token table's, which is stored once, under the table's name."""
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        return model.get_submodule(self.head).weight is table.weight

    def layer_names(self, model: nn.Module, component: str) -> tuple[str, ...]:
        """Full names of a component's layers in the order they run; CheckpointError if the module tree differs."""
        paths = {"vision": self.vision_layers, "text": self.text_layers}
        path = {**paths, "projector": self.projector, "head": self.head}[component]
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            # Module trees moved between releases of transformers (CLIP's in 5.6).
            raise CheckpointError(
                f"{self.model_type}: this transformers builds no module {path}. Install the release in constraints.txt."
            ) from error
        if component == "projector" and (before := self.projectors or self.projector_layers):
            count = len(list(model.get_submodule(before).children()))
            return (*(f"{before}.{i}" for i in range(count)), path)
        if component not in paths:
            return (path,)
        count = len(list(module.children()))
        if component == "vision":
            count = min(count, self.live_vision_layers(model.config))
        return tuple(f"{path}.{i}" for i in range(count))

    def linears(self, model: nn.Module, component: str) -> dict[str, nn.Linear]:
        """Full name -> Linear of every linear that a recipe may quantize, in module order."""
        from fnmatch import fnmatchcase

        found: dict[str, nn.Linear] = {}
        for layer in self.layer_names(model, component):
            found.update(linears_below(model, layer))
        return {
            name: linear
            for name, linear in found.items()
            if not any(fnmatchcase(name, pattern) for pattern in self.keep_float)
        }


def linears_below(model: nn.Module, layer: str) -> dict[str, nn.Linear]:
    """Full name -> Linear for each nn.Linear in (or being) the module ``layer``."""
    root = model.get_submodule(layer)
    return {
        f"{layer}.{name}" if name else layer: module
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear)
    }
