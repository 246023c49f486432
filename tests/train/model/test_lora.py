"""lora: adapters of peft in a policy, whose loss is that of peft's own logits."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_train.config import LoraConfig, ModelConfig, TrainConfig
from kdrl_train.errors import ExtraError
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model import lora
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.load import checkpoint_activations, require_adaptable
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.ranks import ALONE
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import some_rollouts

Tiny = Callable[..., Any]
RKL = MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=0.3, final=0.3), entropy_coef=0.01)
ALL = LoraConfig(rank=3, alpha=6.0, targets=("all-linear", "lm_head"))
INNER = LoraConfig(rank=3, alpha=6.0, rslora=True)


def adapted(tiny: Tiny, family: str, config: LoraConfig, seed: int = 0, **more: Any) -> Any:
    """A model with adapters whose B is not 0."""
    model = tiny(family, seed=seed, **more)
    lora.inject(model, config, seed)
    draw = torch.Generator().manual_seed(seed)
    for layer in lora.adapted(model).values():
        nn.init.normal_(layer.lora_B[lora.ADAPTER].weight, std=0.1, generator=draw)
    return model


def logits_loss(model: Any, theirs: Any, method: MethodConfig) -> Tensor:
    """The loss of some_rollouts by whole logits, one completion after the other."""
    rollouts, rewards = some_rollouts()
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    coefficients = coefficients_of(rewards, method, token_weights=weights)
    total = torch.zeros((), dtype=torch.float64)
    for r, (prompt, completion) in enumerate(
        zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    ):
        if weights[r] == 0:
            continue
        ids = torch.cat([prompt, completion])[None]
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=1)
        with torch.no_grad():
            logq = theirs(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=1)
        chosen = logp.gather(1, completion[:, None])[:, 0]
        kl, entropy = ((logp.exp() * (logp - other)).sum(1) for other in (logq, 0))
        advantage, beta = coefficients.advantages[r], coefficients.kd_weight[r]
        ratio = (chosen - chosen.detach()).exp()
        token = -advantage * ratio + beta * kl + method.entropy_coef * entropy
        total = total + weights[r] * token.sum() / normalizer
    return total


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("family", "config", "more"),
    [
        ("llama", ALL, {"tie_word_embeddings": False}),
        ("qwen2", INNER, {"tie_word_embeddings": True}),
        ("gpt2", LoraConfig(rank=2, targets=("c_attn", "c_proj")), {"tie_word_embeddings": True}),
        ("gpt2", LoraConfig(rank=2, targets=("c_fc", "lm_head")), {"tie_word_embeddings": False}),
    ],
    ids=["head", "tied", "Conv1D", "Conv1D and head"],
)
def test_gradient_is_that_of_the_logits_of_peft(
    tiny: Tiny, family: str, config: LoraConfig, more: dict[str, Any], checkpointed: bool
) -> None:
    model = adapted(tiny, family, config, **more).double()
    theirs = tiny("llama", seed=5, hidden=48, tie_word_embeddings=False).double()
    policy = Policy(model, RKL, compute_dtype=torch.float64)
    expected = logits_loss(model, theirs, RKL)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    policy.zero_grad(set_to_none=True)
    if checkpointed:
        checkpoint_activations(model)
    teacher = Teacher(theirs, compute_dtype=torch.float64)
    rollouts, rewards = some_rollouts()
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), RKL.token_weights, 9
    )
    coefficients = coefficients_of(rewards, RKL, token_weights=weights)
    policy.train()
    total = torch.zeros((), dtype=torch.float64)
    for batch in pack(rollouts, coefficients, 16):
        out = policy(batch, normalizer, teacher(batch))
        out.loss.backward()
        total += out.loss.detach()
    torch.testing.assert_close(total, expected.detach())
    trained = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += 1
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
            assert parameter.grad.abs().max() > 1e-6, name
        else:
            assert parameter.grad is None, name
    assert trained == 2 * len(lora.adapted(model))


def test_a_frozen_head_gets_no_gradient_of_its_weight(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not computed, rather than computed and dropped: it is a third of the head's work."""
    method = MethodConfig(kd=None)
    policy = Policy(adapted(tiny, "llama", INNER, tie_word_embeddings=False), method)
    seen: list[Tensor] = []
    loss = kk.kdrl_loss

    def watched(hidden: Tensor, weight: Tensor, *rest: Any, **more: Any) -> kk.LossOutput:
        seen.append(weight)
        return loss(hidden, weight, *rest, **more)

    monkeypatch.setattr(kk, "kdrl_loss", watched)
    rollouts, rewards = some_rollouts()
    for batch in pack(rollouts, coefficients_of(rewards, method), 64):
        policy(batch, torch.tensor(1.0), None).loss.backward()
    assert seen
    assert not any(weight.requires_grad for weight in seen)


