"""Bad ids of a row raise, or make the outputs NaN where raising would wait for a GPU."""

from typing import Any

import pytest

import kdrl_kernels as kk
from kdrl_kernels import checks
from tests.kernels.params import IMPLS
from tests.kernels.problem import make_problem
from tests.kernels.test_extra_tokens import IDS, N, V

IDS_ERRORS: list[tuple[Any, type[Exception], str]] = [
    ([[1]], TypeError, "extra_tokens must be a tensor or None, got list"),
    (
        IDS.int(),
        TypeError,
        r"extra_tokens must be int64, got torch.int32: convert them with .long\(\)",
    ),
    (
        IDS[0],
        ValueError,
        r"extra_tokens must be \[N, K\] with N = 7 and K in \[1, 512\], got \[4\]",
    ),
    (IDS[:, :0], ValueError, r"K in \[1, 512\], got \[7, 0\]"),
    (IDS.repeat(1, 129), ValueError, r"K in \[1, 512\], got \[7, 516\]"),
    (IDS.to("meta"), ValueError, r"extra_tokens must be on the device of hidden \(cpu\), got meta"),
    (IDS + 1, ValueError, r"in \[0, {size}\) with {size} = 37, or -1 for none, got 37 in row 0"),
    (IDS - 1, ValueError, r"or -1 for none, got -2 in row 0"),
    (None, ValueError, r"extra_tokens must be \[N, K\] with rest=True, got None"),
]


@pytest.mark.parametrize(("ids", "kind", "message"), IDS_ERRORS, ids=range(len(IDS_ERRORS)))
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_bad_ids_are_refused(impl: str, ids: Any, kind: type[Exception], message: str) -> None:
    problem = make_problem(N, kd=None)
    common = {"tokens": problem.tokens, "extra_tokens": ids, "rest": True, "impl": impl}
    with pytest.raises(kind, match=message.replace("{size}", "V")):
        kk.linear_logprobs(**problem.student, **common)
    with pytest.raises(kind, match=message.replace("{size}", "vocab_size")):
        kk.linear_token_loss(**problem.student, loss_fn=lambda rows: rows.logprobs, **common)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_id_makes_nan_where_raising_would_wait(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "is_read", lambda _: False)  # as on a GPU
    problem = make_problem(N, kd=None, device=device)
    ids = IDS.to(device).clone()
    ids[3, 1] = V
    options: dict[str, Any] = {"tokens": problem.tokens, "extra_tokens": ids, "impl": impl}
    out = kk.kdrl_loss(**options, **problem.student, **problem.options)
    assert out.loss.isnan()
    assert out.metrics["bad_tokens"] == 1
    scores = kk.linear_logprobs(**options, **problem.student, rest=True)
    for values in (scores.logprobs, scores.extra_logprobs, scores.rest_logprob):
        assert values is not None
        assert values.isnan().all()
