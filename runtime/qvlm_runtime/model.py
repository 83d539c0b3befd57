"""A loaded model folder: prompt and images in, text out. ``load`` (loading.py) opens it, ``Model`` answers.

A Model may answer several questions at once, from several threads; what belongs to one answer lives
in its Stream, what belongs to a conversation in its Conversation. The image-feature cache and the
budget of cache memory are shared, and lock themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qvlm_runtime.aio import AsyncStream
from qvlm_runtime.backend import DeviceArray, Session, as_host
from qvlm_runtime.budget import CacheBudget
from qvlm_runtime.chat import ChatTemplate, Message, chat, check_list
from qvlm_runtime.context import Context
from qvlm_runtime.conversation import Conversation, WhenFull
from qvlm_runtime.decoder import Decoder, Features
from qvlm_runtime.device_array import device_array
from qvlm_runtime.errors import ImageError, PromptError
from qvlm_runtime.features import FeatureCache, Picture
from qvlm_runtime.generate import Timings, never, new_token_limit
from qvlm_runtime.grammar import JsonGrammars
from qvlm_runtime.image import whole_layout
from qvlm_runtime.image_spec import Layout, WholeImage
from qvlm_runtime.manifest import Manifest
from qvlm_runtime.options import OptionArguments, Options
from qvlm_runtime.positions import prompt_positions
from qvlm_runtime.prompt import Prompt, prompt_tokens
from qvlm_runtime.stream import Generation, Request, Stream
from qvlm_runtime.tokenizer import Tokenizer
from qvlm_runtime.vision import extremes, prepare

if TYPE_CHECKING:
    from typing_extensions import Unpack

Question = str | Sequence[Message]


@dataclass(eq=False)
class Model:
    """The parts of one folder and target. Made by ``load``; usable as a context manager."""

    manifest: Manifest
    target: str
    tokenizer: Tokenizer
    template: ChatTemplate
    vision: Session
    decoder: Decoder
    backend: str = "ort"
    feature_cache: FeatureCache = field(default_factory=FeatureCache)
    budget: CacheBudget = field(default_factory=CacheBudget)
    stop_ids: frozenset[int] = field(init=False)
    grammars: JsonGrammars = field(init=False)
    _feature_salt: str = field(init=False)

    def __post_init__(self) -> None:
        spec = self.manifest.model
        self.stop_ids = frozenset(spec.eos_token_ids)
        self.grammars = JsonGrammars(self.tokenizer, spec.vocab_size, self.stop_ids)
        self._feature_salt = _feature_salt(self.manifest, self.target, self.backend)

    def generate(
        self, question: Question, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Generation:
        """Answer a question; ``options`` are those of options.py and sample.py.

        question: text, or chat messages in Hugging Face's form. images, in the order of their
        markers: Pillow images, paths, encoded bytes, or uint8 arrays (NumPy, or of any library that
        speaks ``__array_interface__`` or DLPack on the CPU); on a CUDA backend, and where an image
        is one tile, also arrays in CUDA memory that are preprocessed (pixel_values [3, H, W] of the
        target's float type) and keep their contents until the answer, or the conversation, has
        ended.

        PromptError, ImageError, CapacityError or SessionError.
        """
        return self.stream(question, images, **options).read()

    def stream(
        self, question: Question, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Stream:
        """As ``generate``, as an iterator over pieces of the text.

        Options, prompt and images are checked here and the cache is reserved; the graphs run when
        the iterator is read.
        """
        request = self.request(question, images, Options(**options), self.decoder.max_rows)
        rows = len(request.prompt.token_ids) + request.limit
        context = Context(self.decoder, rows, self.budget)
        return Stream(self, request, context, lambda failed: context.close())

    def astream(
        self, question: Question, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> AsyncStream:
        """As ``stream``, for ``async for``; all work is done in the event loop's threads."""
        return AsyncStream(lambda: self.stream(question, images, **options))

    async def agenerate(
        self, question: Question, images: Sequence[Any] = (), **options: Unpack[OptionArguments]
    ) -> Generation:
        """As ``generate``, awaited. Cancelling the task ends the answer within one token."""
        return await self.astream(question, images, **options).read()

    def conversation(
        self,
        system: str | None = None,
        *,
        max_rows: int | None = None,
        when_full: WhenFull = "error",
    ) -> Conversation:
        """Begin a conversation whose turns keep the cache rows that they share.

        max_rows: tokens it can hold, prompt and answers; None is all that the graph has.
        ``cache_bytes(max_rows)`` is what it takes, reserved here: CapacityError if ``cache_limit``
        has no room. when_full: see conversation.py.
        """
        rows = self.decoder.max_rows if max_rows is None else max_rows
        return Conversation(self, system, rows, when_full)

    def cache_bytes(self, rows: int) -> int:
        """Bytes of a cache with room for that many tokens."""
        return self.decoder.cache_bytes(rows)

    def request(
        self,
        question: Question,
        images: Sequence[Any],
        options: Options,
        rows: int,
        dropped_messages: int = 0,
    ) -> Request:
        """Check and prepare everything that one answer needs, for a cache of ``rows`` rows."""
        vocab = self.manifest.model.vocab_size
        outside = [token for token in options.logit_bias if token >= vocab]
        if outside:
            raise PromptError(f"logit_bias: token {outside[0]}, expected ids below {vocab}.")
        schema = options.json_schema
        constraint = None if schema is None else self.grammars.constraint(schema)
        start = time.perf_counter()
        prompt = self.prepare(question, images)
        timings = Timings(time.perf_counter() - start, images=len(prompt.pictures))
        timings.prompt_tokens = len(prompt.token_ids)
        limit = new_token_limit(timings.prompt_tokens, options.max_new_tokens, rows)
        chooser = options.chooser(prompt.token_ids, constraint)
        return Request(prompt, options, chooser, limit, timings, dropped_messages)

    def prepare(self, question: Question, images: Sequence[Any] = ()) -> Prompt:
        """Chat template, tokens, image markers and preprocessed images of a question.

        PromptError if markers and images differ, ImageError if an image cannot be read.
        """
        talk = chat(question, images)
        text = self.template.render(talk.messages)
        least = [self._least_layout(image) for image in talk.images]
        # The cheap test comes first: a prompt of a thousand images is refused before any is read.
        token_ids, image_index = self._tokens(text, least)
        new_token_limit(len(token_ids), None, self.decoder.max_rows)
        pictures = self.pictures(talk.images)
        layouts = [picture.layout for picture in pictures]
        if layouts != least:
            token_ids, image_index = self._tokens(text, layouts)
        positions = prompt_positions(self.manifest.model.positions, image_index, layouts)
        return Prompt(text, token_ids, image_index, positions, pictures)

    def count_tokens(self, question: Question, images: Sequence[Any] = ()) -> int:
        """Tokens of a question's prompt. Images are read only where their size decides how many
        tokens they take. PromptError and ImageError as in ``prepare``.
        """
        talk = chat(question, images)
        text = self.template.render(talk.messages)
        layouts = [self._least_layout(image) for image in talk.images]
        if not isinstance(self.manifest.image, WholeImage):
            layouts = [picture.layout for picture in self.pictures(talk.images)]
        return len(self._tokens(text, layouts)[0])

    def _least_layout(self, image: Any) -> Layout:
        """A picture's own layout, else the one that takes the fewest rows."""
        return image.layout if isinstance(image, Picture) else extremes(self.manifest.image)[0]

    def _tokens(
        self, text: str, layouts: Sequence[Layout]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of a rendered chat with expanded image markers, and image_index."""
        # As transformers does: a template that writes the first token itself gets no second one.
        bos = self.manifest.model.template_tokens.get("bos_token")

        def encode(words: str) -> list[int]:
            return self.tokenizer.encode(words, not (bos and words.startswith(bos)))

        found = prompt_tokens(text, self.manifest.model, layouts, encode)
        if not found[0]:
            raise PromptError("the prompt is empty, expected at least one token.")
        return found

    def pictures(self, images: Sequence[Any]) -> tuple[Picture, ...]:
        """Preprocess images, each once; a Picture is passed on as it is. ImageError, or PromptError
        for an image without a list around it.
        """
        check_list(images)
        return tuple(
            source if isinstance(source, Picture) else self._picture(source, f"image {i + 1}")
            for i, source in enumerate(images)
        )

    def _picture(self, source: Any, where: str) -> Picture:
        # On the CPU such an array goes on, to be refused by the name of its device.
        array = None if self.backend == "ort" else device_array(source, where)
        spec = self.manifest.image
        if array is None:
            layout, inputs = prepare(source, spec, where)
            return Picture.of(inputs, layout, self._feature_salt)
        if not isinstance(spec, WholeImage):
            raise ImageError(
                f"{where}: an array in CUDA memory, expected an image in host memory, where this "
                "model's images are cut into tiles or patches. Copy the array first."
            )
        info = self.vision.inputs["pixel_values"]
        if (array.dtype, array.shape) != (info.dtype, info.shape[1:]):
            raise ImageError(
                f"{where}: {array.dtype} {list(array.shape)} in CUDA memory, expected "
                f"preprocessed pixel_values {info.dtype} {list(info.shape[1:])}."
            )
        return Picture.on_device(array, whole_layout(spec, 0, 0))

    def features(
        self, pictures: Sequence[Picture], timings: Timings, halt: Callable[[], bool] = never
    ) -> Features | None:
        """Features of the pictures in order; None without any.

        Those in the cache are taken from it and counted in timings.cached_images. ``halt`` is asked
        before each run of the graph; when it says so the rest is left out.
        """
        pieces = []
        for picture in pictures:
            found = self.feature_cache.get(picture.key) if picture.hashed else None
            if found is None:
                if halt():
                    break
                found = self.image_features([picture])
                if picture.hashed:
                    self.feature_cache.put(picture.key, found)
            else:
                timings.cached_images += 1
            pieces.append(found)
        return Features.join(self.decoder.session, pieces) if pieces else None

    def image_features(self, pictures: Sequence[Picture]) -> Features:
        """Run the vision graph, one image at a time; the result stays where the engine computes.

        One at a time, so that memory does not grow with the number of images.
        """
        pieces = [self._one_image(picture) for picture in pictures]
        return Features.join(self.decoder.session, pieces)

    def _one_image(self, picture: Picture) -> Features:
        """A graph that fixes the number of tiles to one is run tile by tile."""
        layout, width = picture.layout, self.manifest.model.feature_size
        output = self.vision.outputs["image_features"]
        buffer = self.vision.buffer(layout.rows * width, output.dtype)
        runs = layout.tiles if self.vision.inputs["pixel_values"].shape[0] == 1 else 1
        binding, rows = self.vision.binding(), layout.rows // runs
        for run in range(runs):
            for name, array in picture.inputs.items():
                if isinstance(array, DeviceArray):
                    binding.place(name, self.vision.borrow(array), 0, array.shape)
                else:
                    piece = array[run : run + 1] if runs > 1 else array
                    binding.host(name, as_host(piece, self.vision.inputs[name].dtype))
            binding.place("image_features", buffer, run * rows * width, (rows, width))
            binding.run()
        return Features(buffer, layout.rows)

    def close(self) -> None:
        """Release the graphs and let go of the image features; a later generation raises SessionError."""
        self.feature_cache = FeatureCache(0)
        self.vision.close()
        self.decoder.session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _feature_salt(manifest: Manifest, target: str, backend: str) -> str:
    """What image features depend on besides the pixels: the processor, the graph, its dtype, and the
    backend, whose memory they are in.
    """
    spec = manifest.targets[target]
    graph = spec.graphs["vision"]
    digests = [f.sha256 for path, f in sorted(manifest.files.items()) if path.startswith(graph)]
    return f"{manifest.image!r} {spec.dtype} {backend} {digests}"
