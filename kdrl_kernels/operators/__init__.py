"""Operators of torch.library, which let a compiled caller keep one graph.

An operator takes tensors and numbers only: flat.py flattens a call. Each runs with autograd and
autocast off.
"""

from kdrl_kernels.operators.logprobs import linear_logprobs
from kdrl_kernels.operators.loss import kdrl_loss

__all__ = ["kdrl_loss", "linear_logprobs"]
