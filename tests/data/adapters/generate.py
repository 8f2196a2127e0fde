#!/usr/bin/env python3
"""Writes the adapters of golden checkpoints, made and run by PEFT.

    python3 -m venv venv && venv/bin/pip install torch transformers==5.23.0 peft==0.21.2 safetensors
    venv/bin/python tests/data/adapters/generate.py

Each is a directory, named after the checkpoint in tests/data/golden that it is for, as PEFT's save_pretrained writes it,
with random weights, plus golden.json and golden.safetensors: {"prompts": [...]} as those of the checkpoints, computed in
float32 from the base with the adapter beside it, not merged.
"""

import json
import pathlib
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
LENGTHS = [1, 9, 21]
NUM_GREEDY = 12
MIN_MARGIN = 2e-3
# The projections of attention: what is adapted of a model with experts.
ADAPTERS = {"qwen3-moe": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])}


def load(name):
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(HERE.parent / "golden" / name, dtype=torch.float32, **eager)


def forward(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model, ids):
    ids, tokens, margins = list(ids), [], []
    for _ in range(NUM_GREEDY):
        top = forward(model, ids)[-1].topk(2)
        tokens.append(top.indices[0].item())
        margins.append(round((top.values[0] - top.values[1]).item(), 6))
        ids.append(tokens[-1])
    return tokens, margins


def save_adapter(path, name, fields, seed):
    """`B` random as well: as PEFT begins, an adapter changes nothing."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(name), peft.LoraConfig(task_type="CAUSAL_LM", bias="none", **fields))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            # A keeps what is about 1 so, and B adds about half of what the layer gives.
            spread = parameter.shape[1] ** -0.5 * (1.0 if "lora_A" in parameter_name else 0.5)
            parameter.data.copy_(torch.randn(parameter.shape) * spread)
    model.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"base_model_name_or_path": name, "target_modules": sorted(config["target_modules"])}
    file.write_text(json.dumps(config, indent=1) + "\n")
    return len(load_file(path / "adapter_model.safetensors"))


def generate(name, fields):
    path = HERE / name
    for seed in range(100):
        num_tensors = save_adapter(path, name, fields, seed)
        model = peft.PeftModel.from_pretrained(load(name), path).eval()
        generator = torch.Generator().manual_seed(seed)
        prompts, logits = [], {}
        for number, length in enumerate(LENGTHS):
            ids = [1] + torch.randint(6, model.config.vocab_size, (length - 1,), generator=generator).tolist()
            tokens, margins = greedy(model, ids)
            logits[str(number)] = forward(model, ids).contiguous()
            prompts.append({"ids": ids, "logits": str(number), "greedy": tokens, "margins": margins})
        margin = min(margin for prompt in prompts for margin in prompt["margins"])
        if margin > MIN_MARGIN:
            break
    versions = {package.__name__: package.__version__.split("+")[0] for package in (torch, transformers, peft)}
    text = json.dumps({"base": name, "seed": seed, "made_with": versions, "prompts": prompts})
    for separator in ('"prompts"', '{"ids"', '"logits"', '"greedy"', '"margins"'):
        text = text.replace(separator, "\n" + separator)
    (path / "golden.json").write_text(text + "\n")
    save_file(logits, path / "golden.safetensors")
    change = (forward(model.unload(), prompts[-1]["ids"]) - logits[str(len(LENGTHS) - 1)]).norm()
    print(f"{name} seed {seed} margin {margin:.4f} {num_tensors} tensors, logits change by "
          f"{(change / logits[str(len(LENGTHS) - 1)].norm()).item():.2f}")


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or ADAPTERS:
        generate(name, ADAPTERS[name])


if __name__ == "__main__":
    main()
