"""What is no number or flag raises a TypeError that names the argument and shows the value."""

import math
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import pytest
import torch

import kdrl_kernels as kk

NO_NUMBERS: list[Any] = [None, "1", True, [1], math.nan]
NONE_IS_FINE = {
    "softcap",
    "workspace_bytes",
    "memory_bytes",
    "vocab_size",
    "normalizer",
    "dual_clip",
    "compact",
}
HIDDEN, WEIGHT, TOKENS = torch.ones(4, 8), torch.ones(10, 8), torch.arange(4)


def _linear_logprobs(**options: Any) -> Any:
    return kk.linear_logprobs(HIDDEN, WEIGHT, TOKENS, **options)


def _kdrl_loss(**options: Any) -> Any:
    objective = kk.Objective(kd=None)
    return kk.kdrl_loss(
        HIDDEN, WEIGHT, TOKENS, advantages=torch.ones(4), objective=objective, **options
    )


def _linear_token_loss(**options: Any) -> Any:
    return kk.linear_token_loss(HIDDEN, WEIGHT, TOKENS, lambda rows: -rows.logprobs, **options)


def _teacher(**options: Any) -> Any:
    return kk.TeacherHead(HIDDEN, WEIGHT, **options)


def _chunk_plan(**options: Any) -> Any:
    return kk.chunk_plan(**{"N": 4, "H": 8, "V": 10, "device": "cpu"} | options)


def _predicted_ms(**rates: Any) -> Any:
    return _chunk_plan().predicted_ms(**{"tflops": 1.0, "terabytes_per_s": 1.0} | rates)


OF_EVERY_HEAD = ["temperature", "softcap"]
OF_EVERY_LOSS = [*OF_EVERY_HEAD, "vocab_size", "normalizer", "workspace_bytes"]
NUMBERS: dict[Callable[..., Any], list[str]] = {
    kk.Objective: [field.name for field in fields(kk.Objective) if isinstance(field.default, float)]
    + ["dual_clip"],
    _linear_logprobs: [*OF_EVERY_HEAD, "workspace_bytes", "cache_bytes"],
    _kdrl_loss: OF_EVERY_LOSS,
    _linear_token_loss: [*OF_EVERY_LOSS, "jsd_alpha"],
    _teacher: OF_EVERY_HEAD,
    _chunk_plan: ["N", "H", "V", "workspace_bytes", "memory_bytes"],
    _predicted_ms: ["tflops", "terabytes_per_s"],
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param(function, name, id=f"{function.__name__.strip('_')}-{name}")
        for function, names in NUMBERS.items()
        for name in names
    ],
)
def test_what_is_no_number_is_refused(function: Callable[..., Any], name: str) -> None:
    for value in NO_NUMBERS:
        if value is None and name in NONE_IS_FINE:
            continue
        whole = name in ("vocab_size", "N", "H", "V")
        error = ValueError if isinstance(value, float) and not whole else TypeError
        with pytest.raises(error, match=f"{name} must be ") as caught:
            function(**{name: value})
        text = str(caught.value)
        assert text.endswith(f"got {value!r}"), text


def test_every_number_of_the_objective_is_tried() -> None:
    assert len(NUMBERS[kk.Objective]) == sum(
        field.type in (float, float | None) for field in fields(kk.Objective)
    )


FLAGS = [
    (_linear_logprobs, "entropy"),
    (_kdrl_loss, "entropy"),
    (_kdrl_loss, "compact"),
    (_linear_token_loss, "entropy"),
    (_linear_token_loss, "compact"),
    (_chunk_plan, "hidden_grad"),
    (_chunk_plan, "weight_grad"),
]


@pytest.mark.parametrize(("function", "name"), FLAGS)
def test_what_is_no_flag_is_refused(function: Callable[..., Any], name: str) -> None:
    for value in [None, 1, "yes"]:
        if value is None and name in NONE_IS_FINE:
            continue
        with pytest.raises(TypeError, match=rf"{name} must be True.*False.*, got {value!r}$"):
            function(**{name: value})


# ruff: noqa: E501 (a table, one case a line)
OTHERS: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (_kdrl_loss, {"vocab_size": 2.5}, TypeError, "vocab_size must be an integer or None, got 2.5"),
    (_kdrl_loss, {"normalizer": torch.tensor(True)}, TypeError, "normalizer must be a real number, got torch.bool"),
    (_kdrl_loss, {"normalizer": torch.ones((), device="meta")}, ValueError, r"normalizer must be on the device of hidden \(cpu\), got one without a value on meta"),
    (_kdrl_loss, {"softcap": torch.ones(())}, TypeError, "softcap must be a number or None, got a tensor"),
    (_linear_logprobs, {"workspace_bytes": math.inf}, ValueError, "workspace_bytes must be finite, got inf"),
    (_linear_logprobs, {"cache_bytes": -1}, ValueError, "cache_bytes must be at least 0, got -1"),
    (kk.Objective, {"kd": ["k2"]}, ValueError, r"kd must be one of .* or None, got \['k2'\]"),
    (kk.Objective, {"kd_ratio_cap": None}, TypeError, "kd_ratio_cap must be a number, got None"),
    (_chunk_plan, {"teacher": 5}, TypeError, r"teacher must be \(H_t, V_t\) or None, got 5"),
    (_chunk_plan, {"teacher": (4, None)}, TypeError, r"teacher\[1\] must be an integer, got None"),
    (_chunk_plan, {"teacher": (4, 0)}, ValueError, r"teacher\[1\] must be at least 1, got 0"),
    (_chunk_plan, {"dtype": "bfloat16"}, TypeError, "dtype must be a floating-point torch.dtype, got 'bfloat16'"),
    (_predicted_ms, {"tflops": 0}, ValueError, "tflops must be positive, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "options", "error", "message"), OTHERS, ids=[o[-1][:30] for o in OTHERS]
)
def test_messages(
    function: Callable[..., Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**options)


def test_every_kind_of_number_is_taken() -> None:
    numpy = pytest.importorskip("numpy")
    one = _linear_token_loss(temperature=0.5, normalizer=2.0, vocab_size=10, workspace_bytes=4096)
    other = _linear_token_loss(
        temperature=numpy.float32(0.5),
        normalizer=Fraction(2),
        vocab_size=numpy.int64(10),
        workspace_bytes=4.096e3,
    )
    assert torch.equal(one.loss, other.loss)
    assert kk.Objective(kd_coef=1, kd_ratio_cap=math.inf) == kk.Objective(
        kd_coef=numpy.float64(1), kd_ratio_cap=numpy.float32(math.inf)
    )
