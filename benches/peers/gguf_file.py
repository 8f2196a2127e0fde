"""Writes a checkpoint as GGUF in bf16, for llama.cpp's own quantizer to start from. Needs the packages gguf and numpy.

llama.cpp's converter is not on PyPI and knows only tokenizers of published models; two architectures need little.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy

import models
from models import Model

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(model: Model, path: Path) -> None:
    """Writes `model` to `path`, with its tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, config["model_type"])
    _hyperparameters(writer, config)
    _tokenizer(writer, config)
    if (scaling := config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config, scaling))
    for name, bits in _tensors(model.path):
        if bits.ndim == 1:
            # bf16 is the upper half of f32; llama.cpp wants norms in f32.
            writer.add_tensor(_name(name), (bits.astype(numpy.uint32) << 16).view(numpy.float32))
            continue
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            bits = _interleaved(bits, config["head_dim"])
        writer.add_tensor(_name(name), bits.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _hyperparameters(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _tokenizer(writer: gguf.GGUFWriter, config: dict) -> None:
    words = models.vocabulary(config["vocab_size"])
    ends = models.end_tokens(config)
    special = {config["bos_token_id"], *ends}
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if config["model_type"] == "llama" else "qwen2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(models.MERGES)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(ends[0])


def _tensors(directory: Path) -> Iterator[tuple[str, numpy.ndarray]]:
    """Every tensor as its 16-bit patterns, mapped from its file."""
    for path in sorted(directory.glob("*.safetensors")):
        raw = numpy.memmap(path, numpy.uint8, "r")
        length = int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8 : 8 + length].tobytes())
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, raw[begin:end].view(numpy.uint16).reshape(entry["shape"])


def _name(name: str) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    if name.startswith("layers."):
        _, index, part = name.split(".", 2)
        return f"blk.{index}.{_LAYER[part]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]


def _interleaved(weight: numpy.ndarray, head_dim: int) -> numpy.ndarray:
    """Rows in the order of llama.cpp's llama, which rotates neighbours; the checkpoint rotates halves."""
    rows, columns = weight.shape
    halves = weight.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _rope_factors(config: dict, scaling: dict) -> numpy.ndarray:
    """What each frequency is divided by: long waves by `factor`, short ones by 1, between them by a blend."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for index in range(0, config["head_dim"], 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (index / config["head_dim"])
        turns = scaling["original_max_position_embeddings"] / wavelength
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - blend) / scaling["factor"] + blend))
    return numpy.array(factors, numpy.float32)
