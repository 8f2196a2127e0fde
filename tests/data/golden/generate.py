#!/usr/bin/env python3
"""Writes the golden checkpoints: one tiny random model per family, with what Hugging Face transformers makes of it.

    python3 -m venv venv && venv/bin/pip install torch transformers==5.23.0 safetensors
    venv/bin/python tests/data/golden/generate.py            # all families, about a minute on one core
    venv/bin/python tests/data/golden/generate.py qwen3      # one

Each family is a directory as one would download it (config.json, safetensors, generation_config.json), plus
  golden.json         what to feed and what must come out
  golden.safetensors  f32 logits at every position of every prompt, [prompt length, vocab_size]

golden.json: {"cases": [{"max_model_len", "inv_freq", "attention_factor", "prompts": [{"ids", "logits", "greedy",
"margins"}]}], ...}. `logits` is a tensor's name; `greedy` are the argmax continuations, `margins` by how much each
led the runner-up. Logits are computed in float32, with eager attention, from the weights as stored.

Every inner dimension (hidden, ffn, heads * head_dim) is a multiple of 64 and head_dim is 64 or 128, so that no
backend needs a padded path; weights are scaled so that attention is far from uniform and the logits spread.

Dynamic NTK: transformers recomputes the frequencies as the sequence grows; Quire fixes them at load, from
max_model_len. The cases beyond the original length therefore run with the frequencies transformers uses at exactly
max_model_len, and one prompt of that length checks that a stock forward pass gives the same.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = pathlib.Path(__file__).parent
VOCAB = 256
NUM_GREEDY = 24
MIN_MARGIN = 2e-3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def config(architecture, model_type, **fields):
    base = dict(
        architectures=[architecture], model_type=model_type, vocab_size=VOCAB, hidden_size=64, intermediate_size=64,
        num_hidden_layers=2, hidden_act="silu", max_position_embeddings=128, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )
    return base | fields


def llama(**fields):
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    return config("LlamaForCausalLM", "llama", **(heads | fields))


# Old-style configs (`torch_dtype`, `rope_theta`, `rope_scaling`) and those of transformers 5 (`dtype`,
# `rope_parameters`) are both in use, so both are here.
FAMILIES = {
    # Multi-head attention, f32.
    "llama2": llama(num_key_value_heads=2, rope_theta=10000.0, rope_scaling=None, torch_dtype="float32",
                    pretraining_tp=1, attention_bias=False),
    "llama3": llama(num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0, torch_dtype="bfloat16",
                    eos_token_id=[2, 3], rope_scaling=dict(
                        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
                        rope_type="llama3")),
    # The window is shorter than most prompts, and three layers let information travel further than one window.
    # Three query heads share a KV head, and 3 * 64 is not the hidden size.
    "mistral": config("MistralForCausalLM", "mistral", num_hidden_layers=3, num_attention_heads=3,
                      num_key_value_heads=1, head_dim=64, sliding_window=16, rope_theta=10000.0,
                      torch_dtype="bfloat16"),
    "qwen2": config("Qwen2ForCausalLM", "qwen2", num_attention_heads=2, num_key_value_heads=1, hidden_size=128,
                    tie_word_embeddings=True, use_sliding_window=False, sliding_window=32, max_window_layers=2,
                    rope_theta=1000000.0, torch_dtype="bfloat16"),
    # The upper layer slides, the lower does not: one KV group, masked by layer.
    "qwen2-window": config("Qwen2ForCausalLM", "qwen2", num_attention_heads=2, num_key_value_heads=1, hidden_size=128,
                           use_sliding_window=True, sliding_window=16, max_window_layers=1, dtype="bfloat16",
                           tie_word_embeddings=True,
                           layer_types=["full_attention", "sliding_attention"],
                           rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    "qwen3": config("Qwen3ForCausalLM", "qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=128,
                    tie_word_embeddings=True, attention_bias=False, use_sliding_window=False, sliding_window=None,
                    max_window_layers=2, layer_types=["full_attention", "full_attention"], dtype="bfloat16",
                    rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    # Two layers of experts around a dense one. Two heads, and experts of 32 columns, so that two ranks can have a half
    # of each, and of neither less than a backend takes.
    "qwen3-moe": config("Qwen3MoeForCausalLM", "qwen3_moe", num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=64, tie_word_embeddings=True, attention_bias=False,
                        use_sliding_window=False, sliding_window=None, num_experts=8, num_experts_per_tok=2,
                        moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1],
                        dtype="bfloat16", rms_norm_eps=1e-6,
                        rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    # Layers 0 and 2 slide. Caps low enough to bend scores and logits, a scale of scores that is not head_dim ** -0.5,
    # and a width whose root is not a whole number.
    "gemma2": config("Gemma2ForCausalLM", "gemma2", num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                     head_dim=64, hidden_size=128, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24,
                     attn_logit_softcapping=3.0, final_logit_softcapping=0.8, sliding_window=16, rms_norm_eps=1e-6,
                     tie_word_embeddings=True, rope_theta=10000.0, torch_dtype="bfloat16"),
    "smollm": llama(tie_word_embeddings=True, rope_theta=10000.0, torch_dtype="float16",
                    max_position_embeddings=256),
    "rope-linear": llama(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=4.0), torch_dtype="bfloat16"),
    "rope-dynamic": llama(rope_theta=10000.0, rope_scaling=dict(type="dynamic", factor=2.0), torch_dtype="bfloat16",
                          max_position_embeddings=64),
    # As Qwen2.5's model card tells one to extend the context.
    "rope-yarn": config("Qwen2ForCausalLM", "qwen2", num_attention_heads=2, num_key_value_heads=1, hidden_size=128,
                        max_position_embeddings=64, use_sliding_window=False, rope_theta=1000000.0,
                        tie_word_embeddings=True, torch_dtype="bfloat16", rope_scaling=dict(
                            factor=4.0, original_max_position_embeddings=64, type="yarn")),
    "rope-yarn-factor": llama(dtype="bfloat16", rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64, attention_factor=0.9,
        beta_fast=16.0, beta_slow=2.0, truncate=False)),
    # Biases everywhere, and another activation.
    "llama-bias": llama(attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh", dtype="bfloat16",
                        rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
}

GENERATION = {
    "llama3": dict(bos_token_id=1, do_sample=True, eos_token_id=[2, 3, 4], temperature=0.6, top_p=0.9),
    "qwen2": dict(bos_token_id=1, do_sample=True, eos_token_id=[5, 2], repetition_penalty=1.05, temperature=0.7,
                  top_k=20, top_p=0.8),
}

SHARDED = {"llama3"}

# (max_model_len, prompt lengths). The default is one case that covers the context.
CASES = {"rope-dynamic": [(64, [1, 7, 33]), (96, [33, 96])]}
DEFAULT_CASES = [(128, [1, 7, 33, 70])]


def random_weights(fields, seed):
    """A state dict of the family's shape, in the dtype of its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    weights = {}
    for name, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape)
        if parameter.dim() == 3:
            # Experts that have much in common, so that it matters little which one of two equals rounding chooses.
            noise = 0.9 * noise[:1] + 0.4 * noise
        if name == "lm_head.weight" and fields["tie_word_embeddings"]:
            continue
        if "norm" in name:
            # Gemma stores what is to be added to 1.
            value = 0.2 * noise if fields["model_type"] == "gemma2" else 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            # Gemma's grow by the root, and what its layers add is normalised: less, lest every token ask for itself.
            spread = 0.3 if fields["model_type"] == "gemma2" else 2.0
            value = noise * spread / parameter.shape[-1] ** 0.5
        elif name.endswith("mlp.gate.weight"):
            # A decided router: the last expert chosen and the next are often close, but then neither weighs much.
            value = noise * 4.0 / parameter.shape[-1] ** 0.5
        else:
            value = noise * 1.3 / parameter.shape[-1] ** 0.5
        value = value.to(DTYPES[fields.get("dtype") or fields["torch_dtype"]])
        weights |= {name: part.contiguous() for name, part in one_by_one(name, value)}
    return weights


