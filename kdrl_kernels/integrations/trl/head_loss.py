"""Computes the loss of a step's tokens from hidden states, for the forward of fused.py.

B completions, C their positions, V vocabulary, N tokens that are scored.

Which these are is known once a mask on the GPU has been counted, which the host waits for. So their
places are taken from a mask once, and everything else by these, not by the mask.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.integrations.trl.head import ModelHead
from kdrl_kernels.metrics import row_metrics, sum_dtype
from kdrl_kernels.objective import token_losses
from kdrl_kernels.token_rows import Rows

Places = tuple[Tensor, ...]
"""Completions and positions of N tokens, [N] each: tensor[places] is [N, ...]."""


def places_of(mask: Tensor) -> Places:
    """Return where a mask [B, C] is true; the host waits for a GPU."""
    return mask.nonzero(as_tuple=True)


@dataclass(frozen=True, kw_only=True)
class HeadTerms:
    """Holds what a step's loss needs beside the student's head; tensors are [B, C], constants."""

    objective: kk.Objective
    token_weights: Tensor
    """Mask, divided by TRL's normaliser: the loss is the weighted sum over the tokens."""
    joint: bool
    """True: policy gradient and KD term in one pass. False: the KD term alone, beside
    log-probabilities with a gradient, from which TRL computes the policy gradient."""
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    kd_weight: Tensor | None = None
    """Beta, mask and the sampler's importance ratio."""
    teacher_states: Tensor | None = None
    """[B, C, H_t], the teacher's final hidden states at the tokens."""
    teacher_head: Callable[[], ModelHead] | None = None
    teacher_logprobs: Tensor | None = None
    """Instead of teacher_states, from a server."""
    topk: int = 64
    """K of a top-k divergence."""
    sketch: kk.Sketch | None = None
    """Its rows is the number of the first of the B · C tokens."""

    @contextmanager
    def teacher(self, places: Places) -> Iterator[kk.TeacherHead | None]:
        """Enter a context in which the teacher's head can be used, at some tokens of [B, C]."""
        if self.teacher_states is None or self.objective.kd is None:
            yield None
            return
        assert self.teacher_head is not None
        head = self.teacher_head()
        with head.gathered():
            yield head.teacher(self.teacher_states[places])


def one_pass(
    terms: HeadTerms, head: ModelHead, hidden: Tensor, tokens: Tensor, places: Places
) -> kk.LossOutput:
    """Compute the terms' loss of N tokens, none of weight 0, in one pass over the head."""

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[places]

    columns, kd, topk = terms.token_weights.shape[1], terms.objective.kd is not None, None
    sketch = rows_of(terms.sketch, places, columns)
    with terms.teacher(places) as teacher:
        if terms.objective.topk_kd is not None:
            assert teacher is not None
            topk = _best(teacher, terms.topk, len(head.weight))
        out = kk.kdrl_loss(
            hidden,
            head.weight,
            tokens,
            advantages=rows(terms.advantages),
            token_weights=rows(terms.token_weights),
            active_rows=len(tokens),
            old_logprobs=rows(terms.old_logprobs),
            teacher=teacher if topk is None else None,
            teacher_logprobs=rows(terms.teacher_logprobs) if kd else None,
            teacher_topk=topk,
            kd_weight=rows(terms.kd_weight) if kd else None,
            normalizer=1.0,
            objective=terms.objective,
            entropy=True,
            backward="exact" if sketch is None else "sketch",
            sketch=sketch,
            **head.options,
        )
    return replace(
        out, metrics=out.metrics | _divergences(terms.objective, out, rows(terms.kd_weight))
    )


def rows_of(sketch: kk.Sketch | None, places: Places, columns: int) -> kk.Sketch | None:
    """Return a sketch with the numbers of tokens of [B, C = columns]; its rows is the first's."""
    if sketch is None:
        return None
    completions, positions = places
    return replace(sketch, rows=completions * columns + positions + sketch.rows)


