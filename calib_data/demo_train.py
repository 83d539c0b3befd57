"""Train the demo VLM: all tasks of one image in one sequence, each question blind to the others.

A training sequence is the image followed by one question-answer pair per task.  The attention mask
lets a pair see the image and itself only, and its positions start right after the image, so every
pair is trained exactly as the first turn of a chat: the image tokens are paid for once.  The loss
is on the answers.  Two hints (see `demo_hints`) make it learn in an hour on two cores: linear heads,
thrown away afterwards, ask every image token what is drawn on its patch, and two heads of one
decoder layer are asked to look at the patches that show the answer.

Hidden matrices are trained by Muon, everything else by AdamW; warm-up, constant, linear decay to 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demo_hints import IGNORE, RANKS, SHADES, SIGHTS, VALUES, evidence, patch_labels
from demo_model import BOS, IMAGE, IMAGE_TOKENS
from qvlm_calib_data.scenes import (
    SIZE,
    TASKS,
    WORDS,
    ask,
    make_scene,
    render,
    seed_at,
)

LENGTH = 176
MATCHING = ("locate", "chart", "compare")
LOOK_LAYER = 3
LOOK_HEADS = 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    seed: int = 0
    steps: int = 3260
    batch: int = 32
    muon_lr: float = 0.012
    adam_lr: float = 5e-4
    warmup: int = 50
    decay: float = 0.245
    sight_weight: float = 0.3
    look_weight: float = 0.5


class SceneBatches(Dataset[dict[str, Tensor]]):
    """Batch `i` is a pure function of the seed and `i`, so a resumed run sees the same data."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, config: TrainConfig, first: int, last: int
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.first = first
        self.last = last
        self.prefix = prompt_prefix(tokenizer)
        self.cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.last - self.first

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step = self.first + index
        count = self.config.batch
        ids = np.full((count, LENGTH), self.tokenizer.pad_token_id, dtype=np.int64)
        targets = np.full((count, LENGTH), IGNORE, dtype=np.int64)
        weights = np.zeros((count, LENGTH), dtype=np.float32)
        segments = np.full((count, LENGTH), -1, dtype=np.int64)
        positions = np.zeros((count, LENGTH), dtype=np.int64)
        images = np.zeros((count, SIZE, SIZE, 3), dtype=np.uint8)
        sights = np.zeros((count, IMAGE_TOKENS, 5), dtype=np.int64)
        looks = np.zeros((count, LENGTH, IMAGE_TOKENS), dtype=np.bool_)
        start = len(self.prefix)
        for row in range(count):
            seed = seed_at("train", self.config.seed * 10_000_000 + step * count + row)
            scene = make_scene(seed)
            rng = np.random.default_rng(seed + 1)
            images[row] = np.asarray(render(scene))
            sights[row] = patch_labels(scene)
            ids[row, :start] = self.prefix
            segments[row, :start] = 0
            positions[row, :start] = np.arange(start)
            at = start
            for number, task in enumerate(_mix(rng)):
                question = ask(scene, task, rng)
                asked = self.encode(f"{question.prompt} ASSISTANT:")
                answer = [*self.encode(f" {question.answer}"), self.tokenizer.eos_token_id]
                end = at + len(asked) + len(answer)
                if end > LENGTH:
                    break
                ids[row, at:end] = asked + answer
                segments[row, at:end] = number + 1
                positions[row, at:end] = np.arange(start, start + end - at)
                first = at + len(asked) - 1
                targets[row, first : end - 1] = answer
                weights[row, first : end - 1] = len(answer) ** -0.5
                pieces = [self.tokenizer.decode([token]) for token in answer]
                for place, patches in enumerate(evidence(scene, question, pieces)):
                    looks[row, first + place, list(patches)] = True
                at = end
        arrays = {
            "ids": ids,
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "positions": positions,
            "images": images,
            "sights": sights,
            "looks": looks,
        }
        return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _mix(rng: np.random.Generator) -> list[str]:
    """The tasks of one sequence: every task, and one of those that match question and image again.

    What no longer fits into the sequence, mostly every second description, is left out.
    """
    return [str(rng.choice(MATCHING)), *TASKS]


