"""Train the model on the generated corpus; checkpoints go to --out, `export.py` turns one into model/.

    python train.py                           # on a CPU; or --device cuda
    python train.py --resume first/final.pt --peak 0.4 --seed 20001 --minutes 10 --out second

Hidden matrices are trained with Muon (momentum, then an orthogonal update), everything else with AdamW. The learning
rate rises for 1 % of the run, stays flat, and falls to zero over the last 40 %. The run ends after --tokens or --minutes,
whichever comes first, and the schedule follows whichever is further.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from torch.nn import functional as F
from tokenizers import Tokenizer

from corpus import END, documents
from model import CONFIG, Model
from tokenizer import MODEL_DIR

PROMPT_WEIGHT = 0.3  # loss weight of what the model reads; what it answers counts 1
# Row lengths, taken in turn; every step has the same number of tokens, so long rows come with fewer rows.
LENGTHS = [512, 512, 1024, 512, 512, 512, 1024, 2048]


class Rows:
    """Packs documents into rows of ids and loss weights. A row starts with a document, as a request does."""

    def __init__(self, seed):
        self.tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        self.end, self.start, self.stop = (self.tokenizer.token_to_id(t) for t in (END, "<|im_start|>", "<|im_end|>"))
        self.assistant = self.tokenizer.token_to_id("assistant")
        assert self.assistant is not None
        self.stream = self._documents(seed)

    def _documents(self, seed):
        texts = documents(seed, 1 << 40)
        while True:
            batch = [next(texts) + END for _ in range(256)]
            for encoded in self.tokenizer.encode_batch(batch):
                ids = np.array(encoded.ids, dtype=np.int64)
                yield ids, self._weights(ids)

    def _weights(self, ids):
        starts = np.flatnonzero(ids == self.start)
        if len(starts) == 0:
            return np.ones(len(ids), dtype=np.float32)
        weights = np.full(len(ids), PROMPT_WEIGHT, dtype=np.float32)
        stops = np.flatnonzero(ids == self.stop)
        for start, stop in zip(starts, stops):
            if ids[start + 1] == self.assistant:
                weights[start + 3: stop + 1] = 1.0
        return weights

    def batch(self, rows, length):
        ids = np.empty((rows, length + 1), dtype=np.int64)
        weights = np.empty((rows, length + 1), dtype=np.float32)
        for r in range(rows):
            filled = 0
            while filled <= length:
                doc, w = next(self.stream)
                n = min(len(doc), length + 1 - filled)
                ids[r, filled: filled + n], weights[r, filled: filled + n] = doc[:n], w[:n]
                filled += n
        return torch.from_numpy(ids), torch.from_numpy(weights)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought close to an orthogonal matrix by five Newton-Schulz steps.

    Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.02):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(updates)).unbind()):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-scale)


def orthogonal(x):
    """The nearest matrix (roughly) whose singular values are all about 1, for a stack of matrices."""
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def learning_rate(progress):
    return min(1.0, (progress + 0.0005) / 0.01, max(0.0, (1 - progress) / 0.4))


def loss_of(model, ids, weights, device, autocast):
    ids, weights = ids.to(device), weights.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    answer = weights == 1.0
    return (losses * weights).sum() / weights.sum(), losses.mean(), losses[answer].mean()


def evaluate(model, args, batches=8):
    """Mean loss on newly drawn documents: (all tokens, tokens of answers and prose)."""
    rows = Rows(seed=987_654)
    with torch.no_grad():
        found = [loss_of(model, *rows.batch(8, 512), args.device, not args.float32)[1:] for _ in range(batches)]
    return [torch.stack(part).mean().item() for part in zip(*found)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("checkpoints"))
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--resume", type=pathlib.Path, help="start from these weights; use another --seed for new text")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    model = Model().to(args.device)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, map_location=args.device))
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    peaks = [args.peak * optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {CONFIG['num_hidden_layers']} layers", flush=True)

    rows, seen, step, began, average = Rows(args.seed), 0, 0, time.time(), None
    while True:
        minutes = (time.time() - began) / 60
        progress = max(seen / args.tokens, minutes / args.minutes)
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(progress)
        length = LENGTHS[step % len(LENGTHS)]
        weighted, _, answers = loss_of(model, *rows.batch(args.batch_tokens // length, length), args.device, not args.float32)
        weighted.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += args.batch_tokens
        average = answers.item() if average is None else 0.98 * average + 0.02 * answers.item()
        if step <= 3 or step % 50 == 0:
            print(f"step {step} tokens {seen} loss {weighted.item():.4f} answers {average:.4f} progress {progress:.3f} "
                  f"tokens/s {seen / (time.time() - began):.0f}", flush=True)
        if step % 200 == 0:
            torch.save(model.state_dict(), args.out / "latest.pt")
    minutes = (time.time() - began) / 60
    every, answers = evaluate(model, args)
    torch.save(model.state_dict(), args.out / "final.pt")
    report = {"parameters": parameters, "tokens": seen, "steps": step, "minutes": round(minutes, 1),
              "tokens_per_second": round(seen / minutes / 60), "eval_loss": round(every, 4), "eval_loss_answers": round(answers, 4),
              "seed": args.seed, "batch_tokens": args.batch_tokens, "device": args.device, "threads": args.threads}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
