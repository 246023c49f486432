"""Log-probabilities, entropies and gradients by the head are those of ms-swift's full logits."""

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the host and what it imports, at their import
    pytest.importorskip("swift.rlhf_trainers.grpo_trainer")
    pytest.importorskip("swift.rlhf_trainers.gkd_trainer")

import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_kernels.integrations.swift.gkd import SwiftGKDTrainer
from kdrl_kernels.integrations.swift.grpo import SwiftGRPOTrainer
from kdrl_kernels.integrations.swift.head import SwiftHead, through_head

pytestmark = [pytest.mark.swift, pytest.mark.filterwarnings("ignore")]  # the host's own warnings

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",  # eager has NaN in float64 where all is padding
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 2.0},
}


def make(family: str, **options: Any) -> Any:
    """Return a small model in float64."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | options)
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


def stand(kind: type, model: Any, *, padding_free: bool = False, **values: Any) -> Any:
    """Return a trainer without a data set, that has what its losses read."""
    trainer = object.__new__(kind)
    template = SimpleNamespace(padding_free=padding_free, sequence_parallel_size=1)
    names = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
    parts = {"accelerator": Accelerator(cpu=True), "template": template, "model": model}
    vars(trainer).update(parts, temperature=0.7, model_kwarg_keys=names, **values)
    return trainer


def batch(*, padding_free: bool) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """Return two sequences of 4 and 9 tokens of which the last 2 and 5 are completions."""
    rng = torch.Generator().manual_seed(0)
    short, long = (torch.randint(3, 53, (n,), generator=rng) for n in (4, 9))
    if padding_free:
        ids = torch.cat([short, long])[None]
        places = torch.cat([torch.arange(4), torch.arange(9)])[None]
        lengths = torch.tensor([2, 9])  # the last T = 11 of 13 tokens
        mask = torch.zeros(2, 11, dtype=torch.bool)
        mask[0, -2:], mask[1, -5:] = True, True
        values = SimpleNamespace(completion_mask=mask, logits_to_keep=11, seq_lengths=lengths)
        return {"input_ids": ids, "position_ids": places}, values
    ids = torch.stack([torch.cat([torch.zeros(5, dtype=torch.int64), short]), long])
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, -2:], mask[1] = True, True
    mask[1, 2] = False  # a tool's token
    values = SimpleNamespace(completion_mask=mask, logits_to_keep=5, seq_lengths=mask.sum(1))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, values


def outcome(kind: type, model: Any, *, padding_free: bool) -> list[Tensor]:
    """Return log-probabilities, entropies and the gradients of a weighted sum of the former."""
    inputs, values = batch(padding_free=padding_free)
    trainer = stand(kind, model, padding_free=padding_free)
    model.zero_grad()
    logprobs, entropies = trainer._get_per_token_logps_and_entropies_single(
        model, inputs, values, compute_entropy=True
    )
    mask = values.completion_mask
    weights = torch.linspace(-1, 2, int(mask.sum()), dtype=logprobs.dtype)
    (logprobs[mask] * weights).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logprobs[mask].detach(), entropies[mask].detach(), *gradients]


def compare(model: Any, *, padding_free: bool = False) -> None:
    """Compare ours with the host's on a model."""
    ours = outcome(SwiftGRPOTrainer, model, padding_free=padding_free)
    host = outcome(GRPOTrainer, model, padding_free=padding_free)
    assert len(ours) == len(host) > 2
    assert max(gradient.abs().max() for gradient in host[2:]) > 0.1
    for mine, theirs in zip(ours, host, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_full_logits(family: str, padding_free: bool) -> None:
    compare(make(family), padding_free=padding_free)


def test_a_model_that_sees_an_image() -> None:
    """The gradient reaches the layers that read the image."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    sight = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    sight |= {"out_hidden_size": 16, "patch_size": 4, "temporal_patch_size": 1, "window_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_scaling": rope},
        vision_config={**sight, "spatial_merge_size": 2, "fullatt_block_indexes": [0]},
        image_token_id=50,
        vision_start_token_id=51,
        vision_end_token_id=52,
        video_token_id=49,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).double()
    ids = torch.tensor([[51, 50, 50, 50, 50, 52, 5, 6, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 48, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 50).long(),
    }
    mask = torch.ones(1, 4, dtype=torch.bool)
    values = SimpleNamespace(completion_mask=mask, logits_to_keep=4, seq_lengths=mask.sum(1))
    gradients = []
    for kind in (SwiftGRPOTrainer, GRPOTrainer):
        model.zero_grad()
        trainer = stand(kind, model)
        logprobs, _ = trainer._get_per_token_logps_and_entropies_single(model, inputs, values)
        logprobs.sum().backward()
        gradients.append(model.model.visual.patch_embed.proj.weight.grad.clone())
    assert gradients[1].abs().max() > 0.1
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-9


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"saves": True}])
def test_an_adapter_on_the_head(options: dict[str, Any]) -> None:
    if options.pop("saves", False):
        options |= {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(make("Qwen2"), LoraConfig(r=3, lora_alpha=5, **options)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    compare(model)
    with model.disable_adapter(), torch.no_grad():
        inputs, values = batch(padding_free=False)
        pair = [
            stand(kind, model)._get_per_token_logps_and_entropies_single(model, inputs, values)[0]
            for kind in (SwiftGRPOTrainer, GRPOTrainer)
        ]
    mask = values.completion_mask
    assert (pair[0] - pair[1])[mask].abs().max() <= 1e-9


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "one with dropout"),
        ({"use_dora": True}, "one with DoRA"),
        ({"lora_bias": True}, "one with a bias of its own"),
    ],
)
def test_another_adapter_on_the_head_is_refused(options: dict[str, Any], reason: str) -> None:
    model = make("Qwen2", tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(53).double())  # lora_bias wants one
    config = LoraConfig(r=3, target_modules=["lm_head"], **options)
    model = get_peft_model(model, config).train()
    with pytest.raises(ValueError, match=f"one plain LoRA without dropout, got {reason}"):
        outcome(SwiftGRPOTrainer, model, padding_free=False)


class _Doubled(transformers.Qwen2ForCausalLM):
    """Doubles its logits, and its config says nothing of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class _Twice(transformers.Qwen2ForCausalLM):
    """Calls its head twice."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Doubled, "must make of a logit 16 what its config says, 16, got 32"),
        (_Twice, "must call its LM head once a forward, got 2 calls"),
    ],
)
def test_a_head_that_is_more_is_refused(kind: type, message: str) -> None:
    model = kind(transformers.Qwen2Config(**SIZES)).double()
    with pytest.raises(ValueError, match=message):
        outcome(SwiftGRPOTrainer, model, padding_free=False)
    assert "forward" not in vars(model.lm_head)


def test_a_large_cap_that_the_model_does_not_read_is_refused() -> None:
    """A cap of 100 bends a logit of 16 by less than 16 bits round it."""
    model = make("Qwen2", final_logit_softcapping=100.0)
    with pytest.raises(ValueError, match=r"of a logit 256 what its config says, 98\.81, got 256"):
        outcome(SwiftGRPOTrainer, model, padding_free=False)


def test_a_head_of_another_type_is_refused() -> None:
    model = make("Qwen2")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="must be a plain linear layer, got Sequential"):
        outcome(SwiftGRPOTrainer, model, padding_free=False)


def test_rows_outside_of_the_mask_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    function = kk.linear_logprobs

    def spy(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["mask"])
        return function(*args, **kwargs)

    monkeypatch.setattr(kk, "linear_logprobs", spy)
    for padding_free in (False, True):
        outcome(SwiftGRPOTrainer, make("Qwen2"), padding_free=padding_free)
    assert [int(mask.sum()) for mask in masks] == [6, 7]


def test_autocast_computes_the_head_in_its_dtype() -> None:
    model, dtypes = make("Qwen2").float(), []

    def function(hidden: Tensor, head: SwiftHead) -> Tensor:
        dtypes.append((hidden.dtype, head.weight.dtype))
        return hidden[..., :1]

    inputs, _ = batch(padding_free=False)
    with torch.autocast("cpu", torch.bfloat16):
        through_head(Accelerator(cpu=True), model, inputs, function)
    assert dtypes == [(torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_tokens_of_a_server(beta: float) -> None:
    """Two of five rows are unknown to the server, which ms-swift then leaves out."""
    rng = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 16, generator=rng), torch.randn(53, 16, generator=rng)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    served = torch.randn(5, 53, generator=rng).double().log_softmax(-1).topk(4)
    logprobs = served.values.clone()
    logprobs[[1, 4]] = -torch.inf
    labels = torch.arange(5)
    teacher = TeacherOutput(
        topk_logprobs=logprobs[None], topk_indices=served.indices[None], labels=labels[None]
    )
    logits = (hidden @ weight.T)[None]
    total, count = gkd_loss(logits, teacher, labels[None], beta, 0.7)
    host = torch.autograd.grad(total / count, (hidden, weight))
    trainer = stand(SwiftGKDTrainer, None, beta=beta)
    head = SwiftHead(weight, None, transformers.Qwen2Config())
    ours = trainer._divergence(hidden, head, labels, (served.indices, logprobs / 0.7))
    assert count == 3
    assert torch.isclose(ours, total / count, rtol=0, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours, (hidden, weight)), host, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12


def distilled(student: Any, teacher: Any, **values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return GKD's loss of two sequences at beta 0.5, their tokens and their labels."""
    ids = torch.arange(3, 19).view(2, 8)
    labels = ids.clone()
    labels[:, :3], labels[1, 5:] = -100, -100
    settings: dict[str, Any] = {"beta": 0.5, "use_teacher_api": False, "gkd_logits_topk": None}
    settings |= {"_is_self_distillation": False, "teacher_model": teacher}
    settings |= {"is_fsdp_enabled": False, "is_deepspeed_enabled": False}
    arguments = SimpleNamespace(
        sft_alpha=0.0,
        use_logits_to_keep=False,
        offload_teacher_model=False,
        gradient_checkpointing_kwargs=None,
        report_to=[],
    )
    trainer = stand(SwiftGKDTrainer, student, args=arguments, **settings | values)
    inputs = {
        "model_inputs": {"input_ids": ids, "labels": labels},
        "teacher_model_inputs": {"input_ids": ids, "labels": labels},
        "gkd_batch": SimpleNamespace(data_source="dataset"),
    }
    return trainer.compute_loss(student, inputs), ids, labels.roll(-1, 1)


@pytest.mark.parametrize("K", [None, 5])
def test_vocabularies_of_two_sizes(K: int | None) -> None:
    """The columns of both count; the host puts the larger model's logits into the smaller's."""
    student, teacher = make("Qwen2"), make("Llama")
    student.resize_token_embeddings(48)
    ours, ids, labels = distilled(student, teacher, gkd_logits_topk=K)
    with torch.no_grad():
        logits = teacher(input_ids=ids).logits[..., :48]
    output = TeacherOutput(full_logits=logits, labels=labels)
    output = output if K is None else output.to_topk(K)
    total, count = gkd_loss(student(input_ids=ids).logits, output, labels, 0.5, 0.7)
    assert torch.isclose(ours, total / count, rtol=0, atol=1e-9)


def test_sharded_models() -> None:
    """FSDP2 on two processes: the log-probabilities, losses and gradients of whole models."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "tests.integrations.swift_sharded"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [line.split() for line in done.stdout.splitlines() if line.startswith("error ")]
    assert sorted(case for _, case, _ in errors) == ["gkd", "gkd-head", "grpo", "grpo-head"]
    assert all(float(error) <= 1e-9 for _, _, error in errors)
