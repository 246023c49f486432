"""Computes log-probabilities, policy-gradient and teacher losses in one pass over the LM head."""

from kdrl_kernels.adapter import LowRank
from kdrl_kernels.api import kdrl_loss, linear_logprobs, linear_token_loss
from kdrl_kernels.composite import composite_teacher
from kdrl_kernels.head import TeacherHead
from kdrl_kernels.metrics import mean_metrics
from kdrl_kernels.objective import Objective
from kdrl_kernels.outputs import LogprobOutput, LossOutput
from kdrl_kernels.plan import ChunkPlan, chunk_plan
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.token_rows import Rows
from kdrl_kernels.truncation import Truncation

__version__ = "0.1.0"
__all__ = [
    "ChunkPlan",
    "LogprobOutput",
    "LossOutput",
    "LowRank",
    "Objective",
    "Rows",
    "Sketch",
    "TeacherHead",
    "Truncation",
    "__version__",
    "chunk_plan",
    "composite_teacher",
    "kdrl_loss",
    "linear_logprobs",
    "linear_token_loss",
    "mean_metrics",
]
