"""Hugging Face transformers on PyTorch, the way most people run a model first: bf16, SDPA attention, static batch.

The prompt of a batch is computed once and its KV repeated.
"""

import time
from pathlib import Path

import models
from cases import REPEATS, WARMUP_STEPS, Case, Job, Setting
from stats import median

NAME = "transformers"
TITLE = "transformers"
REQUIREMENTS = ("transformers==5.23.0", "torch==2.13.0", "safetensors")
SETTINGS = {"bf16": (Setting("SDPA"),)}
LACKS = {
    "int8": "has none for CPU without further packages",
    "int4": "has none for CPU without further packages",
}


def environment(_job: Job) -> dict[str, str]:
    """Nothing special."""
    return {}


def prepare(job: Job) -> Path:
    """The checkpoint as it is."""
    return job.model.path


class Engine:
    """The model and nothing else."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        self.torch, self.transformers = torch, transformers
        self.vocab_size = job.model.vocab_size
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model.path, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model = model.eval()

    def run(self, case: Case) -> float:
        with self.torch.inference_mode():
            if case.kind == "prefill":
                rates = [self._prefill(case.length)[0] for _ in range(1 + REPEATS)]
                return median(rates[1:])
            return self._decode(case)

    def _prefill(self, length: int):
        """Prompt tokens per second, and the cache."""
        prompt = self.torch.tensor(models.prompts(1, length, self.vocab_size))
        cache = self.transformers.DynamicCache(config=self.model.config)
        begin = time.perf_counter()
        self.model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        return length / (time.perf_counter() - begin), cache

    def _decode(self, case: Case) -> float:
        _, cache = self._prefill(case.length)
        cache.batch_repeat_interleave(case.batch)
        token = self.torch.tensor(models.prompts(case.batch, 1, self.vocab_size))
        begin = 0.0
        for step in range(WARMUP_STEPS + case.steps):
            if step == WARMUP_STEPS:
                begin = time.perf_counter()
            token = self.model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        return case.batch * case.steps / (time.perf_counter() - begin)
