"""Tokenizer and image processor of a directory as transformers makes them, and what theirs leaves out.

Some processors have no chat template, want a library for videos that nobody reads here, or drop images in silence.
What a family's lacks is said by its adapter (``chat_template``, ``images``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvlm.errors import CalibrationError, CheckpointError
from qvlm.models import ADAPTERS, Adapter
from qvlm.quiet import first_line, quiet


def load_processor(directory: Path) -> Any:
    """Tokenizer and image processor of a directory; CheckpointError if transformers cannot make them.

    A processor's video part is left out: it is made of torchvision, and no video is read here.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    auto: Any = AutoProcessor
    with quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            known: Any = PROCESSOR_MAPPING.get(type(config), None)
            if known is not None and "video_processor" in known.get_attributes():
                auto = _without_video(known)
            processor = auto.from_pretrained(directory, local_files_only=True, backend="pil")
            return _completed(processor, ADAPTERS.get(str(config.model_type)), directory)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(
                f"{directory}: tokenizer or image processor not loadable ({first_line(error)})"
            ) from error


def _completed(processor: Any, adapter: Adapter | None, directory: Path) -> Any:
    """A processor with its directory's chat template, or the one and the limit on images that its adapter names."""
    if processor.chat_template is None:  # older directories have it with the tokenizer
        processor.chat_template = processor.tokenizer.chat_template
    if adapter is not None and adapter.chat_template and not processor.chat_template:
        # Not every processor reads the directory's own.
        path = directory / "chat_template.jinja"
        own = path.read_text(encoding="utf-8") if path.is_file() else ""
        processor.chat_template = own or adapter.chat_template
    if adapter is not None and adapter.images is not None:
        processor.__class__ = _with_few_images(type(processor), adapter.images)
    return processor


def _with_few_images(processor: Any, most: int) -> Any:
    """A processor class that refuses more images in a prompt than ``most``, which it would leave out in silence."""

    class Few(processor):  # type: ignore[misc]
        def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
            count = len(images) if isinstance(images, list | tuple) else int(images is not None)
            if count > most:
                raise CalibrationError(
                    f"a prompt has {count} images, this model takes {most}. Give a question for each image."
                )
            return super().__call__(images, *args, **kwargs)

    return Few


def _without_video(processor: Any) -> Any:
    """A processor class whose ``video_processor`` is None."""
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

    makers: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}

    class Pictures(processor):  # type: ignore[misc]
        # SmolVLM's own asks the video part for its settings, whatever the conversation holds.
        apply_chat_template = ProcessorMixin.apply_chat_template

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def _get_arguments_from_pretrained(
            cls, directory: Any, processor_dict: Any = None, **kwargs: Any
        ) -> list[Any]:
            return [
                makers[name].from_pretrained(directory, **kwargs) if name in makers else None
                for name in cls.get_attributes()
            ]

    return Pictures
