"""Runs in a peer's own environment, started by accuracy_peers.py: quantizes the decoder of a LLaVA directory with one
preset of one peer and saves the weights it stands for. Imports nothing of ours.

Input (torch.save): a list of the model's keyword arguments, one calibration sample each. Output: OUT.safetensors with,
for each decoder linear L, "L.weight" (dequantized, float32), if the peer scales the linear's input "L.column_scale"
[in] (the linear computes weight @ (x * column_scale)), and every other decoder parameter as the peer left it;
OUT.json with seconds (of the clock and of the processor), peak resident MB of the process and versions.

Usage: python peer_worker.py PEER PRESET FORMAT MODEL SAMPLES OUT
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DECODER = "model.language_model."
FLOAT = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
Tensors = dict[str, Tensor]


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """By kind of weight, not by class: peers put modules of their own in a linear's place."""
    for name, module in model.named_modules():
        if name.startswith(DECODER) and name.endswith("_proj"):
            yield name, module


def bits_and_group(name: str) -> tuple[int, int]:
    """w4a16-g64 -> (4, 64); a weight-only format without a group size has 128."""
    weights, _, group = name.partition("-g")
    return int(weights[1]), int(group or 128)


# -- NVIDIA ModelOpt


def modelopt(model: nn.Module, samples: list[Any], preset: str, format_: str) -> Tensors:
    """Its documented call: mtq.quantize(model, config, forward_loop)."""
    import copy

    import modelopt.torch.quantization as mtq

    def forward_loop(m: nn.Module) -> None:
        for sample in samples:
            m(**sample)

    if format_ == "w8a8":
        config: Any = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    else:
        config = copy.deepcopy(mtq.INT4_AWQ_CFG)
        bits, group = bits_and_group(format_)
        for entry in _entries(config["quant_cfg"]):
            if "block_sizes" in entry:
                entry["num_bits"], entry["block_sizes"][-1] = bits, group
        config["algorithm"] = {**_algorithm(config["algorithm"]), "method": preset}
    for pattern in FLOAT:
        _disable(config, f"*{pattern.rpartition('.')[2]}*")
    mtq.quantize(model, config, forward_loop)
    found: Tensors = {}
    for name, linear in decoder_linears(model):
        quantizer = linear.input_quantizer
        found[f"{name}.weight"] = linear.weight_quantizer(linear.weight)
        scale = getattr(quantizer, "pre_quant_scale", None)
        if scale is not None:
            found[f"{name}.column_scale"] = scale.flatten()
        if format_ == "w8a8":
            found[f"{name}.input_scale"] = quantizer.amax.reshape(1) / 127
    return found


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    """Every dict below a configuration of any shape."""
    if isinstance(config, dict):
        yield config
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict | list):
            yield from _entries(value)


def _algorithm(algorithm: Any) -> dict[str, Any]:
    return dict(algorithm) if isinstance(algorithm, dict) else {}


def _disable(config: Any, pattern: str) -> None:
    """Releases differ: quant_cfg was a dict by pattern, now it is a list of rules of which the last wins."""
    rules = config["quant_cfg"]
    if isinstance(rules, dict):
        rules[pattern] = {"enable": False}
    else:
        rules.append({"quantizer_name": pattern, "enable": False})


# -- AutoRound


def auto_round(model: nn.Module, samples: list[Any], preset: str, format_: str) -> Tensors:
    """AutoRound(model, tokenizer, scheme, dataset, iters).quantize(). Its default batch of 8 is taken as 8 accumulated
    samples, as ours have different lengths; 200 iterations are its default, 1000 those of auto-round-best.
    """
    from auto_round import AutoRound
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model.name_or_path)
    if format_ == "w8a8":
        scheme: dict[str, Any] = {"scheme": "INT8"}
    else:
        bits, group = bits_and_group(format_)
        scheme = {"scheme": f"W{bits}A16", "group_size": group, "sym": True}
    work = AutoRound(
        model,
        tokenizer=processor.tokenizer,
        processor=processor,
        dataset=samples,
        nsamples=len(samples),
        seqlen=max(sample["input_ids"].shape[1] for sample in samples),
        batch_size=1,
        gradient_accumulate_steps=8,
        iters={"default": 200, "best": 1000}[preset],
        device_map="cpu",
        **scheme,
    )
    done, _ = work.quantize()
    return {f"{name}.weight": linear.weight for name, linear in decoder_linears(done)}


# -- llm-compressor


def llmcompressor(model: nn.Module, samples: list[Any], preset: str, format_: str) -> Tensors:
    """oneshot with the recipes of its examples; its sequential pipeline is what those of vision models use.

    Its own Llama mappings, held to the decoder: unrestricted they match the vision tower's q_proj too and are refused.
    """
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils.data import DataLoader

    common: dict[str, Any] = {"ignore": [f"re:.*{part}.*" for part in FLOAT]}
    if format_ == "w8a8":
        common |= {"scheme": "W8A8", "targets": "Linear"}
    else:
        bits, group = bits_and_group(format_)
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
        scheme = {"targets": ["Linear"], "weights": {**weights, "group_size": group}}
        common |= {"config_groups": {"decoder": scheme}}
    inside = "re:.*language_model.*"
    attention = [inside + f"{part}_proj$" for part in "qkv"]
    feed_forward = [inside + "gate_proj$", inside + "up_proj$"]
    entering = (inside + "input_layernorm$", inside + "post_attention_layernorm$")
    awq = AWQModifier(
        mappings=[
            AWQMapping(entering[0], attention),
            AWQMapping(inside + "v_proj$", [inside + "o_proj$"]),
            AWQMapping(entering[1], feed_forward),
            AWQMapping(inside + "up_proj$", [inside + "down_proj$"]),
        ]
    )
    smoothquant = SmoothQuantModifier(
        smoothing_strength=0.8,
        mappings=[[attention, entering[0]], [feed_forward, entering[1]]],
    )
    recipe: list[Any] = {
        "rtn": lambda: [QuantizationModifier(**common)],
        "gptq": lambda: [GPTQModifier(**common)],
        "awq": lambda: [awq, QuantizationModifier(**common)],
        "awq+gptq": lambda: [awq, GPTQModifier(**common)],
        "smoothquant+gptq": lambda: [smoothquant, GPTQModifier(**common)],
    }[preset]()
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=None),  # type: ignore[arg-type]
        recipe=recipe,
        num_calibration_samples=len(samples),
        pipeline="sequential",
        sequential_targets=["LlamaDecoderLayer"],
    )
    found: Tensors = {}
    for name, linear in decoder_linears(model):
        found[f"{name}.weight"] = fake_quantize(
            linear.weight,
            linear.weight_scale,
            linear.weight_zero_point,
            linear.quantization_scheme.weights,
        )
    return found


PEERS = {"nvidia-modelopt": modelopt, "auto-round": auto_round, "llmcompressor": llmcompressor}


def main() -> None:
    peer, preset, format_, directory, samples_file, out = sys.argv[1:]
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    samples = torch.load(samples_file)
    torch.manual_seed(0)
    started, worked = time.perf_counter(), time.process_time()
    found = PEERS[peer](model, samples, preset, format_)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - worked
    for name, tensor in model.state_dict().items():
        if name.startswith(DECODER) and name.endswith("norm.weight"):
            found.setdefault(name, tensor)
    save_file(
        {n: t.detach().float().clone().contiguous() for n, t in found.items()},
        f"{out}.safetensors",
    )
    packages = (peer, "torch", "transformers")
    report = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        # Linux counts kilobytes.
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
