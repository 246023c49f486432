"""Samples on a vLLM server: completions come over HTTP, weights go through a file both can see.

Every push of weights has a label of its own, which the server's workers keep. A server that was
restarted, or that another run has pushed to, has another label or none.
"""

import os
import time
from collections.abc import Callable
from itertools import islice
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError, RunError
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines.requests import (
    CompletionReply,
    CompletionRequest,
    RequestEngine,
)
from kdrl_train.rollouts.engines.vllm_client import RETRIES, VllmClient
from kdrl_train.waiting import Poll, retry_waits

WEIGHTS = "engine_weights.safetensors"
"""Name of the file in the run's folder; it exists only while the server reads it."""


def inspect(server: VllmClient, config: TrainConfig) -> tuple[str, int]:
    """Return the server's name for its model, and its window in tokens.

    Raises: ValueError unless the server replies, and was started as the run needs it.
    """
    required = {"dtype": config.model.dtype, "logprobs_mode": "processed_logprobs"}
    try:
        (model,) = server.send("GET", "/v1/models")["data"]
        for state in server.workers("kdrl_state"):
            if {key: state[key] for key in required} != required:
                raise EngineError(f"{state} where {required} is needed")
        return model["id"], model["max_model_len"]
    except (EngineError, LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"engine.url must be a vLLM server for this run, got {error}: start it with "
            "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model "
            f"{config.model.policy} --dtype {config.model.dtype} --logprobs-mode "
            "processed_logprobs --worker-extension-cls kdrl_train.rollouts.vllm_worker.Worker"
        ) from error


class VllmServerEngine(RequestEngine):
    """An Engine whose model is at engine.url; all ranks send requests, rank 0 pushes weights.

    Raises: ValueError unless the server replies, and was started as the run needs it.
    """

    def __init__(self, config: TrainConfig, policy: Policy, tokenizer: Any, world: World) -> None:
        super().__init__(policy, tokenizer)
        self.server = VllmClient(str(config.engine.url), config.engine.timeout_s)
        self.dtype = policy.compute_dtype
        self.file = config.out.absolute() / WEIGHTS
        self.world = world
        self.label: str | None = None
        self.failure: RunError | None = None
        self.model, self.window = inspect(self.server, config)

    def replies(
        self,
        requests: list[CompletionRequest],
        sampling: SamplingConfig,
        poll: Poll,
        report: Callable[[int, int], None],
    ) -> list[CompletionReply]:
        """Return replies as RequestEngine says; at most sampling.batch_size are open at a time.

        Raises: EngineError where the server fails, has other weights or too short a window, and
            where the last push of weights failed.
        """
        if self.failure is not None:
            raise self.failure
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > self.window:
            raise EngineError(
                f"the server at {self.server.url} must hold the longest prompt and completion, "
                f"got a window of {self.window} tokens for {longest} + {sampling.max_new_tokens}: "
                "start it with a larger --max-model-len"
            )
        self._require_weights()
        replies = self.server.complete(self.model, requests, sampling.batch_size, poll, report)
        self._require_weights()  # the server may have been restarted in between
        return replies

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """Load weights as Engine says.

        An error of the push is raised by the next `generate`, so that the step that is done can
        still be saved.
        """
        weights: dict[str, Tensor] = {}
        for name, weight in full_weights(policy.model):
            if self.world.main:
                weights[name] = weight.to("cpu", self.dtype).contiguous()
        self.failure = None
        try:
            self.label = self.world.on_main(lambda: self._push(weights, version))
        except RunError as error:
            self.failure = error
        self.version = version

    def _push(self, weights: dict[str, Tensor], version: int) -> str:
        """Write the weights, have the server load them, and return the label of this push."""
        label = f"{version} steps, {uuid4().hex}"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(weights, self.file)
                with self.file.open("rb") as written:
                    os.fsync(written.fileno())  # the server may be on another machine
                self.server.workers("kdrl_load", str(self.file), label)
            finally:
                self.file.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the weights for the server must be written to {self.file}, got {error}: set "
                "`out` to a folder that can be written, with enough space"
            ) from error
        # a request that has just ended may still hold its keys and values
        for wait_s in (0.0, *islice(retry_waits(), RETRIES)):
            time.sleep(wait_s)
            if self.server.send("POST", "/reset_prefix_cache")["success"]:
                return label
        raise EngineError(
            f"the server at {self.server.url} must drop its prefix cache after a push, got a "
            "refusal: it has requests of another client, and must serve this run alone"
        )

    def _require_weights(self) -> None:
        """Raise EngineError unless every worker of the server has the label of the last push."""
        labels = [state["label"] for state in self.server.workers("kdrl_state")]
        if any(label != self.label for label in labels):
            raise EngineError(
                f"the server at {self.server.url} must have the weights of this run after "
                f"{self.version} steps, got {labels[0] or 'those it was started with'}: it was "
                "restarted, or another run uses it; --resume pushes the weights again"
            )
