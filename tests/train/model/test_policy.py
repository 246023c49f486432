"""policy: the head path, packed rows, and a loss that does not depend on how a step is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.batch import Rollouts
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.metrics import add_sums, token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.load import checkpoint_activations, load_model, load_policy, load_teacher
from kdrl_train.model.method_loss import objective
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.model.policy import HeadedModel, Policy, Teacher
from kdrl_train.model.probe import probe
from tests import tolerance
from tests.train.coefficients import coefficients_of, uniform

V = 258
ARCHITECTURES = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "gemma2 softcap": ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "granite scale": ("granite", {"logits_scaling": 4.0}),
    "cohere scale": ("cohere", {"logit_scale": 0.25}),
    "hyperclovax scale": ("hyperclovax", {"logits_scaling": 4.0}),
    "phi bias": ("phi", {"partial_rotary_factor": 0.5}),
}
KD = ScheduleConfig(initial=0.3, final=0.3)
METHODS = {
    "k2": MethodConfig(kd="k2", kd_coef=KD, entropy_coef=0.01),
    "rkl sequence": MethodConfig(kd="rkl", kd_coef=KD, token_weights="sequence_mean"),
    "fkl constant": MethodConfig(kd="fkl", kd_coef=KD, token_weights="constant"),
    "jsd": MethodConfig(kd="jsd", jsd_alpha=0.3, kd_coef=KD),
    "mixture": MethodConfig(kd="rkl+fkl", fkl_share=0.3, kd_coef=KD),
    "centred k2": MethodConfig(kd="k2", kd_baseline="kl", kd_coef=KD),
    "k3 masked": MethodConfig(kd="k3", kd_coef=KD, kd_mask="wrong_group"),
    "distillation": MethodConfig(policy="off", kd="rkl", kd_coef=KD, kd_mask="wrong"),
    "grpo": PRESETS["grpo"],
}


def some_rollouts() -> tuple[Rollouts, Tensor]:
    """3 groups of 2 completions of unequal length, rewards [3, 2]; one reward is missing."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (3, 9), (7, 1), (7, 5), (1, 6), (1, 2)]
    ids = [torch.randint(2, V, (p + c,), generator=draw) for p, c in sizes]
    completions = [i[p:] for i, (p, _) in zip(ids, sizes, strict=True)]
    rollouts = Rollouts(
        prompt_ids=[i[:p] for i, (p, _) in zip(ids, sizes, strict=True)],
        completion_ids=completions,
        logprobs=[torch.full((len(c),), -1.0) for c in completions],
        truncated=torch.zeros(6, dtype=torch.bool),
        texts=[""] * 6,
    )
    return rollouts, torch.tensor([[1.0, 0.0], [0.0, 0.0], [float("nan"), 1.0]])


def step_gradient(
    policy: Policy, teacher: Teacher | None, method: MethodConfig, budget: int, **fields: Any
) -> tuple[Tensor, list[Tensor], dict[str, float | None]]:
    """Loss, gradients and metrics of one step, packed into rows of `budget` tokens."""
    rollouts, rewards = some_rollouts()
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    coefficients = coefficients_of(rewards, method, token_weights=weights, **fields)
    policy.zero_grad()
    total, sums = torch.zeros((), dtype=torch.float64), {}
    for batch in pack(rollouts, coefficients, budget):
        head = teacher(batch) if teacher is not None and batch.needs_teacher else None
        out = policy(batch, normalizer, head)
        out.loss.backward()
        total += out.loss.detach()
        sums = add_sums(sums, out.sums)
    gradients = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    return total, gradients, token_means(sums)


def pair(
    tiny: Callable[..., Any], method: MethodConfig, dtype: torch.dtype, family: str, **config: Any
) -> tuple[Policy, Teacher | None]:
    policy = Policy(
        tiny(family, seed=1, **config).to(dtype), method, temperature=0.8, compute_dtype=dtype
    )
    if method.kd is None:
        return policy, None
    teacher = tiny("llama", seed=2, hidden=48).to(dtype)
    return policy, Teacher(teacher, temperature=0.8, compute_dtype=dtype)


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return difference / max(b.abs().max().item() for b in theirs)


