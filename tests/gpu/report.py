"""The table of tests/gpu/run: what was measured, against the targets of the first version that ships (M1) and of peers (M2).

    python3 report.py FOLDER    reads FOLDER/*.json, prints the table, writes FOLDER/results.json

Ends with 1 if a check failed; a target that is missed is said and fails nothing.
"""

import json
import pathlib
import sys

# (what, how it is computed from rows by name, unit, M1, M2). A lambda that lacks a row gives no line.
# Rates are held against what was measured in the same run: the copy, and torch's products.
TARGETS = [
    ("decode attention B=64 ctx 2k, of copy", lambda r: r["decode_gb_s/64x2048/bf16"] / r["copy_gb_s"], "x", 0.75, 0.90),
    ("decode attention B=64 ctx 8k, of copy", lambda r: r["decode_gb_s/64x8192/bf16"] / r["copy_gb_s"], "x", 0.75, 0.90),
    ("decode attention B=1 ctx 1k", lambda r: r["decode_us/1x1024/bf16"], "us", 14, 8),
    ("decode attention B=1 ctx 4k", lambda r: r["decode_us/1x4096/bf16"], "us", 18, 11),
    ("fp8 KV decode B=64 ctx 8k, of bf16", lambda r: r["decode_us/64x8192/bf16"] / r["decode_us/64x8192/fp8"], "x", 1.7, 1.85),
    ("prefill attention S=4k", lambda r: r["prefill_tflop_s/4096"], "TFLOP/s", 300, 550),
    ("prefill attention S=8k", lambda r: r["prefill_tflop_s/8192"], "TFLOP/s", 300, 550),
    ("the same with QUIRE_KERNELS=sm90a", lambda r: r["sm90a_prefill_tflop_s/8192"], "TFLOP/s", 300, 550),
    ("prefill attention S=2k, of torch SDPA", lambda r: r["prefill_tflop_s/2048"] / r["torch_prefill_tflop_s/2048"], "x", 0.7, 0.9),
    ("GEMM up M=1, of torch", lambda r: r["torch_gemm_us/up/1/bf16"] / r["gemm_us/up/1/bf16"], "x", 0.98, 1.1),
    ("GEMM up M=64, of torch", lambda r: r["torch_gemm_us/up/64/bf16"] / r["gemm_us/up/64/bf16"], "x", 0.98, 1.0),
    ("GEMM up M=8192, of torch", lambda r: r["torch_gemm_us/up/8192/bf16"] / r["gemm_us/up/8192/bf16"], "x", 0.98, 1.0),
    ("GEMM up M=1, of copy", lambda r: r["gemm_gb_s/up/1/bf16"] / r["copy_gb_s"], "x", 0.75, 0.85),
    ("GEMM up M=64, of copy", lambda r: r["gemm_gb_s/up/64/bf16"] / r["copy_gb_s"], "x", 0.75, 0.85),
    ("fp8 GEMM up M=2048", lambda r: r["gemm_tflop_s/up/2048/fp8"], "TFLOP/s", 1100, 1300),
    ("int4 GEMM up M=16, of bf16", lambda r: r["gemm_us/up/16/bf16"] / r["gemm_us/up/16/int4"], "x", 2.8, 3.3),
    ("experts of Qwen3-30B-A3B, 64 rows, of copy", lambda r: r["moe_gb_s/64/bf16"] / r["copy_gb_s"], "x", 0.65, 0.85),
    ("the same in fp8, of bf16", lambda r: r["moe_us/64/bf16"] / r["moe_us/64/fp8"], "x", 1.5, 1.8),
    ("8 adapters r=16, 64 rows, of the products", lambda r: r["lora_of_products/64x8/r16"], "of 1", 0.15, 0.07),
    ("the same, of torch", lambda r: r["torch_lora_us/64x8/r16"] / r["lora_us/64x8/r16"], "x", 1.0, 2.0),
    ("norm T=8192, of copy", lambda r: r["norm_gb_s/8192"] / r["copy_gb_s"], "x", 0.8, 0.9),
    ("RoPE + KV T=8192, of copy", lambda r: r["rope_gb_s/8192"] / r["copy_gb_s"], "x", 0.8, 0.9),
    ("activation T=8192, of copy", lambda r: r["act_gb_s/8192"] / r["copy_gb_s"], "x", 0.8, 0.9),
    ("norm T=64", lambda r: r["norm_us/64"], "us", 3, 2),
    ("RoPE + KV T=64", lambda r: r["rope_us/64"], "us", 3, 2),
    ("activation T=64", lambda r: r["act_us/64"], "us", 3, 2),
    ("sampling 256 x 128k, top-k and top-p", lambda r: r["sample_us/256x128256"], "us", 150, 60),
    ("8B batch 1, a step", lambda r: r["step_us_p50/llama-3.1-8b/1/bf16"] / 1e3, "ms", 4.9, 4.2),
    ("0.6B batch 1", lambda r: r["decode_tok_s/qwen3-0.6b/1/bf16"], "tok/s", 900, 1600),
    ("0.6B batch 256", lambda r: r["decode_tok_s/qwen3-0.6b/256/bf16"], "tok/s", 20000, 28000),
    ("8B 1000/1000 offline", lambda r: r["output_tok_s/llama-3.1-8b/1000x1000/bf16"], "tok/s", 7000, 9500),
    ("8B 128/128, of transformers", lambda r: r["output_tok_s/llama-3.1-8b/128x128/bf16"] / r["transformers_output_tok_s/llama-3.1-8b/128x128"], "x", 3, 5),
    ("0.6B 128/128, of transformers", lambda r: r["output_tok_s/qwen3-0.6b/128x128/bf16"] / r["transformers_output_tok_s/qwen3-0.6b/128x128"], "x", 3, 5),
    ("batch invariance costs, 8B 128/128", lambda r: 1 - r["output_tok_s/llama-3.1-8b/128x128/bf16"] / r["off/output_tok_s/llama-3.1-8b/128x128/bf16"], "of 1", 0.05, 0.02),
]

