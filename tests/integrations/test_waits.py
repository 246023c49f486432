"""Where the losses of hosts wait for a GPU: every wait is listed here with its reason.

On a pretended GPU. verl and ms-swift are not among what the tests install.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_kernels.integrations.logprob_losses import read_numbers
from kdrl_kernels.integrations.prime_rl import kdrl
from tests.kernels.test_waits import COMPACT
from tests.pretended_gpu import PretendedGpu, move, on_gpu, pretend

B, P, C = 3, 2, 4
"""Sequences, and tokens of their prompts and completions."""
MASK = {
    # transformers looks whether the sequences are padded
    "kdrl_kernels/integrations/trl/fused.py FusedHead.forward: _local_scalar_dense": 1
}
PLACES = "kdrl_kernels/integrations/trl/head_loss.py places_of: nonzero"
"""How many tokens are scored: the GEMM of their rows cannot be launched without."""


@pytest.mark.parametrize(
    ("kd", "joint", "waits"),
    [
        ("rkl", True, MASK | {PLACES: 1} | COMPACT),
        ("topk_rkl", True, MASK | {PLACES: 1} | COMPACT),
        # beside TRL's own policy loss; those that are distilled may be fewer than those scored
        ("rkl", False, MASK | {PLACES: 2} | COMPACT),
        ("k2", False, MASK | {PLACES: 2}),
    ],
)
def test_trl(
    kd: str, joint: bool, waits: dict[str, int], tiny: Callable[..., Any], gpu: PretendedGpu
) -> None:
    pytest.importorskip("trl")
    from kdrl_kernels.integrations.trl import fused, head, head_loss  # noqa: PLC0415

    draw, models = torch.Generator().manual_seed(0), [tiny("qwen2", seed=1), tiny("llama", seed=2)]
    ids = torch.randint(2, 64, (B, P + C), generator=draw)
    labels = torch.where(torch.arange(P + C) < P, -100, ids)
    labels[1, -1] = -100
    student, teacher = (fused.FusedHead(1.0, states=states) for states in (False, True))
    for model, its_head in zip(models, (student, teacher), strict=True):
        its_head.attach(model)
    advantages = torch.randn(B, C, generator=draw)
    with gpu:
        policy, theirs = (move(model) for model in models)
        inputs = {"input_ids": on_gpu(ids), "labels": on_gpu(labels), "fused_lm_head": True}
        with torch.no_grad():
            states = theirs(**inputs).log_probs[:, -C:]
        terms = head_loss.HeadTerms(
            objective=kk.Objective(policy="clip" if joint else "off", kd=kd, kd_coef=0.1),
            token_weights=on_gpu((labels[:, -C:] != -100).float()),
            joint=joint,
            advantages=on_gpu(advantages),
            kd_weight=on_gpu(torch.ones(B, C)),
            teacher_states=states,
            teacher_head=lambda: head.model_head(theirs, 1.0),
            topk=4,
        )
        gpu.waits.clear()
        with student.computing(terms):
            out = policy(**inputs)
        (out.loss if joint else out.loss + out.log_probs.sum()).backward()
    assert gpu.waits == waits


def test_prime_rl(gpu: PretendedGpu) -> None:
    names = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages")
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([False, True, True, True, False])
    with gpu:
        inputs = {name: on_gpu(torch.randn(5, generator=draw)) for name in names}
        inputs["trainer_logprobs"].requires_grad_()
        inputs["loss_weights"] = on_gpu(torch.rand(5, generator=draw))
        kdrl(SimpleNamespace(**inputs, loss_mask=on_gpu(mask))).loss.backward()
    # how many tokens the mask keeps
    assert gpu.waits == {"kdrl_kernels/integrations/prime_rl.py _rows: nonzero": 1}


def test_metrics_of_verl_are_read_together(gpu: PretendedGpu) -> None:
    values = {"a": torch.tensor(0.1), "b": torch.tensor(3), "c": torch.tensor(-2.5).double()}
    with gpu:
        numbers = read_numbers({name: on_gpu(value) for name, value in values.items()})
    assert numbers == {name: value.item() for name, value in values.items()}
    what = "kdrl_kernels/integrations/logprob_losses.py read_numbers: to"
    assert gpu.waits == {what: 1}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Make a pretended GPU."""
    return pretend(monkeypatch)
