"""Write a checkpoint as a Hugging Face style directory: model/{config,generation_config}.json and model.safetensors (bf16).

    python export.py checkpoints/final.pt
"""

import json
import sys

import torch
from safetensors.torch import save_file

from model import CONFIG, Model
from tokenizer import MODEL_DIR

GENERATION = {
    "do_sample": True,
    "eos_token_id": [2, 0],
    "max_new_tokens": 512,
    "pad_token_id": 0,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.95,
}


def main():
    model = Model()
    if len(sys.argv) > 1:
        model.load_state_dict(torch.load(sys.argv[1], map_location="cpu"))
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    path = MODEL_DIR / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    (MODEL_DIR / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (MODEL_DIR / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    print(f"{sum(w.numel() for w in weights.values())} parameters")


if __name__ == "__main__":
    main()
