"""llama.cpp, built from the sources inside `llama-cpp-python` for this very processor, with its tools.

Prefill and decode go through libllama itself, as llama-batched-bench does, without sampling. The prompt of a batch is
computed once and its KV copied, so that every sequence has its own; a sequence's tokens have no influence on the time.
"""

import ctypes
import os
import time
from pathlib import Path

import models
from cases import REPEATS, WARMUP_STEPS, Case, Job, Setting, Skip
from stats import median

NAME = "llama-cpp"
TITLE = "llama.cpp"
REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy")
PIP_OPTIONS = ("--no-binary", "llama-cpp-python")
_CMAKE = {
    "GGML_NATIVE": "ON",
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_TOOLS_INSTALL": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
INSTALL_ENVIRONMENT = {"CMAKE_ARGS": " ".join(f"-D{key}={value}" for key, value in _CMAKE.items())}
SETTINGS = {
    "bf16": (Setting("bf16", {"ftype": 32}),),
    "int8": (Setting("Q8_0", {"ftype": 7}),),
    "int4": (Setting("Q4_0", {"ftype": 2}), Setting("Q4_K_M", {"ftype": 15})),
}
"""`ftype` is llama.cpp's number of the format."""
LACKS: dict[str, str] = {}
HEALTH = "/health"
EXTRA_FIELDS = {"cache_prompt": False}
SERVER_SLOTS = 32
SERVER_CONTEXT = 45056
"""32 slots of 1408 tokens."""
BATCH, UBATCH = 2048, 512


def environment(job: Job) -> dict[str, str]:
    """The installed tools do not find their libraries by themselves."""
    return {"LD_LIBRARY_PATH": str(_tools(job) / "lib")}


def _tools(job: Job) -> Path:
    """Where pip put llama.cpp's own bin and lib."""
    home = Path(job.python).parent.parent
    found = sorted(home.glob("lib/python*/site-packages/bin/llama-server"))
    if not found:
        raise Skip(f"no llama-server under {home}")
    return found[0].parent.parent


def _path(job: Job, name: str) -> Path:
    return job.scratch / f"{job.model.name}-{name}.gguf"


def prepare(job: Job) -> Path:
    """GGUF in bf16, and from there llama.cpp's own quantization."""
    full, path = _path(job, "bf16"), _path(job, job.setting.name)
    if not full.exists():
        import gguf_file

        partial = full.with_name(full.name + ".partial")
        gguf_file.write(job.model, partial)
        os.replace(partial, full)
    if not path.exists():
        import llama_cpp

        partial = path.with_name(path.name + ".partial")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = job.setting.options["ftype"], job.threads
        if llama_cpp.llama_model_quantize(str(full).encode(), str(partial).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not quantize to {job.setting.name}")
        os.replace(partial, path)
    return path


def serve(job: Job, port: int) -> list[str]:
    """llama-server, which the build installed into the environment."""
    command = [str(_tools(job) / "bin/llama-server"), "-m", str(_path(job, job.setting.name))]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(job.threads), "-tb", str(job.threads), "-np", str(SERVER_SLOTS), "-c", str(SERVER_CONTEXT)]
    return command + ["-b", str(BATCH), "-ub", str(UBATCH), "-fa", "on", "--no-warmup", "--cache-ram", "0"]


class Engine:
    """A model; each case has a context of its size."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.api, self.threads, self.vocab_size = llama_cpp, job.threads, job.model.vocab_size
        llama_cpp.llama_backend_init()
        path = str(_path(job, job.setting.name)).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.decode()}")

    def run(self, case: Case) -> float:
        context = self._context(case)
        try:
            if case.kind == "prefill":
                return median([self._prefill(context, case.length) for _ in range(1 + REPEATS)][1:])
            return self._decode(context, case)
        finally:
            self.api.llama_free(context)

    def _context(self, case: Case):
        params = self.api.llama_context_default_params()
        per_sequence = -(-(case.length + WARMUP_STEPS + case.steps + 1) // 256) * 256
        params.n_ctx, params.n_seq_max = per_sequence * case.batch, case.batch
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        return context

    def _compute(self, context, tokens: list[tuple[int, int, int]], logits_from: int) -> None:
        """One call for `tokens`, as (token, position, sequence); logits of those from `logits_from` on."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, (token, position, sequence) in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = index >= logits_from
            self._decode_batch(context, batch)
        finally:
            self.api.llama_batch_free(batch)

    def _decode_batch(self, context, batch) -> None:
        if status := self.api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self.api.llama_synchronize(context)

    def _prompt(self, context, length: int) -> None:
        prompt = models.prompts(1, length, self.vocab_size)[0]
        tokens = [(token, position, 0) for position, token in enumerate(prompt)]
        self._compute(context, tokens, len(tokens) - 1)

    def _prefill(self, context, length: int) -> float:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        begin = time.perf_counter()
        self._prompt(context, length)
        return length / (time.perf_counter() - begin)

    def _decode(self, context, case: Case) -> float:
        self._prompt(context, case.length)
        for sequence in range(1, case.batch):
            self.api.llama_memory_seq_cp(self.api.llama_get_memory(context), 0, sequence, -1, -1)
        token = models.prompts(1, 1, self.vocab_size)[0][0]
        begin = 0.0
        for step in range(WARMUP_STEPS + case.steps):
            if step == WARMUP_STEPS:
                begin = time.perf_counter()
            self._compute(context, [(token, case.length + step, sequence) for sequence in range(case.batch)], 0)
        return case.batch * case.steps / (time.perf_counter() - begin)
