"""The public functions: contract, checks and choice of implementation."""

from kdrl_kernels.api.logprobs import linear_logprobs
from kdrl_kernels.api.loss import kdrl_loss
from kdrl_kernels.api.token_loss import linear_token_loss

__all__ = ["kdrl_loss", "linear_logprobs", "linear_token_loss"]