def one_by_one(name, value):
    """Experts as published checkpoints and `save_pretrained` store them; transformers 5 holds those of a layer in one."""
    prefix, projection = name.rpartition(".")[::2]
    if projection == "gate_up_proj":
        for expert, both in enumerate(value):
            for half, part in zip(("gate", "up"), both.chunk(2)):
                yield f"{prefix}.{expert}.{half}_proj.weight", part
    elif projection == "down_proj":
        for expert, part in enumerate(value):
            yield f"{prefix}.{expert}.down_proj.weight", part
    else:
        yield name, value


def save(path, name, fields, weights):
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    write_json(path / "config.json", fields)
    if name in GENERATION:
        write_json(path / "generation_config.json", GENERATION[name])
    if name not in SHARDED:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    half = len(names) // 2
    weight_map = {}
    for i, part in enumerate([names[:half], names[half:]]):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def load(path):
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager).eval()


def forward(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def freeze_rope(model, max_model_len):
    """Fixes dynamic frequencies to those of `max_model_len`."""
    rotary = model.model.rotary_emb
    if rotary.rope_type == "dynamic":
        inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, seq_len=max_model_len)
        rotary.inv_freq.copy_(inv_freq)
        rotary.rope_type = "frozen"
    return rotary


def greedy(model, ids, count):
    ids, tokens, margins = list(ids), [], []
    for _ in range(count):
        top = forward(model, ids)[-1].topk(2)
        tokens.append(top.indices[0].item())
        margins.append(round((top.values[0] - top.values[1]).item(), 6))
        ids.append(tokens[-1])
    return tokens, margins


