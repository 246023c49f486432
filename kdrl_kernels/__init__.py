"""One pass over the LM head: log-probabilities, teacher KL, policy-gradient loss and gradients."""

from kdrl_kernels.api import LogprobOutput, LossOutput, kdrl_loss, linear_logprobs
from kdrl_kernels.head import TeacherHead
from kdrl_kernels.objective import Objective

__version__ = "0.1.0"
__all__ = [
    "LogprobOutput",
    "LossOutput",
    "Objective",
    "TeacherHead",
    "__version__",
    "kdrl_loss",
    "linear_logprobs",
]