def test_it_starts_as_its_base_and_is_its_base_without_adapters(tiny: Tiny) -> None:
    base = tiny("llama", tie_word_embeddings=False)
    model = copy.deepcopy(base)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        lora.inject(model, ALL, 0)
        assert torch.equal(model(input_ids=ids).logits, before)
        for layer in lora.adapted(model).values():
            layer.lora_B[lora.ADAPTER].weight.fill_(0.1)
        policy = Policy(model, RKL)
        assert not torch.allclose(model(input_ids=ids).logits, before)
        assert not torch.allclose(policy.head()[0], base.lm_head.weight)
        with lora.without_adapters(model):
            assert torch.equal(model(input_ids=ids).logits, before)
            assert torch.equal(policy.head()[0], base.lm_head.weight)
        assert not torch.allclose(model(input_ids=ids).logits, before)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_adapters_are_a_function_of_the_seed(tiny: Tiny) -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = tiny("qwen2", tie_word_embeddings=True)
        torch.rand(seed + 1)  # what was drawn before does not matter
        state = torch.get_rng_state()
        lora.inject(model, INNER, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.lora_A[lora.ADAPTER].weight for layer in lora.adapted(model).values()]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("family", "config", "more"),
    [
        ("llama", ALL, {"tie_word_embeddings": False}),
        ("qwen2", INNER, {"tie_word_embeddings": True}),
        ("gpt2", LoraConfig(rank=2, targets=("c_attn", "c_fc")), {"tie_word_embeddings": True}),
    ],
    ids=["head", "tied", "Conv1D"],
)
def test_merged_weights_are_those_of_peft(
    tiny: Tiny, family: str, config: LoraConfig, more: dict[str, Any]
) -> None:
    model, base = adapted(tiny, family, config, **more), tiny(family, **more)
    merged = dict(full_weights(model))
    assert merged.keys() == dict(base.named_parameters()).keys()
    state = lora.merged_state(model, model.state_dict())
    assert state.keys() == base.state_dict().keys()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    in_place = copy.deepcopy(model)
    lora.merge_in_place(in_place, torch.float32)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            in_place(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    peft_model = copy.deepcopy(model)
    for layer in lora.adapted(peft_model).values():
        layer.merge()
    theirs = {n: p for n, p in peft_model.named_parameters() if "lora_" not in n}
    for name, weight in theirs.items():
        plain = name.replace(".base_layer", "")
        torch.testing.assert_close(merged[plain], weight.detach(), msg=name)
        torch.testing.assert_close(state[plain], weight.detach(), msg=name)


def test_what_is_trained_is_said(tiny: Tiny) -> None:
    model = adapted(tiny, "llama", LoraConfig(rank=1, targets=("q_proj",)))
    # two layers with A [1, 32] and B [32, 1]
    assert lora.parameters(model)[0] == 2 * (32 + 32)
    assert lora.summary(model).startswith("LoRA rank 1 on 2 layers: 128 parameters are trained, 0.")


def test_targets_that_cannot_be_adapted_are_refused(tiny: Tiny) -> None:
    tied = tiny("qwen2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"linear layers of Qwen2.*'q_prj' \(did you mean q_proj"):
        lora.inject(tied, replace(ALL, targets=("q_prj",)), 0)
    with pytest.raises(ValueError, match=r"targets must leave out a head that is tied .*'lm_head'"):
        lora.inject(tied, ALL, 0)
    with pytest.raises(ValueError, match=r"must name linear layers of Qwen2.*'embed_tokens'"):
        lora.inject(tied, replace(ALL, targets=("embed_tokens",)), 0)
    assert not lora.adapted(tied)


def test_settings_without_a_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be at least 1 with other settings of model"):
        LoraConfig(targets=("q_proj",))
    with pytest.raises(ValueError, match=r"tensor_parallel must be 1 with model.lora, got 2"):
        ModelConfig(lora=LoraConfig(rank=2), tensor_parallel=2)
    with pytest.raises(ValueError, match=r"targets must name a layer, got none"):
        LoraConfig(rank=2, targets=())


def test_without_peft_it_says_what_to_install(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    run = config(policy="llama")
    run = replace(run, model=replace(run.model, lora=INNER))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExtraError, match=r"pip install 'kdrl-kernels\[lora\]'"):
        require_adaptable(run, ALONE)
