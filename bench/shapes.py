"""Names shapes: the heads of real models, and the two shapes that the targets are stated for."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a student's head and its teacher's head, and the tokens through both."""

    name: str
    N: int
    """Number of tokens with a loss."""
    H: int
    V: int
    H_t: int
    V_t: int
    dtype: torch.dtype
    """Dtype of hidden states and heads."""
    source: str
    """The models that have these sizes."""

    @property
    def unit_flop(self) -> float:
        """Return u = 2 N H V FLOP: one GEMM over the student's head."""
        return 2.0 * self.N * self.H * self.V

    @property
    def tau(self) -> float:
        """Return the cost of the teacher's projection, in u."""
        return self.H_t * self.V_t / (self.H * self.V)

    def same(self, other: "Shape") -> bool:
        """Say whether the other shape differs in name and source alone."""
        return replace(self, name=other.name, source=other.source) == other


TOKENS = 16384
BF16 = torch.bfloat16

MODELS = (
    Shape("qwen2.5-0.5b", TOKENS, 896, 151936, 3584, 152064, BF16, "Qwen2.5-0.5B, teacher 7B"),
    Shape("qwen2.5-3b", TOKENS, 2048, 151936, 3584, 152064, BF16, "Qwen2.5-3B (1.7B of 3), 7B"),
    Shape("qwen2.5-7b", TOKENS, 3584, 152064, 3584, 152064, BF16, "Qwen2.5-7B, teacher the same"),
    Shape("llama-3.1-8b", TOKENS, 4096, 128256, 8192, 128256, BF16, "Llama-3.1-8B, teacher 70B"),
    Shape("qwen3-14b", TOKENS, 5120, 151936, 5120, 151936, BF16, "Qwen3-14B, teacher 32B"),
    Shape("gemma-2-2b", TOKENS, 2304, 256000, 3584, 256000, BF16, "Gemma-2-2B, teacher 9B"),
)
REFERENCE = Shape(
    "reference", TOKENS, 3584, 152064, 3584, 152064, BF16, "Qwen2.5-7B taught by Qwen2.5-7B"
)
FP32 = torch.float32
CPU = Shape("cpu", 1024, 1024, 32768, 1024, 32768, FP32, "none: small enough for 2 cores")
CPU_SMALL = Shape("cpu-small", 512, 256, 8192, 256, 8192, FP32, "none: everybody in minutes")
CPU_RAGGED = Shape("cpu-ragged", 751, 257, 8093, 301, 8191, FP32, "none: no size is round")
TINY = Shape("tiny", 32, 64, 512, 64, 512, FP32, "none: tests")
RAGGED = Shape("ragged", 16381, 3584, 151937, 3584, 152063, BF16, "Qwen2.5-7B, less a few rows")

SHAPES = {
    shape.name: shape for shape in (*MODELS, REFERENCE, RAGGED, CPU, CPU_SMALL, CPU_RAGGED, TINY)
}


def default_shape() -> Shape:
    """Return REFERENCE where there is a GPU, else CPU_SMALL."""
    return REFERENCE if torch.cuda.is_available() else CPU_SMALL
