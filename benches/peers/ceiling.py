"""What this machine could do at most in a row, and what Quire is to reach.

A ceiling adds up what cannot overlap: products at the rate of the unit (bf16 or int8) or weights at the rate of memory,
whichever takes longer; causal attention at the rate of bf16; keys and values at the rate of memory. Nothing else counts,
so nobody gets there.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cases import Case, Skip
from models import Model

PROBE = ["bench", "kernels", "--input-len", "16", "--batch-size", "1", "--num-iters", "1", "--json"]
"""Of the embedded model, for the limits that it measures first."""
PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Limits:
    """Rates of all threads together, as measured: the machine is shared, and changes within minutes."""

    read_gb_s: float
    bf16_gflop_s: float
    int8_gop_s: float


def measure(quire: Path, threads: int) -> Limits:
    """What the machine gives now. Takes three seconds."""
    command = [str(quire), *PROBE, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    if done.returncode:
        raise Skip(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    found = json.loads(done.stdout)["machine"]
    return Limits(**{name: float(found[name]) for name in Limits.__dataclass_fields__})


def _weights(config: dict) -> tuple[int, int]:
    """Weights of all layers, and of the output layer."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer, config["vocab_size"] * hidden


def rate(model: Model, case: Case, precision: str, cache_bits: int, limits: Limits) -> float:
    """Tokens per second at the ceiling. At int4 the output layer counts as int8."""
    config = model.config
    layers, output = _weights(config)
    products = (limits.bf16_gflop_s if precision == "bf16" else limits.int8_gop_s) * 1e9
    read = limits.read_gb_s * 1e9
    if case.kind == "prefill":
        width = config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
        attention = 2 * case.length**2 * width
        return case.length / (2 * layers * case.length / products + attention / (limits.bf16_gflop_s * 1e9))
    width, output_width = {"bf16": (2, 2), "int8": (1, 1), "int4": (0.5, 1)}[precision]
    context = case.length + case.steps / 2
    cache = case.batch * context * model.kv_bytes_per_token * cache_bits / 16
    weights = (layers * width + output * output_width) / read
    return case.batch / (max(weights, 2 * (layers + output) * case.batch / products) + cache / read)


@dataclass(frozen=True)
class Target:
    """Met by either: so many times the best peer of the same run, or such a share of the ceiling of the same run."""

    ratio: float
    share: float


def _targets(ratios: str, percents: str) -> dict[str, Target]:
    pairs = zip(map(float, ratios.split()), map(float, percents.split()), strict=True)
    return {name: Target(ratio, percent / 100) for name, (ratio, percent) in zip(("bf16", "int8", "int4"), pairs, strict=True)}


TARGETS = {
    ("qwen3-0.6b", "prefill-512"): _targets("1.02 1.29 1.30", "90 69 66"),
    ("qwen3-0.6b", "prefill-2048"): _targets("1.02 1.23 1.20", "88 70 67"),
    ("qwen3-0.6b", "decode-1"): _targets("1.23 1.61 1.99", "85 84 81"),
    ("qwen3-0.6b", "decode-8"): _targets("1.54 1.74 2.06", "70 66 59"),
    ("qwen3-0.6b", "decode-32"): _targets("1.23 1.22 1.39", "76 74 70"),
    ("llama-3.2-1b", "prefill-512"): _targets("1.02 1.17 1.10", "90 74 71"),
    ("llama-3.2-1b", "decode-1"): _targets("1.04 1.61 1.63", "90 85 83"),
    ("llama-3.2-1b", "decode-8"): _targets("1.23 1.80 2.00", "75 66 56"),
    ("llama-3.2-1b", "decode-32"): _targets("1.05 1.49 1.29", "87 72 70"),
}
"""What Quire aims at by model, row and precision: a lead over the best engine as it was found in 2026, and the share of
the ceiling that the lead meant on that machine."""
