"""Every family's tiny directory, questions for it and its quantized checkpoint, by the family's name: what tests and
measurements over all families share. For tests only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_blip
import tiny_qwen
import tiny_source
import tiny_tiles

from qvlm.checkpoint import Checkpoint
from qvlm.data import Question
from qvlm.quantize import quantize
from qvlm.recipe import RECIPES

FAMILIES = ("llava", *tiny_tiles.PROCESSORS, *tiny_qwen.FAMILIES, "blip-2")


def write_source(family: str, directory: Path, **changes: Any) -> Path:
    """A directory as Hugging Face has them: weights, tokenizer, processor, chat template. ``changes`` go to the model's
    config, as its family's module takes them.
    """
    if family == "llava":
        return tiny_source.write_tiny_source(directory, **changes)
    if family in tiny_qwen.FAMILIES:
        return tiny_qwen.write_tiny_source(directory, family, **changes)
    if family == "blip-2":
        return tiny_blip.write_tiny_source(directory, **changes)
    return tiny_tiles.write_source(family, directory, **changes)


def tied(family: str, vocabulary: int) -> dict[str, Any]:
    """The changes that tie its head to a table of ``vocabulary`` rows."""
    text = "text__" if family in (*tiny_tiles.PROCESSORS, "blip-2") else "text_"
    both = dict.fromkeys(("tie_word_embeddings", f"{text}tie_word_embeddings"), True)
    return {**both, f"{text}vocab_size": vocabulary}


def questions(family: str) -> list[Question]:
    """Two questions, with pictures of the sizes that the family's settings are made for."""
    if family == "llava":
        return tiny_source.tiny_questions(2)
    if family in tiny_qwen.FAMILIES:
        return tiny_qwen.tiny_questions(2)
    if family == "blip-2":
        return tiny_blip.tiny_questions(2)
    return tiny_tiles.tiny_questions(2)


def quantized(family: str, folder: Path, method: str = "rtn") -> Checkpoint:
    """w4a16 and an INT8 tower by ``method``, with one golden."""
    source = write_source(family, folder / "source")
    recipe = replace(RECIPES["w4a16"], method=method, samples=2)
    out = folder / "checkpoint"
    quantize(str(source), out, recipe, questions=questions(family), goldens=1)
    return Checkpoint(out)
