"""torch.library operators, so that a compiled caller keeps one graph: the calls, flattened.

An operator takes tensors and numbers only. Each runs with autograd and autocast off.
"""

from kdrl_kernels.operators.logprobs import linear_logprobs
from kdrl_kernels.operators.loss import kdrl_loss

__all__ = ["kdrl_loss", "linear_logprobs"]
