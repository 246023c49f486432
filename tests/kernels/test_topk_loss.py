"""kdrl_loss with a divergence over K tokens: what it computes, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, F64, IMPL_DTYPES, IMPLS, quick_or_slow
from tests.kernels.problem import Problem, assert_solves, make_problem

KINDS = ["topk_rkl", "topk_fkl", "topk_jsd"]
FORMS = {f"{kd}{'' if tail else '_alone'}": (kd, tail) for kd in KINDS for tail in (True, False)}
N, V, K, ALPHA = 7, 37, 5, 0.3


def _topk_problem(name: str, objective: dict[str, Any] | None = None, **kind: Any) -> Problem:
    """Make a problem of one of FORMS."""
    kd, tail = FORMS[name]
    settings = {"tail": tail, "jsd_alpha": ALPHA} | (objective or {})
    return make_problem(kd=kd, objective=settings, **kind)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_definition(name: str, impl: str, dtype: torch.dtype, device: str) -> None:
    problem = _topk_problem(name, dtype=dtype, device=device)
    ours = problem.solve(upstream=0.7, impl=impl)
    assert ours["kl"].any()
    assert_solves(problem, ours, upstream=0.7)


KINDS_OF_CALLS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 4.0},
    "temperature_of_each_row": {"temperature": torch.linspace(0.5, 2, N)},
    "entropy_bonus": {"objective": {"entropy_coef": 0.1}},
    "distillation_alone": {"objective": {"policy": "off"}, "off_policy": False},
    "compact": {"compact": True},
    "forbidden_columns": {"forbidden": True},
}


@pytest.mark.parametrize(
    ("impl", "kind"),
    quick_or_slow(["torch", "triton"], list(KINDS_OF_CALLS), {"entropy_bonus", "compact"}),
)
def test_matches_definition_in_other_calls(impl: str, kind: str, device: str) -> None:
    options = dict(KINDS_OF_CALLS[kind])
    forbidden = options.pop("forbidden", False)
    problem = _topk_problem("topk_rkl", device=device, **options)
    if forbidden:
        problem.student["bias"][5:9] = -math.inf
    assert_solves(problem, problem.solve(impl=impl))


def _definition(kd: str, tail: bool, logits: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """Return the divergence of one row [V], term by term."""
    support = torch.zeros(len(logits), dtype=torch.bool)
    support[ids[ids >= 0]] = True
    p, q = logits.softmax(0), logq.exp()
    if tail:
        p, q = (torch.cat([x[support], x[~support].sum()[None]]) for x in (p, q))
    else:
        p, q = p[support], q[support]
    m = ALPHA * q + (1 - ALPHA) * p
    rkl, fkl = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    jsd = ALPHA * (q * (q / m).log()).sum() + (1 - ALPHA) * (p * (p / m).log()).sum()
    return {"topk_rkl": rkl, "topk_fkl": fkl, "topk_jsd": jsd}[kd]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_gradient_of_every_logit_is_that_of_the_definition(name: str, impl: str) -> None:
    """Against autograd over the whole vocabulary, where hidden · identity are the logits."""
    kd, tail = FORMS[name]
    rng = torch.Generator().manual_seed(2)
    student, teacher = 2 * torch.randn(2, V, generator=rng, dtype=F64)
    logq = teacher.log_softmax(0)
    ids = torch.cat([logq.topk(K).indices, torch.tensor([-1])])
    leaf = student.clone().requires_grad_()
    value = _definition(kd, tail, leaf, logq, ids)
    (expected,) = torch.autograd.grad(value, leaf)
    hidden = student[None].clone().requires_grad_()
    out = kk.kdrl_loss(
        hidden,
        torch.eye(V, dtype=F64),
        ids[:1],
        advantages=None,
        teacher_topk=(ids[None], logq[ids][None]),
        objective=kk.Objective(policy="off", kd=kd, tail=tail, kd_coef=1.0, jsd_alpha=ALPHA),
        impl=impl,
    )
    out.loss.backward()
    torch.testing.assert_close(out.kl[0], value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden.grad[0], expected, rtol=1e-11, atol=1e-14)


def _distil(
    hidden: Tensor, weight: Tensor, topk: tuple[Tensor, Tensor], kd: str, impl: str, **options: Any
) -> kk.LossOutput:
    objective = kk.Objective(policy="off", kd=kd, kd_coef=1.0, tail=options.pop("tail", True))
    tokens = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    return kk.kdrl_loss(
        hidden,
        weight,
        tokens,
        advantages=None,
        teacher_topk=topk,
        objective=objective,
        impl=impl,
        **options,
    )


def _head(device: str, rows: int = 6, scale: float = 1.0, columns: int = 500) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    hidden = scale * torch.randn(rows, 8, generator=rng)
    weight = torch.randn(columns, 8, generator=rng)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("kd", KINDS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_teacher_equal_to_the_student_gives_exactly_zero(
    impl: str, kd: str, scale: float, device: str
) -> None:
    """From flat rows to peaked ones, whose K numbers sum to 1 and a little more or less."""
    hidden, weight = _head(device, scale=scale)
    with torch.no_grad():
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=device)
        best = kk.linear_logprobs(hidden, weight, tokens, topk=16, impl=impl)
    out = _distil(hidden, weight, (best.topk_tokens, best.topk_logprobs), kd, impl)
    out.loss.backward()
    assert out.loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kd", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_teacher_changed_changes_the_gradient(
    impl: str, kd: str, tail: bool, device: str
) -> None:
    gradients = []
    for seed in range(2):
        hidden, weight = _head(device, columns=40)
        rng = torch.Generator().manual_seed(seed)
        logprobs = torch.randn(len(hidden), 40, generator=rng).log_softmax(1)[:, :4].to(device)
        ids = torch.arange(4, device=device).expand(len(hidden), 4)
        _distil(hidden, weight, (ids, logprobs), kd, impl, tail=tail).loss.backward()
        gradients.append(hidden.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kd", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_all_tokens_give_the_exact_divergence(impl: str, kd: str, device: str) -> None:
    """K = V: loss and gradients are those of "rkl", "fkl" and "jsd", in any order of the ids."""
    hidden, weight = _head(device, columns=33)
    teacher = kk.TeacherHead(hidden.detach() + 0.3, weight.detach() * 0.8)
    logprobs = (teacher.hidden @ teacher.weight.T).log_softmax(1)
    ids = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(device)
    topk = ids.expand(len(hidden), 33), logprobs[:, ids]
    tokens = torch.zeros(len(hidden), dtype=torch.int64, device=device)
    exact = kk.kdrl_loss(
        hidden,
        weight,
        tokens,
        advantages=None,
        teacher=teacher,
        objective=kk.Objective(policy="off", kd=kd.removeprefix("topk_"), kd_coef=1.0),
        impl="reference",
    )
    ours = _distil(hidden, weight, topk, kd, impl)
    torch.testing.assert_close(ours.kl, exact.kl, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(out.loss, (hidden, weight)) for out in (ours, exact))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_chunks_do_not_matter(impl: str, device: str) -> None:
    problem = _topk_problem("topk_rkl", device=device)
    whole = problem.solve(impl=impl)
    chunked = problem.solve(impl=impl, workspace_bytes=4000)
    for name in ("kl", "dhidden", "dweight"):
        torch.testing.assert_close(whole[name], chunked[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_weight_0_and_padding(impl: str, device: str) -> None:
    """They may hold anything; a row of KD weight 0 may have an infinite divergence."""
    problem = _topk_problem("topk_rkl", device=device)
    ids, logprobs = (x.clone() for x in problem.options["teacher_topk"])
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1, 1], device=device)
    options = {
        "impl": impl,
        "token_weights": weights,
        "kd_weight": weights * (weights.cumsum(0) > 1),
    }
    expected = problem.solve(**options)
    ids[4], logprobs[4] = 99, 7.0
    logprobs[0, 0] = -math.inf
    out = problem.solve(teacher_topk=(ids, logprobs), **options)
    assert out["kl"][0] == math.inf
    assert out["kl"][4] == 0
    for name in ("loss", "dhidden", "dweight"):
        assert torch.equal(out[name], expected[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_batches(impl: str, device: str) -> None:
    hidden, weight = _head(device, columns=40)
    ids = torch.arange(12, device=device).view(6, 2)
    logprobs = torch.full((6, 2), -1.5, device=device)
    flat = _distil(hidden, weight, (ids, logprobs), "topk_fkl", impl)
    batch = ids.view(2, 3, 2), logprobs.view(2, 3, 2)
    shaped = _distil(hidden.view(2, 3, 8), weight, batch, "topk_fkl", impl)
    assert torch.equal(shaped.loss, flat.loss)
    assert torch.equal(shaped.kl, flat.kl.view(2, 3))
    assert torch.equal(shaped.extra_logprobs, flat.extra_logprobs.view(2, 3, 2))


def test_metrics() -> None:
    """The divergence over rows of positive kd_weight, and nothing that K numbers do not tell."""
    problem = _topk_problem("topk_jsd")
    weight = problem.options["kd_weight"]
    masked = weight.masked_fill(weight < weight.median(), 0)
    out = kk.kdrl_loss(
        problem.student["hidden"],
        problem.student["weight"],
        problem.tokens,
        **problem.options | {"kd_weight": masked},
    )
    metrics, kl = out.metrics, out.kl[masked > 0]
    assert out.kl[masked == 0].any()
    assert metrics["kd_tokens"] == len(kl) == N - N // 2
    assert metrics["topk_divergence_sum"].item() == pytest.approx(float(kl.sum()))
    mean = kk.mean_metrics(metrics)["topk_divergence_mean"].item()
    assert mean == pytest.approx(float(kl.mean()))
    absent = {"kl_sum", "k2_sum", "teacher_log_ratio_sum", "kd_flipped"}
    assert not absent & metrics.keys()


def test_no_teacher_gemm() -> None:
    plan = kk.chunk_plan(1000, 64, 512, kd="topk_rkl")
    assert plan.flop["teacher"] == 0
    assert plan.flop == kk.chunk_plan(1000, 64, 512).flop
    with pytest.raises(ValueError, match="teacher must be None for kd='topk_rkl', got"):
        kk.chunk_plan(1000, 64, 512, kd="topk_rkl", teacher=(64, 512))


def test_mass_collapses_without_a_tail() -> None:
    """Adam on a head: "topk_rkl" alone leaves 63% of the teacher's mass off its K tokens.

    With the tail, p_k = q_k and the rest is the teacher's.
    """
    torch.manual_seed(0)
    logq = (2 * torch.randn(4, V)).log_softmax(1)
    logprobs, ids = logq.topk(8)
    mass = {}
    for tail in (True, False):
        hidden = torch.zeros(4, V, requires_grad=True)
        optimizer = torch.optim.Adam([hidden], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            out = _distil(hidden, torch.eye(V), (ids, logprobs), "topk_rkl", "torch", tail=tail)
            out.loss.backward()
            optimizer.step()
        mass[tail] = out.extra_logprobs.exp().sum(1)
    Q = logprobs.exp().sum(1)
    torch.testing.assert_close(mass[True], Q, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(mass[False], Q / math.e, rtol=1e-2, atol=1e-3)


def test_a_divergence_as_a_detached_advantage_has_no_gradient() -> None:
    """A number of the row alone: E[D ∇log p_y] = D Σ ∇p = 0, so there is no such option."""
    logits = torch.randn(V, dtype=F64, requires_grad=True)
    logp = logits.log_softmax(0)
    divergence = 0.7  # of K tokens, or any other number that the sampled token does not change
    (gradient,) = torch.autograd.grad((logp.detach().exp() * divergence * logp).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_float32_numbers_of_a_teacher_beside_16_bit_hidden_states() -> None:
    problem = _topk_problem("topk_rkl", dtype=torch.bfloat16)
    assert problem.options["teacher_topk"][1].dtype == F32
    out = problem.solve(impl="torch")
    ids, logprobs = problem.options["teacher_topk"]
    rounded = problem.solve(impl="torch", teacher_topk=(ids, logprobs.bfloat16()))
    assert not torch.equal(out["kl"], rounded["kl"])  # they are not rounded to 16 bits


@pytest.mark.parametrize("student_ids", [False, True])
def test_a_compiled_caller_is_one_graph(student_ids: bool) -> None:
    torch.compiler.reset()
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    tokens = torch.arange(6)

    def caller(hidden: Tensor) -> Tensor:
        ids = teacher.topk(5).indices
        if student_ids:
            with torch.no_grad():
                ids = kk.linear_logprobs(hidden, weight, tokens, topk=5).topk_tokens
        return _distil(hidden, weight, (ids, teacher.gather(1, ids)), "topk_jsd", "torch").loss

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (caller, compiled):
        hidden = torch.ones(6, 8).cumsum(0).div(9).requires_grad_()
        function(hidden).backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("name", FORMS)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Meta tensors have no values: whatever reads one raises."""
    problem = _topk_problem(name, device="cpu").map(lambda x: x.to("meta"))
    ids, logprobs = (x.to("meta") for x in problem.options["teacher_topk"])
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    options = problem.options | {"teacher_topk": (ids, logprobs), "token_weights": None}
    out = kk.kdrl_loss(tokens=problem.tokens.to("meta"), compact=False, **student, **options)
    out.loss.backward()
    assert out.kl.is_meta
    assert out.rest_logprob is None or out.rest_logprob.is_meta
    assert student["hidden"].grad.shape == student["hidden"].shape


