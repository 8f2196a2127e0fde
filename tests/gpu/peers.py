"""What PyTorch and transformers do on the same GPU, in the same session, as rows for the table of tests/gpu/run.

    python3 tests/gpu/peers.py OUT.json SHAPE_DIR [--tiny]

Products (torch.matmul, and torch._scaled_mm for fp8), attention (scaled_dot_product_attention), and continuous batching of
transformers on random weights of SHAPE_DIR/config.json. Row names are those of our own timings with `torch_` or
`transformers_` in front. A part that fails is said and left out. With --tiny the shapes are small, on whatever device there
is, so that the program itself can be tested.
"""

import argparse
import json
import statistics
import sys
import time

ROWS = []


def row(name, value, unit):
    ROWS.append({"name": name, "value": value, "unit": unit})
    print(f"{name:44} {value:12.2f} {unit}", flush=True)


def part(function, *args):
    try:
        function(*args)
    except Exception as error:  # whatever it is, the other parts go on
        print(f"{function.__name__}{args} left out: {type(error).__name__}: {error}", flush=True)


def microseconds(torch, work, repeats):
    """Of one call, by events where there are any: the best of three rounds."""
    work()
    best = float("inf")
    for _ in range(3):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) * 1e3
        else:
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            elapsed = (time.perf_counter() - start) * 1e6
        best = min(best, elapsed / repeats)
    return best


class Torch:
    def __init__(self, tiny):
        import torch

        self.torch, self.tiny = torch, tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.repeats = 2 if tiny else 20
        self.hidden, self.intermediate = (64, 96) if tiny else (4096, 14336)
        self.heads, self.kv_heads, self.head_dim = (4, 2, 64) if tiny else (32, 8, 128)
        torch.manual_seed(0)

    def random(self, *shape):
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.bfloat16)

    def time(self, work):
        return microseconds(self.torch, work, self.repeats)

    def copy(self):
        count = 1 << (20 if self.tiny else 30)
        source = self.torch.ones(count, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        row("torch_copy_gb_s", 2e-3 * count / self.time(lambda: target.copy_(source)), "GB/s")

    def products(self):
        layers = [("up", 2 * self.intermediate, self.hidden), ("down", self.hidden, self.intermediate)]
        for layer, n, k in layers:
            weight = self.random(n, k)
            for m in [1, 16] if self.tiny else [1 << i for i in range(14)]:
                x = self.random(m, k)
                us = self.time(lambda: self.torch.matmul(x, weight.T))
                row(f"torch_gemm_us/{layer}/{m}/bf16", us, "us")
                row(f"torch_gemm_tflop_s/{layer}/{m}/bf16", 2e-6 * m * n * k / us, "TFLOP/s")

    def products_fp8(self):
        n, k = 2 * self.intermediate, self.hidden
        one = self.torch.ones((), device=self.device)
        weight = self.random(n, k).to(self.torch.float8_e4m3fn)
        for m in [16] if self.tiny else [16, 64, 512, 2048, 8192]:
            x = self.random(m, k).to(self.torch.float8_e4m3fn)
            us = self.time(lambda: self.torch._scaled_mm(
                x, weight.T, scale_a=one, scale_b=one, out_dtype=self.torch.bfloat16))
            row(f"torch_gemm_tflop_s/up/{m}/fp8", 2e-6 * m * n * k / us, "TFLOP/s")

    def attention(self, num_seqs, num_queries, context, causal):
        q = self.random(num_seqs, self.heads, num_queries, self.head_dim)
        k, v = (self.random(num_seqs, self.kv_heads, context, self.head_dim) for _ in range(2))
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        return self.time(lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=True))

    def decode(self):
        for num_seqs in [2] if self.tiny else [1, 64]:
            for context in [32] if self.tiny else [1024, 2048, 4096, 8192]:
                us = self.attention(num_seqs, 1, context, False)
                row(f"torch_decode_us/{num_seqs}x{context}/bf16", us, "us")

    def prefill(self):
        for length in [48] if self.tiny else [512, 1024, 2048, 4096, 8192]:
            us = self.attention(1, length, length, True)
            flops = 2.0 * self.heads * self.head_dim * length * (length + 1)
            row(f"torch_prefill_tflop_s/{length}", 1e-6 * flops / us, "TFLOP/s")

    def adapters(self):
        """What PEFT does for a batch with several adapters: the rows of each by themselves, twice through thin products."""
        rows, count, rank = 64, 8, 16
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = [(self.hidden, [q, kv, kv]), (q, [self.hidden]), (self.hidden, [self.intermediate] * 2),
                   (self.intermediate, [self.hidden])]
        of = [self.torch.arange(adapter, rows, count, device=self.device) for adapter in range(count)]
        # Copies of the factors that no cache holds.
        copies = 1 if self.tiny else 16
        work = []
        for inputs, parts in linears:
            x = self.random(rows, inputs)
            for outputs in parts:
                out = self.random(rows, outputs)
                factors = [[(self.random(rank, inputs), self.random(outputs, rank)) for _ in range(count)]
                           for _ in range(copies)]
                work.append((x, out, factors))
        turn = [0]

        def add():
            turn[0] += 1
            for x, out, factors in work:
                for rows_of, (a, b) in zip(of, factors[turn[0] % copies]):
                    out.index_add_(0, rows_of, x[rows_of] @ a.T @ b.T, alpha=0.5)

        row(f"torch_lora_us/{rows}x{count}/r{rank}", self.time(add), "us")


def continuous_batching(shape, tiny):
    """Output tokens per second of transformers' own paged scheduler, prompts of 128 and answers of 128 tokens."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(shape)
    requests, length, answer = (2, 8, 4) if tiny else (128, 128, 128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("paged|sdpa")
    generation = transformers.GenerationConfig(
        max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, config.vocab_size, (requests, length), generator=generator).tolist()
    model.generate_batch(inputs=prompts[:2], generation_config=generation, progress_bar=False)
    start = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation, progress_bar=False)
    seconds = time.perf_counter() - start
    lengths = [len(output.generated_tokens) for output in outputs.values()]
    if statistics.mean(lengths) < answer:
        raise RuntimeError(f"answers of {statistics.mean(lengths)} tokens on average instead of {answer}")
    name = shape.rstrip("/").rsplit("/", 1)[-1]
    row(f"transformers_output_tok_s/{name}/{length}x{answer}", sum(lengths) / seconds, "tok/s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("shape")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    try:
        peer = Torch(args.tiny)
        for function in (
                peer.copy, peer.products, peer.products_fp8, peer.decode, peer.prefill, peer.adapters):
            part(function)
    except ImportError as error:
        print(f"left out: {error}")
    part(continuous_batching, args.shape, args.tiny)
    with open(args.out, "w") as file:
        json.dump({"rows": ROWS}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
