"""Each KD form optimises what Objective says, by exact enumeration of a tiny vocabulary.

One prefix, token y drawn from the student p (or, off-policy, from a behaviour policy b): the
expected gradient is the sum over every y of its probability times the gradient kdrl_loss returns.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk

V = 6
JSD_ALPHA = 0.3
FKL_SHARE = 0.3
MIXTURE: dict[str, Any] = {"kd": "rkl+fkl", "fkl_share": FKL_SHARE}
CENTRED = {"kd": "k2", "kd_baseline": "kl"}
KD_TERMS = [*({"kd": kd} for kd in ("k2", "k3", "k3_ratio", "rkl", "fkl", "jsd")), CENTRED]
KD_TERMS += [MIXTURE]
EVERY_TERM = pytest.mark.parametrize(
    "term", KD_TERMS, ids=lambda term: "-".join(map(str, term.values()))
)


def _distributions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student, teacher and behaviour policy, [V] each."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher, behaviour = torch.randn(3, V, generator=rng, dtype=torch.float64)
    return student, teacher, behaviour


def _token_gradients(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    impl: str,
    old: Tensor | None,
    term: dict[str, Any],
) -> Tensor:
    """Return in row y the gradient [V] of weights[y] · KD(y), where logits = hidden · identity."""
    hidden = student.expand(V, V).clone().requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    settings = {"kd_coef": 1.0, "kd_ratio_cap": torch.inf, "jsd_alpha": JSD_ALPHA} | term
    kk.kdrl_loss(
        hidden,
        identity,
        torch.arange(V),
        advantages=None,
        token_weights=weights,
        normalizer=1.0,
        old_logprobs=old,
        teacher=kk.TeacherHead(teacher.expand(V, V), identity),
        objective=kk.Objective(policy="off", **settings),
        impl=impl,
    ).loss.backward()
    return hidden.grad


def _head_gradient(*args: Any) -> Tensor:
    """Return the gradient [V] of sum_y weights[y] · KD(y)."""
    return _token_gradients(*args).sum(dim=0)


def _true_gradient(divergence: Callable[[Tensor, Tensor], Tensor], student: Tensor, q: Tensor):
    logits = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(torch.log_softmax(logits, 0), q), logits)
    return gradient


def _reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum()


def _forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logq.exp() * (logq - logp)).sum()


def _jensen_shannon(logp: Tensor, logq: Tensor) -> Tensor:
    """Compute a KL(q‖m) + (1 - a) KL(p‖m), m = a q + (1 - a) p, written out."""
    logm = (JSD_ALPHA * logq.exp() + (1 - JSD_ALPHA) * logp.exp()).log()
    return JSD_ALPHA * _reverse_kl(logq, logm) + (1 - JSD_ALPHA) * _reverse_kl(logp, logm)


def _mixture(logp: Tensor, logq: Tensor) -> Tensor:
    forward, reverse = _forward_kl(logp, logq), _reverse_kl(logp, logq)
    return FKL_SHARE * forward + (1 - FKL_SHARE) * reverse


CASES = {
    "k2": ({"kd": "k2"}, _reverse_kl, False),
    "k2_off_policy": ({"kd": "k2"}, _reverse_kl, True),
    "centred_k2": (CENTRED, _reverse_kl, False),
    "centred_k2_off_policy": (CENTRED, _reverse_kl, True),
    "k3": ({"kd": "k3"}, _forward_kl, False),
    "k3_ratio": ({"kd": "k3_ratio"}, _reverse_kl, False),
    "k3_ratio_off_policy": ({"kd": "k3_ratio"}, _reverse_kl, True),
    "rkl": ({"kd": "rkl"}, _reverse_kl, False),
    "fkl": ({"kd": "fkl"}, _forward_kl, False),
    "jsd": ({"kd": "jsd"}, _jensen_shannon, False),
    "mixture": (MIXTURE, _mixture, False),
    "mixture_off_policy": (MIXTURE, _mixture, True),
}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("term", "divergence", "off_policy"), CASES.values(), ids=CASES)
def test_expected_gradient(
    term: dict[str, Any],
    divergence: Callable[[Tensor, Tensor], Tensor],
    off_policy: bool,
    impl: str,
) -> None:
    student, teacher, behaviour = _distributions()
    sampler = torch.log_softmax(behaviour if off_policy else student, 0)
    old = sampler if off_policy else None
    gradient = _head_gradient(student, teacher, sampler.exp(), impl, old, term)
    expected = _true_gradient(divergence, student, torch.log_softmax(teacher, 0))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def _variance(student: Tensor, teacher: Tensor, term: dict[str, Any]) -> float:
    """Return E|gradient|² - |E gradient|² over the token that is drawn."""
    p = torch.softmax(student, 0)
    rows = _token_gradients(student, teacher, p, "torch", None, term)  # p_y times the gradient
    return float((rows.square().sum(dim=1) / p).sum() - rows.sum(dim=0).square().sum())


def test_the_baseline_takes_out_variance() -> None:
    """Over random pairs, a baseline lowers nearly every variance, and their mean."""
    pairs = [_distributions(seed)[:2] for seed in range(20)]
    plain, centred = (
        torch.tensor([_variance(*pair, term) for pair in pairs]) for term in ({"kd": "k2"}, CENTRED)
    )
    assert centred[0] < plain[0]
    assert (centred < plain).sum() >= 16
    assert centred.mean() < 0.9 * plain.mean()


def _top(share: float, token: int = 0) -> Tensor:
    """Return logits of a distribution that gives one token a share and spreads the rest evenly."""
    probabilities = torch.full((V,), (1 - share) / (V - 1), dtype=torch.float64)
    probabilities[token] = share
    return probabilities.log()


def _variances(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Return the variance of the gradient without a baseline and with one."""
    plain, centred = (_variance(student, teacher, term) for term in ({"kd": "k2"}, CENTRED))
    return plain, centred


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_baseline_takes_out_a_known_variance_of_a_uniform_student(
    scale: float, seed: int
) -> None:
    """|∇lp|² is 1 - 1/V for every token there, so the variance falls by KL² (1 - 1/V)."""
    student, teacher = torch.zeros(V, dtype=torch.float64), _distributions(seed)[1] * scale
    plain, centred = _variances(student, teacher)
    kl = _reverse_kl(torch.log_softmax(student, 0), torch.log_softmax(teacher, 0))
    assert plain - centred == pytest.approx(float(kl.square() * (1 - 1 / V)), rel=1e-9)