SLOW = ("fkl constant", "centred k2", "distillation")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else []) for x in METHODS]
)
def test_loss_and_gradient_do_not_depend_on_packing(tiny: Callable[..., Any], name: str) -> None:
    method = METHODS[name]
    # weights of an ordinary width: wide ones amplify float32 rounding inside the model itself
    config = {"tie_word_embeddings": True, "initializer_range": 0.05}
    pairs = {
        dtype: pair(tiny, method, dtype, "qwen2", **config)
        for dtype in (torch.float32, torch.float64)
    }

    def step(dtype: torch.dtype, budget: int) -> tuple[dict[str, Tensor], dict[str, float | None]]:
        policy, teacher = pairs[dtype]
        loss, gradients, metrics = step_gradient(policy, teacher, method, budget)
        return {"loss": loss, "gradient": torch.cat([g.flatten() for g in gradients])}, metrics

    exact, metrics = step(torch.float64, 1)
    assert exact["gradient"].abs().max() > 1e-3
    sizes = {"loss": max(exact["loss"].abs().item(), 1.0)}  # it may cancel to about 0
    single, single_metrics = step(torch.float32, 12)
    tolerance.assert_matches(single, lambda dtype: step(dtype, 1)[0], lambda _: sizes)
    for budget in (12, 1000):
        other, other_metrics = step(torch.float64, budget)
        for key, value in exact.items():
            assert tolerance.relative_error(other[key], value, sizes.get(key)) <= 1e-10
        for key, value in metrics.items():
            assert other_metrics[key] == (value and pytest.approx(value, rel=1e-8)), key
    for key, value in metrics.items():
        assert single_metrics[key] == (value and pytest.approx(value, rel=1e-4)), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_is_that_of_the_models_own_logits(tiny: Callable[..., Any], name: str) -> None:
    """Against logits of the whole model, sequence by sequence, in float64 (in which some of these
    models still normalise in float32)."""
    family, config = ARCHITECTURES[name]
    method = METHODS["rkl sequence"]
    policy, teacher = pair(tiny, method, torch.float64, family, **config)
    loss, gradients, metrics = step_gradient(policy, teacher, method, budget=1000)

    rollouts, rewards = some_rollouts()
    coefficients = coefficients_of(rewards, method)
    advantages, kd_weight = coefficients.advantages, coefficients.kd_weight
    weights, _ = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    policy.zero_grad()
    expected, kl_sum, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for r in (0, 1, 2, 3, 5):  # the fifth completion has no reward
        ids = torch.cat([rollouts.prompt_ids[r], rollouts.completion_ids[r]])
        n = len(rollouts.completion_ids[r])
        p = (policy.model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        q = (teacher.model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        chosen = p.gather(1, ids[-n:, None]).squeeze(1)
        kl = (p.exp() * (p - q.detach())).sum(dim=1)
        losses = -(chosen - chosen.detach()).exp() * advantages[r] + kd_weight[r] * kl
        expected = expected + weights[r] * losses.sum() / 5
        kl_sum, count = kl_sum + kl.sum().item(), count + n
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradients, [p.grad for p in policy.parameters()]) <= 1e-6
    assert metrics["kl_teacher"] == pytest.approx(kl_sum / count, rel=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_hidden_states_equal_single_ones(tiny: Callable[..., Any], name: str) -> None:
    family, config = ARCHITECTURES[name]
    wrapped = HeadedModel(tiny(family, **config))
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(V, (1, n), generator=draw) for n in (1, 5, 9, 1, 1, 17)]
    positions = [torch.arange(i.shape[1])[None] for i in ids]
    with torch.no_grad():
        single = [
            wrapped.hidden(i, p, None, [i.shape[1]]) for i, p in zip(ids, positions, strict=True)
        ]
        together = wrapped.hidden(
            torch.cat(ids, dim=1), torch.cat(positions, dim=1), None, (1, 5, 9, 1, 1, 17)
        )
        mixed = wrapped.hidden(torch.cat(ids, dim=1), torch.arange(34)[None], None, [34])
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-5, atol=1e-5)
    assert (mixed - torch.cat(single)).abs().max() > 1e-2  # without restarts it does leak
    assert probe(wrapped, "model.policy") < 1e-5