def _best(teacher: kk.TeacherHead, K: int, V: int) -> tuple[Tensor, Tensor]:
    """Return the teacher's K likeliest tokens of each row, and their log-probabilities."""
    tokens = teacher.hidden.new_zeros(len(teacher.hidden), dtype=torch.int64)  # anyone's
    best = _teacher_scores(teacher, tokens, V, topk=K)
    assert best.topk_tokens is not None
    assert best.topk_logprobs is not None
    return best.topk_tokens, best.topk_logprobs


@torch.no_grad()
def _teacher_scores(
    teacher: kk.TeacherHead, tokens: Tensor, V: int, topk: int | None = None
) -> kk.LogprobOutput:
    """Return the teacher's log-probabilities over the columns that a student of V has too."""
    V = min(V, len(teacher.weight))
    return kk.linear_logprobs(
        teacher.hidden,
        teacher.weight[:V],
        tokens,
        bias=None if teacher.bias is None else teacher.bias[:V],
        temperature=teacher.temperature,
        softcap=teacher.softcap,
        topk=None if topk is None else min(topk, V),
    )


def kd_loss(
    terms: HeadTerms, head: ModelHead, hidden: Tensor, labels: Tensor, logprobs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the KD term alone, and its metrics, beside log-probabilities that have a gradient.

    A sampled term is a function of these; any other is computed by a second pass over the head.
    """
    goal = terms.objective
    places = places_of((labels != -100) & (terms.token_weights != 0))
    if goal.exact_kd is not None or goal.topk_kd is not None:
        terms = _weighted(terms, logprobs.detach())
        out = one_pass(terms, head, hidden[places], labels[places], places)
        return out.loss, out.metrics
    old, kd_weight = terms.old_logprobs, terms.kd_weight
    rows = Rows(
        logprobs=logprobs[places],
        old_logprobs=None if old is None else old[places],
        kd_weight=None if kd_weight is None else kd_weight[places],
        teacher_logprobs=_teacher_logprobs(terms, labels[places], places, len(head.weight)),
    )
    loss = (token_losses(goal, rows) * terms.token_weights[places]).sum()
    constants = replace(rows, logprobs=rows.logprobs.detach())
    return loss, row_metrics(goal, constants, used=None)


def _weighted(terms: HeadTerms, logprobs: Tensor) -> HeadTerms:
    """Multiply kd_weight by the bounded importance ratio, in the place of old_logprobs.

    These are over the student's columns, while a pass over the head has those of both models alone.
    """
    if terms.old_logprobs is None or terms.kd_weight is None:
        return terms
    most = terms.objective.kd_ratio_cap
    ratio = (logprobs - terms.old_logprobs).clamp(max=math.log(most)).exp()
    return replace(terms, old_logprobs=None, kd_weight=terms.kd_weight * ratio / min(most, 1.0))


def _teacher_logprobs(terms: HeadTerms, tokens: Tensor, places: Places, V: int) -> Tensor:
    """Return the teacher's log-probabilities of the tokens, [N]."""
    if terms.teacher_logprobs is not None:
        return terms.teacher_logprobs[places]
    with terms.teacher(places) as teacher:
        assert teacher is not None
        return _teacher_scores(teacher, tokens, V).logprobs


def _divergences(
    objective: kk.Objective, out: kk.LossOutput, kd_weight: Tensor | None
) -> dict[str, Tensor]:
    """Return sums, over the distilled tokens, of divergences that metrics of kdrl_loss lack."""
    sums: dict[str, Tensor] = {}
    if objective.kd in ("fkl", "jsd") and out.kl is not None:
        sums["jsd_sum" if objective.kd == "jsd" else "forward_kl_sum"] = out.kl
    if out.forward_kl is not None:
        sums["forward_kl_sum"] = out.forward_kl
    if kd_weight is not None:
        sums = {name: torch.where(kd_weight > 0, kl, 0) for name, kl in sums.items()}
    return {name: kl.to(sum_dtype(kl.device)).sum() for name, kl in sums.items()}
