"""Make the demo directory from a seed: train, reparametrise, measure, write, and hash every file.

python calib_data/make_demo.py --out calib_data/qvlm_calib_data --scratch SCRATCH --resume
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from demo_eval import cases, exact_match
from demo_model import build_model, build_processor, build_tokenizer, write_model
from demo_reparam import Dial
from demo_train import TrainConfig, train
from demo_write import load_float, write_card, write_demo, write_sources


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True, help="package folder to fill")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--wip", type=Path, help="write the model here at every checkpoint")
    parser.add_argument(
        "--stages", type=Path, help="JSON: how a resumed run was changed on the way"
    )
    parser.add_argument("--questions", type=int, default=1600, help="held-out, for card.json")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run the whole recipe."""
    args = parse()
    torch.set_num_threads(2)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, args.seed, args.layers)
    config = TrainConfig(seed=args.seed, steps=args.steps)

    def watch(step: int) -> None:
        print(f"monitor {step} {exact_match(model, processor, cases('monitor', 240))}", flush=True)
        if args.wip:
            write_model(model, processor, args.wip)

    seconds = train(model, processor, config, args.scratch, args.resume, watch)
    print(f"trained in {seconds:.0f} seconds", flush=True)
    stages = json.loads(args.stages.read_text(encoding="utf-8")) if args.stages else []
    dial = Dial()
    moves = write_demo(model, processor, args.out, dial)
    written = load_float(args.out / "demo")
    write_card(args.out, written, processor, config, seconds, stages, dial, moves, args.questions)
    write_sources(args.out)
    print((args.out / "demo" / "card.json").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()
