"""What is measured, and how one engine is asked for it: cases, settings, jobs. Plain data, without any engine."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from models import Model

PRECISIONS = ("bf16", "int8", "int4")
CONTEXT = 512
"""Tokens of each sequence before decoding starts."""
WARMUP_STEPS = 2
"""Decode steps before those that count."""
REPEATS = 2
"""Prefills of one visit that count, after one that does not; their median is the visit's figure."""
TOKEN_BUDGET = 2048
"""Prompt tokens in one step, for the engines that ask."""


@dataclass(frozen=True)
class Case:
    """One cell's load: a prefill of one prompt, or decode steps of a batch."""

    kind: str
    """prefill or decode"""
    batch: int
    """Sequences."""
    length: int
    """Tokens of each prompt."""
    steps: int
    """Decode steps that count; 0 for a prefill."""

    @property
    def name(self) -> str:
        return f"prefill-{self.length}" if self.kind == "prefill" else f"decode-{self.batch}"

    @property
    def output_len(self) -> int:
        """Tokens to ask of each sequence. While the last prompts are computed the first sequences decode already."""
        if self.kind == "prefill":
            return 1
        prompt_steps = -(-self.batch * self.length // TOKEN_BUDGET)
        return 1 + prompt_steps + 2 + WARMUP_STEPS + self.steps

    @property
    def tokens(self) -> int:
        """All that must be in the KV cache at once."""
        return self.batch * (self.length + self.output_len)


ALL = (
    Case("prefill", 1, 512, 0),
    Case("prefill", 1, 2048, 0),
    Case("decode", 1, CONTEXT, 24),
    Case("decode", 8, CONTEXT, 24),
    Case("decode", 32, CONTEXT, 12),
)
BY_NAME = {case.name: case for case in ALL}


@dataclass(frozen=True)
class Setting:
    """One documented way to run an engine at a precision. The best of them is the engine's figure, row by row."""

    name: str
    options: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Job:
    """One engine on one model: everything that it is told."""

    peer: str
    """Name of the module that knows the engine."""
    python: str
    """The interpreter of its virtual environment."""
    model: Model
    precision: str
    setting: Setting
    threads: int
    cores: tuple[int, ...]
    """Exactly `threads` of them; the engine's processes are confined to these."""
    scratch: Path
    """The engine's own directory, for converted models and caches."""
    max_tokens: int
    """Tokens of KV cache that the cases need at most."""
    quire: str = ""
    """The binary, for Quire alone."""
    quire_args: tuple[str, ...] = ()

    @property
    def kv_gib(self) -> int:
        """KV cache to reserve: what the cases need at 16 bits, and a tenth more, in whole GiB."""
        return -(-self.max_tokens * self.model.kv_bytes_per_token * 11 // 10 // 2**30)

    def to_json(self) -> dict:
        return asdict(self) | {
            "model": {"name": self.model.name, "path": str(self.model.path)},
            "scratch": str(self.scratch),
        }

    @staticmethod
    def from_json(value: dict) -> "Job":
        model = Model(value["model"]["name"], Path(value["model"]["path"]))
        lists = {key: tuple(value[key]) for key in ("cores", "quire_args")}
        setting = Setting(**value["setting"])
        return Job(**value | lists | {"model": model, "setting": setting, "scratch": Path(value["scratch"])})


class Skip(Exception):
    """An engine that cannot take part, with the reason."""
