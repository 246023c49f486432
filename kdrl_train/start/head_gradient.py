"""The preflight's check of a sketched head: sketches the gradient of the tokens of some prompts."""

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.config import TrainConfig
from kdrl_train.method.metrics import token_means
from kdrl_train.model.fsdp import gathered
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.problems import encode_prompt
from kdrl_train.start.load import Loaded
from kdrl_train.start.prompts import PROBE_PROMPTS

NEARLY_ALL = 0.9
"""Share of tokens with an exact gradient from which a sketch saves next to nothing."""


def check_sketch(config: TrainConfig, loaded: Loaded) -> str:
    """Say how many entries the sketch keeps of the tokens of a few prompts, and its noise.

    Raises: UserWarning where nearly all of these tokens are too flat to be sketched.
    """
    policy, probed = loaded.policy, loaded.examples[:PROBE_PROMPTS]
    prompts = [torch.tensor(encode_prompt(loaded.tokenizer, e, config.data)) for e in probed]
    tokens = sum(len(prompt) - 1 for prompt in prompts)
    if tokens == 0:
        return "not measured: prompts of one token"
    means = sketch_means(policy, prompts)
    flat = means["sketch_flat_share"] or 0.0
    noise = means["sketch_noise"]
    where = f"of {tokens} prompt tokens {flat:.0%} have their exact gradient"
    if flat >= NEARLY_ALL:
        raise UserWarning(
            f"{where}, as sparse products over {policy.vocab_size:,} columns would cost more: the "
            "sketch saves next to nothing; set model.head_backward to exact, unless completions "
            "are far less flat (sketch_flat_share in the log)"
        )
    relative = "" if noise is None else f", noise {noise:.2%} of the gradient"
    entries = means["sketch_entries"] or 0.0
    return f"{where}; {entries:.0f} entries a token of {policy.vocab_size:,} columns{relative}"


def sketch_means(policy: Policy, prompts: list[Tensor]) -> dict[str, float | None]:
    """Return the metrics of a policy gradient of the tokens of prompts, each [T].

    All ranks call it together.
    """
    device = policy.device
    with gathered(policy), torch.no_grad():
        weight, bias = policy.head()
        states = []
        for prompt in prompts:
            T = len(prompt)
            ids, positions = prompt[None].to(device), torch.arange(T, device=device)[None]
            states.append(policy.hidden(ids, positions, positions[0, :-1], [T]))
        hidden = torch.cat(states).requires_grad_()
        tokens = torch.cat([prompt[1:] for prompt in prompts]).to(device)
        with torch.enable_grad():
            out = kk.kdrl_loss(
                hidden,
                weight,
                tokens,
                advantages=torch.ones(len(tokens), device=device),
                objective=kk.Objective(kd=None),
                bias=bias,
                temperature=policy.temperature,
                softcap=policy.softcap,
                workspace_bytes=policy.workspace_bytes,
                backward="sketch",
                sketch=policy.sketch,
                impl=policy.head_impl,
            )
    return token_means(out.metrics)