def run_case(path, index, max_model_len, lengths, generator):
    model = load(path)
    rotary = freeze_rope(model, max_model_len)
    precise = load(path)
    freeze_rope(precise, max_model_len)
    precise.double()
    prompts, logits, error = [], {}, 0.0
    for number, length in enumerate(lengths):
        ids = [1] + torch.randint(6, VOCAB, (length - 1,), generator=generator).tolist()
        out = forward(model, ids)
        error = max(error, (out - forward(precise, ids)).abs().max().item())
        if length == max_model_len:
            stock = forward(load(path), ids)
            assert torch.equal(stock, out), "freezing the frequencies changed a stock forward pass"
        tokens, margins = greedy(model, ids, min(NUM_GREEDY, max_model_len - length))
        name = f"{index}.{number}"
        logits[name] = out.contiguous()
        prompts.append({"ids": ids, "logits": name, "greedy": tokens, "margins": margins})
    case = {
        "max_model_len": max_model_len,
        "inv_freq": rotary.inv_freq.tolist(),
        "attention_factor": float(rotary.attention_scaling),
        "prompts": prompts,
    }
    return case, logits, error


def generate(name, fields):
    path = HERE / name
    for seed in range(100):
        save(path, name, fields, random_weights(fields, seed))
        generator = torch.Generator().manual_seed(seed)
        cases, logits, error = [], {}, 0.0
        for index, (max_model_len, lengths) in enumerate(CASES.get(name, DEFAULT_CASES)):
            case, case_logits, case_error = run_case(path, index, max_model_len, lengths, generator)
            cases.append(case)
            logits |= case_logits
            error = max(error, case_error)
        margin = min(m for case in cases for prompt in case["prompts"] for m in prompt["margins"])
        if margin > MIN_MARGIN:
            break
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    golden = {"family": name, "seed": seed, "made_with": versions, "cases": cases}
    text = json.dumps(golden)
    for separator in ('{"max_model_len"', '"prompts"', '{"ids"', '"logits"', '"greedy"', '"margins"'):
        text = text.replace(separator, "\n" + separator)
    (path / "golden.json").write_text(text + "\n")
    save_file(logits, path / "golden.safetensors")
    size = sum(file.stat().st_size for file in path.iterdir())
    spread = torch.cat(list(logits.values())).std().item()
    print(f"{name:18} seed {seed:2} margin {margin:.4f} logits std {spread:.2f} "
          f"f32 error {error:.1e} {size / 1024:.0f} KiB", flush=True)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or FAMILIES:
        generate(name, FAMILIES[name])


main()