# share of the student's likeliest token, of the teacher's, whether these are the same token, and
# by what the baseline multiplies the variance, worked out in rows/README.md's formula
PEAKED = [
    (0.3, 0.9, True, 0.39),
    (0.5, 0.9, True, 0.43),
    (0.9, 0.99, True, 0.87),
    (0.9, 0.5, True, 1.55),
    (0.9, 0.2, True, 2.58),
    (0.5, 0.9, False, 0.64),
    (0.9, 0.9, False, 6.92),
]


@pytest.mark.parametrize(("share", "teacher_share", "same", "factor"), PEAKED)
def test_where_the_baseline_helps_and_where_it_hurts(
    share: float, teacher_share: float, same: bool, factor: float
) -> None:
    """It helps a sure student whose teacher is surer of the same token, and hurts any other one."""
    plain, centred = _variances(_top(share), _top(teacher_share, token=0 if same else 1))
    assert centred / plain == pytest.approx(factor, abs=0.005)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("teacher_share", [0.3, 0.6, 0.8, 0.95, 0.999])
def test_the_baseline_helps_where_the_teacher_is_surer_of_the_same_token(
    teacher_share: float, share: float
) -> None:
    plain, centred = _variances(_top(share), _top(teacher_share))
    assert (centred < plain) == (teacher_share > share)


def test_the_condition_of_the_baseline_is_exact() -> None:
    """The variance falls where 2 E[l |∇lp|²] > KL E[|∇lp|²], by KL times the difference."""
    signs = set()
    for seed, scale in product(range(6), (0.5, 2.0, 5.0)):
        student, teacher, _ = (x * scale for x in _distributions(seed))
        p, logp = torch.softmax(student, 0), torch.log_softmax(student, 0)
        log_ratio = logp - torch.log_softmax(teacher, 0)
        squares = 1 - 2 * p + p.square().sum()  # of ∇lp = 1[v = y] - p_v
        kl = (p * log_ratio).sum()
        change = kl * (2 * (p * log_ratio * squares).sum() - kl * (p * squares).sum())
        plain, centred = _variances(student, teacher)
        assert plain - centred == pytest.approx(float(change), rel=1e-9)
        signs.add(bool(change > 0))
    assert signs == {True, False}


def test_a_capped_ratio_is_no_longer_exact_with_a_baseline() -> None:
    """E_b[s ∇lp] is 0 for the ratio itself only; the cap biases k2 without a baseline as well."""
    student, teacher, behaviour = _distributions()
    sampler = torch.log_softmax(behaviour, 0)
    expected = _true_gradient(_reverse_kl, student, torch.log_softmax(teacher, 0))
    for term in ({"kd": "k2"}, CENTRED):
        capped = term | {"kd_ratio_cap": 1.0}
        gradient = _head_gradient(student, teacher, sampler.exp(), "torch", sampler, capped)
        assert (gradient - expected).abs().max() > 0.01


