"""Exact match of a demo model per task, by greedy batched generation on fresh scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from qvlm_calib_data.scenes import Question, SeedUse, draw_samples

Case = tuple[Image.Image, Question]


def cases(use: SeedUse, count: int, first: int = 0) -> list[Case]:
    """`count` questions of a use, the tasks in turn, every one on a scene of its own."""
    return draw_samples(use, count, first)


def batch_inputs(processor: LlavaProcessor, asked: Sequence[Case]) -> BatchFeature:
    """The model inputs of a batch of questions, through the chat template and the processor."""
    texts = []
    for _, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    images = [image for image, _ in asked]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[Case],
    batch: int = 64,
) -> list[str]:
    """The generated answers, in the order asked."""
    # Long answers go together, so that a batch stops when its own answers end.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1].answer))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = batch_inputs(processor, [asked[i] for i in part])
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        fresh = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(fresh, skip_special_tokens=True)
        found.update(zip(part, (t.strip() for t in texts), strict=True))
    return [found[i] for i in range(len(asked))]


def exact_match(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[Case]
) -> dict[str, float]:
    """Percent of exactly right answers per task, and over all questions under "all"."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for (_, question), answer in zip(asked, answers(model, processor, asked), strict=True):
        right[question.task].append(answer == question.answer)
        right["all"].append(answer == question.answer)
    return {task: round(100.0 * float(np.mean(hits)), 2) for task, hits in right.items()}


def round_decoder(model: LlavaForConditionalGeneration, bits: int, group: int = 128) -> None:
    """Round the decoder's linears to nearest: symmetric, one scale per output and group along K."""
    top = 2 ** (bits - 1) - 1
    for module in model.model.language_model.layers.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.data
        grouped = weight.float().unflatten(1, (-1, group))
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
        rounded = (grouped / scale).round().clamp(-top - 1, top) * scale
        module.weight.data = rounded.flatten(1).to(weight.dtype)
