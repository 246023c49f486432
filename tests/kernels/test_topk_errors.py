"""What kdrl_loss says of a wrong teacher_topk."""

import math
from typing import Any

import pytest
import torch

import kdrl_kernels as kk


def _pair(**changes: Any) -> tuple[Any, Any]:
    pair = {"ids": torch.tensor([[0, 1, -1], [2, 5, 3]]), "logprobs": torch.full((2, 3), -2.0)}
    pair |= changes
    return pair["ids"], pair["logprobs"]


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other_kd": (
        {"kd": "k2"},
        ValueError,
        r"teacher_topk must be None for kd='k2', got a pair: .*Objective\(kd=\"topk_rkl\"\)",
    ),
    "none": ({"topk": None}, ValueError, r"must be \(ids, logprobs\) for kd='topk_rkl', got None$"),
    "a_head_instead": (
        {"topk": None, "teacher": kk.TeacherHead(torch.ones(2, 4), torch.ones(9, 4))},
        ValueError,
        "for kd='topk_rkl', got only teacher: use it with kd='rkl'",
    ),
    "log_probabilities_of_one_token": (
        {"topk": None, "teacher_logprobs": torch.zeros(2)},
        ValueError,
        "for kd='topk_rkl', got only teacher_logprobs: use it with kd='k2'",
    ),
    "other_way_round": (
        {"topk": _pair()[::-1]},
        TypeError,
        "got them the other way round: torch.topk returns the values first",
    ),
    "probabilities": (
        {"topk": _pair(logprobs=torch.full((2, 3), 0.2))},
        ValueError,
        "got a sum of 2.44.* in row 0: take log_softmax of all logits, in float32",
    ),
    "a_teacher_too": (
        {"teacher_logprobs": torch.zeros(2)},
        ValueError,
        "teacher_logprobs must be None with teacher_topk, got both",
    ),
    "extra_tokens_too": (
        {"extra_tokens": torch.zeros(2, 1, dtype=torch.int64)},
        ValueError,
        "extra_tokens must be None with teacher_topk",
    ),
    "no_pair": ({"topk": torch.zeros(2)}, TypeError, "must be two tensors, .*, got Tensor"),
    "a_list_of_ids": (
        {"topk": ([[0, 1]], torch.zeros(2, 3))},
        TypeError,
        "must be two tensors, .*, got list, Tensor",
    ),
    "ids_dtype": (
        {"topk": _pair(ids=torch.zeros(2, 3))},
        TypeError,
        r"teacher_topk\[0\] must be int64, got torch.float32",
    ),
    "ids_shape": (
        {"topk": _pair(ids=torch.zeros(3, 3, dtype=torch.int64))},
        ValueError,
        r"teacher_topk\[0\] must be \[N, K\] with N = 2",
    ),
    "logprobs_dtype": (
        {"topk": _pair(logprobs=torch.zeros(2, 3, dtype=torch.int64))},
        TypeError,
        r"teacher_topk\[1\] must be floating point, got torch.int64",
    ),
    "logprobs_shape": (
        {"topk": _pair(logprobs=torch.zeros(2, 2))},
        ValueError,
        r"teacher_topk\[1\] must be \[N, K\] with N = 2 and K = 3",
    ),
    "out_of_range": (
        {"topk": _pair(ids=torch.tensor([[0, 1, 2], [3, 9, 4]]))},
        ValueError,
        r"teacher_topk\[0\] must be in \[0, vocab_size\) with vocab_size = 9, .* got 9 in row 1",
    ),
    "repeated": (
        {"topk": _pair(ids=torch.tensor([[0, -1, -1], [3, 4, 3]]))},
        ValueError,
        r"teacher_topk\[0\] must not repeat an id in a row, got 3 twice in row 1",
    ),
    "too_much_mass": (
        {"topk": _pair(logprobs=torch.tensor([[-2.0, -2, 0], [-0.1, -0.1, -3]]))},
        ValueError,
        r"teacher_topk\[1\] must be log-probabilities .*got a sum of 1.85\d+ in row 1",
    ),
    "nan": (
        {"topk": _pair(logprobs=torch.tensor([[-2.0, -2, 0], [-3, math.nan, -3]]))},
        ValueError,
        "got a sum of nan in row 1",
    ),
    "truncated_fkl": (
        {"kd": "topk_fkl", "truncation": kk.Truncation(top_k=3)},
        ValueError,
        "truncation must be None for 'topk_fkl'",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, impl: str) -> None:
    options = {"topk": _pair(), "kd": "topk_rkl"} | changes
    topk, kd = options.pop("topk"), options.pop("kd")
    with pytest.raises(error, match=message):
        kk.kdrl_loss(
            torch.ones(2, 4),
            torch.ones(9, 4),
            torch.zeros(2, dtype=torch.int64),
            advantages=torch.ones(2),
            teacher_topk=topk,
            objective=kk.Objective(kd=kd),
            impl=impl,
            **options,
        )


def test_an_option_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="tail must be True for kd='rkl', got False"):
        kk.Objective(kd="rkl", tail=False)
    with pytest.raises(TypeError, match="tail must be True or False, got 1"):
        kk.Objective(kd="topk_rkl", tail=1)
