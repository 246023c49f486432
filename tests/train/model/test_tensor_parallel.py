"""Two ranks that split a model compute its logits and gradients; other models are refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close

import kdrl_kernels as kk
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model import fsdp
from kdrl_train.model import policy as policy_module
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.tensor_parallel import split, styles_of
from kdrl_train.ranks import World, connect
from kdrl_train.step.update import clip
from tests.families import FAMILIES, make
from tests.train.model.test_policy import batches
from tests.train.ranks import on_ranks, train_ranks

Config = Callable[..., TrainConfig]
SPLIT = {"arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text"}
SPLIT |= {"gemma4_text", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral"}
SPLIT |= {"mistral", "nemotron", "olmo", "phi", "qwen2", "qwen3", "seed_oss", "smollm3"}
SPLIT |= {"starcoder2", "vaultgemma"}
FAST = ["qwen3", "llama", "gemma2"]
ODD = {"vocab_size": 131, "attention_bias": True, "tie_word_embeddings": True}
"""Settings of a model whose head has another number of rows on each rank."""


def both(family: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return a model after a backward pass, and its like on two ranks."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 120, (2, 20), generator=draw)
    whole, parts = make(family, **settings), make(family, **settings)
    split(list(parts.modules()), styles_of(parts, 2), init_device_mesh("cpu", (2,)))
    for model in (whole, parts):
        for _ in range(2):  # gradients add up
            logits = model(input_ids=ids, use_cache=False).logits
            logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
            logprobs.mean().backward()
        model.logits = logits.detach()
    return whole, parts


def worst(family: str, settings: dict[str, Any], _world: World) -> dict[str, float]:
    """Return the largest difference of the logits and of each gradient, as a share of its size."""
    whole, parts = both(family, settings)
    pairs = {"logits": (parts.logits, whole.logits)}
    named = zip(whole.named_parameters(), parts.parameters(), strict=True)
    for (name, theirs), ours in named:
        if theirs.grad is not None:
            pairs[name] = (ours.grad.full_tensor(), theirs.grad)
    return {
        # a key's bias has no gradient but rounding
        name: ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-4)).item()
        for name, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", ODD)]
    + [pytest.param(x, {}, marks=[] if x in FAST else pytest.mark.slow) for x in sorted(SPLIT)],
    ids=str,
)
def test_logits_and_gradients_are_those_of_one_process(
    family: str, settings: dict[str, Any]
) -> None:
    for errors in on_ranks(2, partial(worst, family, settings)):
        assert isinstance(errors, dict), errors
        assert len(errors) > 10
        assert max(errors.values()) < 1e-4, {k: e for k, e in errors.items() if e >= 1e-4}


def layout(_world: World) -> list[str]:
    """List what is wrong with the parameters of a tied, split model."""
    _, parts = both("qwen3", ODD)
    wrong = []
    for name, parameter in parts.named_parameters():
        rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens")
        if any(f"{part}." in name for part in rows):
            expected: Any = Shard(0)
        else:
            columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = Shard(1) if columns else Replicate()
        if not isinstance(parameter, DTensor) or parameter.placements != (expected,):
            wrong.append(name)
    if parts.lm_head.weight is not parts.model.embed_tokens.weight:
        wrong.append("tied")
    wrong += [name for name, buffer in parts.named_buffers() if isinstance(buffer, DTensor)]
    return wrong


def test_only_the_projections_and_the_vocabulary_are_split() -> None:
    assert on_ranks(2, layout) == [[], []]


def frozen(_world: World) -> bool:
    """Say whether the parameters of a teacher need no gradient after it was split."""
    model = make("qwen3").requires_grad_(requires_grad=False)
    split(list(model.modules()), styles_of(model, 2), init_device_mesh("cpu", (2,)))
    return not any(p.requires_grad for p in model.parameters())


def test_frozen_weights_stay_frozen() -> None:
    assert on_ranks(2, frozen) == [True, True]


def policy_pass(
    family: str, teacher_rows: int, impl: str | None, world: World | None
) -> tuple[dict[str, Tensor], list[int]]:
    """Return loss, log-probabilities and gradients of a policy with 261 rows, 258 of them used,
    beside a teacher; and the rows of both heads that the loss takes."""
    method = MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=0.5, final=0.5))
    settings = {"tie_word_embeddings": False}
    student = make(family, vocab_size=261, **settings)
    if student.lm_head.bias is not None:
        torch.nn.init.normal_(student.lm_head.bias, generator=torch.Generator().manual_seed(0))
    policy = Policy(student, method, vocab_size=258, head_impl=impl)
    teacher = Teacher(make("llama", vocab_size=teacher_rows, **settings))
    if world is not None:
        for wrapped in (teacher, policy):
            fsdp.shard(wrapped, torch.device("cpu"), world)
    rows: list[int] = []

    def recorded(hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> kk.LossOutput:
        rows.extend([len(weight), len(options["teacher"].weight)])
        return kk.kdrl_loss(hidden, weight, *arguments, **options)

    (batch,) = batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "kk", SimpleNamespace(**vars(kk) | {"kdrl_loss": recorded}))
        out = policy(batch, batch.token_weights.sum(), teacher(batch))
    out.loss.backward()
    grads = {name: fsdp.full(p.grad) for name, p in policy.named_parameters()}
    return {"loss": out.loss.detach(), "logprobs": out.logprobs} | grads, rows


def policy_errors(
    family: str, teacher_rows: int, impl: str | None, world: World
) -> tuple[dict[str, float], list[int]]:
    """Return the differences between one process and the ranks, as `worst`, and the rows."""
    exact, _ = policy_pass(family, teacher_rows, impl, None)
    ours, rows = policy_pass(family, teacher_rows, impl, world)
    return {
        name: ((ours[name] - x).abs().max() / x.abs().max().clamp(min=1e-4)).item()
        for name, x in exact.items()
    }, rows


@pytest.mark.parametrize(
    ("family", "teacher_rows", "impl", "rows"),
    [
        ("phi", 262, None, [[131, 131], [130, 131]]),  # a head with a bias
        ("gemma2", 258, None, [[131, 258], [130, 258]]),  # capped; 129 rows of the teacher a rank
        ("granite", 262, "reference", [[131, 131], [130, 131]]),
    ],
)
def test_the_head_s_rows_stay_on_their_ranks(
    family: str, teacher_rows: int, impl: str | None, rows: list[list[int]]
) -> None:
    results = on_ranks(2, partial(policy_errors, family, teacher_rows, impl), tensor=2)
    for (errors, read), expected in zip(results, rows, strict=True):
        assert read == expected
        assert len(errors) > 10
        assert max(errors.values()) < 1e-4, {k: e for k, e in errors.items() if e >= 1e-4}


def unequal_copies(world: World) -> list[str]:
    """Train on two ranks; name the parameters that both hold whole, but not the same of."""
    model = make("qwen3", tie_word_embeddings=True, vocab_size=258)
    policy = Policy(model, MethodConfig(kd=None))
    fsdp.shard(policy, torch.device("cpu"), world)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    (batch,) = batches()
    for _ in range(3):
        policy(batch, batch.token_weights.sum(), None).loss.backward()
        clip(policy, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    unequal, copies = [], 0
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor)
        if parameter.placements[-1] == Replicate():
            ours = parameter.to_local().detach()
            theirs = [torch.empty_like(ours) for _ in range(world.size)]
            dist.all_gather(theirs, ours)
            unequal += [] if torch.equal(*theirs) else [name]
            copies += 1
    return unequal if copies == 4 * 4 + 1 else [f"{copies} copies"]


def test_both_ranks_keep_the_same_norms() -> None:
    assert on_ranks(2, unequal_copies, tensor=2) == [[], []]


def message(model: Any, ranks: int = 2) -> str:
    with pytest.raises(ValueError, match=r"^model\.tensor_parallel must") as error:
        styles_of(model, ranks)
    return str(error.value)


def test_heads_and_projections_must_be_divisible() -> None:
    model = make("qwen3", intermediate_size=90)
    assert "must divide num_key_value_heads = 2 of Qwen3ForCausalLM, got 4" in message(model, 4)
    assert "layers.0.mlp.gate_proj.out_features = 90 of Qwen3" in message(
        make("qwen3", num_key_value_heads=4, intermediate_size=90), 4
    )


def without_norms() -> nn.Module:
    model = make("qwen3")
    model.tp_plan = {key: rule for key, rule in model.tp_plan.items() if "norm" not in key}
    return model


def with_a_gate() -> nn.Module:
    model = make("llama")
    model.model.layers[1].gate = nn.Parameter(torch.ones(1))
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make("gpt2"), "be 1 for GPT2LMHeadModel, got 2: transformers has no tp_plan"),
        (lambda: make("olmo2"), "the rule colwise_gather_output for model.layers.0.self_attn"),
        (lambda: make("lfm2"), "model.layers.0.conv.conv has parameters that its tp_plan does not"),
        (lambda: make("gpt_oss"), "model.layers.0.self_attn has parameters that its tp_plan"),
        (without_norms, "model.layers.0.self_attn.q_norm has parameters that its tp_plan"),
        (with_a_gate, "model.layers.1 has parameters that its tp_plan does not split"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(build: Callable[[], Any], words: str) -> None:
    assert words in message(build())


@pytest.mark.slow
def test_every_family_is_split_or_refused() -> None:
    accepted = set()
    for family in FAMILIES:
        try:
            styles_of(make(family), 2)
        except ValueError as error:
            assert str(error).startswith("model.tensor_parallel must")  # noqa: PT017
        else:
            accepted.add(family)
    assert accepted == SPLIT


def test_ranks_must_be_a_multiple(config: Config) -> None:
    base = config()
    settings = replace(base, model=replace(base.model, tensor_parallel=2))
    for words in [*train_ranks(settings, 3), *train_ranks(settings, 1)]:
        assert "model.tensor_parallel must divide the number of ranks, got 2 with" in words


def test_a_size_without_a_rank_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may set WORLD_SIZE for processes that it does not start as ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="got 2 with 1"), connect(torch.device("cpu"), tensor=2):
        pass


@pytest.mark.parametrize("name", ["liger", "offload_policy", "offload_teacher"])
def test_what_is_not_supported_beside_it_is_refused(name: str) -> None:
    words = f"{name} must be off where model.tensor_parallel is more than 1, got 2"
    with pytest.raises(ValueError, match=words):
        ModelConfig(tensor_parallel=2, **{name: True})


def test_packs_of_a_group_count_once() -> None:
    class Four(World):
        def share(self, make: Callable[[], Any]) -> list[Any]:
            """Return what four ranks would: two and two the same."""
            value: dict[str, Tensor] = make()
            return [{"n": value["n"] * factor} for factor in (1, 1, 10, 10)]

    world = Four(rank=3, size=4, tensor=2)
    assert (world.data_rank, world.data_size) == (1, 2)
    assert_close(world.sum({"n": torch.tensor(2.0)})["n"], torch.tensor(22.0).double())