@pytest.mark.parametrize("kd", KINDS)
def test_a_sketch_has_the_same_loss_and_expected_gradient(kd: str) -> None:
    """The K tokens are exact entries of it; the error of a mean falls with the root of its size."""
    seeds, impl = 40, "torch"
    hidden, weight = _head("cpu", rows=8, scale=2.0, columns=1000)
    rng = torch.Generator().manual_seed(4)
    logprobs = torch.randn(8, 1000, generator=rng).mul(2).log_softmax(1)
    topk = torch.topk(logprobs, 6)
    pair = topk.indices, topk.values
    exact = _distil(hidden, weight, pair, kd, impl)
    (expected,) = torch.autograd.grad(exact.loss, hidden)
    errors = []
    for seed in range(seeds):
        sketch = kk.Sketch(threshold=2**-5, seed=seed, flat=math.inf)
        out = _distil(hidden, weight, pair, kd, impl, backward="sketch", sketch=sketch)
        assert torch.equal(out.loss, exact.loss)
        errors.append(torch.autograd.grad(out.loss, hidden)[0] - expected)
    single = torch.stack([error.norm() for error in errors]).mean()
    assert single > 0.001 * expected.norm()
    assert torch.stack(errors).mean(0).norm() < 2.0 * single / seeds**0.5


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_head_with_an_adapter_is_the_merged_one(impl: str) -> None:
    rng = torch.Generator().manual_seed(5)
    A, B = (0.2 * torch.randn(*size, generator=rng, dtype=F64) for size in ((3, 8), (60, 3)))
    hidden, weight = (x.detach().double() for x in _head("cpu", columns=60))
    tokens = torch.arange(len(hidden))
    logprobs, ids = torch.randn(len(hidden), 60, generator=rng).log_softmax(1).topk(5)
    results = []
    for merged in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, A, B)]
        x, a, b = leaves
        head = weight + 0.5 * b @ a if merged else weight
        adapter = None if merged else kk.LowRank(a, b, 0.5)
        best = kk.linear_logprobs(x, head, tokens, topk=4, adapter=adapter, impl=impl)
        out = _distil(x, head, (ids, logprobs), "topk_rkl", impl, adapter=adapter)
        loss = out.loss + best.topk_logprobs.square().sum()
        results.append([best.topk_tokens, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