# Smaller is better for these units.
LESS = {"us", "ms", "of 1"}


def verdict(value, target, unit):
    is_met = value <= target if unit in LESS else value >= target
    return "met" if is_met else "missed"


def lines(rows):
    """(what, value, unit, M1, verdict, M2, verdict) of every target whose rows are there."""
    for what, compute, unit, first, second in TARGETS:
        try:
            value = compute(rows)
        except (KeyError, ZeroDivisionError):
            continue
        yield what, value, unit, first, verdict(value, first, unit), second, verdict(value, second, unit)


def read(folder):
    """Rows by name, and the checks. A file whose name ends in .off holds what ran with --batch-invariant off."""
    rows, checks = {}, []
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        if path.name == "results.json":
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            print(f"{path.name} left out: {error}")
            continue
        prefix = "off/" if path.stem.endswith(".off") else ""
        rows.update({prefix + row["name"]: row["value"] for row in content.get("rows", [])})
        checks.extend(content.get("checks", []))
    return rows, checks


def main(folder):
    rows, checks = read(folder)
    table = list(lines(rows))
    print(f"{'':44} {'measured':>12} {'':8} {'M1':>8} {'':7} {'M2':>8}")
    for what, value, unit, first, met_first, second, met_second in table:
        print(f"{what:44} {value:12.2f} {unit:8} {first:8g} {met_first:7} {second:8g} {met_second}")
    not_measured = len(TARGETS) - len(table)
    if not_measured:
        print(f"{not_measured} of {len(TARGETS)} targets were not measured")
    failed = [check["name"] for check in checks if check["result"] != "ok"]
    result = {
        "checks": checks,
        "targets": [
            {"name": what, "value": value, "unit": unit, "m1": first, "m1_met": met_first == "met",
             "m2": second, "m2_met": met_second == "met"}
            for what, value, unit, first, met_first, second, met_second in table
        ],
        "rows": [{"name": name, "value": value} for name, value in rows.items()],
    }
    (pathlib.Path(folder) / "results.json").write_text(json.dumps(result, indent=1))
    print(f"{len(checks)} checks, {len(failed)} failed" + (": " + ", ".join(failed) if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
