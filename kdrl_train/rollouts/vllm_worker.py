"""Takes new weights inside vLLM.

For a server: --worker-extension-cls kdrl_train.rollouts.vllm_worker.Worker.
It needs no other part of this package there. Importing it changes vLLM on a CPU, see below.
"""

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform

from kdrl_train.errors import EngineError

if current_platform.is_cpu():
    # oneDNN's packed copies of weights would stay as they were, a tied head's without an error.
    # vLLM imports an extension before it builds the model, and calls no other hook of it.
    _custom_ops._supports_onednn = False


def load_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights, by their names in transformers, into a model of vLLM.

    Raises: EngineError where one of the model's own gets none.
    """
    missing = {name for name, _ in model.named_parameters()} - set(model.load_weights(weights))
    if missing:
        raise EngineError(f"every weight must be loaded, got none for {sorted(missing)}")


class Worker:
    """Methods that the server's /collective_rpc calls on each of its workers."""

    kdrl_label: str | None = None
    """Which push the weights are from; None: from the model's folder."""

    def kdrl_load(self: Any, path: str, label: str) -> None:
        """Take the weights in a safetensors file, and call them `label`."""
        self.kdrl_label = "a push that failed"
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            load_weights(self.get_model(), ((name, file.get_tensor(name)) for name in names))
        self.kdrl_label = label

    def kdrl_state(self: Any) -> dict[str, str | None]:
        """Label of the weights, their dtype, and which log-probabilities are recorded."""
        config = self.vllm_config.model_config
        return {
            "label": self.kdrl_label,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
        }