def test_k1_as_a_loss_has_no_teacher_and_no_expected_gradient() -> None:
    """So it is refused: E[d(lp - lq)] = sum_y p_y dlog p_y = 0, whatever the teacher is."""
    student, teacher, _ = _distributions()
    logits = student.clone().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    k1 = logp - torch.log_softmax(teacher, 0)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * k1).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_k3_off_policy_is_not_the_reverse_kl() -> None:
    student, teacher, behaviour = _distributions()
    sampler = torch.log_softmax(behaviour, 0)
    gradient = _head_gradient(student, teacher, sampler.exp(), "torch", sampler, {"kd": "k3"})
    expected = _true_gradient(_reverse_kl, student, torch.log_softmax(teacher, 0))
    assert (gradient - expected).abs().max() > 0.01


def test_k2_off_policy_needs_the_ratio() -> None:
    """Without old log-probabilities, samples of another policy give another gradient."""
    student, teacher, behaviour = _distributions()
    sampler = torch.log_softmax(behaviour, 0)
    gradient = _head_gradient(student, teacher, sampler.exp(), "torch", None, {"kd": "k2"})
    expected = _true_gradient(_reverse_kl, student, torch.log_softmax(teacher, 0))
    assert (gradient - expected).abs().max() > 0.01


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_expected_policy_gradient_is_that_of_the_expected_advantage(impl: str) -> None:
    student, _, _ = _distributions()
    advantages = torch.linspace(-1, 2, V, dtype=torch.float64)
    hidden = student.expand(V, V).clone().requires_grad_()
    p = torch.softmax(student, 0)
    objective = kk.Objective(kd=None)
    options = {"advantages": advantages, "token_weights": p, "normalizer": 1.0, "impl": impl}
    kk.kdrl_loss(
        hidden, torch.eye(V).double(), torch.arange(V), objective=objective, **options
    ).loss.backward()
    logits = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-(torch.softmax(logits, 0) * advantages).sum(), logits)
    torch.testing.assert_close(hidden.grad.sum(0), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@EVERY_TERM
def test_only_the_teacher_changed_changes_the_gradient(
    term: dict[str, Any], impl: str, device: str
) -> None:
    gradients = []
    for shift in (0.0, 0.5):
        torch.manual_seed(0)
        hidden = torch.randn(5, 8, device=device).requires_grad_()
        weight = torch.randn(11, 8, device=device)
        other = weight + shift * torch.randn(11, 8, device=device)
        kk.kdrl_loss(
            hidden,
            weight,
            torch.arange(5, device=device),
            advantages=torch.ones(5, device=device),
            teacher=kk.TeacherHead(hidden.detach() * 0.9, other),
            objective=kk.Objective(**term),
            impl=impl,
        ).loss.backward()
        gradients.append(hidden.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-5


@pytest.mark.parametrize("impl", ["torch", "triton"])
@EVERY_TERM
def test_a_teacher_equal_to_the_student_gives_exactly_zero(
    term: dict[str, Any], impl: str, device: str
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, device=device).requires_grad_()
    weight = torch.randn(5000, 8, device=device).requires_grad_()
    result = kk.kdrl_loss(
        hidden,
        weight,
        torch.arange(3, device=device),
        advantages=None,
        teacher=kk.TeacherHead(hidden, weight),
        objective=kk.Objective(policy="off", kd_coef=1.0, **term),
        impl=impl,
        workspace_bytes=4 * 5000 * 32,
    )
    result.loss.backward()
    assert result.loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@EVERY_TERM
def test_the_teacher_is_never_trained(term: dict[str, Any], impl: str, device: str) -> None:
    hidden, t_hidden = torch.randn(2, 5, 8, device=device).requires_grad_().unbind()
    weight, t_weight = (torch.randn(11, 8, device=device).requires_grad_() for _ in range(2))
    result = kk.kdrl_loss(
        hidden,
        weight,
        torch.arange(5, device=device),
        advantages=torch.ones(5, device=device),
        teacher=kk.TeacherHead(t_hidden, t_weight),
        objective=kk.Objective(**term),
        impl=impl,
    )
    gradients = torch.autograd.grad(result.loss, [weight, t_weight, t_hidden], allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert gradients[1:] == (None, None)