@pytest.mark.parametrize("kd", ["k2", "k3"])
@pytest.mark.parametrize("mask", ["none", "wrong"])
def test_log_probabilities_of_a_server_train_as_the_teacher_does(
    tiny: Callable[..., Any], kd: str, mask: str
) -> None:
    """What the server was not asked for is NaN, and must not reach loss, gradient or metrics."""
    method = MethodConfig(kd=kd, kd_coef=KD, kd_mask=mask)
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    rollouts, rewards = some_rollouts()
    kd_weight = coefficients_of(rewards, method).kd_weight
    scores: list[Tensor | None] = []
    for prompt, completion, weight in zip(
        rollouts.prompt_ids, rollouts.completion_ids, kd_weight, strict=True
    ):
        ids = torch.cat([prompt, completion])[None]
        logits = teacher.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8
        chosen = logits.detach().log_softmax(dim=1).gather(1, completion[:, None]).squeeze(1)
        scores.append(chosen if weight > 0 else None)
    assert (None in scores) == (mask == "wrong")
    for budget in (1, 12, 1000):
        local = step_gradient(policy, teacher, method, budget)
        remote = step_gradient(policy, None, method, budget, teacher_logprobs=scores)
        assert relative_error([remote[0]], [local[0]]) <= 1e-9
        assert relative_error(remote[1], local[1]) <= 1e-9
        assert remote[2] == pytest.approx(local[2], rel=1e-9, nan_ok=False)


@pytest.mark.parametrize("trained", [True, False])
def test_the_gradient_of_a_float32_head_is_not_rounded(
    tiny: Callable[..., Any], trained: bool
) -> None:
    """Computing in bfloat16, it is added in float32; a frozen head is in the compute dtype."""
    method = MethodConfig(kd=None)
    policy, _ = pair(tiny, method, torch.float32, "llama")
    policy.compute_dtype = torch.bfloat16
    head = policy.model.get_output_embeddings()
    head.weight.requires_grad_(trained)
    weight, bias = policy.trained_head()
    assert bias is None
    assert (weight is head.weight) == trained
    assert weight.dtype == (torch.float32 if trained else torch.bfloat16)
    if trained:
        step_gradient(policy, None, method, 64)
        gradient = head.weight.grad
        assert gradient.dtype == torch.float32
        assert (gradient != gradient.bfloat16()).any()
        policy.trained_head = policy.head_without_adapter
        step_gradient(policy, None, method, 64)
        assert torch.equal(head.weight.grad, head.weight.grad.bfloat16().float())
        torch.testing.assert_close(head.weight.grad, gradient, rtol=2**-7, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tiny: Callable[..., Any]) -> None:
    method = METHODS["k2"]
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    plain = step_gradient(policy, teacher, method, budget=12)
    checkpoint_activations(policy.model)
    policy.train()
    again = step_gradient(policy, teacher, method, budget=12)
    assert relative_error(again[1], plain[1]) <= 1e-12


def test_dropout_is_off_while_training(tiny: Callable[..., Any]) -> None:
    model = tiny("phi", resid_pdrop=0.5, attention_dropout=0.5, embd_pdrop=0.5)
    policy = Policy(model, PRESETS["grpo"])
    ids = torch.arange(2, 22)[None]
    evaluated = policy.hidden(ids, torch.arange(20)[None], None, [20])
    policy.train()
    trained = policy.hidden(ids, torch.arange(20)[None], None, [20])
    assert torch.equal(trained, evaluated)


def test_teacher_is_frozen_and_gives_no_graph(tiny: Callable[..., Any]) -> None:
    teacher = Teacher(tiny("llama"))
    (batch,) = batches()
    head = teacher(batch)
    assert isinstance(head, kk.TeacherHead)
    assert not head.hidden.requires_grad
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def batches() -> list[PackedBatch]:
    rollouts, _ = some_rollouts()
    ones = torch.ones(6)
    return list(pack(rollouts, uniform(6, advantages=ones, kd_weight=ones), 1000))


