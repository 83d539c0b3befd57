"""A loaded model folder: prompt and images in, text out. ``load`` opens it, ``Model`` answers.

A Model holds nothing that changes while it answers, so several threads may generate on it at once;
what belongs to one generation lives in its Stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qvlm_runtime import image as image_processing
from qvlm_runtime.backend import (
    FAST,
    PLAN_BACKENDS,
    Array,
    DeviceArray,
    Session,
    as_host,
    missing_tensors,
    open_session,
)
from qvlm_runtime.chat import ChatTemplate, Message, chat
from qvlm_runtime.decoder import Decoder, Features
from qvlm_runtime.device_array import device_array
from qvlm_runtime.engines import GRAPHS, Choice, choose
from qvlm_runtime.errors import ImageError, PromptError
from qvlm_runtime.generate import StopText, Timings, new_token_limit, tokens
from qvlm_runtime.manifest import Manifest, read_manifest, verify_files
from qvlm_runtime.sample import Sampling
from qvlm_runtime.tokenizer import Detokenizer, Tokenizer

Finish = Literal["stop", "stop_string", "length"]
Conversation = str | Sequence[Message]
_TEXT_FILES = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the graphs.

    image_index[i] is the row of image_features that token i takes, or -1: rows count up over all
    images in order. pixels is float32 [N, 3, H, W], or None without images; with images in CUDA
    memory among them, a list of one array for each.
    """

    text: str
    token_ids: tuple[int, ...]
    image_index: tuple[int, ...]
    pixels: NDArray[np.float32] | Sequence[Array | DeviceArray] | None


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    token_ids: every generated id, the end token included. finish: "stop" (an end token),
    "stop_string", or "length" (max_new_tokens).
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    timings: Timings


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
    _stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._stop_ids = frozenset(self.manifest.model.eos_token_ids)

    def generate(
        self,
        prompt: Conversation,
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Answer a prompt.

        prompt: text, or chat messages in Hugging Face's form. images: Pillow images, paths or uint8
        arrays, in the order of their markers; on a CUDA backend also arrays in CUDA memory that are
        preprocessed (pixel_values [3, H, W] of the target's float type). temperature 0 is greedy.
        stop strings end the text and are not part of it. max_new_tokens None: 256, or what the
        cache has room for.

        PromptError, ImageError or SessionError.
        """
        stream = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self,
        prompt: Conversation,
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Stream:
        """As ``generate``, as an iterator over pieces of the text.

        Options, prompt and images are checked here; the graphs run when the iterator is read.
        """
        sampling, stops = Sampling(temperature, top_k, top_p, seed), StopText(stop)
        timings = Timings()
        start = time.perf_counter()
        ready = self.prepare(prompt, images)
        timings.preprocess_s = time.perf_counter() - start
        timings.images = 0 if ready.pixels is None else len(ready.pixels)
        timings.prompt_tokens = len(ready.token_ids)
        limit = new_token_limit(timings.prompt_tokens, max_new_tokens, self.decoder.max_rows)
        return Stream(self, ready, sampling, stops, limit, timings)

    def prepare(self, prompt: Conversation, images: Sequence[Any] = ()) -> Prompt:
        """Chat template, tokens, image markers and pixels of a prompt.

        PromptError if markers and images differ, ImageError if an image cannot be read.
        """
        spec, talk = self.manifest.model, chat(prompt, images)
        text = self.template.render(talk.messages)
        # As transformers does: a template that writes the first token itself gets no second one.
        bos = spec.template_tokens.get("bos_token")
        ids = self.tokenizer.encode(text, not (bos and text.startswith(bos)))
        markers = ids.count(spec.image_token_id)
        if markers != len(talk.images):
            raise PromptError(
                f"the prompt has {markers} image markers ({spec.image_token}) and "
                f"{len(talk.images)} images, expected as many images as markers."
            )
        if not ids:
            raise PromptError("the prompt is empty, expected at least one token.")
        token_ids, image_index = expand_images(ids, spec.image_token_id, spec.tokens_per_image)
        # The cheap test comes first: a prompt of a thousand images is refused before any is read.
        new_token_limit(len(token_ids), None, self.decoder.max_rows)
        pixels = None
        if talk.images:
            pixels = self._pixels(talk.images)
        return Prompt(text, token_ids, image_index, pixels)

    def _pixels(self, images: Sequence[Any]) -> NDArray[np.float32] | list[Array | DeviceArray]:
        found = [device_array(image, f"image {i + 1}") for i, image in enumerate(images)]
        if not any(found):
            return image_processing.pixel_values(images, self.manifest.image)
        dtype, shape = self._pixel_tensor()
        for i, array in enumerate(found):
            if array is not None and (array.dtype, array.shape) != (dtype, shape):
                raise ImageError(
                    f"image {i + 1}: {array.dtype} {list(array.shape)} in CUDA memory, expected "
                    f"preprocessed pixel_values {dtype} {list(shape)}."
                )
        return [
            array or image_processing.pixel_values([image], self.manifest.image)[0]
            for image, array in zip(images, found, strict=True)
        ]

    def _pixel_tensor(self) -> tuple[str, tuple[int | None, ...]]:
        """Type and shape of one image as the vision graph takes it."""
        info = self.vision.inputs["pixel_values"]
        return info.dtype, info.shape[1:]

    def image_features(self, pixels: Sequence[Array | DeviceArray] | Array) -> Features:
        """Run the vision graph, one image at a time; the result stays where the engine computes.

        pixels: of each image [3, H, W], on the host or in CUDA memory. One at a time, so that
        memory does not grow with the number of images.
        """
        spec, dtype = self.manifest.model, self.vision.inputs["pixel_values"].dtype
        shape = (spec.tokens_per_image, spec.hidden_size)
        pieces = []
        for one in pixels:
            binding = self.vision.binding()
            if isinstance(one, DeviceArray):
                binding.place("pixel_values", self.vision.borrow(one), 0, (1, *one.shape))
            else:
                binding.host("pixel_values", as_host(one[None], dtype))
            buffer = self.vision.buffer(
                shape[0] * shape[1], self.vision.outputs["image_features"].dtype
            )
            binding.place("image_features", buffer, 0, shape)
            binding.run()
            pieces.append(Features(buffer, shape[0]))
        return Features.join(self.decoder.session, pieces)

    def close(self) -> None:
        """Release the graphs; a later generation raises SessionError."""
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


class Stream(Iterator[str]):
    """Pieces of one answer's text; ``generation`` when the last was read."""

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        sampling: Sampling,
        stops: StopText,
        max_new_tokens: int,
        timings: Timings,
    ) -> None:
        self._generation: Generation | None = None
        self._pieces = self._run(model, prompt, sampling, stops, max_new_tokens, timings)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def generation(self) -> Generation:
        """The finished answer. PromptError while pieces are still to be read."""
        if self._generation is None:
            raise PromptError("the stream is not finished. Read all of its pieces first.")
        return self._generation

    def _run(
        self,
        model: Model,
        prompt: Prompt,
        sampling: Sampling,
        stops: StopText,
        max_new_tokens: int,
        timings: Timings,
    ) -> Iterator[str]:
        features = None
        if prompt.pixels is not None:
            start = time.perf_counter()
            features = model.image_features(prompt.pixels)
            timings.vision_s = time.perf_counter() - start
        state = model.decoder.start(len(prompt.token_ids) + max_new_tokens, features)
        detokenizer, ids, given = Detokenizer(model.tokenizer), list[int](), list[str]()
        finish: Finish = "length"
        for token in tokens(
            state,
            prompt.token_ids,
            prompt.image_index,
            sampling.chooser(),
            model._stop_ids,
            max_new_tokens,
            timings,
        ):
            ids.append(token)
            if token in model._stop_ids:
                finish = "stop"
                break
            piece = stops.push(detokenizer.push(token))
            if piece:
                given.append(piece)
                yield piece
            if stops.stopped:
                finish = "stop_string"
                break
        if not stops.stopped:
            last = stops.push(detokenizer.flush()) + stops.flush()
            if stops.stopped:
                finish = "stop_string"
            if last:
                given.append(last)
                yield last
        self._generation = Generation("".join(given), tuple(ids), finish, timings)


def expand_images(
    ids: Sequence[int], image_token_id: int, tokens_per_image: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Repeat each image marker tokens_per_image times; return (token_ids, image_index).

    image_index counts 0, 1, … over the repeated markers of all images and is -1 elsewhere.
    """
    token_ids: list[int] = []
    image_index: list[int] = []
    row = 0
    for token in ids:
        if token == image_token_id:
            token_ids += [token] * tokens_per_image
            image_index += range(row, row + tokens_per_image)
            row += tokens_per_image
        else:
            token_ids.append(token)
            image_index.append(-1)
    return tuple(token_ids), tuple(image_index)


def load(
    folder: str | os.PathLike[str],
    target: str | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
    accuracy_level: int = FAST,
    verify: bool = True,
) -> Model:
    """Open a folder written by qvlm-export.

    target: None takes one with engines for this GPU, else "ort", else the only one. backend: "ort",
    "ort-cuda", "tensorrt" or "tensorrt-rtx"; None takes engines where this machine has a GPU and a
    TensorRT that they were built for, else ONNX Runtime on the CPU. threads: None leaves the number
    to the engine. accuracy_level: 4 (fast) or 1 (exact), see backend.py. verify: compare the
    sha256 of every file that is opened with the manifest; False saves that read of the folder when
    the application has done it before.

    FolderError or SessionError.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    choice = choose(root, manifest, target, backend)
    spec = manifest.targets[choice.target]
    if verify:
        verify_files(root, manifest, _opened_files(manifest, choice))
    tokenizer = Tokenizer(root / _TEXT_FILES[0])
    template = ChatTemplate(root / _TEXT_FILES[1], manifest.model.template_tokens)
    paths = {graph: root / choice.paths[graph] for graph in GRAPHS}

    def opened(graph: str) -> Session:
        return open_session(
            paths[graph], threads=threads, accuracy_level=accuracy_level, backend=choice.backend
        )

    vision = opened("vision")
    missing_tensors(vision, str(paths["vision"]), ["pixel_values"], ["image_features"])
    decoder = Decoder(opened("decoder"), manifest.model, spec, str(paths["decoder"]))
    return Model(manifest, choice.target, tokenizer, template, vision, decoder, choice.backend)


def _opened_files(manifest: Manifest, choice: Choice) -> list[str]:
    """Text files, the graphs with what lies beside them (their external data), or the plans."""
    opened = [choice.paths[graph] for graph in GRAPHS]
    beside: list[str] = []
    if choice.backend not in PLAN_BACKENDS:
        folders = {PurePosixPath(path).parent for path in opened}
        beside = [path for path in manifest.files if PurePosixPath(path).parent in folders]
    return list(dict.fromkeys([*_TEXT_FILES, *opened, *beside]))
