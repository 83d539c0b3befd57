"""A float16 GGUF with the tensors of decode_peers' checkpoint, and quantized copies made by llama.cpp itself.
Arguments: checkpoint folder, output folder, threads, type names. Run with llama-cpp-python's environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

SOURCE, OUT, THREADS, TYPES = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
# llama.cpp's enum llama_ftype
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").removeprefix("model.").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return f"{TOP[parts[0]]}.weight"


def tensors():
    """Names and arrays of the safetensors file, mapped and not read."""
    path = SOURCE / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", 8 + length)
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, data[start:end].view(np.float16).reshape(entry["shape"])


def main() -> None:
    config = json.loads((SOURCE / "config.json").read_text())
    path = OUT / "f16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(1)
    # A vocabulary that llama.cpp opens: specials, bytes, and fillers. No text is ever tokenized.
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [f"t{i}" for i in range(len(tokens), config["vocab_size"])]
    kinds = [2, 3, 3, *[6] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in tensors():
        one_dimensional = array.astype(np.float32) if array.ndim == 1 else array
        writer.add_tensor(gguf_name(name), one_dimensional)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in TYPES:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_TYPES[name], THREADS
        target = str(OUT / f"{name}.gguf").encode()
        code = llama_cpp.llama_model_quantize(str(path).encode(), target, params)
        assert code == 0, f"llama_model_quantize {name} failed with {code}"


main()
