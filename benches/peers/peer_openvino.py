"""OpenVINO GenAI: its continuous-batching pipeline, stepped in process.

Export by optimum-intel (fp16 weights, which the bf16 hint turns into bf16), weight compression by NNCF: int8 per
channel with zero points, int4 symmetric in groups of 64; embedding and output layer stay at int8. Activations are
quantized at run time in groups; the default group of 32 is not the fastest, so several settings run. KV cache:
OpenVINO's default (8 bits on x86), which is to its advantage.
"""

import os
import shutil
import subprocess
from pathlib import Path

import stepped
from cases import TOKEN_BUDGET, Case, Job, Setting

NAME = "openvino"
TITLE = "OpenVINO GenAI"
REQUIREMENTS = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "nncf==3.4.0",
    "optimum-intel==2.2.0",
    "transformers==5.5.4",
    "torch==2.13.0",
)


def _setting(hint: str, group: int | None) -> Setting:
    options = {"INFERENCE_PRECISION_HINT": hint}
    if group is not None:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    return Setting(f"{hint} hint, " + ("default DQ" if group is None else f"DQ {group}"), options)


SETTINGS = {
    "bf16": (Setting("bf16 hint", {"INFERENCE_PRECISION_HINT": "bf16"}),),
    "int8": (_setting("bf16", None), _setting("bf16", 128), _setting("f32", 128)),
    "int4": (_setting("bf16", None), _setting("bf16", 64), _setting("f32", 32)),
}
LACKS: dict[str, str] = {}
TRACE_BUDGET = 512
"""Tokens of one step in the server's trace: short steps keep the time between tokens short."""


def for_trace(setting: Setting) -> Setting:
    """The same in the trace of the server, which runs in process, as there is none on PyPI."""
    return Setting(f"{setting.name}, in process, no HTTP", setting.options | {"budget": TRACE_BUDGET})


def environment(job: Job) -> dict[str, str]:
    """Nothing special."""
    return {"OPENVINO_TELEMETRY_DISABLE": "1", "NNCF_DISABLE_TELEMETRY": "1"}


def _path(job: Job, precision: str) -> Path:
    return job.scratch / f"{job.model.name}-{precision}"


def prepare(job: Job) -> Path:
    """Exports to fp16 once, and compresses from there."""
    full = _path(job, "bf16")
    if not full.exists():
        partial = full.with_name(full.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [str(Path(job.python).with_name("optimum-cli")), "export", "openvino", "--model", str(job.model.path)]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp16", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(full)
    path = _path(job, job.precision)
    if not path.exists():
        _compress(full, path, job.precision)
    return path


def _compress(full: Path, path: Path, precision: str) -> None:
    import nncf
    import openvino

    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights = shutil.ignore_patterns("openvino_model.*")
    shutil.copytree(full, partial, ignore=weights)
    model = openvino.Core().read_model(full / "openvino_model.xml")
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0)
    openvino.save_model(model, partial / "openvino_model.xml")
    os.rename(partial, path)


class Engine:
    """The pipeline, one step at a time."""

    def __init__(self, job: Job) -> None:
        import openvino
        import openvino_genai

        self.genai, self.tensor = openvino_genai, openvino.Tensor
        self.vocab_size = job.model.vocab_size
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = job.kv_gib
        scheduler.max_num_batched_tokens = job.setting.options.get("budget", TOKEN_BUDGET)
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": job.threads} | job.setting.options
        properties.pop("budget", None)
        path = str(_path(job, job.precision))
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self.handles: dict = {}

    def add(self, request: int, prompt: list[int], output_len: int) -> None:
        import numpy

        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_len
        config.ignore_eos = True
        config.do_sample = False
        ids = self.tensor(numpy.array([prompt], dtype=numpy.int64))
        self.handles[request] = self.pipeline.add_request(request, ids, config)

    def step(self) -> dict[int, int]:
        self.pipeline.step()
        given = {}
        for request, handle in list(self.handles.items()):
            if handle.can_read():
                given[request] = sum(len(output.generated_ids) for output in handle.read().values())
            if handle.get_status() != self.genai.GenerationStatus.RUNNING:
                del self.handles[request]
        return given

    def run(self, case: Case) -> float:
        return stepped.run(self, case)
