"""Loads new weights inside vLLM.

A server takes it by --worker-extension-cls kdrl_train.rollouts.vllm_worker.Worker, and needs this
package without its dependencies. Importing this module changes vLLM on a CPU, see below.
"""

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform

from kdrl_train.errors import EngineError

if current_platform.is_cpu():
    # vLLM would keep oneDNN's packed copies of the old weights, of a tied head without an error.
    # An import is the only hook: vLLM imports an extension before it builds the model.
    _custom_ops._supports_onednn = False


def load_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights, by their names in transformers, into a model of vLLM.

    Raises: EngineError where a parameter of the model gets none.
    """
    missing = {name for name, _ in model.named_parameters()} - set(model.load_weights(weights))
    if missing:
        raise EngineError(f"every weight must be loaded, got none for {sorted(missing)}")


class Worker:
    """Holds the methods that the server's /collective_rpc calls on each of its workers."""

    kdrl_label: str | None = None
    """Label of the push that the weights are from; None: they are from the model's folder."""

    def kdrl_load(self: Any, path: str, label: str) -> None:
        """Load the weights of a safetensors file, and keep their label."""
        self.kdrl_label = "a push that failed"
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            load_weights(self.get_model(), ((name, file.get_tensor(name)) for name in names))
        self.kdrl_label = label

    def kdrl_state(self: Any) -> dict[str, str | None]:
        """Return the label and dtype of the weights, and which log-probabilities vLLM records."""
        config = self.vllm_config.model_config
        return {
            "label": self.kdrl_label,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
        }
