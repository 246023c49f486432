"""Bad input raises an error that names the argument, what it must be, and what it is."""

from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from tests.kernels.problem import make_problem

F = torch.float32


def _call(**changes: Any) -> kk.LossOutput:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(10, 8),
        "tokens": torch.arange(4),
        "advantages": torch.ones(4),
        "teacher": kk.TeacherHead(torch.randn(4, 6), torch.randn(12, 6)),
    }
    arguments |= changes
    return kk.kdrl_loss(**arguments)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list$"),
    ({"weight": torch.nn.Linear(3, 10)}, TypeError, "weight must be a tensor, got Linear: pass its weight"),
    ({"hidden": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "hidden must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"hidden": torch.ones(8)}, ValueError, r"hidden must be \[N, H\] or \[B, T, H\], got \[8\]"),
    ({"token_weights": torch.ones(4) * 1j}, TypeError, "token_weights must be floating point, integer or bool, got torch.complex64"),
    ({"weight": torch.ones(8)}, ValueError, r"weight must be \[V, H\], got \[8\]"),
    ({"weight": torch.ones(10, 9)}, ValueError, r"weight must be \[V, H\] with H = 8, got \[10, 9\]"),
    ({"weight": torch.ones(8, 10)}, ValueError, r"weight must be \[V, H\] with H = 8, got \[8, 10\]: transpose it"),
    ({"hidden": torch.ones(4, 10)}, ValueError, r"with H = 10, got \[10, 8\]: transpose it, or pass states as hidden"),
    ({"weight": torch.ones(0, 8)}, ValueError, r"weight must have at least one row, got \[0, 8\]"),
    ({"weight": torch.ones(10, 8).double()}, TypeError, r"weight must have the dtype of hidden \(torch.float32\), or one of the two must be float32 and the other float16 or bfloat16, got torch.float64"),
    ({"hidden": torch.ones(4, 8).half(), "weight": torch.ones(10, 8).bfloat16()}, TypeError, r"weight must have the dtype of hidden \(torch.float16\), or"),
    ({"weight": torch.ones(10, 8, device="meta")}, ValueError, "weight must be on the device of hidden"),
    ({"tokens": [0, 1]}, TypeError, "tokens must be a tensor, got list"),
    ({"tokens": torch.ones(4, dtype=torch.int32)}, TypeError, r"tokens must be int64, got torch.int32: convert them with .long\(\)"),
    ({"tokens": torch.zeros(5, dtype=torch.int64)}, ValueError, r"tokens must be \[N\] with N = 4, got \[5\]"),
    ({"tokens": torch.tensor([0, 1, 10, 2])}, ValueError, r"vocab_size = 10, got 10 in row 2"),
    ({"tokens": torch.tensor([0, -100, 1, 2])}, ValueError, r"got -100 in row 1; give padding"),
    ({"advantages": None}, ValueError, r"advantages must be \[N\] for policy='clip', got None"),
    ({"advantages": torch.ones(4, 1)}, ValueError, r"advantages must be \[N\] with N = 4, got \[4, 1\]"),
    ({"advantages": torch.ones(4).long()}, TypeError, r"advantages must be floating point, got torch.int64: convert them with \.float"),
    ({"token_weights": torch.ones(3)}, ValueError, r"token_weights must be \[N\] with N = 4, got \[3\]"),
    ({"old_logprobs": torch.ones(3)}, ValueError, r"old_logprobs must be \[N\]"),
    ({"kd_weight": [1.0] * 4}, TypeError, "kd_weight must be a tensor or None, got list"),
    ({"tokens": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, r"tokens must be on the device of hidden \(cpu\), got meta"),
    ({"advantages": torch.ones(4, device="meta")}, ValueError, r"advantages must be on the device of hidden \(cpu\), got meta"),
    ({"temperature": torch.ones(4, device="meta")}, ValueError, r"temperature must be on the device of hidden \(cpu\), got meta"),
    ({"bias": torch.ones(10, device="meta")}, ValueError, r"bias must be on the device of hidden \(cpu\), got meta"),
    ({"bias": torch.ones(9)}, ValueError, r"bias must be \[V\] with V = 10, got \[9\]"),
    ({"bias": torch.ones(10).double()}, TypeError, "bias must have the dtype of hidden"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must be a float or \[N\] with N = 4, got \[3\]"),
    ({"temperature": torch.tensor([1.0, 0, 1, 1])}, ValueError, "temperature must be positive, got a minimum of 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive and finite or None, got -1.0"),
    ({"vocab_size": 11}, ValueError, r"vocab_size must be in \[1, 10\], got 11"),
    ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 10\], got 0"),
    ({"normalizer": 0}, ValueError, "normalizer must be positive and finite, got 0.0"),
    ({"normalizer": float("inf")}, ValueError, "normalizer must be positive and finite, got inf"),
    ({"objective": "clip"}, TypeError, r"objective must be an Objective, got str: pass kk\.Objective"),
    ({"teacher": kk.TeacherHead(torch.ones(4, 6).double(), torch.ones(12, 6).double())}, TypeError, "teacher.hidden must be float64 if and only if hidden is"),
    ({"teacher": kk.TeacherHead(torch.ones(4, 6, device="meta"), torch.ones(12, 6, device="meta"))}, ValueError, "teacher.hidden must be on the device of hidden"),
    ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be 0-d, got \[2\]"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive or None, got 0"),
    ({"workspace_bytes": 7}, ValueError, r"workspace_bytes must be at least \d+ \(one row at V = 10\), got 7"),
    ({"impl": "cuda"}, ValueError, r"impl must be one of \('triton', 'torch', 'reference'\) or None, got 'cuda'"),
    ({"teacher": None}, ValueError, r"teacher or teacher_logprobs must be passed for kd='k2', got neither: Objective\(kd=None\) is for no teacher"),
    ({"teacher": None, "objective": kk.Objective(kd="rkl")}, ValueError, r"teacher=TeacherHead\(...\) must be passed for kd='rkl'"),
    ({"teacher": torch.ones(4)}, TypeError, r"teacher must be a TeacherHead or None, got Tensor: pass kk\.TeacherHead"),
    ({"objective": kk.Objective(kd=None)}, ValueError, "teacher must be None when objective.kd is None"),
    ({"teacher_logprobs": torch.ones(4)}, ValueError, "teacher_logprobs must be None when teacher is passed"),
    ({"teacher": None, "teacher_logprobs": torch.ones(4), "objective": kk.Objective(kd="fkl")}, ValueError, "teacher must be a TeacherHead for the exact kd='fkl'"),
    ({"teacher": None, "teacher_logprobs": torch.ones(4), "objective": kk.Objective(kd_baseline="kl")}, ValueError, "teacher must be a TeacherHead for kd_baseline='kl', got teacher_logprobs: use kd_baseline=None with those"),
    ({"teacher": None, "objective": kk.Objective(kd_baseline="kl")}, ValueError, r"teacher=TeacherHead\(...\) must be passed for kd='k2', got neither: Objective\(kd=None\) is for no teacher"),
    ({"teacher": kk.TeacherHead(torch.ones(5, 6), torch.ones(12, 6))}, ValueError, r"teacher.hidden must have N = 4 rows, got \[5, 6\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), ERRORS, ids=[m[:40] for _, _, m in ERRORS]
)
def test_kdrl_loss(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(impl=changes.pop("impl", "torch"), **changes)


OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    ({"kd": "k1"}, "kd must not be 'k1': k1 as a loss has no teacher in its gradient"),
    (
        {"kd": "kl"},
        r"kd must be one of \('k2', 'k3', 'k3_ratio', 'rkl', 'fkl', 'jsd', 'rkl\+fkl', 'topk_rkl', 'topk_fkl', 'topk_jsd'\) or None, got 'kl'",
    ),
    ({"kd_baseline": "mean"}, "kd_baseline must be 'kl' or None, got 'mean'"),
    ({"kd": "k3", "kd_baseline": "kl"}, "kd_baseline must be None for kd='k3', got 'kl'"),
    ({"kd": None, "kd_baseline": "kl"}, "kd_baseline must be None for kd=None, got 'kl'"),
    (
        {"policy": "ppo"},
        r"policy must be one of \('clip', 'none', 'off'\), got 'ppo': that of PPO and GRPO is 'clip'",
    ),
    ({"policy": "off", "kd": None}, "kd must be set when policy is 'off'"),
    ({"clip_low": 1.0}, r"clip_low must be in \[0, 1\), got 1.0"),
    ({"clip_high": -0.1}, "clip_high must be finite and at least 0, got -0.1"),
    ({"dual_clip": 1.0}, "dual_clip must be above 1 and finite, or None, got 1.0"),
    ({"k3_bound": 61}, r"k3_bound must be in \(0, 60\], got 61"),
    ({"kd_coef": -1}, "kd_coef must be finite and at least 0, got -1"),
    ({"kd_ratio_cap": 0}, "kd_ratio_cap must be positive, got 0"),
    ({"jsd_alpha": 1}, r"jsd_alpha must be in \(0, 1\), got 1"),
    ({"kd": "rkl+fkl", "fkl_share": 1}, r"fkl_share must be in \(0, 1\), got 1"),
    ({"kd": "fkl", "fkl_share": 0.3}, "fkl_share must be 0.5 for kd='fkl', got 0.3"),
    ({"entropy_coef": float("nan")}, "entropy_coef must be finite, got nan"),
]


@pytest.mark.parametrize(("options", "message"), OBJECTIVES, ids=[str(o) for o, _ in OBJECTIVES])
def test_objective(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kk.Objective(**options)


def test_teacher_fields_are_named_as_the_teachers() -> None:
    with pytest.raises(ValueError, match=r"teacher.weight must be \[V, H\] with H = 6, got"):
        kk.TeacherHead(torch.ones(4, 6), torch.ones(12, 7))


def test_linear_logprobs_checks_tokens() -> None:
    with pytest.raises(
        ValueError, match=r"tokens must be in \[0, V\) with V = 10, got 10 in row 1"
    ):
        kk.linear_logprobs(torch.ones(2, 8), torch.ones(10, 8), torch.tensor([0, 10]))


def test_triton_refuses_float64() -> None:
    problem = make_problem(dtype=torch.float64)
    with pytest.raises(TypeError, match="impl='triton' must get float32"):
        problem.solve(impl="triton")


@pytest.mark.gpu
def test_a_bad_token_on_a_gpu_makes_the_loss_nan() -> None:
    problem = make_problem(device="cuda")
    tokens = problem.tokens.clone()
    tokens[2] = 37
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher)
    result = kk.kdrl_loss(tokens=tokens, teacher=teacher, **student, **problem.options)
    result.loss.backward()
    assert result.loss.isnan()
    assert result.metrics["bad_tokens"] == 1
    assert student["weight"].grad.isnan().all()


def test_an_error_in_a_loss_names_what_is_none_in_rows() -> None:
    tokens = torch.zeros(4, dtype=torch.int64)
    for read in (lambda rows: rows.extra_logprobs[:, 0], lambda rows: rows.extra_logprobs.sum(1)):
        with pytest.raises((TypeError, AttributeError)) as error:
            kk.linear_token_loss(torch.ones(4, 3), torch.ones(10, 3), tokens, read, entropy=True)
        (note,) = error.value.__notes__
        assert note.startswith("rows has None for what no option of this call sets: ")
        names = note.partition(": ")[2].split(", ")
        assert "extra_logprobs" in names
        assert not {"logprobs", "entropy", "index"} & set(names)
