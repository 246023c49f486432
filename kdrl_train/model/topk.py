"""Distils over the teacher's likeliest tokens: which they are, and what is measured beside."""

from dataclasses import replace

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.objective import subtract
from kdrl_train.batch import TopkScores
from kdrl_train.model.packing import PackedBatch


@torch.no_grad()
def likeliest(teacher: kk.TeacherHead, tokens: Tensor, count: int, columns: int) -> TopkScores:
    """Return the teacher's `count` likeliest of the first `columns` tokens, of which its
    probabilities are, and its score of `tokens` [N]."""
    columns = min(columns, len(teacher.weight))
    out = kk.linear_logprobs(
        teacher.hidden,
        teacher.weight[:columns],
        tokens,
        bias=None if teacher.bias is None else teacher.bias[:columns],
        temperature=teacher.temperature,
        softcap=teacher.softcap,
        topk=min(count, columns),
    )
    assert out.topk_tokens is not None
    assert out.topk_logprobs is not None
    return TopkScores(out.logprobs, out.topk_tokens, out.topk_logprobs)


def with_sampled(out: kk.LossOutput, sampled: Tensor, batch: PackedBatch) -> kk.LossOutput:
    """Add what a loss of sampled tokens measures of its teacher, whose scores are `sampled` [N]."""
    distilled = (batch.token_weights != 0) & (batch.kd_weight > 0)
    log_ratio = torch.where(distilled, subtract(out.logprobs.detach(), sampled), 0.0).double()
    sums = {
        "teacher_log_ratio_sum": log_ratio.sum(),
        "k2_sum": (log_ratio.square() / 2).sum(),
    }
    return replace(out, teacher_logprobs=sampled, metrics=out.metrics | sums)
