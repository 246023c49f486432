"""Takes a pack through a loss that kdrl_kernels.Objective does not have: method/losses.py.

The head's passes are those of kdrl_loss: 3u, and u more where the loss reads a whole completion and
completions are not strictly on-policy, since its coefficients are known only after a pass that has
no gradient. N loss tokens, C of them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.metrics import row_metrics
from kdrl_kernels.objective import subtract
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.losses import (
    POLICIES,
    MethodLoss,
    TokenCoefficients,
    completions_of,
    distilled_rows,
    method_loss,
    needs_token_loss,
)
from kdrl_train.method.own_loss import load_loss
from kdrl_train.model.packing import PackedBatch


def objective(method: MethodConfig, *, distil: bool) -> kk.Objective:
    """Make the kk.Objective of a method; kd_coef is 1 since beta is in each token's kd weight.

    Without distillation, where all kd weights are 0, a method with policy "off" becomes a policy
    gradient of its advantages, which are 0: no loss, but entropy and log-probabilities.
    kd "reward" has no term in the loss; its teacher is only read without a gradient, as for k2.
    For the policies of method/losses.py, which add their own term, it is "none".
    """
    alone = method.policy == "off" and not distil
    policy = "none" if alone or method.policy in POLICIES else method.policy
    kd = "k2" if method.kd == "reward" else method.kd
    return kk.Objective(
        policy=policy,  # type: ignore[arg-type]
        clip_low=method.clip_low if policy == "clip" else 0.2,
        clip_high=method.clip_high if policy == "clip" else 0.2,
        kd=kd if distil else None,
        kd_baseline=method.kd_baseline if distil else None,
        fkl_share=method.fkl_share if distil else 0.5,
        kd_coef=1.0,
        jsd_alpha=method.jsd_alpha,
        entropy_coef=method.entropy_coef,
        tail=method.kd_tail or not distil,
    )


class LossOfRows:
    """Computes the loss of packs for a method with a loss of the user's own, or with parts that
    kdrl_kernels.Objective lacks.

    Raises: ValueError where method.loss cannot be loaded.
    """

    def __init__(self, method: MethodConfig) -> None:
        self.method = method
        self.users = load_loss(method)

    @property
    def leaves_rows_out(self) -> bool:
        """Whether a row may have no gradient though it has an advantage or is distilled."""
        return self.users is not None or self.method.selects_tokens

    @classmethod
    def of(cls, method: MethodConfig) -> "LossOfRows | None":
        """Return the loss of a method; None where kdrl_kernels.Objective has all of it."""
        return cls(method) if needs_token_loss(method) else None

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        goal: kk.Objective,
        head: dict[str, Any],
    ) -> kk.LossOutput:
        """Compute the loss of the tokens of a pack.

        Args:
            hidden, weight: [N, H] and [V, H], as the head's functions take them.
            goal: the method's objective, or a part of it; a loss of the user's own reads its kd
                alone, which says whether a token is distilled.
            head: the keywords of kdrl_loss and of linear_token_loss.
        """
        loss = method_loss(self.method, goal) if self.users is None else self.users
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        tokens = coefficients(batch, dtype)
        old = None if batch.old_logprobs is None else batch.old_logprobs.to(dtype)
        if loss.sequence is not None:
            log_ratio = _log_ratio(hidden, weight, batch, old, head)
            tokens = replace(tokens, sequence=loss.sequence(log_ratio, tokens).detach())

        def losses(rows: kk.Rows) -> Tensor:
            assert rows.index is not None
            return loss.losses(*joined(rows, tokens.take(rows.index), old))

        out = kk.linear_token_loss(
            hidden,
            weight,
            batch.tokens,
            losses,
            kl=goal.exact_kd,
            jsd_alpha=goal.jsd_alpha,
            **head,
        )
        measured = self._metrics(out, batch, tokens, old, loss, goal)
        return replace(out, metrics=out.metrics | measured)

    def _metrics(
        self,
        out: kk.LossOutput,
        batch: PackedBatch,
        tokens: TokenCoefficients,
        old: Tensor | None,
        loss: MethodLoss,
        goal: kk.Objective,
    ) -> dict[str, Tensor]:
        """Sum what kdrl_loss sums. Of the teacher, over all rows of kd_weight above 0; kd_selected
        counts those that the method distils of them."""
        used = batch.token_weights != 0
        rows = kk.Rows(
            logprobs=out.logprobs,
            teacher_logprobs=out.teacher_logprobs,
            kl=out.kl,
            forward_kl=out.forward_kl,
            entropy=out.entropy,
        )
        rows, tokens = joined(rows, tokens, old)
        metrics = row_metrics(goal, rows, used)
        if self.users is not None:
            return {k: v for k, v in metrics.items() if k not in ("kd_flipped", "clipped")}
        if rows.teacher_logprobs is not None and self.method.selects_tokens:
            taught = distilled_rows(self.method, rows)
            assert taught.kd_weight is not None
            metrics["kd_selected"] = (used & (taught.kd_weight > 0)).sum()
            flipped = row_metrics(goal, taught, used)
            metrics |= {k: v for k, v in flipped.items() if k == "kd_flipped"}
        if loss.clipped is not None:
            clipped = used & (tokens.advantages != 0) & loss.clipped(rows, tokens)
            metrics["clipped"] = clipped.sum()
        return metrics


def joined(
    rows: kk.Rows, tokens: TokenCoefficients, old: Tensor | None
) -> tuple[kk.Rows, TokenCoefficients]:
    """Give rows what kdrl_kernels.objective reads of their coefficients; old is [N]."""
    if old is not None and rows.index is not None:
        old = old[rows.index]
    rows = replace(rows, advantages=tokens.advantages, kd_weight=tokens.kd_weight, old_logprobs=old)
    return rows, tokens


def coefficients(batch: PackedBatch, dtype: torch.dtype) -> TokenCoefficients:
    """Collect what a loss may read of the [N] tokens of a pack, whose completions are whole."""
    place, counts = completions_of(batch.rollout)
    starts = counts.cumsum(0) - counts
    return TokenCoefficients(
        advantages=batch.advantages.to(dtype),
        kd_weight=batch.kd_weight.to(dtype),
        sampled_logprobs=batch.sampled_logprobs.to(dtype),
        completion=batch.rollout,
        positions=torch.arange(len(place), device=place.device) - starts.index_select(0, place),
        lengths=counts.index_select(0, place),
    )


@torch.no_grad()
def _log_ratio(
    hidden: Tensor,
    weight: Tensor,
    batch: PackedBatch,
    old: Tensor | None,
    head: dict[str, Any],
) -> Tensor:
    """Compute log p - log old of all [N] tokens, which is 0 where there is no old."""
    if old is None:
        return torch.zeros_like(
            batch.sampled_logprobs, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
    left_out = ("token_weights", "active_rows", "teacher", "teacher_logprobs", "sketch")
    plain = {k: v for k, v in head.items() if k not in left_out}
    plain |= {"backward": "exact", "entropy": False}
    out = kk.linear_token_loss(hidden, weight, batch.tokens, lambda rows: -rows.logprobs, **plain)
    return subtract(out.logprobs, old)