def prompt_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of the chat up to the question: what the chat template writes before it."""
    text = f"{BOS}USER: " + IMAGE * IMAGE_TOKENS + "\n"
    return list(tokenizer.encode(text, add_special_tokens=False))


class Trainee(nn.Module):
    """The model with its sight heads; `forward` gives the answer loss and the sight loss."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        sizes = (len(SIGHTS), len(SHADES), VALUES, RANKS, len(WORDS))
        head = model.config.text_config.head_dim
        self.near = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.deep = nn.ModuleList(nn.Linear(head, size) for size in sizes)
        images = processor.image_processor
        mean = torch.tensor(images.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(images.image_std).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.image_start = prompt_prefix(processor.tokenizer).index(model.config.image_token_id)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        weights: Tensor,
        segments: Tensor,
        positions: Tensor,
        images: Tensor,
        sights: Tensor,
        looks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        core = self.model.model
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        seen = core.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        features = core.multi_modal_projector(seen)
        embeds = core.language_model.embed_tokens(ids)
        start = self.image_start
        embeds = torch.cat(
            [embeds[:, :start], features.to(embeds.dtype), embeds[:, start + IMAGE_TOKENS :]], 1
        )
        length = ids.shape[1]
        index = torch.arange(length)
        same = segments[:, :, None] == segments[:, None, :]
        allowed = (index[:, None] >= index[None, :]) & (same | (segments == 0)[:, None, :])
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]
        decoder = core.language_model
        rope = decoder.rotary_emb(embeds, positions)
        hidden = embeds
        for number, layer in enumerate(decoder.layers):
            if number == LOOK_LAYER:
                look_loss = self.look(layer, hidden, rope, mask, looks)
                inside = layer.input_layernorm(hidden[:, start : start + IMAGE_TOKENS])
                values = layer.self_attn.v_proj(inside)[..., : layer.self_attn.head_dim]
                sight_loss = sight(self.near, seen, sights) + sight(self.deep, values, sights)
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope
            )
        hidden = decoder.norm(hidden)
        after = start + IMAGE_TOKENS
        logits = self.model.lm_head(hidden[:, after:]).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            targets[:, after:].flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        flat = weights[:, after:].flatten()
        answer_loss = (loss * flat).sum() / flat.sum()
        return answer_loss, sight_loss, look_loss

    def look(
        self,
        layer: nn.Module,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        looks: Tensor,
    ) -> Tensor:
        """How far the first heads of a layer are from looking at the evidence: -log of the mass."""
        attention = layer.self_attn
        read = layer.input_layernorm(hidden)
        shape = (*read.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(read).view(shape).transpose(1, 2)[:, :LOOK_HEADS]
        key = attention.k_proj(read).view(shape).transpose(1, 2)[:, :1]
        query, key = apply_rotary_pos_emb(query, key, *rope)
        scores = (query @ key.transpose(2, 3)).float() * attention.scaling + mask
        start = self.image_start
        image = scores.softmax(-1)[..., start : start + IMAGE_TOKENS].mean(1)
        mass = (image * looks).sum(-1)
        known = looks.any(-1).float()
        return -((mass + 1e-3).log() * known).sum() / known.sum()


def sight(heads: nn.ModuleList, features: Tensor, sights: Tensor) -> Tensor:
    """The loss of the patch labels read from image features by linear heads."""
    loss = torch.zeros(())
    for number, head in enumerate(heads):
        found = head(features).float().flatten(0, 1)
        target = sights[..., number].flatten()
        part = F.cross_entropy(found, target, ignore_index=IGNORE)
        loss = loss + (0.5 if number else 1.0) * part
    return loss


def optimizers(trainee: Trainee, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of both transformers, AdamW for all other parameters.

    AdamW moves every weight by its rate, so a linear whose inputs are large moves its outputs most:
    the patch embedding reads pixels and the projector reads the unnormalised residual of the vision
    tower, hence their far smaller rates (at the common rate the image tokens drift faster than the
    decoder can follow, and it never learns to read them).
    """
    hidden, other, pixels, projector, deep = [], [], [], [], []
    for name, parameter in trainee.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            hidden.append(parameter)
        elif "patch_embedding" in name:
            pixels.append(parameter)
        elif "multi_modal_projector.linear_1" in name:
            projector.append(parameter)
        elif name.startswith("deep"):
            deep.append(parameter)
        else:
            other.append(parameter)
    groups = [
        {"params": other, "lr": config.adam_lr},
        {"params": pixels, "lr": config.adam_lr / 5},
        {"params": projector, "lr": config.adam_lr / 15},
        {"params": deep, "lr": config.adam_lr * 6},
    ]
    return [
        torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=0.03),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
    ]


def rate(step: int, config: TrainConfig) -> float:
    """The factor on the learning rates at a step: up, flat, and linearly down to 0."""
    decay = int(config.steps * config.decay)
    return min((step + 1) / config.warmup, 1.0, max((config.steps - step) / max(decay, 1), 0.0))


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def batches(
    tokenizer: PreTrainedTokenizerFast, config: TrainConfig, first: int
) -> Iterator[dict[str, Tensor]]:
    """The batches from a step on, rendered one process ahead."""
    data = SceneBatches(tokenizer, config, first, config.steps)
    yield from DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    config: TrainConfig,
    scratch: Path,
    resume: bool,
    watch: Callable[[int], None],
) -> float:
    """Train `model` in place; gives the seconds spent.  `watch(step)` is called every 5 minutes."""
    trainee = Trainee(model, processor)
    opts = optimizers(trainee, config)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    first, spent, path = 0, 0.0, scratch / "train.pt"
    if resume and path.exists():
        state = torch.load(path, weights_only=False)
        trainee.load_state_dict(state["trainee"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        first, spent = state["step"], state["spent"]
        print(f"resume at step {first}", flush=True)
    step_loss = trainee
    began = watched = kept = time.monotonic()
    for step, batch in enumerate(batches(processor.tokenizer, config, first), start=first):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer, sight, look = step_loss(**batch)
        (answer + config.sight_weight * sight + config.look_weight * look).backward()
        factor = rate(step, config)
        for opt, rates in zip(opts, base, strict=True):
            for group, lr in zip(opt.param_groups, rates, strict=True):
                group["lr"] = lr * factor
            opt.step()
            opt.zero_grad()
        now = time.monotonic()
        if step % 20 == 0:
            print(
                f"step {step}/{config.steps} answer {answer.item():.4f} sight {sight.item():.4f} "
                f"look {look.item():.4f} "
                f"rate {factor:.3f} seconds {spent + now - began:.0f}",
                flush=True,
            )
        last = step + 1 == config.steps
        if last or now - kept > 150:
            kept = now
            saved = {
                "trainee": trainee.state_dict(),
                "opts": [opt.state_dict() for opt in opts],
                "step": step + 1,
                "spent": spent + now - began,
            }
            save_state(path, saved)
        if last or now - watched > 300:
            watched = now
            watch(step + 1)
            trainee.train()
    return spent + time.monotonic() - began
