"""What the tests of kept caches share: a toy folder whose chats go on as those of chat models, pictures, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from runtime_support import SCATTERS, write_folder

from qvlm_runtime.kept import KeptCaches

TARGETS = ["ort", "rtx"] if SCATTERS else ["rtx"]
# As in test_decoder.py: roundings of one logit, of its largest magnitude.
ROUNDINGS = 4 * 12 * 2**-24
# As chat models write it: what opens an answer stays in the conversation.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}>{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def write_chat_folder(path: Path) -> Path:
    """Open it with ``verify=False``: the template is not the one of the manifest."""
    write_folder(path, max_context=256)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def answer(kept: KeptCaches, text: str, **options: Any) -> int:
    """Cached rows of an answer."""
    options = {"max_new_tokens": 4, **options}
    return kept.stream(text, **options).read().timings.cached_tokens
