"""Random-weight checkpoints of real shapes: what every engine of the comparison loads, in its own format.

A shape is a directory under benches/shapes with nothing but a config.json. From it this module writes a Hugging Face
checkpoint: config.json, bf16 safetensors and a made-up tokenizer. The weights depend on the seed alone, are written in
pieces of a few MiB (so memory stays small whatever the model), and need no package beyond Python's own.
"""

import json
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path

SHAPES = Path(__file__).resolve().parent.parent / "shapes"
FAMILIES = ("llama", "qwen3")
SEED = 20
"""Any number; another one gives other weights of the same statistics."""
SHARD_BYTES = 1 << 30
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk."""

    name: str
    path: Path

    @property
    def config(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, at 16 bits each."""
        config = self.config
        return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def tensors(config: dict) -> list[tuple[str, list[int]]]:
    """Names and shapes, in the order of the file. Llama, and Qwen3, which also has norms on its heads."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = [
        ("input_layernorm", [hidden]),
        ("self_attn.q_proj", [query, hidden]),
        ("self_attn.k_proj", [key, hidden]),
        ("self_attn.v_proj", [key, hidden]),
        ("self_attn.o_proj", [hidden, query]),
        ("post_attention_layernorm", [hidden]),
        ("mlp.gate_proj", [ffn, hidden]),
        ("mlp.up_proj", [ffn, hidden]),
        ("mlp.down_proj", [hidden, ffn]),
    ]
    if config["model_type"] == "qwen3":
        layer += [("self_attn.q_norm", [head]), ("self_attn.k_norm", [head])]
    elif config["model_type"] not in FAMILIES:
        raise ValueError(f"model_type {config['model_type']!r} is not known here; {' and '.join(FAMILIES)} are")
    if not config["tie_word_embeddings"]:
        raise ValueError("only shapes whose embedding is also the output layer are supported")
    names = [("model.embed_tokens.weight", [config["vocab_size"], hidden])]
    for index in range(config["num_hidden_layers"]):
        names += [(f"model.layers.{index}.{name}.weight", shape) for name, shape in layer]
    return names + [("model.norm.weight", [hidden])]


def make(shape: str, layers: int | None, directory: Path) -> Model:
    """The checkpoint of `shape`, cut to `layers` if given; written on first use."""
    config = json.loads((SHAPES / shape / "config.json").read_text())
    name = shape
    if layers is not None:
        config["num_hidden_layers"] = layers
        name = f"{shape}-{layers}-layers"
    path = directory / name
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        write_tokenizer(config, path)
        write_weights(config, path)
        # The config comes last: a directory that has one is complete.
        write_json(path / "config.json", config)
    return Model(name, path)


def write_json(path: Path, value: object) -> None:
    """Writes `value` under another name first, so that no half-written file is ever taken for whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, ensure_ascii=False))
    os.replace(partial, path)


# bf16 is a sign, 8 bits of exponent and 7 of mantissa; the upper byte holds the sign and 7 bits of the exponent. Random
# lower bytes, and upper bytes out of this table, give magnitudes of 2^-11 to 2^-5, most of them above 2^-7: a standard
# deviation of about 0.016, as trained models have, without a single floating-point operation.
_UPPER = bytes((i & 0x80) | (60 if i & 0x7F < 96 else 59 if i & 0x7F < 120 else 58) for i in range(256))
_ONE = b"\x80\x3f"


def random_bf16(rng: random.Random, count: int) -> bytes:
    """`count` random weights, little-endian."""
    raw = bytearray(rng.randbytes(2 * count))
    raw[1::2] = raw[1::2].translate(_UPPER)
    return bytes(raw)


def write_weights(config: dict, path: Path) -> None:
    """Writes safetensors shards of at most SHARD_BYTES (or one tensor) and their index."""
    shards: list[list[tuple[str, list[int], int]]] = [[]]
    filled = 0
    for name, shape in tensors(config):
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, size))
        filled += size
    rng = random.Random(SEED)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(path / file, shard, rng)
        weight_map |= {name: file for name, _, _ in shard}
    total = sum(size for shard in shards for _, _, size in shard)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index_json)


def write_shard(path: Path, shard: list[tuple[str, list[int], int]], rng: random.Random) -> None:
    """One file: the length of the header, the header, the tensors (github.com/huggingface/safetensors)."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, size in shard:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, size in shard:
            if len(shape) == 1:  # the scale of a norm
                file.write(_ONE * shape[0])
                continue
            for begin in range(0, size, PIECE_BYTES):
                file.write(random_bf16(rng, min(PIECE_BYTES, size - begin) // 2))


def vocabulary(vocab_size: int) -> list[str]:
    """256 bytes in GPT-2's alphabet, one merge, and words without meaning."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [*(letters[byte] for byte in range(256)), "th", *(f"w{i}" for i in range(257, vocab_size))]


MERGES = ["t h"]


def end_tokens(config: dict) -> list[int]:
    """Ids that end an answer."""
    ids = config["eos_token_id"]
    return ids if isinstance(ids, list) else [ids]


def write_tokenizer(config: dict, path: Path) -> None:
    """A byte-level BPE of the right size. Prompts are token ids everywhere; servers insist on one for their answers."""
    words = vocabulary(config["vocab_size"])
    special = [*end_tokens(config), config["bos_token_id"]]
    added = [
        {"id": i, "content": words[i], "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i in sorted(set(special))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {word: index for index, word in enumerate(words)},
        "merges": MERGES,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[config["bos_token_id"]],
        "eos_token": words[end_tokens(config)[0]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(path / "tokenizer.json", tokenizer)
    write_json(path / "tokenizer_config.json", settings)


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random token ids, the same every time; none of the words that end an answer (they are the last ones)."""
    rng = random.Random(SEED)
    words = range(257, min(vocab_size, 100_000))
    return [rng.choices(words, k=length) for _ in range(count)]
