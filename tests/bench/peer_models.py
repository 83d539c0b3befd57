"""The models and environments of decode_peers.py and threads.py: one decoder with random weights, in our form, as a
Hugging Face checkpoint and as onnxruntime-genai's builder makes it. llama.cpp's are made by peers/write_gguf.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path

import numpy as np
from decode import HEAD, PREFIX, Shape, write_checkpoint

from qvlm.progress import silent
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.llama import decoder
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.manifest import TargetSpec


def environment(folder: Path, packages: tuple[str, ...], variables: dict[str, str]) -> Path:
    """Python of an environment with these packages, made on the first run."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.is_file() or done.read_text() != "\n".join(packages):
        print(f"installing {', '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True, env=dict(os.environ) | variables)
        done.write_text("\n".join(packages))
    return python


def write_hugging_face(folder: Path, shape: Shape) -> None:
    """A Llama checkpoint in float16, N(0, 0.02), with the tokenizer that genai's builder asks for."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return (rng.standard_normal(size, np.float32) * np.float32(0.02)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden)}
    for name, out, columns in shape.linears():
        tensors[f"{name.removeprefix(PREFIX).replace('.', 'model.', 1)}.weight"] = normal(
            out, columns
        )
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = np.ones(shape.hidden, np.float16)
    tensors["model.norm.weight"] = np.ones(shape.hidden, np.float16)
    tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_ours(folder: Path, shape: Shape) -> list[str]:
    """Our decoder graph for target ort; the runner's arguments."""
    path, target = folder / "decoder.onnx", named_target("ort")
    spec = TargetSpec(target.dtype, target.opset, target.cache, {"decoder": str(path)})
    if not path.is_file():
        checkpoint = write_checkpoint(folder / "checkpoint", shape, quantized=True)
        builder = GraphBuilder("decoder", target, Weights(checkpoint, target.dtype))
        decoder(builder, shape.config(), PREFIX, HEAD, shape.positions, "bench")
        write_model(builder.model("bench"), path, silent)
        shutil.rmtree(folder / "checkpoint")
    return [str(path), json.dumps({"model": asdict(shape.spec()), "target": asdict(spec)})]


def write_genai(python: Path, source: Path, folder: Path, block: int, threads: int) -> str:
    """genai's own builder; torch and transformers come from this environment. Its command line."""
    options = [f"block_size={block}", "is_symmetric=true", "accuracy_level=4"]
    command = ["-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *options]
    if not (folder / "genai_config.json").is_file():
        print(f"building genai's model, block {block}", flush=True)
        # Behind its own packages, so that only what it lacks is taken from here.
        path = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        ours = sysconfig.get_paths()["purelib"]
        variables = {"PYTHONPATH": f"{path}:{ours}", "HF_HUB_OFFLINE": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.log").open("w") as log:
            variables = dict(os.environ) | variables
            subprocess.run([python, *command], check=True, env=variables, stdout=log, stderr=log)
    config = json.loads((folder / "genai_config.json").read_text())
    decoder_options = config["model"]["decoder"]["session_options"]
    decoder_options["intra_op_num_threads"] = threads
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2))
    return " ".join(command)


def genai_blocks(folder: Path) -> dict[str, int]:
    """How many MatMulNBits of each (bits, block) genai's graph has: what was asked for may be ignored."""
    import onnx

    found: dict[str, int] = {}
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            given = {a.name: a.i for a in node.attribute}
            kind = f"{given.get('bits', 4)} bits, block {given['block_size']}"
            found[kind] = found.get(kind, 0) + 1
    return found
