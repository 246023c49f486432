"""The divergences over K tokens of a row: values and derivatives against full logits.

The definition is written out here over the vocabulary, and differentiated in float64.
"""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from kdrl_kernels.objective import TopkKd
from kdrl_kernels.topk import ROUNDINGS, TopkDivergence, teacher_rest, topk_divergence

KINDS = get_args(TopkKd)
ALPHA = 0.3
V = 11
IDS = torch.tensor([[2, 7, 0], [5, -1, 10], [-1, -1, -1], [8, 1, 3]])
EVERY_FORM = [(kd, tail) for kd in KINDS for tail in (True, False)]
FORMS = pytest.mark.parametrize(("kd", "tail"), EVERY_FORM, ids=str)


def _logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, len(IDS), V, generator=rng, dtype=torch.float64)
    return student, teacher


def _support(ids: Tensor = IDS) -> Tensor:
    """Return [N, V] bool: the tokens of each row."""
    columns = torch.zeros(len(ids), V + 1, dtype=torch.bool)
    return columns.scatter(1, ids % (V + 1), True)[:, :V]


def _defined(kd: str, tail: bool, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of each row, term by term over the vocabulary."""
    p, q, support = student.softmax(1), teacher.softmax(1), _support()

    def total(term: Tensor, of_tail: Tensor) -> Tensor:
        on_support = torch.where(support, term, 0).sum(1)
        return on_support + of_tail if tail else on_support

    def kl(a: Tensor, b: Tensor) -> Tensor:
        rest_a, rest_b = (torch.where(support, 0, x).sum(1) for x in (a, b))
        return total(a * (a / b).log(), rest_a * (rest_a / rest_b).log())

    if kd == "topk_rkl":
        return kl(p, q)
    if kd == "topk_fkl":
        return kl(q, p)
    m = ALPHA * q + (1 - ALPHA) * p
    return ALPHA * kl(q, m) + (1 - ALPHA) * kl(p, m)


def _inputs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p and log q at IDS, -inf where a row has none, and log r."""
    logp, logq = student.log_softmax(1), teacher.log_softmax(1)
    at_ids = (x.gather(1, IDS.clamp(min=0)).masked_fill(IDS < 0, -math.inf) for x in (logp, logq))
    return *at_ids, logp.masked_fill(_support(), -math.inf).logsumexp(1)


def _spread(student: Tensor, form: TopkDivergence, ids: Tensor = IDS) -> Tensor:
    """Return d value / d logits [N, V] of derivatives in log p_k and log r, as rows/README.md."""
    p, columns = student.softmax(1), torch.zeros(len(ids), V + 1, dtype=student.dtype)
    c = form.extra
    dz = columns.scatter_add(1, ids % (V + 1), c)[:, :V] - c.sum(1, keepdim=True) * p
    if form.rest is None:
        return dz
    outside = torch.where(_support(ids), 0, p)
    return dz + form.rest[:, None] * (outside / outside.sum(1, keepdim=True) - p)


@FORMS
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_definition(kd: TopkKd, tail: bool, seed: int) -> None:
    student, teacher = _logits(seed)
    leaf = student.clone().requires_grad_()
    value = _defined(kd, tail, leaf, teacher)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    logp, logq, logr = _inputs(student, teacher)
    form = topk_divergence(kd, logp, logq, logr if tail else None, ALPHA)
    torch.testing.assert_close(form.value, value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(_spread(student, form), expected, rtol=1e-11, atol=1e-14)


def test_gradients_with_a_tail_in_closed_form() -> None:
    """On the support those of the exact divergence; off it, all columns move by one factor."""
    student, teacher = _logits()
    support, p, q = _support(), student.softmax(1), teacher.softmax(1)
    r, q_r = (torch.where(support, 0, x).sum(1, keepdim=True) for x in (p, q))
    logp, logq, logr = _inputs(student, teacher)
    rkl, fkl, jsd = (topk_divergence(kd, logp, logq, logr, ALPHA) for kd in KINDS)
    log_ratio = torch.where(support, p / q, r / q_r).log()
    by_hand = p * (log_ratio - rkl.value[:, None])
    torch.testing.assert_close(_spread(student, rkl), by_hand, rtol=1e-11, atol=1e-14)
    by_hand = torch.where(support, p - q, p * (1 - q_r / r))
    torch.testing.assert_close(_spread(student, fkl), by_hand, rtol=1e-11, atol=1e-14)
    mixed = (1 - ALPHA) * (1 - (ALPHA * (-log_ratio).exp() + 1 - ALPHA).log() - 1)
    by_hand = p * (mixed - (p * mixed).sum(1, keepdim=True))
    torch.testing.assert_close(_spread(student, jsd), by_hand, rtol=1e-11, atol=1e-14)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_teacher_equal_to_the_student(kd: TopkKd, tail: bool, dtype: torch.dtype) -> None:
    """With a tail all is exactly 0, though the teacher's rest is 1 - sum q and the student's not.

    Without one, only "topk_jsd" has its minimum there.
    """
    student, _ = _logits()
    logp, logq, logr = _inputs(student.to(dtype), student.to(dtype))
    form = topk_divergence(kd, logp, logq, logr if tail else None, ALPHA)
    still = tail or kd == "topk_jsd"
    assert (form.value == 0).all()
    assert bool((form.extra == 0).all()) == still
    assert form.rest is None or bool((form.rest == 0).all())


@FORMS
def test_the_tail_makes_the_exact_divergence_a_bound(kd: TopkKd, tail: bool) -> None:
    """Merging tokens into a bucket loses the divergence inside it: with a tail 0 <= D <= exact."""
    student, teacher = _logits(3)
    logp, logq, logr = _inputs(student, teacher)
    value = topk_divergence(kd, logp, logq, logr if tail else None, ALPHA).value
    whole = (student.log_softmax(1), teacher.log_softmax(1))
    exact = topk_divergence(kd, *whole, None, ALPHA).value
    if tail or kd == "topk_jsd":
        assert (value >= -1e-15).all()
        assert (value <= exact + 1e-15).all()
    else:  # a sum of some terms of the exact one: of either sign
        assert (value < 0).any()


@pytest.mark.parametrize("kd", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_tokens_give_the_exact_divergence(kd: TopkKd, dtype: torch.dtype) -> None:
    """K = V: there is no rest, whatever the sum of the teacher's numbers rounds to."""
    for seed in range(20):
        student, teacher = (x.to(dtype) for x in _logits(seed))
        logp, logq = student.log_softmax(1), teacher.log_softmax(1)
        no_rest = torch.full((len(IDS),), -math.inf, dtype=dtype)
        whole = topk_divergence(kd, logp, logq, no_rest, ALPHA)
        exact = topk_divergence(kd, logp, logq, None, ALPHA)
        size = 8 * torch.finfo(dtype).eps  # of the sums, which have one term more
        torch.testing.assert_close(whole.value, exact.value, rtol=size, atol=size)
        assert whole.rest is not None
        assert (whole.rest == 0).all()


@pytest.mark.parametrize("kd", KINDS)
def test_a_teacher_whose_sum_rounds_to_1_gives_a_finite_divergence(kd: TopkKd) -> None:
    """log(1 - 1) would make "topk_rkl" infinite for every row of a teacher that is sure."""
    logq = torch.tensor([[-1e-9, -30.0], [1e-7, -40.0]])
    logp = torch.tensor([[-1.0, -9.0], [-1.0, -9.0]])
    logr = torch.log1p(-logp.exp().sum(1))
    form = topk_divergence(kd, logp, logq, logr, ALPHA)
    assert form.rest is not None
    for tensor in (form.value, form.extra, form.rest):
        assert tensor.isfinite().all()
    assert (form.value > 0).all()
    assert (form.rest > 0).all()  # it pulls the student's mass onto the support


def test_the_teachers_rest() -> None:
    """1 - Q without cancellation, from the smallest rest that rounding leaves to all of it."""
    logq = torch.tensor([[-1e-9], [-1e-3], [-40.0], [-math.inf]], dtype=torch.float64)
    rest = teacher_rest(logq, torch.full((4,), -0.5, dtype=torch.float64)).exp()
    exact = torch.tensor([1e-9 - 5e-19, 9.995001666250083e-4, 1 - math.exp(-40), 1.0])
    torch.testing.assert_close(rest, exact.double(), rtol=1e-7, atol=0)
    equal = torch.tensor([math.log(9.995001666250083e-4 + 1e-15)], dtype=torch.float64)
    assert teacher_rest(logq[1:2], equal) == equal
    smallest = teacher_rest(torch.tensor([[1e-6]]), torch.tensor([-2.0]))
    assert smallest.exp().item() == pytest.approx(ROUNDINGS * 2**-23)


@FORMS
def test_what_one_of_the_models_forbids(kd: TopkKd, tail: bool) -> None:
    """0 · log 0 is 0; the divergence is infinite where the exact one is, and never NaN."""
    logp = torch.tensor([[-1.0, -math.inf], [-1.0, -2.0]])
    logq = torch.tensor([[-0.5, -2.0], [-0.5, -math.inf]])
    logr = torch.log1p(-logp.exp().sum(1)) if tail else None
    form = topk_divergence(kd, logp, logq, logr, ALPHA)
    infinite = {"topk_rkl": [False, True], "topk_fkl": [True, False]}.get(kd, [False, False])
    assert form.value.isinf().tolist() == infinite
    assert not form.extra.isnan().any()


def _descend(kd: TopkKd, tail: bool, teacher: Tensor, steps: int = 800) -> Tensor:
    """Return p [N, V] after gradient descent on the logits."""
    student = torch.zeros_like(teacher)
    for _ in range(steps):
        logp, logq, logr = _inputs(student, teacher)
        form = topk_divergence(kd, logp, logq, logr if tail else None, ALPHA)
        student -= 4 * _spread(student, form)
    return student.softmax(1)


@FORMS
def test_where_the_minimum_lies(kd: TopkKd, tail: bool) -> None:
    """With a tail p_k = q_k; without, mass leaves the support (rkl) or has to stay on it (fkl).

    "topk_rkl" without a tail ends at p_k = q_k / e: 63% of the teacher's mass on these tokens is
    gone. "topk_fkl" ends at q_k / Q, a teacher that never leaves them. "topk_jsd" is right.
    """
    teacher = _logits(1)[1] / 2
    support, q = _support(), teacher.softmax(1)
    p = _descend(kd, tail, teacher)
    Q = torch.where(support, q, 0).sum(1, keepdim=True)
    factors = {"topk_rkl": 1 / math.e, "topk_fkl": 1 / Q}
    minimum = q if tail else q * factors.get(kd, 1.0)
    torch.testing.assert_close(p[support], minimum[support], rtol=2e-2, atol=1e-5)
