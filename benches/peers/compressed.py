"""Writes a checkpoint in the compressed-tensors format, which vLLM runs as it is. Needs torch and safetensors.

int8: weights per output channel, activations per token at run time (W8A8). int4: weights in groups of 64 with bf16
activations (W4A16). Round to nearest, no calibration: the weights are random anyhow. Embedding and output stay bf16.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import models
from models import Model

GROUP = 64


def write(model: Model, precision: str, path: Path) -> None:
    """Writes `model` at `precision` to the directory `path`, one shard at a time."""
    path.mkdir(parents=True)
    weight_map, total = {}, 0
    for shard in sorted(model.path.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                is_linear = tensor.ndim == 2 and "embed_tokens" not in name
                tensors |= _compressed(name, tensor, precision) if is_linear else {name: tensor}
        save_file(tensors, path / shard.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model.path / name, path)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    models.write_json(path / "model.safetensors.index.json", index)
    models.write_json(path / "config.json", model.config | {"quantization_config": scheme(precision)})


def scheme(precision: str) -> dict:
    """The `quantization_config` of config.json."""
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    if precision == "int8":
        group = {
            "weights": weights | {"num_bits": 8, "strategy": "channel"},
            "input_activations": weights | {"num_bits": 8, "strategy": "token", "dynamic": True},
        }
    else:
        group = {"weights": weights | {"num_bits": 4, "strategy": "group", "group_size": GROUP}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if precision == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }


def _compressed(name: str, weight: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    base = name.removesuffix(".weight")
    rows, columns = weight.shape
    if precision == "int8":
        codes, scale = _rounded(weight.float(), 127)
        return {name: codes.to(torch.int8), f"{base}.weight_scale": scale.to(torch.bfloat16)}
    codes, scale = _rounded(weight.float().view(rows, columns // GROUP, GROUP), 7)
    nibbles = (codes.view(rows, columns // 8, 8) + 8).to(torch.int32)
    packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
    for place in range(8):
        packed |= nibbles[:, :, place] << (4 * place)
    return {
        f"{base}.weight_packed": packed,
        f"{base}.weight_scale": scale.view(rows, columns // GROUP).to(torch.bfloat16),
        f"{base}.weight_shape": torch.tensor([rows, columns]),
    }


def _rounded(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from -largest to largest, and the scale of each last dimension."""
    scale = weight.abs().amax(-1, keepdim=True) / largest
    return (weight / scale).round().clamp(-largest, largest).to(torch.int32), scale
