"""Opens a model folder: which graphs, are the files whole, tokenizer, sessions.

On the CPU both graphs are opened at once, and their weights hashed meanwhile: each of the three keeps
about one core busy. Files that are parsed (tokenizer, template, graphs) are hashed before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from qvlm_runtime.backend import FAST, PLAN_BACKENDS, Session, missing_tensors, open_session
from qvlm_runtime.budget import CacheBudget
from qvlm_runtime.chat import ChatTemplate
from qvlm_runtime.decoder import Decoder
from qvlm_runtime.engines import GRAPHS, Choice, choose
from qvlm_runtime.features import FeatureCache
from qvlm_runtime.manifest import Manifest, check_digests, check_sizes, read_manifest
from qvlm_runtime.model import Model
from qvlm_runtime.ort import has_prepared
from qvlm_runtime.tokenizer import Tokenizer
from qvlm_runtime.vision import extremes, input_shapes

_TEXT_FILES = ("tokenizer.json", "chat_template.jinja")


def load(
    folder: str | os.PathLike[str],
    target: str | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
    accuracy_level: int = FAST,
    verify: bool = True,
    prepared: str | os.PathLike[str] | None = None,
    cache_limit: int | None = None,
    feature_cache: FeatureCache | None = None,
) -> Model:
    """Open a folder written by qvlm-export.

    target: None takes one with engines for this GPU, else "ort", else the only one. backend: "ort",
    "ort-cuda", "tensorrt" or "tensorrt-rtx"; None takes engines where this machine has a GPU and a
    TensorRT that they were built for, else ONNX Runtime on the CPU. threads: None leaves the number
    to the engine. accuracy_level: 4 (fast) or 1 (exact), see backend.py. verify: compare the
    sha256 of every file that is opened with the manifest; False saves that read of the folder when
    the application has done it before. prepared: a folder where ONNX Runtime keeps its own form
    of the graphs for the CPU, so that the next load is faster and takes less memory, see
    prepared.py; no other backend uses it. A graph that it holds is opened from it: the weights in
    the model folder are then neither read nor hashed again.
    cache_limit: bytes that the key/value caches of all answers and conversations may take at once;
    None refuses none. feature_cache: None makes one of 128 MiB.

    FolderError or SessionError.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    choice = choose(root, manifest, target, backend)
    on_cpu = choice.backend == "ort"
    kept = None if prepared is None or not on_cpu else Path(prepared)
    paths = {graph: root / choice.paths[graph] for graph in GRAPHS}
    parsed, weights = _opened_files(manifest, choice)
    if verify:
        check_sizes(root, manifest, [*parsed, *weights])
        check_digests(root, manifest, parsed)
        if kept is not None:
            ready = [g for g in GRAPHS if has_prepared(paths[g], kept, accuracy_level)]
            unread = tuple(choice.paths[graph] for graph in ready)
            weights = [name for name in weights if not name.startswith(unread)]
    # What is prepared now is not hashed later, and a plan is opened only when it is known to be whole.
    meanwhile = verify and on_cpu and kept is None
    if verify and not meanwhile:
        check_digests(root, manifest, weights)
    tokenizer = Tokenizer(root / _TEXT_FILES[0])
    template = ChatTemplate(root / _TEXT_FILES[1], manifest.model.template_tokens)

    def opened(graph: str) -> Session:
        return open_session(
            paths[graph],
            threads=threads,
            accuracy_level=accuracy_level,
            backend=choice.backend,
            prepared=kept,
        )

    if on_cpu:
        hashed = weights if meanwhile else []
        vision, graph = _at_once(opened, lambda: check_digests(root, manifest, hashed))
    else:
        vision, graph = (opened(name) for name in GRAPHS)
    inputs = input_shapes(manifest.image, extremes(manifest.image)[0])
    missing_tensors(vision, str(paths["vision"]), list(inputs), ["image_features"])
    spec = manifest.targets[choice.target]
    decoder = Decoder(graph, manifest.model, spec, str(paths["decoder"]))
    return Model(
        manifest,
        choice.target,
        tokenizer,
        template,
        vision,
        decoder,
        choice.backend,
        FeatureCache() if feature_cache is None else feature_cache,
        CacheBudget(cache_limit),
    )


def _at_once(opened: Callable[[str], Session], check: Callable[[], None]) -> list[Session]:
    """Both graphs, while ``check`` runs."""
    with ThreadPoolExecutor(len(GRAPHS)) as pool:
        sessions = [pool.submit(opened, graph) for graph in GRAPHS]
        check()  # first: a damaged file explains a graph that does not open
        return [session.result() for session in sessions]


def _opened_files(manifest: Manifest, choice: Choice) -> tuple[list[str], list[str]]:
    """Text files and graphs or plans; and what lies beside the graphs (their external data)."""
    opened = [*_TEXT_FILES, *(choice.paths[graph] for graph in GRAPHS)]
    if choice.backend in PLAN_BACKENDS:
        return opened, []
    folders = {PurePosixPath(path).parent for path in opened[len(_TEXT_FILES) :]}
    beside = [p for p in manifest.files if PurePosixPath(p).parent in folders and p not in opened]
    return opened, beside