class ScalesItsLogits(torch.nn.Module):
    """An LM head that does more than a matrix product."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.5 * torch.nn.functional.linear(hidden, self.weight, self.bias)


def test_probe_refuses_a_head_of_another_formula(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.set_output_embeddings(ScalesItsLogits(model.get_output_embeddings()))
    with pytest.raises(ValueError, match=r"model\.teacher must have logits .* LlamaForCausalLM"):
        probe(HeadedModel(model), "model.teacher")


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_probe_names_weights_that_are_not_finite(
    tiny: Callable[..., Any], weight: str, value: float
) -> None:
    model = tiny("llama")
    model.get_parameter(weight).data[0, 0] = value
    with pytest.raises(ValueError, match=r"^model\.teacher must compute finite logits, got NaN or"):
        probe(Teacher(model), "model.teacher")


def test_probe_refuses_a_leak_unless_rows_hold_one_sequence(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    inner = model.base_model.forward
    model.base_model.forward = lambda **kwargs: inner(
        **kwargs | {"position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}
    )
    wrapped = HeadedModel(model)
    with pytest.raises(ValueError, match=r"set optim\.micro_batch_tokens to 1"):
        probe(wrapped, "model.policy")
    assert probe(wrapped, "model.policy", packed=False) < 1e-5


def test_models_that_do_not_fit_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="causal LM with an LM head, got LlamaModel"):
        HeadedModel(tiny("llama").base_model)
    model = tiny("granite", logits_scaling=4.0)
    model.config.final_logit_softcapping = 3.0  # which Granite's forward does not read
    with pytest.raises(ValueError, match=r"must have logits = softcap\(scale"):
        probe(HeadedModel(model), "model.policy")


def test_a_model_that_scales_and_caps_its_logits(tiny: Callable[..., Any]) -> None:
    model = tiny("gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=16)
    model.get_output_embeddings().register_forward_hook(lambda *call: 0.5 * call[2])
    model.config.output_multiplier = 0.5  # Muse has both, but no small model
    assert probe(HeadedModel(model, temperature=0.7), "model.policy") < 1e-5


def test_missing_models_are_named(folders: dict) -> None:
    def config(**model: Any) -> TrainConfig:
        return TrainConfig(model=ModelConfig(**model))

    with pytest.raises(ValueError, match=r'model\.teacher must name .* when method\.kd is "k2"'):
        load_teacher(config(policy=str(folders["student"])))
    with pytest.raises(ValueError, match=r"model\.policy must name a folder or hub id"):
        load_policy(config(), None)
    with pytest.raises(ValueError, match=r"model\.policy must be a folder .* got '/no/such'"):
        load_policy(config(policy="/no/such"), None)


def test_vocabulary_ends_where_the_shorter_head_does(
    folders: dict, tiny: Callable[..., Any]
) -> None:
    teacher = Teacher(tiny("llama", vocab_size=V - 4))
    config = TrainConfig(model=ModelConfig(policy=str(folders["student"])))
    assert load_policy(config, teacher.vocab_size).sampled_vocab_size == V - 4
    assert load_policy(config, None).sampled_vocab_size == V


def test_a_gpu_named_by_its_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1"):  # the folder is looked for only then
        with pytest.raises(ValueError, match=r"model\.policy must be a folder with a causal LM"):
            load_model("absent/", "model.policy", ModelConfig(device=name), torch.float32)
    assert chosen == [torch.device("cuda:1")]


def test_a_baseline_changes_the_gradient_of_k2_and_measures_the_exact_kl(
    tiny: Callable[..., Any],
) -> None:
    result = {}
    for kd, baseline in (("k2", None), ("k2", "kl"), ("rkl", None)):
        method = MethodConfig(kd=kd, kd_baseline=baseline, kd_coef=KD)
        policy, teacher = pair(tiny, method, torch.float64, "qwen2")
        result[kd, baseline] = step_gradient(policy, teacher, method, budget=12)
    (_, plain, sampled), (_, centred, metrics), (_, _, exact) = result.values()
    assert relative_error(centred, plain) > 1e-3
    assert metrics["kl_teacher"] == pytest.approx(exact["kl_teacher"], rel=1e-9)
    for name in ("teacher_log_ratio", "k2", "kd_share", "entropy"):
        assert metrics[name] == pytest.approx(sampled[name], rel=1e-9)
    alone = objective(METHODS["centred k2"], distil=False)
    assert (alone.kd, alone.kd_baseline) == (None, None)
