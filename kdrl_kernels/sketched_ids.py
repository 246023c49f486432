"""Makes exact entries of a sketched gradient at the K ids of each row, as at the sampled token.

Maths: rows/SKETCH.md.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_kernels.rows.entries import Entries
from kdrl_kernels.rows.ids import IdStats, normalizer_factor
from kdrl_kernels.rows.streams import Stats, TeacherStream
from kdrl_kernels.sparse_rows import row_sums
from kdrl_kernels.token_rows import Coefficients


def with_ids(entries: Entries, ids: IdStats, used: Tensor, value: Tensor, V: int) -> Entries:
    """Put one entry for each id of the used rows, with value [C, K] and chance 1, before entries.

    Those of the same columns that were kept by chance go.
    """
    row, k = (used[:, None] & (ids.columns >= 0)).nonzero(as_tuple=True)
    keys, inverse = (row * V + ids.columns[row, k]).unique(return_inverse=True)
    entries = entries.select(~torch.isin(entries.row * V + entries.column, keys))
    values, logps = (value.new_empty(len(keys)) for _ in range(2))
    values[inverse], logps[inverse] = value[row, k], ids.logprobs[row, k]  # equal for equal ids
    return Entries(
        torch.cat([keys // V, entries.row]),
        torch.cat([keys % V, entries.column]),
        torch.cat([torch.ones_like(values), entries.chance]),
        torch.cat([values, entries.value]),
        torch.cat([logps, entries.logp]),
    )


def places(entries: Entries, ids: IdStats, used: Tensor, V: int) -> Tensor:
    """Return which entry is that of each id, [C, K]; -1 where there is none."""
    keys, order = (entries.row * V + entries.column).sort()
    C, some = len(used), used[:, None] & (ids.columns >= 0)
    id_keys = torch.arange(C, device=keys.device)[:, None] * V + ids.columns
    place = torch.searchsorted(keys, torch.where(some, id_keys, 0))
    return torch.where(some, F.pad(order, (0, 1))[place], -1)


def add_at(values: Tensor, place: Tensor, amounts: Tensor) -> None:
    """Add amounts [N, K] to values[place], those of one place in their order; -1: to none."""
    some = (place.flatten() >= 0).nonzero().squeeze(1)
    place, order = place.flatten()[some].sort(stable=True)
    different, counts = place.unique_consecutive(return_counts=True)
    sums = row_sums(amounts.flatten()[some][order], F.pad(counts.cumsum(0), (1, 0)))
    values[different] += sums


def without_hits(stats: Stats, coef: Coefficients, teacher: TeacherStream | None) -> Tensor:
    """Return dL/dz at the ids, [C, K], but for the derivatives in their own log-probabilities."""
    assert stats.at_ids is not None
    return _gradient(stats.at_ids.logprobs, stats.at_ids.teacher_logprobs, stats, coef, teacher)


def at_tokens(stats: Stats, coef: Coefficients, teacher: TeacherStream | None) -> Tensor:
    """Return dL/dz at the sampled tokens, [C], of a loss that reads no ids."""
    lq = None if stats.teacher_logprobs is None else stats.teacher_logprobs[:, None]
    return _gradient(stats.logprobs[:, None], lq, stats, coef, teacher)[:, 0] + coef.logprobs


def _gradient(
    lp: Tensor, lq: Tensor | None, stats: Stats, coef: Coefficients, teacher: TeacherStream | None
) -> Tensor:
    """Return dL/dz where log p and log q are lp and lq [C, K], without a term of these columns."""
    p, factor = lp.exp(), normalizer_factor(coef)[:, None]
    dz = -factor * p
    if coef.entropy is not None:
        assert stats.entropy is not None
        surprise = coef.entropy[:, None] * p * (lp + stats.entropy[:, None])
        dz -= torch.where(p > 0, surprise, 0)
    if coef.kl is None:
        return dz
    assert teacher is not None
    assert lq is not None
    g = coef.kl[:, None]
    if teacher.kd == "fkl":
        return dz + g * (p - lq.exp())
    pull = _pull(lp - lq, stats, teacher)
    dz += torch.where((p > 0) & (g != 0), g * p * pull, 0)
    return dz if coef.forward_kl is None else dz + coef.forward_kl[:, None] * (p - lq.exp())


def _pull(log_ratio: Tensor, stats: Stats, teacher: TeacherStream) -> Tensor:
    """Return dD/dz / p of "rkl", "rkl+fkl" or "jsd"; log_ratio is log p - log q."""
    if teacher.kd != "jsd":
        assert stats.kl is not None
        return log_ratio - stats.kl[:, None]
    assert stats.mixture_kl is not None
    alpha = teacher.jsd_alpha
    share = torch.where(log_ratio < 0, 1 - alpha, alpha)
    to_mixture = log_ratio.clamp(max=0) - (share * torch.expm1(-log_ratio.abs())).log1p()
    return (1 - alpha) * (to_mixture - stats.mixture_kl[:, None])
