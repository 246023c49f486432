"""The part of the run configuration that says who samples."""

from dataclasses import dataclass
from typing import Literal

from kdrl_train.bounds import positive


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who samples the completions."""

    kind: Literal["generate", "continuous", "vllm", "vllm_server"] = "generate"
    """transformers' `generate`, from the policy itself, under torchrun from a whole copy on each
    rank; its continuous batching, always from a copy, for GPUs; vLLM in this process, from a copy
    on each rank; or a vLLM server, which all ranks share."""
    url: str | None = None
    """Where the server of `vllm_server` is: http://host:port. It must see the run's folder, through
    which it gets the weights."""
    timeout_s: float = 1800.0
    """Longest wait for one answer of that server, in seconds; past it the run stops."""
    memory_share: float = 0.4
    """Share of a GPU's memory (on a CPU: of the machine's) that `vllm` takes for its copy and its
    keys and values."""
    eager: bool = False
    """`vllm` without CUDA graphs: starts sooner, takes less memory, samples slower."""
    max_gap: float | None = None
    """Largest mean difference between the log-probabilities of engine and trainer for the tokens
    of a step, in nats, beyond which the run stops; None: 1e-3 in float32, 0.05 in bfloat16."""
    staleness: Literal[0, 1] = 0
    """1: each step's completions, but the first's, are drawn and verified while the step before
    trains, by a copy of the weights that it starts from. They are off-policy by one step: the ratio
    is taken to the policy that sampled (with method.sampler_correction: see terms.py)."""

    def __post_init__(self) -> None:
        if self.max_gap is not None:
            positive("engine.max_gap", self.max_gap)
        positive("engine.timeout_s", self.timeout_s)
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"engine.memory_share must be in (0, 1], got {self.memory_share}")
        if (self.url is not None) != (self.kind == "vllm_server"):
            raise ValueError(
                'engine.url must be set for engine.kind "vllm_server", and for no other, got '
                f'{self.url} and "{self.kind}"'
            )

    def limit(self, dtype: str) -> float:
        """The largest gap for a model.dtype."""
        return self.max_gap or {"float32": 1e-3, "bfloat16": 0.05}[dtype]
