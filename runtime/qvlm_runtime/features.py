"""Image features that were computed before: a second question about an image skips the vision graph.

The key is a sha256 over the vision graph's inputs, the image-processor settings, the backend and the
digest of the vision graph. Equal keys therefore mean equal input to an equal graph, whatever file or
array the image came from. Features stay where the engine computes. Bounded in bytes; the entry that
was not used for the longest time goes first.

An image in CUDA memory is read there and not hashed: it has a key of its own, and its features are
not kept.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qvlm_runtime.backend import Array, DeviceArray
from qvlm_runtime.decoder import Features
from qvlm_runtime.image_spec import Layout

DEFAULT_BYTES = 128 << 20  # 14 images of LLaVA-1.5 in float32 (576 rows of 4,096)


_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Picture:
    """A preprocessed image: the vision graph's inputs by name, its layout, and the key of its features.

    inputs: float32 and int64 on the host, or pixel_values [1, 3, H, W] in CUDA memory. hashed:
    whether the key is a digest of them.
    """

    inputs: Mapping[str, Array | DeviceArray]
    layout: Layout
    key: str
    hashed: bool = True

    @staticmethod
    def of(inputs: Mapping[str, Array], layout: Layout, salt: str) -> Picture:
        """``salt`` names the settings and the graph."""
        sha = hashlib.sha256(salt.encode())
        for name, array in sorted(inputs.items()):
            sha.update(f"{name} {array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return Picture(inputs, layout, sha.hexdigest())

    @staticmethod
    def on_device(pixels: DeviceArray, layout: Layout) -> Picture:
        """A picture like no other, also if the array is the same: its contents may have changed."""
        inputs = {"pixel_values": replace(pixels, shape=(1, *pixels.shape))}
        return Picture(inputs, layout, f"device {next(_numbers)}", hashed=False)


class FeatureCache:
    """Features by key, least recently used first out. Safe to use from several threads.

    Two threads that miss the same key at once both compute it; either result is the same. May be
    shared by several models.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        """max_bytes 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self._entries: OrderedDict[str, Features] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Features | None:
        """The features, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: str, features: Features) -> None:
        """Keep features. Too large ones are not kept."""
        if features.nbytes > self.max_bytes:
            return
        with self._lock:
            replaced = self._entries.pop(key, None)
            self.bytes += features.nbytes - (0 if replaced is None else replaced.nbytes)
            self._entries[key] = features
            while self.bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0
