"""Everything of the demo that is not a weight: samples, showcase, measured card, SOURCES.md."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from demo_eval import cases, exact_match, round_decoder
from demo_model import write_model
from demo_reparam import Dial, Move, apply, choose, profile
from demo_train import TrainConfig
from qvlm_calib_data.scenes import SEED_RANGES, TASKS, SeedUse

SHIPPED_SAMPLES = 256
PROFILE_QUESTIONS = 64


def write_samples(out: Path, use: SeedUse, count: int, folder: str, index: str) -> None:
    """Render `count` samples of a use into PNG files and one line of JSON each."""
    (out / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, question) in enumerate(cases(use, count), start=1):
        name = f"{folder}/{number:04d}.png"
        image.save(out / name, optimize=True)
        lines.append(
            json.dumps(
                {
                    "image": name,
                    "prompt": question.prompt,
                    "answer": question.answer,
                    "task": question.task,
                }
            )
        )
    (out / index).write_text("\n".join(lines) + "\n", encoding="utf-8")


def reparametrise(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, dial: Dial
) -> list[Move]:
    """Round to float16, then move the factors in place; gives the moves.

    Rounding first makes every raised weight an exact float16; a lowered one is rounded when it is
    written, to a number whose raised counterpart is a float16 as well.  So the written model and
    the written model with its moves undone are both float16 models, with the same function.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    moves = choose(model, profile(model, processor, cases("monitor", PROFILE_QUESTIONS)), dial)
    apply(model, moves)
    return moves


def load_float(directory: Path) -> LlavaForConditionalGeneration:
    """The written model in fp32, as every measurement sees it."""
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def measure(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, use: SeedUse, count: int
) -> dict[str, dict[str, float]]:
    """Exact match in float and with the decoder rounded to nearest in 4 and 3 bits."""
    asked = cases(use, count)
    found = {"float": exact_match(model, processor, asked)}
    for bits in (4, 3):
        rounded = copy.deepcopy(model)
        round_decoder(rounded, bits)
        found[f"w{bits}_rtn_g128"] = exact_match(rounded, processor, asked)
    return found


def write_card(
    out: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    config: TrainConfig,
    seconds: float,
    stages: object,
    dial: Dial,
    moves: Sequence[Move],
    questions: int,
) -> None:
    """Measure the written model on evaluation scenes and write demo/card.json."""
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {**asdict(config), "seconds": round(seconds), "stages": stages},
        "evaluation": {
            "questions": questions,
            **measure(model, processor, "evaluation", questions),
        },
        "reparametrisation": {"dial": asdict(dial), "moves": [asdict(move) for move in moves]},
    }
    (out / "demo" / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def write_demo(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path, dial: Dial
) -> list[Move]:
    """Reparametrise and write the model, the samples and the showcase."""
    moves = reparametrise(model, processor, dial)
    write_model(model, processor, out / "demo")
    write_samples(out, "calibration", SHIPPED_SAMPLES, "images", "samples.jsonl")
    write_samples(out, "showcase", len(TASKS), "showcase", "showcase.jsonl")
    return moves


def shipped(out: Path) -> list[Path]:
    """The generated files: everything in the package but its Python and this list itself."""
    return sorted(
        path
        for path in out.rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc", ".typed")
        and path.name != "SOURCES.md"
    )


def write_sources(out: Path) -> None:
    """Write SOURCES.md: where every file comes from, under which licence, with its SHA-256."""
    card = json.loads((out / "demo" / "card.json").read_text(encoding="utf-8"))
    evaluation = card["evaluation"]
    columns = ("float", "w4_rtn_g128", "w3_rtn_g128")
    table = [
        f"| {task} | " + " | ".join(f"{evaluation[c][task]:.2f}" for c in columns) + " |"
        for task in ("all", *TASKS)
    ]
    uses = [f"| {use} | {seeds.start} | {seeds.stop - 1} |" for use, seeds in SEED_RANGES.items()]
    hashes = [
        f"| {path.relative_to(out).as_posix()} | {hashlib.sha256(path.read_bytes()).hexdigest()} |"
        for path in shipped(out)
    ]
    training = card["training"]
    stages = [
        f"- from step {stage['from_step']}: {stage['change']}" for stage in training["stages"]
    ]
    text = [
        "# Sources",
        "",
        "Every file listed here was made by `calib_data/make_demo.py` from a seed: the images are",
        "rendered, the model is trained on rendered images, nothing comes from elsewhere. The glyphs",
        "are those of Pillow's built-in font. Licence: Apache-2.0.",
        "",
        f"The model has {card['parameters']:,} parameters and was trained in {training['steps']:,} "
        f"steps of {training['batch']} images",
        f"({training['seconds']:,} seconds on two cores, seed {training['seed']}).",
        "",
        "The shipped weights were trained in stages, each resumed from the one before. A fresh run",
        "uses the last stage's settings from the first step; it was not repeated:",
        "",
        *stages,
        "",
        "Left out because the model did not learn them in that time: numbers of three digits, counts",
        "by colour, comparing bars of one height. The strength of the outlier channels was chosen on",
        "the tuning scenes, the numbers below are from the evaluation scenes.",
        "",
        f"Exact match in percent on {evaluation['questions']:,} held-out questions; the rounded",
        "columns have the decoder's linears rounded to nearest, symmetric, group 128:",
        "",
        "| Task | float | W4 | W3 |",
        "| --- | ---: | ---: | ---: |",
        *table,
        "",
        "Scene seeds of every use:",
        "",
        "| Use | first | last |",
        "| --- | ---: | ---: |",
        *uses,
        "",
        "| File | SHA-256 |",
        "| --- | --- |",
        *hashes,
        "",
    ]
    (out / "SOURCES.md").write_text("\n".join(text), encoding="utf-8")
